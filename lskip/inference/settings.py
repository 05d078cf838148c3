"""What a caller may choose for one generation, and the checks that come before any work."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from numbers import Real

from transformers import GenerationConfig


@dataclass(frozen=True)
class GenerationSettings:
    """How to continue a prompt. Where the checkpoint's generation_config says otherwise, it sets the default.

    Attributes:
        max_new_tokens: tokens to generate at most; cut to what the context leaves.
        min_new_tokens: an end-of-text token is not chosen before this many, as in transformers.
        exit_layer: blocks that run before a token is read off (1 … L). None: all of them.
        num_speculations: tokens drafted before the whole model verifies them: at `exit_layer`, or where the
            generator has draft_weights by all layers in those. 0 with an `exit_layer` below L generates from that
            layer alone.
        temperature: 0.0 takes the likeliest token, 1.0 samples from the model's distribution.
        top_k: sample among the k likeliest only; None: all.
        top_p: sample among the likeliest that together reach this probability, in (0, 1].
        seed: fixes the sampled text (with or without speculation); None: another text each time.
        chat: whether a text prompt goes through the tokenizer's chat template; None: when it has one.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = 0
    exit_layer: int | None = None
    num_speculations: int = 0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    chat: bool | None = None

    def __post_init__(self):
        check_whole("max_new_tokens", self.max_new_tokens, 1)
        check_whole("min_new_tokens", self.min_new_tokens, 0)
        check_whole("num_speculations", self.num_speculations, 0)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: {self.min_new_tokens} is more than max_new_tokens, {self.max_new_tokens}"
            )
        if self.exit_layer is not None:
            check_whole("exit_layer", self.exit_layer, 1)
        if self.top_k is not None:
            check_whole("top_k", self.top_k, 1)
        if self.seed is not None:
            check_whole("seed", self.seed, 0)
            if self.seed >= 2**64:
                raise ValueError(f"seed: {self.seed} is not below 2**64")
        check_real("temperature", self.temperature, "0 or more", lambda value: value >= 0)
        check_real("top_p", self.top_p, "above 0 and at most 1", lambda value: 0 < value <= 1)
        if self.chat not in (None, True, False):
            raise ValueError(f"chat: {self.chat!r} is not true, false or null")

    def check_layers(self, num_layers: int, draft_weights: bool = False) -> None:
        """Checks `exit_layer` and `num_speculations` against a model of `num_layers`, with draft weights or without.

        Raises:
            ValueError: exit_layer beyond the model, or speculation without an exit below the last layer.
        """
        if self.exit_layer is not None and self.exit_layer > num_layers:
            raise ValueError(
                f"exit_layer: {self.exit_layer} is not a whole number from 1 to {num_layers}, the model's layers"
            )
        if self.num_speculations and not draft_weights and self.exit_layer in (None, num_layers):
            raise ValueError(
                f"num_speculations: {self.num_speculations} needs an exit_layer from 1 to {num_layers - 1} to draft"
                f" with (it is {self.exit_layer}), or draft_weights"
            )

    def changed(self, **settings) -> GenerationSettings:
        """A copy with some settings changed.

        Raises:
            ValueError: an unknown name, or a value that is not allowed.
        """
        known = [field.name for field in fields(self)]
        for name in settings:
            if name not in known:
                raise ValueError(f"{name}: no such generation setting; there are {', '.join(known)}")
        return replace(self, **settings)


def defaults_from(config: GenerationConfig | None) -> GenerationSettings:
    """The settings that a checkpoint's generation_config asks for; what it leaves open keeps lskip's default."""
    if config is None:
        return GenerationSettings()

    def given(name: str, default):
        value = getattr(config, name, None)
        return default if value is None else value

    sampled = bool(config.do_sample)
    max_new_tokens = given("max_new_tokens", GenerationSettings.max_new_tokens)
    return GenerationSettings(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min(given("min_new_tokens", 0), max_new_tokens),
        temperature=float(given("temperature", 1.0)) if sampled else 0.0,
        top_k=given("top_k", None) or None,  # transformers writes 0 for "all"
        top_p=float(given("top_p", 1.0)),
    )


def check_whole(name: str, value, lowest: int) -> None:
    """ValueError unless `value` is a whole number from `lowest` up."""
    if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
        raise ValueError(f"{name}: {value!r} is not a whole number from {lowest} up")


def check_real(name: str, value, allowed: str, holds) -> None:
    """ValueError unless `value` is a finite number for which `holds`."""
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not holds(value):
        raise ValueError(f"{name}: {value!r} is not a number {allowed}")
