"""Settings for `generate` from a generation_config, whose values have their types checked."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import GenerationConfig

from lskip.utils.checks import is_real
from lskip.utils.foreign import first_line

_WHOLE = (
    *("max_new_tokens", "min_new_tokens", "max_length", "min_length", "top_k", "num_beams", "num_return_sequences"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "num_assistant_tokens", "assistant_early_exit"),
)
_NUMBERS = (
    *("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty"),
    *("encoder_repetition_penalty", "length_penalty", "diversity_penalty", "guidance_scale", "penalty_alpha"),
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id")


def check_kinds(values: Mapping[str, Any], where: str) -> None:
    """Raise ValueError, its message beginning with `where` and the field, for a value of the wrong type; null passes.

    A number of the right type that lskip cannot use (a top_k of -1, which elsewhere means all) is refused where it is
    used, since the user may set another.
    """
    for names, allowed, holds in _KINDS:
        for name in names:
            value = values.get(name)
            if value is not None and not holds(value):
                raise ValueError(f"{where}: {name}: {value!r:.60} is not {allowed}")


def _is_whole(value: Any) -> bool:
    return is_real(value) and value == int(value)


def _are_tokens(value: Any) -> bool:
    return all(map(_is_whole, value)) if isinstance(value, list) else _is_whole(value)


def _are_texts(value: Any) -> bool:
    return all(isinstance(text, str) and text for text in (value if isinstance(value, list) else [value]))


_KINDS: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (_WHOLE, "a whole number", _is_whole),
    (_NUMBERS, "a number", is_real),
    (_TOKENS, "a token, or a list of tokens", _are_tokens),
    (("stop_strings",), "a text, or a list of texts, none of them empty", _are_texts),
    (("do_sample",), "true or false", lambda value: isinstance(value, bool)),
)


def generation_config_of(values: object, where: str) -> GenerationConfig:
    """Return the settings for `generate`; raise ValueError, its message beginning with `where`, if they are invalid."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is not a mapping")
    check_kinds(values, where)
    try:
        return GenerationConfig.from_dict(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is not valid ({first_line(error)})") from error
