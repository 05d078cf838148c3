"""Every bad setting or prompt is one sentence, before any work."""

import pytest
import torch

from lskip.inference import GenerationSettings, TextGenerator, load_generator

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
def test_bad_settings(tiny_model, settings, message):
    generator = TextGenerator(tiny_model("llama"))
    generator.step = None  # nothing may run before the check
    with pytest.raises(ValueError, match=message) as caught:
        generator.stream(PROMPT, **settings)
    assert "\n" not in str(caught.value)


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
    [({"dtype": "int3"}, "dtype: 'int3'"), ({"device": "abacus"}, "device: 'abacus'")],
)
def test_bad_arguments_of_load_generator(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_generator("no/such/model", **arguments)


def test_settings_are_unchangeable_values():
    settings = GenerationSettings()
    assert settings.changed(top_k=3) == GenerationSettings(top_k=3)
    assert settings.top_k is None
