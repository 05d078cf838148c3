"""Building of transformers configs from untrusted values, each field checked before a model is made."""

import copy
import difflib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from lskip.models.families import FAMILIES, check_family, family_of, fields_read
from lskip.models.reading.config_values import check_values

_ROPE_BEFORE_5 = ("rope_theta", "rope_scaling")  # transformers 5 has one field for both, rope_parameters
# Fields that would fetch or patch in code, which is never done; Decoder chooses the attention.
_CODE = ("auto_map", "custom_pipelines", "attn_implementation", "_attn_implementation", "fusion_config")
# Names of one size in several families (and other programs), for a hint.
_SYNONYMS = (
    ("hidden_size", "n_embd", "d_model"),
    ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    ("num_key_value_heads", "n_kv_heads", "num_kv_heads"),
    ("max_position_embeddings", "n_positions", "n_ctx", "context_length", "max_seq_len"),
    ("hidden_act", "hidden_activation", "activation_function"),
    ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    ("attention_dropout", "attn_pdrop"),
    ("initializer_range", "init_std"),
)


def make_config(
    values: Mapping[str, Any], dtype: torch.dtype = torch.float32, fits_here: bool = True
) -> PreTrainedConfig:
    """Return the transformers config of a mapping with `model_type`, for a model from scratch.

    Args:
        fits_here: refuse a model larger than this machine's memory.

    Raises:
        ValueError: an unknown family or field, a value that is not allowed, or a model larger than the memory.
    """
    family = values.get("model_type")
    try:
        kind = type(AutoConfig.for_model(family))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"model.model_type: {family!r} is no family of transformers; allowed: {', '.join(FAMILIES)}"
        ) from error
    check_family(family)
    _refuse_unknown_fields(values, kind, dtype)
    config = build_config(values, "model.", strict=True)
    if fits_here:
        check_memory(config, dtype)
    return config


def build_config(values: Mapping[str, Any], prefix: str, strict: bool = False) -> PreTrainedConfig:
    """Return the config of a mapping, after checking that a model can be made of it.

    Args:
        prefix: precedes the name of a field in a message.
        strict: also refuse what is harmless in a saved model: end tokens beyond its vocabulary, settings of rotary
            positions that nothing reads.

    Raises:
        ValueError: one sentence with the field, its value and what is allowed.
    """
    check_family(values.get("model_type"))
    if values["model_type"] == "mistral" and values.get("layer_types"):
        raise ValueError(f"{prefix}layer_types: a mistral with kinds of layers is a ministral, which is not supported")
    check_values(values, prefix, strict)
    _check_heads(values.get, values, prefix)
    with _no_warnings(prefix) if strict else nullcontext():
        try:
            config = AutoConfig.for_model(**{name: value for name, value in values.items() if name not in _CODE})
        except Exception as error:  # any type: whatever a wrong value leads to inside transformers
            raise ValueError(_invalid(values, prefix, error)) from error
    family = family_of(config)
    _check_heads(lambda name: getattr(config, name, None), values, prefix)
    if strict:
        _check_rope_effect(config, values, family.rotary_by_kind, prefix)
    parameter_count(config)  # builds the model on the meta device, which raises where that fails
    return config


def with_layers(config: PreTrainedConfig, kept: slice) -> PreTrainedConfig:
    """Return a copy of a config for some of its layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = len(range(config.num_hidden_layers)[kept])
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[kept]
    return config


def parameter_count(config: PreTrainedConfig) -> int:
    """Return the number of parameters of a config's model, without allocating them.

    Raises:
        ValueError: no model can be made of the config.
    """
    counts = []
    for layers in (1, 2):
        few = with_layers(config, slice(layers))
        try:
            counts.append(sum(part.numel() for part in without_memory(few).parameters()))
        except Exception as error:  # any type: whatever a wrong value leads to inside transformers
            kind = config.model_type
            raise ValueError(f"model: no {kind} can be made of this config ({_short(error)})") from error
        if few.num_hidden_layers == config.num_hidden_layers:
            return counts[-1]
    return counts[0] + (config.num_hidden_layers - 1) * (counts[1] - counts[0])


def without_memory(config: PreTrainedConfig) -> torch.nn.Module:
    """Return a model whose weights are on the meta device: names and shapes without memory."""
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.tie_weights()  # left out by no_init_weights
    return model


def check_memory(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Raise ValueError if the weights of such a model are larger than this machine's memory."""
    size = parameter_count(config) * dtype.itemsize
    if hasattr(os, "sysconf") and size > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
        raise ValueError(
            f"model: a {config.model_type} of these sizes has {size / 2**30:,.0f} GiB of weights, this machine "
            f"{memory / 2**30:,.0f} GiB of memory"
        )


def check_weights_hold(config: PreTrainedConfig, most: int, place: str) -> None:
    """Raise ValueError if a config has more parameters than the `most` that its weight files can hold.

    Missing weights are found by name later; this refuses sizes that would fill the memory before.
    """
    if (count := parameter_count(config)) > most:
        raise ValueError(
            f"model: the config of {place!r} describes {count:,} parameters, its weights hold at most {most:,}"
        )


def _check_heads(get: Callable[[str], Any], values: Mapping[str, Any], prefix: str) -> None:
    """Raise ValueError for fields that contradict each other; `get` returns a field's value or None."""
    hidden, heads, pairs = (get(name) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    own_width = values.get("head_dim")
    if hidden and heads and hidden % heads and own_width is None:
        raise ValueError(f"{prefix}num_attention_heads: {heads} does not divide hidden_size, {hidden}")
    if heads and pairs and heads % pairs:
        raise ValueError(f"{prefix}num_key_value_heads: {pairs} does not divide num_attention_heads, {heads}")
    padding, words = get("pad_token_id"), get("vocab_size")
    if isinstance(padding, int) and words and padding >= words:
        raise ValueError(f"{prefix}pad_token_id: {padding} is beyond the vocabulary of {words}; null: there is none")
    if own_width and own_width % 2:
        raise ValueError(f"{prefix}head_dim: {own_width} is odd; rotary positions turn pairs")


def _check_rope_effect(config: PreTrainedConfig, values: Mapping[str, Any], by_kind: bool, prefix: str) -> None:
    """Raise ValueError for a rope setting that the built config ignores.

    Some families do not read the old names, and some need one mapping for each kind of layer.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [part for kind, part in rope.items() if kind in config.layer_types] if by_kind else [rope]
    given = {"rope_theta": {"rope_theta": values.get("rope_theta")}, "rope_scaling": values.get("rope_scaling") or {}}
    for name, settings in given.items():
        read = [all(part.get(key) == value for key, value in settings.items() if key != "type") for part in parts]
        if values.get(name) is not None and not any(read):
            raise ValueError(f"{prefix}{name}: has no effect in a {config.model_type}; give rope_parameters")
    flat = [name for name in values.get("rope_parameters") or {} if by_kind and name not in config.layer_types]
    if flat:
        kinds = " and ".join(sorted(set(config.layer_types)))
        raise ValueError(f"{prefix}rope_parameters.{flat[0]}: has no effect; give a mapping for {kinds}")


def _refuse_unknown_fields(values: Mapping[str, Any], kind: type, dtype: torch.dtype) -> None:
    """Raise ValueError for a field that the family does not have.

    transformers keeps unknown fields and builds the default model, which would waste a training run.
    """
    family = values["model_type"]
    allowed = {"model_type", "torch_dtype"} | fields_read(family, kind)
    if "rope_parameters" in allowed:
        allowed |= set(_ROPE_BEFORE_5)
    for name, value in values.items():
        if name not in allowed:
            raise ValueError(f"model.{name}: a {family} config has no field {name!r}{_meant(name, allowed)}")
        made = str(dtype).removeprefix("torch.")
        if name in ("dtype", "torch_dtype") and value is not None and str(value) not in (made, str(dtype)):
            raise ValueError(f"model.{name}: {value!r} has no effect, a model is made in {made}; leave it out")
        other = kind.attribute_map.get(name)
        if other in values:
            raise ValueError(f"model.{name}: is {other!r} in a {family} config, and that is given too")
    if "rope_parameters" in values and (twice := sorted(set(_ROPE_BEFORE_5) & values.keys())):
        raise ValueError(f"model.{twice[0]}: has no effect beside rope_parameters; put it in there")


def _meant(name: str, allowed: set[str]) -> str:
    same = next((group for group in _SYNONYMS if name in group), ())
    close = [each for each in same if each in allowed] or difflib.get_close_matches(str(name), sorted(allowed), 1, 0.8)
    return f"; did you mean {close[0]!r}?" if close else ""


@contextmanager
def _no_warnings(prefix: str) -> Iterator[None]:
    """Raise ValueError for what transformers only warns about: unknown and missing settings of rotary positions."""
    warnings: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: warnings.append(record.getMessage())
    logger = logging.getLogger("transformers.modeling_rope_utils")
    before = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    logger.addHandler(listener)
    try:
        yield
    finally:
        logger.removeHandler(listener)
        logger.propagate = before[0]
        logger.setLevel(before[1])
    if warnings:
        raise ValueError(f"{prefix}rope_parameters: {' '.join(warnings[0].split())[:200]}")


def _invalid(values: Mapping[str, Any], prefix: str, error: Exception) -> str:
    """Return the message for an error of transformers, the field first where the error names one."""
    text = str(error)
    if (named := re.search(r"[Ff]ield '(\w+)'", text)) and named[1] in values:
        expected = re.search(r"expected .*?(?=, got)|an? .*", text)
        hint = f" ({expected[0][:100]})" if expected else ""
        return f"{prefix}{named[1]}: {values[named[1]]!r:.60} is not allowed{hint}"
    quoted = [name for name in re.findall(r"`(\w+)`", text)]
    if "rope_parameters" in quoted:
        quoted.append("rope_scaling")
    if field := next((name for name in quoted if name in values), None):
        return f"{prefix}{field}: is not valid ({_short(error)})"
    return f"model: this {values['model_type']} config is not valid ({_short(error)})"


def _short(error: Exception, limit: int = 160) -> str:
    lines = [line.strip() for line in str(error).splitlines() if len(line.strip()) > 1] or [""]
    text = f"{type(error).__name__}: {lines[-1]}"
    return text if len(text) <= limit else text[: limit - 1] + "…"
