"""Reading of a model's generation_config: default settings, logits processors, and the names that lskip ignores."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TypicalLogitsWarper,
)

from lskip.inference.settings import GenerationSettings
from lskip.utils.console import warn

# They change a text in transformers' `generate` and are ignored here. (The last line: in beam search alone.)
IGNORED = (
    *("max_length", "min_length", "max_time", "num_beams", "num_return_sequences", "penalty_alpha", "dola_layers"),
    *("guidance_scale", "sequence_bias", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "top_h"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "begin_suppress_tokens"),
    *("token_healing", "watermarking_config", "constraints", "force_words_ids", "remove_invalid_values"),
    *("length_penalty", "diversity_penalty", "num_beam_groups"),
)
OFF = {"length_penalty": 1.0, "encoder_repetition_penalty": 1.0, "guidance_scale": 1, "num_beams": 1, "max_length": 20}
OFF |= {"penalty_alpha": 0, "token_healing": False}


@dataclass
class ModelDefaults:
    """Defaults that a model brings, for what the caller does not name.

    Attributes:
        settings: the model's where lskip allows them, else lskip's own defaults.
        refused: name of a setting -> why the model's value is not allowed. A caller may name another.
        by_text: logits processors that depend on the text so far.
        warpers: logits processors of sampling, applied after those of the settings.
    """

    settings: GenerationSettings = field(default_factory=GenerationSettings)
    refused: dict[str, str] = field(default_factory=dict)
    by_text: tuple[LogitsProcessor, ...] = ()
    warpers: tuple[LogitsProcessor, ...] = ()

    def changed(self, **settings) -> GenerationSettings:
        """Return the settings with some changed.

        Raises:
            ValueError: an unknown name, a value that is not allowed, or one of `refused` that is not overridden.
        """
        for name, reason in self.refused.items():
            if name not in settings:
                raise ValueError(f"generation_config.{reason} (it comes with the model); name {name} to override it")
        most = settings.get("max_new_tokens")
        if isinstance(most, int) and most < self.settings.min_new_tokens:
            settings = {"min_new_tokens": max(most, 0), **settings}
        return self.settings.changed(**settings)


def read_defaults(
    config: GenerationConfig | None, eos_ids: Iterable[int], device: torch.device, vocab_size: int
) -> ModelDefaults:
    """Return the defaults of `config` (None: lskip's own), and warn of what lskip ignores in it.

    Raises:
        ValueError: a value that transformers' logits processor refuses, or a token id that the model does not have.
    """
    if config is None:
        return ModelDefaults()
    settings, refused = _settings(config)
    ends = list(eos_ids) or None

    def rules(*kinds) -> tuple[LogitsProcessor, ...]:
        return tuple(rule for name, matters, make in kinds if (rule := _rule(config, name, matters, make)) is not None)

    # With the conditions and in the order of transformers' `generate`.
    by_text = rules(
        ("no_repeat_ngram_size", lambda size: size > 0, NoRepeatNGramLogitsProcessor),
        ("bad_words_ids", lambda words: True, lambda words: _bad_words(words, ends, vocab_size)),
        ("suppress_tokens", lambda tokens: True, lambda tokens: SuppressTokensLogitsProcessor(tokens, device)),
    )
    warpers = rules(
        ("typical_p", lambda mass: mass < 1, TypicalLogitsWarper),
        ("epsilon_cutoff", lambda epsilon: 0 < epsilon < 1, EpsilonLogitsWarper),
        ("eta_cutoff", lambda eta: 0 < eta < 1, lambda eta: EtaLogitsWarper(eta, device=device)),
    )
    _warn_of_ignored(config)
    return ModelDefaults(settings, refused, by_text, warpers)


def _warn_of_ignored(config: GenerationConfig) -> None:
    usual = GenerationConfig._get_default_generation_params() | OFF
    set_here = {name: getattr(config, name, None) for name in IGNORED}
    # 0 may mean something: the token of that id, no seconds, no guidance.
    ignored = [f"{name}: {value!r}" for name, value in set_here.items() if value not in (None, [], usual.get(name))]
    if ignored:
        warn(f"generation_config: lskip does not go by {', '.join(ignored)}")


def _given(config: GenerationConfig, name: str, default: Any) -> Any:
    value = getattr(config, name, None)
    return default if value is None else value


def _rule(config: GenerationConfig, name: str, matters, make) -> LogitsProcessor | None:
    """Return a logits processor of transformers', which checks its argument; None where it does nothing."""
    if (value := getattr(config, name, None)) is None:
        return None
    try:
        return make(value) if matters(value) else None
    except (ValueError, TypeError) as error:
        raise ValueError(f"generation_config.{name}: {value!r} (it comes with the model) is not allowed") from error


def _bad_words(words: list[list[int]], ends: list[int] | None, vocab_size: int) -> LogitsProcessor:
    rule = NoBadWordsLogitsProcessor(words, ends)
    if any(token >= vocab_size for word in words for token in word):
        raise ValueError  # transformers would raise only while decoding
    return rule


def _settings(config: GenerationConfig) -> tuple[GenerationSettings, dict[str, str]]:
    """Return the settings of `config` that are allowed, and why the others are not."""
    stop_strings, sampled = _given(config, "stop_strings", ()), _given(config, "do_sample", False)
    asked = {
        "max_new_tokens": _given(config, "max_new_tokens", GenerationSettings.max_new_tokens),
        "min_new_tokens": _given(config, "min_new_tokens", 0),
        "temperature": _given(config, "temperature", 1.0) if sampled else 0.0,
        "top_k": _given(config, "top_k", None) if _given(config, "top_k", None) != 0 else None,  # 0 means all
        "top_p": _given(config, "top_p", 1.0),
        "min_p": _given(config, "min_p", 0.0),
        "repetition_penalty": _given(config, "repetition_penalty", 1.0),
        "stop_strings": (stop_strings,) if isinstance(stop_strings, str) else stop_strings,
    }
    settings, refused = GenerationSettings(), {}
    if not isinstance(sampled, bool):
        refused["temperature"] = f"do_sample: {sampled!r} is not true or false"
    for name, value in asked.items():
        if name == "min_new_tokens" and isinstance(value, int):
            value = min(value, settings.max_new_tokens)
        try:
            settings = replace(settings, **{name: value})
        except ValueError as error:
            refused.setdefault(name, str(error))
    return settings, refused
