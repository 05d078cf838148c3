"""Every bad setting or prompt is one sentence, before any work."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from lskip.inference import GenerationSettings, TextGenerator, load_generator
from lskip.inference.drafting.drafter import Available
from lskip.inference.drafting.policies import FixedDraft
from lskip.inference.model_defaults import read_defaults

PROMPT = [7, 42, 99]
ALMOST = SimpleNamespace(begin=print, plan=print, goes_on=print, learn=print)  # no policy: learnt, judge … are missing

BAD_SETTINGS = [
    ({"max_new_tokens": 0}, "max_new_tokens: 0"),
    ({"max_new_tokens": 2.5}, "max_new_tokens: 2.5"),
    ({"min_new_tokens": -1}, "min_new_tokens: -1"),
    ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens: 9"),
    ({"exit_layer": 0}, "exit_layer: 0"),
    ({"exit_layer": 5}, "exit_layer: 5 .* 1 to 4"),
    ({"exit_layer": "two"}, "exit_layer: 'two'"),
    ({"exit_layer": True}, "exit_layer: True"),
    ({"num_speculations": -1}, "num_speculations: -1"),
    ({"num_speculations": 1.0}, "num_speculations: 1.0"),
    ({"num_speculations": 3}, "num_speculations: 3 needs an exit_layer from 1 to 3"),
    ({"num_speculations": 3, "exit_layer": 4}, "num_speculations: 3 needs an exit_layer from 1 to 3"),
    ({"temperature": -0.1}, "temperature: -0.1"),
    ({"temperature": float("nan")}, "temperature: nan"),
    ({"temperature": "hot"}, "temperature: 'hot'"),
    ({"top_k": 0}, "top_k: 0"),
    ({"top_p": 0.0}, "top_p: 0.0"),
    ({"top_p": 1.1}, "top_p: 1.1"),
    ({"min_p": -0.1}, "min_p: -0.1"),
    ({"min_p": 1.5}, "min_p: 1.5"),
    ({"min_p": True}, "min_p: True"),
    ({"repetition_penalty": 0}, "repetition_penalty: 0 is"),
    ({"repetition_penalty": -1.2}, "repetition_penalty: -1.2"),
    ({"repetition_penalty": float("inf")}, "repetition_penalty: inf"),
    ({"stop_strings": "stop"}, "stop_strings: 'stop' is not a list"),
    ({"stop_strings": ["a", ""]}, r"stop_strings: \['a', ''\]"),
    ({"stop_strings": [7]}, r"stop_strings: \[7\]"),
    ({"stop_strings": None}, "stop_strings: None"),
    ({"acceptance": "always"}, "acceptance: 'always' is not one of shared_noise, rejection"),
    ({"acceptance": None}, "acceptance: None"),
    ({"draft": "n-gram"}, "draft: 'n-gram' is not one of auto, adapter, weights, layers, ngram"),
    ({"draft": 3}, "draft: 3"),
    ({"draft": "weights"}, "draft: 'weights' needs draft_weights"),
    ({"draft": "weights", "num_speculations": 3, "exit_layer": 2}, "draft: 'weights' needs draft_weights"),
    ({"draft": "layers", "num_speculations": 3}, "num_speculations: 3 needs an exit_layer from 1 to 3"),
    ({"draft_policy": "fast"}, "draft_policy: 'fast' is not a DraftPolicy"),
    ({"draft_policy": ALMOST}, "draft_policy: .* is not a DraftPolicy"),
    ({"draft_policy": FixedDraft}, "draft_policy: <class .* is not a DraftPolicy"),
    ({"draft_policy": FixedDraft(), "num_speculations": 3}, "num_speculations: 3 needs an exit_layer from 1 to 3"),
    ({"seed": -1}, "seed: -1"),
    ({"seed": 2**64}, "seed"),
    ({"chat": "yes"}, "chat: 'yes'"),
    ({"max_tokens": 5}, "max_tokens: no such generation setting"),
]
BAD_PROMPTS = [
    ([], "prompt: is empty"),
    ("hello", "prompt: a text needs a tokenizer"),
    ([300], "prompt: token ids must lie between 0 and 299"),
    ([-1], "prompt: token ids"),
    (list(range(128)), "prompt: 128 tokens leave no room"),
    ([{"role": "user", "content": "hi"}], "prompt: chat messages need"),
    ([1, "a"], "prompt: is neither"),
    (torch.zeros(2, 3, dtype=torch.long), "prompt: is neither"),
    (None, "prompt: is neither"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        GenerationSettings().changed(**settings).check_model(Available(4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_bad_settings_are_found_before_any_work(tiny_model, settings, message):
    generator = TextGenerator(tiny_model("llama"))
    generator.runner = SimpleNamespace(num_layers=4)  # nothing may run before the check
    with pytest.raises(ValueError, match=message):
        generator.stream(PROMPT, **settings)


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_bad_prompts(tiny_model, prompt, message):
    generator = TextGenerator(tiny_model("llama"))
    generator.runner = SimpleNamespace(num_layers=4)
    with pytest.raises(ValueError, match=message):
        generator.stream(prompt)


def test_empty_text_and_broken_messages(tiny_model, tiny_tokenizer):
    generator = TextGenerator(tiny_model("llama"), tiny_tokenizer)
    with pytest.raises(ValueError, match="prompt: is empty"):
        generator.generate("")
    with pytest.raises(ValueError, match="chat messages need"):
        generator.generate("hi", chat=True)
    tiny_tokenizer.chat_template = "{{ messages[0].content }}"
    try:
        with pytest.raises(ValueError, match="'role' and 'content'"):
            generator.generate([{"text": "hi"}])
    finally:
        tiny_tokenizer.chat_template = None


def test_a_stream_of_text_needs_a_tokenizer(tiny_model):
    with pytest.raises(ValueError, match="tokenizer"):
        next(iter(TextGenerator(tiny_model("llama")).stream(PROMPT)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int3"}, "dtype: 'int3'"),
        ({"device": "abacus"}, "device: 'abacus'"),
        ({"batch_size": 0}, "batch_size: 0"),
    ],
)
def test_bad_arguments_of_load_generator(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_generator("no/such/model", **arguments)


def test_settings_are_unchangeable_values():
    settings = GenerationSettings()
    assert settings.changed(top_k=3) == GenerationSettings(top_k=3)
    assert settings.top_k is None
    assert settings.changed(stop_strings=["a"]).stop_strings == ("a",)


class AnyDraft(FixedDraft):
    chooses_draft = True


@pytest.mark.parametrize(
    ("settings", "draft_weights"),
    [
        ({"exit_layer": 3}, False),
        ({}, True),
        ({"exit_layer": 4}, True),
        ({"draft": "weights"}, True),
        ({"draft": "ngram"}, False),
        ({"draft": "ngram", "exit_layer": 4}, False),
        ({"draft": "layers", "exit_layer": 2}, True),
        ({"draft_policy": FixedDraft(), "draft": "ngram"}, False),
        ({"draft_policy": AnyDraft()}, False),
        ({"draft_policy": AnyDraft(), "exit_layer": 2}, False),
    ],
)
def test_what_can_draft(settings, draft_weights):
    GenerationSettings(num_speculations=3, **settings).check_model(Available(4, draft_weights))


@pytest.mark.parametrize("draft_weights", [False, True])
def test_layers_named_as_the_draft_need_an_exit_whatever_else_there_is(draft_weights):
    for policy in (None, AnyDraft()):
        settings = GenerationSettings(num_speculations=3, draft="layers", draft_policy=policy)
        with pytest.raises(ValueError, match="needs an exit_layer from 1 to 3"):
            settings.check_model(Available(4, draft_weights))


def test_defaults_come_from_the_generation_config():
    config = GenerationConfig(
        do_sample=True, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, repetition_penalty=1.3, stop_strings="end"
    )
    ours = read_defaults(config, [], "cpu", 300).settings
    assert (ours.temperature, ours.top_k, ours.top_p, ours.min_p) == (0.5, 7, 0.9, 0.1)
    assert (ours.repetition_penalty, ours.stop_strings) == (1.3, ("end",))
    assert read_defaults(GenerationConfig(stop_strings=["a", "b"]), [], "cpu", 300).settings.stop_strings == ("a", "b")
    for nothing in (GenerationConfig(), None):
        assert read_defaults(nothing, [], "cpu", 300).settings == GenerationSettings()


IGNORED = "K11 generation_config.json"
CONFIGS = [
    pytest.param({"no_repeat_ngram_size": 2}, id="F37 no_repeat_ngram_size"),
    pytest.param({"bad_words_ids": [[5], [35], [0, 190]]}, id="bad_words_ids"),
    pytest.param({"suppress_tokens": [190, 128, 7]}, id="suppress_tokens"),
    pytest.param(
        {"no_repeat_ngram_size": 3, "repetition_penalty": 1.3, "suppress_tokens": [190]}, id="several, with a penalty"
    ),
]


@pytest.mark.kind(IGNORED)
@pytest.mark.parametrize("drafts", [{}, {"exit_layer": 2, "num_speculations": 3}], ids=["plain", "drafted"])
@pytest.mark.parametrize("says", CONFIGS)
def test_rules_of_a_generation_config_make_the_text_of_generate(tiny_model, says, drafts):
    model = tiny_model("llama", eos_token_id=None)
    ids = torch.tensor([[5, 6, 7, 5, 6]])
    plain = model.generate(ids, max_new_tokens=30, pad_token_id=0, do_sample=False)[0, 5:].tolist()
    model.generation_config.update(**says)
    expected = model.generate(ids, max_new_tokens=30, pad_token_id=0, do_sample=False)[0, 5:].tolist()
    assert expected != plain
    generator = TextGenerator(model)
    assert generator.generate(ids, max_new_tokens=30, **drafts).token_ids == expected
    both = generator.generate_batch([ids, ids[:, :3]], max_new_tokens=30, **drafts)
    assert dict(both)[0].token_ids == expected


@pytest.mark.kind(IGNORED)
@pytest.mark.parametrize("says", [{"typical_p": 0.3}, {"epsilon_cutoff": 0.05}, {"eta_cutoff": 0.3}, {"typical_p": 2}])
def test_rules_of_sampling_leave_the_tokens_that_transformers_leaves(tiny_model, says):
    config = GenerationConfig(do_sample=True, temperature=0.9, top_k=40, top_p=0.95, **says)
    model = tiny_model("llama")
    model.generation_config = config
    logits = torch.randn(1, 300)
    theirs = model._get_logits_processor(config, 3)(torch.tensor([PROMPT]), logits.clone())
    generator = TextGenerator(model)
    ours = generator.prepare(PROMPT, generator.settings()).chooser.scores(logits, torch.empty(0, dtype=torch.long))
    assert torch.equal(ours, theirs) and ours.isinf().any()


@pytest.mark.kind(IGNORED)
@pytest.mark.parametrize(
    ("says", "words"),
    [
        pytest.param({"num_beams": 4, "length_penalty": 2.0}, ["num_beams: 4", "length_penalty: 2.0"], id="beams"),
        pytest.param({"guidance_scale": 1.5}, ["guidance_scale: 1.5"], id="guidance"),
        pytest.param({"sequence_bias": [[[5], 2.0]]}, ["sequence_bias"], id="bias"),
        pytest.param({"forced_eos_token_id": 3, "penalty_alpha": 0.6}, ["forced_eos", "penalty_alpha"], id="forced"),
        pytest.param({"encoder_repetition_penalty": 1.2, "max_length": 50}, ["encoder_rep", "max_length"], id="length"),
        pytest.param(
            {"forced_eos_token_id": 0, "max_time": 0.0}, ["token_id: 0", "max_time: 0.0"], id="a 0 that counts"
        ),
        pytest.param({"guidance_scale": 0.0}, ["guidance_scale: 0.0"], id="no guidance"),
        pytest.param({"penalty_alpha": 0.0, "begin_suppress_tokens": []}, [], id="a 0 that is nothing"),
        pytest.param({"num_beams": 1, "use_cache": False, "renormalize_logits": True, "max_length": 20}, [], id="none"),
        pytest.param({}, [], id="an empty one"),
    ],
)
def test_what_lskip_does_not_go_by_is_named(tiny_model, capsys, says, words):
    model = tiny_model("llama")
    for name, value in says.items():
        setattr(model.generation_config, name, value)
    TextGenerator(model)
    said = capsys.readouterr().err
    assert all(word in said for word in words) and said.count("warning:") == bool(words)


REFUSED = "K11 generation_config.json"


@pytest.mark.kind(REFUSED)
@pytest.mark.parametrize(
    ("says", "sentence", "override"),
    [
        pytest.param({"top_k": -1}, r"generation_config\.top_k: -1 is not .* name top_k", {"top_k": 5}, id="F39"),
        pytest.param({"temperature": "hot"}, r"generation_config\.temperature: 'hot'", {"temperature": 0.5}, id="B41"),
        pytest.param({"top_p": 1.5}, r"generation_config\.top_p: 1.5", {"top_p": 0.9}, id="top_p"),
        pytest.param({"min_p": -0.5}, r"generation_config\.min_p: -0.5", {"min_p": 0.0}, id="min_p"),
        pytest.param(
            {"max_new_tokens": 0}, r"generation_config\.max_new_tokens: 0", {"max_new_tokens": 3}, id="length"
        ),
        pytest.param({"stop_strings": [""]}, r"generation_config\.stop_strings", {"stop_strings": ["a"]}, id="stop"),
        pytest.param({"do_sample": "no"}, r"generation_config\.do_sample: 'no'", {"temperature": 0.0}, id="do_sample"),
    ],
)
def test_a_setting_of_the_model_that_is_not_allowed_is_named_and_can_be_overridden(
    tiny_model, tiny_tokenizer, says, sentence, override
):
    model = tiny_model("llama")
    for name, value in {"do_sample": True, **says}.items():
        setattr(model.generation_config, name, value)
    generator = TextGenerator(model, tiny_tokenizer)
    with pytest.raises(ValueError, match=sentence):
        generator.generate(PROMPT)
    assert generator.generate(PROMPT, **{"max_new_tokens": 3, **override}).token_ids


@pytest.mark.kind(REFUSED)
@pytest.mark.parametrize(
    "says",
    [
        *({"no_repeat_ngram_size": -2}, {"no_repeat_ngram_size": "two"}),
        *({"bad_words_ids": [5]}, {"bad_words_ids": [[5, 300]]}, {"bad_words_ids": [["a"]]}),
    ],
)
def test_a_rule_of_the_model_that_is_none(tiny_model, says):
    model = tiny_model("llama")
    for name, value in says.items():
        setattr(model.generation_config, name, value)
    if says == {"no_repeat_ngram_size": -2}:  # as in transformers: off
        assert TextGenerator(model).generate(PROMPT, max_new_tokens=2).token_ids
        return
    with pytest.raises(ValueError, match=rf"generation_config\.{next(iter(says))}: "):
        TextGenerator(model)


def test_a_shorter_text_than_the_models_least_is_no_contradiction(tiny_model):
    model = tiny_model("llama")
    model.generation_config.min_new_tokens = 5
    assert len(TextGenerator(model).generate(PROMPT, max_new_tokens=2).token_ids) == 2


@pytest.mark.kind("K10 mistakes of the user that arrive as other exceptions")
@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        pytest.param([0, 300], (0,), id="F34 beyond the vocabulary"),
        pytest.param([0, -1], (0,), id="F34 negative"),
        pytest.param(10**9, (), id="B40 one alone"),
        pytest.param([10**6, -4], (), id="B40 all"),
        pytest.param([299, 7], (299, 7), id="good ones"),
    ],
)
def test_end_tokens_beyond_the_vocabulary_end_and_ban_nothing(tiny_model, ends, expected):
    model = tiny_model("llama")
    model.generation_config.eos_token_id = ends
    generator = TextGenerator(model)
    assert generator.eos_ids == expected
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, -1]
    logits[list(expected)] = float("-inf")
    first = generator.generate(PROMPT, max_new_tokens=4, min_new_tokens=4).token_ids[0]
    assert first == int(logits.argmax())
