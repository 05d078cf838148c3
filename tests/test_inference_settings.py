"""Every bad setting or prompt is one sentence, before any work."""

import pytest
import torch
from transformers import GenerationConfig

from lskip.inference import GenerationSettings, TextGenerator, load_generator
from lskip.inference.drafting import FixedDraft
from lskip.inference.settings import defaults_from

PROMPT = [7, 42, 99]

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
    ({"draft": "n-gram"}, "draft: 'n-gram' is not one of layers, weights, ngram"),
    ({"draft": 3}, "draft: 3"),
    ({"draft": "weights"}, "draft: 'weights' needs draft_weights"),
    ({"draft": "weights", "num_speculations": 3, "exit_layer": 2}, "draft: 'weights' needs draft_weights"),
    ({"draft": "layers", "num_speculations": 3}, "num_speculations: 3 needs an exit_layer from 1 to 3"),
    ({"draft_policy": "fast"}, "draft_policy: 'fast' is not a DraftPolicy"),
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
        GenerationSettings().changed(**settings).check_layers(4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_bad_settings_are_found_before_any_work(tiny_model, settings, message):
    generator = TextGenerator(tiny_model("llama"))
    generator.step = None  # nothing may run before the check
    with pytest.raises(ValueError, match=message):
        generator.stream(PROMPT, **settings)


@pytest.mark.parametrize(("prompt", "message"), BAD_PROMPTS)
def test_bad_prompts(tiny_model, prompt, message):
    generator = TextGenerator(tiny_model("llama"))
    generator.step = None
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
    GenerationSettings(num_speculations=3, **settings).check_layers(4, draft_weights)


@pytest.mark.parametrize("draft_weights", [False, True])
def test_layers_named_as_the_draft_need_an_exit_whatever_else_there_is(draft_weights):
    for policy in (None, AnyDraft()):
        settings = GenerationSettings(num_speculations=3, draft="layers", draft_policy=policy)
        with pytest.raises(ValueError, match="needs an exit_layer from 1 to 3"):
            settings.check_layers(4, draft_weights)


def test_defaults_come_from_the_generation_config():
    config = GenerationConfig(
        do_sample=True, temperature=0.5, top_k=7, top_p=0.9, min_p=0.1, repetition_penalty=1.3, stop_strings="end"
    )
    ours = defaults_from(config)
    assert (ours.temperature, ours.top_k, ours.top_p, ours.min_p) == (0.5, 7, 0.9, 0.1)
    assert (ours.repetition_penalty, ours.stop_strings) == (1.3, ("end",))
    assert defaults_from(GenerationConfig(stop_strings=["a", "b"])).stop_strings == ("a", "b")
    assert defaults_from(GenerationConfig()) == defaults_from(None) == GenerationSettings()
