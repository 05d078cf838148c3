"""transformers' decoding methods in the decoding benchmark."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from benchmarks.decoding.measuring import Run
from benchmarks.decoding.settings import Setting


class Assistants:
    """The second models of two-model drafting: a given one, or copies of the first blocks."""

    def __init__(self, model: PreTrainedModel, given: PreTrainedModel | None = None):
        """Take a given assistant, if any; ValueError if it has another vocabulary."""
        if given is not None and given.config.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"assistant: its vocabulary has {given.config.vocab_size} tokens, the model's {model.config.vocab_size}"
            )
        self.model, self.given = model, given
        self.copies: dict[int, PreTrainedModel] = {}

    def of(self, exit_layer: int | None) -> PreTrainedModel:
        """Return a copy of the first `exit_layer` blocks; None: the given assistant."""
        if exit_layer is None:
            return self.given
        if exit_layer not in self.copies:
            self.copies[exit_layer] = first_blocks(self.model, exit_layer)
        return self.copies[exit_layer]


def first_blocks(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """A model of the first `count` blocks with weights of its own."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]
    small = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation="sdpa").eval()
    missing = small.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert not missing, missing
    return small.to(model.device)


class Transformers:
    """`hf_generate` and the rest of them: greedy, one prompt after the other."""

    def __init__(self, model: PreTrainedModel, assistants: Assistants, setting: Setting):
        self.model, self.setting = model, setting
        self.drafting = {}  # arguments of `generate`
        self.drafts_from: GenerationConfig | None = None  # where `generate` looks up how much to draft
        if setting.method == "hf_early_exit":
            self.drafting = {"assistant_early_exit": setting.exit_layer}
            self.drafts_from = model.generation_config
        elif setting.method == "hf_assistant":
            assistant = assistants.of(setting.exit_layer)
            self.drafting, self.drafts_from = {"assistant_model": assistant}, assistant.generation_config
        elif setting.method == "hf_prompt_lookup":
            self.drafting = {"prompt_lookup_num_tokens": setting.num_speculations}

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], max_new_tokens: int) -> Run:
        length = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens}
        texts = []
        with rows_of_last_block(self.model) as rows, drafting_as(self.drafts_from, self.setting):
            begin = time.perf_counter()
            for prompt in prompts:
                ids = torch.tensor([prompt], device=self.model.device)
                output = self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **length, **self.drafting
                )
                texts.append(output[0, len(prompt) :].tolist())
            seconds = time.perf_counter() - begin
        # A pass takes the last token, or the prompt, and what was drafted; it brings what it accepts and one more.
        drafted = sum(rows) - sum(map(len, prompts)) - (len(rows) - len(prompts))
        return Run(texts, seconds, len(rows), drafted, sum(map(len, texts)) - len(rows))


@contextmanager
def rows_of_last_block(model: PreTrainedModel) -> Iterator[list[int]]:
    """A list that grows by the number of rows of each pass of the whole model; an early exit's passes do not count."""
    rows: list[int] = []
    last = model.get_decoder().layers[-1]
    hook = last.register_forward_pre_hook(lambda module, arguments: rows.append(arguments[0].shape[1]))
    try:
        yield rows
    finally:
        hook.remove()


@contextmanager
def drafting_as(config: GenerationConfig | None, setting: Setting) -> Iterator[None]:
    """Put a draft's length and confidence where `generate` reads them: not its arguments, the assistant's config."""
    if config is None:
        yield
        return
    wanted = {
        "num_assistant_tokens": setting.num_speculations,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0 if setting.policy == "fixed" else 0.4,  # .4 is transformers' default
    }
    before = {name: getattr(config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
