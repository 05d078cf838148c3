"""What is particular about each family of causal LMs: where its parts are, and what stands around its blocks."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Family:
    """How a family differs from Llama, whose description this is without any argument.

    Paths are dotted names below the model's `base_model`; a part that is None there (OPT has some by config) is
    left out. The token embedding and the head need no path: transformers tells them.

    Attributes:
        blocks: the list of blocks.
        norm: the final norm.
        rotary: makes cosines and sines of positions for the blocks; None: they take none.
        rotary_by_kind: blocks of sliding and of full attention turn by other angles.
        positions: embedding of learned positions, added to that of the tokens; None: there is none.
        first_position: its row for position 0.
        embedding_dropout: stands between embedding and first block; None: there is none.
        project_in, project_out: linear behind the token embedding, and behind the final norm; None: there is none.
        cache_argument: what blocks call their cache.
        exits_in_transformers: whether `generate(assistant_early_exit=E)` of transformers leaves after block E. Where
            not, it breaks.
        unnamed_fields: fields that its code reads, though its config does not name them.
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


# By model_type of the config. Scaled embeddings, soft-caps and windows need no entry: embeddings are modules, and a
# config names the others (`final_logit_softcapping`, `sliding_window`, `layer_types`) alike in every family.
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
    """The family of the model that a config describes; needs no weights, so ask before they are read.

    Raises:
        ValueError: a family that is not covered, or a variant of one that would be run wrongly.
    """
    name = config.model_type
    check_family(name)
    if getattr(config, "use_bidirectional_attention", None):
        raise ValueError(f"model: this {name} has use_bidirectional_attention, and sees what it is to predict")
    return FAMILIES[name]


def check_family(name) -> None:
    """ValueError unless `name` is the model_type of a family that is covered."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"model: the family {name!r} is not supported; allowed: {', '.join(FAMILIES)}")
