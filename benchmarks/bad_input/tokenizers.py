"""Bad tokenizers: wrong settings, templates that do not end, grow or name code, broken vocabularies and rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from benchmarks.bad_input.models import SAME, Make, edit, flip, on_model
from benchmarks.bad_input.verdict import Case, done, either, refused


def cases(random: Random) -> Iterator[Case]:
    def settings(**more) -> Make:
        return lambda m: edit(m / "tokenizer_config.json", lambda fields: {**fields, **more})

    def vocabulary(change: Callable[[dict], object]) -> Make:
        return lambda m: edit(m / "tokenizer.json", lambda fields: (change(fields) and fields) or fields)

    broken = refused("model|tokenizer")
    told = either(SAME, refused("model|tokenizer|prompt"))
    evil = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    yield on_model("generate", "tokenizer", "code of its own", told, settings(**evil))
    for name, values in {
        "tokenizer_class": ["Nope", 5, None, "os.system"],
        "model_max_length": [-1, "x", 10**30, 2],
        "chat_template": TEMPLATES,
        "eos_token": [5, {"content": 5}, ["a"]],
        "added_tokens_decoder": [{"x": {"content": "a"}}, 5, {"10000000": {"content": "<a>", "special": True}}],
        "extra_special_tokens": [5, {"a": 5}],
        "clean_up_tokenization_spaces": ["x"],
        "add_bos_token": ["x", True],
        "add_prefix_space": [True],
    }.items():
        for value in values:
            right = either(done(), broken, refused("prompt|template"))
            yield on_model("generate", "tokenizer", f"{name}: {str(value)[:50]!r}", right, settings(**{name: value}))
    kinds = {
        "no vocabulary": lambda fields: fields["model"].update(vocab={}, merges=[]),
        "ids beyond the model": lambda fields: fields["model"]["vocab"].update({"a": 10**6}),
        "ids that are negative": lambda fields: fields["model"]["vocab"].update({"a": -1}),
        "ids that are texts": lambda fields: fields["model"]["vocab"].update({"a": "1"}),
        "merges of nothing": lambda fields: fields["model"].update(merges=[["zz", "yy"]]),
        "another model": lambda fields: fields["model"].update(type="Nope"),
        "a regex without end": lambda fields: fields.update(pre_tokenizer=split_at("(x+x+)+y")),
        "a regex that is none": lambda fields: fields.update(pre_tokenizer=split_at("((")),
        # To some thousand characters. One that fills the memory does so: lskip says that it trusts these files.
        "a normalizer that grows": lambda fields: fields.update(normalizer=growing(4)),
        "no decoder": lambda fields: fields.update(decoder=None),
        "an added token of id 10**9": lambda fields: fields["added_tokens"].append(
            {**fields["added_tokens"][0], "id": 10**9, "content": "<a>"}
        ),
        "two added tokens of one id": lambda fields: fields["added_tokens"].append(
            {**fields["added_tokens"][0], "content": "<a>"}
        ),
        "a decoder of escapes": lambda fields: fields.update(
            decoder={"type": "Replace", "pattern": {"String": "a"}, "content": "\x1b[2J"}
        ),
    }
    for what, change in kinds.items():
        right = either(done(), refused("model|tokenizer|prompt"))
        yield on_model("generate", "tokenizer", what, right, vocabulary(change))
    for number in range(8):
        seed = random.random()
        right = either(done(), refused("model|tokenizer|prompt"))
        yield on_model(
            "generate", "tokenizer", f"flipped {number}", right, lambda m, s=seed: flip(m / "tokenizer.json", s)
        )


TEMPLATES = [
    *(
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 'a' * 10**8 }}",
        "{% include 'x' %}",
        "{{ nope.x.y }}",
        "{% if %}",
    ),
    *(
        "{{ raise_exception('no\x1b[2J') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "",
        5,
        ["a"],
        "{{ 1/0 }}",
    ),
    *(
        "{{ messages[5] }}",
        "{{ strftime_now(5) }}",
        "{{ ('a'*10**6)|wordwrap(1) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ),
    *({"a": "b"}, [{"name": "default", "template": "{{ messages[0].content }}"}], "{{ messages|tojson|upper|list }}"),
    *("{% set ns = namespace(a='x') %}{% for i in range(27) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}", "x" * 10**6),
]


def split_at(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def growing(times: int) -> dict:
    double = {"type": "Replace", "pattern": {"String": "f"}, "content": "ffffffff"}
    return {"type": "Sequence", "normalizers": [double] * times}
