"""The supported families of causal LMs: paths to their modules, and what differs around their blocks."""

import functools
from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Family:
    """The modules of a family; the defaults describe Llama.

    Paths are dotted names below the model's `base_model`; a module that is None there (in OPT, by config) is left out.
    The token embedding and the head need no path, since transformers returns them.

    Attributes:
        blocks: the list of blocks.
        norm: the final norm.
        rotary: returns cosines and sines of positions; None: positions are not rotary.
        rotary_by_kind: whether blocks of sliding and of full attention rotate by different angles.
        positions: embedding of learned positions, added to that of the tokens; None: there is none.
        first_position: its row for position 0.
        embedding_dropout: dropout between embedding and first block; None: there is none.
        project_in, project_out: linear after the token embedding, and after the final norm; None: there is none.
        cache_argument: the name of the cache among the arguments of a block.
        exits_in_transformers: whether `generate(assistant_early_exit=E)` of transformers works and exits after block E.
        unnamed_fields: fields that the family's code reads, though its config class does not declare them.
    """

    blocks: str = "layers"
    norm: str = "norm"
    rotary: str | None = "rotary_emb"
    rotary_by_kind: bool = False
    positions: str | None = None
    first_position: int = 0
    embedding_dropout: str | None = None
    project_in: str | None = None
    project_out: str | None = None
    cache_argument: str = "cache"
    exits_in_transformers: bool = True
    unnamed_fields: tuple[str, ...] = ()


# By model_type of the config. Scaled embeddings, soft-caps and windows need no entry: scaling is inside the embedding
# module, and `final_logit_softcapping`, `sliding_window` and `layer_types` are the same fields in every family.
FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(unnamed_fields=("head_dim",)),
    "qwen3": Family(),
    "phi3": Family(unnamed_fields=("head_dim",)),
    "olmo2": Family(unnamed_fields=("head_dim",)),
    "gemma2": Family(),
    "gemma3_text": Family(rotary_by_kind=True),
    "gpt2": Family(
        blocks="h",
        norm="ln_f",
        rotary=None,
        positions="wpe",
        embedding_dropout="drop",
        exits_in_transformers=False,
    ),
    "gpt_neox": Family(
        norm="final_layer_norm",
        embedding_dropout="emb_dropout",
        cache_argument="layer_past",
        exits_in_transformers=False,
    ),
    "opt": Family(
        blocks="decoder.layers",
        norm="decoder.final_layer_norm",
        rotary=None,
        positions="decoder.embed_positions",
        first_position=2,
        project_in="decoder.project_in",
        project_out="decoder.project_out",
        exits_in_transformers=False,
    ),
}


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a config's model.

    Raises:
        ValueError: a family that is not supported, or a variant of one that would be run wrongly.
    """
    name = config.model_type
    check_family(name)
    if getattr(config, "use_bidirectional_attention", None):
        raise ValueError(f"model: this {name} has use_bidirectional_attention, and sees what it is to predict")
    return FAMILIES[name]


def field_of(config: PreTrainedConfig, name: str) -> Any:
    """Return a field of a config; None where the family's code reads none of that name, for a config keeps any."""
    return getattr(config, name, None) if name in fields_read(config.model_type, type(config)) else None


@functools.cache
def fields_read(family: str, kind: type[PreTrainedConfig]) -> frozenset[str]:
    """Return the names, and other names, of the fields that a family's code reads; kind: the class of its configs."""
    declared = {field.name for field in fields(kind)}
    return frozenset({*declared, *kind.attribute_map, *FAMILIES[family].unnamed_fields})


def head_dim_of(config: PreTrainedConfig) -> int:
    """Return the width of an attention head of a config's model."""
    return field_of(config, "head_dim") or config.hidden_size // config.num_attention_heads


def check_family(name) -> None:
    """Raise ValueError unless `name` is the model_type of a supported family."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"model: the family {name!r} is not supported; allowed: {', '.join(FAMILIES)}")


# Whose blocks are Llama's: an RMS norm before attention and MLP, SiLU and gate. Qwen3 norms queries and keys too;
# Gemma 3 does, and what attention and MLP add, and has GELU.
FUSED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
