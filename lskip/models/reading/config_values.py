"""Checks of the values in a model's config, under the field names of every family."""

import difflib
import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from lskip.utils.checks import check_real, check_whole

_SIZES = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "vocab_size", "max_position_embeddings", "sliding_window"),
    *("n_embd", "n_layer", "n_head", "n_positions", "n_inner", "ffn_dim", "word_embed_proj_dim"),
    *("original_max_position_embeddings", "pretraining_tp"),
}
_LARGEST = 2**40  # the product of two still fits int64
MAX_LAYERS = 4096  # transformers makes a list of them
_LAYERS = ("num_hidden_layers", "n_layer")
_SHARES = {
    *("attention_dropout", "hidden_dropout", "dropout", "activation_dropout", "layerdrop"),
    *("attn_pdrop", "resid_pdrop", "embd_pdrop", "classifier_dropout", "summary_first_dropout"),
}
_ABOVE_0 = {
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "rope_theta", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
}
_FROM_0 = {"initializer_range", "init_std"}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ACTIVATIONS = {"hidden_act", "hidden_activation", "activation_function"}
_ROPE = ("rope_parameters", "rope_scaling")


def check_values(values: Mapping[str, Any], prefix: str, strict: bool) -> None:
    """Raise ValueError if a field of a config has a value that no model can have; null passes.

    Args:
        prefix: precedes the field's name in the message.
        strict: also refuse tokens outside the vocabulary.
    """
    for name, value in values.items():
        if value is None:
            continue
        if name in _SIZES:
            check_whole(f"{prefix}{name}", value, 1, MAX_LAYERS if name in _LAYERS else _LARGEST)
        elif name in _SHARES:
            check_real(f"{prefix}{name}", value, "from 0 up and below 1", lambda share: 0 <= share < 1)
        elif name in _ABOVE_0:
            check_real(f"{prefix}{name}", value, "above 0", lambda number: number > 0)
        elif name in _FROM_0:
            check_real(f"{prefix}{name}", value, "from 0 up", lambda number: number >= 0)
        elif name in _ACTIVATIONS:
            _check_activation(f"{prefix}{name}", value)
        elif name in _TOKENS:
            _check_tokens(f"{prefix}{name}", value, values.get("vocab_size"), strict)
        elif name in _ROPE:
            _check_rope(f"{prefix}{name}", value)


def _check_activation(name: str, value: Any) -> None:
    from transformers.activations import ACT2FN

    if value not in list(ACT2FN):
        close = difflib.get_close_matches(str(value), list(ACT2FN), 1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(ACT2FN)}"
        raise ValueError(f"{name}: {value!r} is no activation of transformers{hint}")


def _check_tokens(name: str, value: Any, vocab_size: Any, strict: bool) -> None:
    """Raise ValueError for what is no token.

    Unless `strict`, -1 (none) and tokens beyond the vocabulary pass: saved models have them, without effect.
    """
    lowest = 0 if strict else -1
    for token in value if isinstance(value, list) else [value]:
        check_whole(name, token, lowest)
        if strict and isinstance(vocab_size, int) and token >= vocab_size:
            raise ValueError(f"{name}: {token} is beyond the vocabulary of {vocab_size}")


def _check_rope(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: {value!r} is not a mapping")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kinds = {"default", *ROPE_INIT_FUNCTIONS}
    for key, part in value.items():
        if part is None:
            continue
        if isinstance(part, Mapping):  # one mapping for each kind of layer
            _check_rope(f"{name}.{key}", part)
        elif key in ("rope_type", "type"):
            if part not in kinds:
                raise ValueError(f"{name}.{key}: {part!r} is not one of {', '.join(sorted(kinds))}")
        elif key == "partial_rotary_factor":
            check_real(f"{name}.{key}", part, "above 0 and at most 1", lambda share: 0 < share <= 1)
        elif key == "factor":
            check_real(f"{name}.{key}", part, "from 1 up", lambda factor: factor >= 1)
        elif (isinstance(part, Real) and not isinstance(part, bool)) or key == "rope_theta":
            check_real(f"{name}.{key}", part, "above 0", lambda number: number > 0)
        elif isinstance(part, list) and not all(_is_real(number) for number in part):
            raise ValueError(f"{name}.{key}: holds what is no finite number")


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)
