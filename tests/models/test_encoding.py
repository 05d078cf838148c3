"""Users' texts through tokenizers and templates of unknown origin: tokens, or a one-sentence error."""

import time
from copy import deepcopy

import pytest
from tokenizers import Regex, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from lskip.inference import TextGenerator
from lskip.inference.text import encode_prompt
from lskip.models import encoding
from lskip.models.encoding import open_ended, render_chat
from tests.tokenizer_kinds import KINDS, tokenizer_of

MESSAGES = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
REFUSED = "K10 mistakes of the user that arrive as other exceptions"


def with_template(tokenizer, template):
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.kind(REFUSED)
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        pytest.param("{{ raise_exception('System role not supported') }}", "System role", id="F29 raise_exception"),
        pytest.param("{% if messages|length > 1 %}{{ raise_exception('two') }}{% endif %}", "two", id="B9 two turns"),
        pytest.param("{% if %}", "Expected", id="B9 syntax"),
        pytest.param("{{ nope.x }}", "'nope' is undefined", id="B9 undefined"),
        pytest.param("{{ ''.__class__.__mro__ }}", "unsafe", id="B9 sandbox"),
        pytest.param("{% for i in range(10**9) %}{% endfor %}", "Range too big", id="B9 range"),
        pytest.param("{{ 1 / 0 }}", "division by zero", id="division"),
        pytest.param("{{ 'a' + 1 }}", "concatenate", id="types"),
        pytest.param("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion", id="recursion"),
        pytest.param("{{ 'a' * 10**15 }}", "MemoryError", id="memory"),
        pytest.param("{{ messages|nosuch }}", "nosuch", id="filter"),
        pytest.param("{% include 'x' %}", "loader", id="include"),
    ],
)
def test_a_template_that_refuses_is_a_sentence(tiny_tokenizer, template, reason):
    with pytest.raises(ValueError, match=rf"^the chat template refuses this prompt \(.*{reason}"):
        render_chat(with_template(tiny_tokenizer, template), MESSAGES, True)


@pytest.mark.kind(REFUSED)
@pytest.mark.parametrize(
    "template",
    [
        pytest.param(
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", id="B38 nested loops"
        ),
        pytest.param("{{ ('a' * 10**6)|wordwrap(1) }}", id="B38 wordwrap"),
        pytest.param("{{ messages[0].content|center(10**6)|wordwrap(1) }}", id="not computed in advance"),
        pytest.param("{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}", id="output"),
    ],
)
def test_a_template_that_does_not_end_is_ended(tiny_tokenizer, monkeypatch, template):
    monkeypatch.setattr(encoding, "TEMPLATE_SECONDS", 0.3)
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"^the chat template refuses this prompt \(it does not end within"):
        render_chat(with_template(tiny_tokenizer, template), MESSAGES, True)
    assert time.perf_counter() - began < 5


def test_a_fault_of_lskips_own_is_not_the_templates(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "check_unicode", lambda *_: {}["planted"])
    with pytest.raises(KeyError, match="planted"):
        encode_prompt("x", tiny_tokenizer, None, 300)


@pytest.mark.kind("K10 mistakes of the user that arrive as other exceptions")
@pytest.mark.parametrize("prompt", [pytest.param("b \ud83d", id="F32"), "\udce9t\u00e9", "\udfff\ud800"])
def test_half_a_character_is_refused(tiny_tokenizer, prompt):
    chatty = with_template(tiny_tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}")
    for tokenizer in (tiny_tokenizer, chatty):
        with pytest.raises(ValueError, match=r"^prompt: holds '.*', half a character"):
            encode_prompt(prompt, tokenizer, None, 300)


@pytest.mark.kind("K10 mistakes of the user that arrive as other exceptions", "B38")
def test_a_tokenizer_that_panics_is_a_sentence(tiny_tokenizer):
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with pytest.raises(ValueError, match=r"^tokenizer: fails on this text"):
        encode_prompt("a" * 30 + "b", tokenizer, None, 300)


ENDS = "K15 special tokens around and inside text"


def ending(kind: str, single: str):
    tokenizer = tokenizer_of(kind)
    names = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<unk>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=names)
    return tokenizer


@pytest.mark.kind(ENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("single", "before"),
    [
        pytest.param("$A </s>", [], id="F56"),
        pytest.param("<unk> $A </s>", [0], id="something before"),
        pytest.param("<unk> $A </s> </s>", [0], id="two ends"),
        pytest.param("</s> $A", [1], id="an end before"),
        pytest.param("$A", [], id="nothing"),
    ],
)
def test_a_prompt_stays_open(kind, single, before):
    tokenizer = ending(kind, single)
    plain = tokenizer("a b", add_special_tokens=False)["input_ids"]
    assert encode_prompt("a b", tokenizer, None, 1000) == before + plain
    spelled = tokenizer("a b</s>", add_special_tokens=False)["input_ids"]
    assert spelled[-1] == 1  # what the user writes on purpose stays
    assert open_ended(tokenizer, ["a b</s>", "a b"]) == [before + spelled, before + plain]


LONG = "B21 one long line"


@pytest.mark.kind(LONG)
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    "text", [pytest.param("ab " * 1_700_000, id="B21 5 MB"), "é" * 100_000, " " * 10**6, "x" * (128 * 13 + 1)]
)
def test_what_cannot_have_room_is_not_tokenized(tiny_model, tiny_tokenizer, monkeypatch, text, chat):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}" if chat else None
    generator = TextGenerator(tiny_model("llama"), with_template(tiny_tokenizer, template))
    generator.generate("x", max_new_tokens=1)
    seen = []
    encode_batch = type(generator.tokenizer)._encode_plus
    monkeypatch.setattr(
        type(generator.tokenizer),
        "_encode_plus",
        lambda self, text, *a, **k: seen.append(text) or encode_batch(self, text, *a, **k),
    )
    with pytest.raises(ValueError, match=rf"^prompt: {len(text)} characters leave no room"):
        generator.generate(text)
    assert not seen
    assert generator.generate("x", max_new_tokens=1).token_ids and seen


@pytest.mark.kind(LONG)
def test_the_longest_prompt_that_has_room_is_answered(tiny_model, tiny_tokenizer):
    generator = TextGenerator(tiny_model("llama"), tiny_tokenizer)
    prompt = "<|endoftext|>" * 127  # of the longest tokens
    assert len(generator.generate(prompt).token_ids) == 1
