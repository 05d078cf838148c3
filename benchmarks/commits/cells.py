"""Name what compare_texts.py and compare_speed.py decode: models, ways of loading them, ways of decoding.

The names stay. Only public faces of lskip are used, so that it runs on any commit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lskip.inference import (
    ConfidenceDraft,
    CostAwareDraft,
    CriterionDraft,
    Entropy,
    FixedDraft,
    LearnedExit,
    Margin,
    Saturation,
)

SEED = 7
TEMPERATURE = 0.8
BATCH = 4
SMOLLM2_LAYERS, TINY_LAYERS = 30, 4

_SYSTEM = [1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182]
_QUESTIONS = (  # "Why is the sky blue?", "Write a Python function …", "Repeat five times …", "List the planets …"
    [4898, 314, 260, 6376, 4461, 47],
    [19161, 253, 5905, 1517, 338, 7845, 827, 2966, 28, 965, 946, 357, 1296, 1711, 30],
    [48010, 2531, 1711, 42, 260, 2644, 2643, 335, 260, 1171, 30],
    [6106, 260, 9244, 282, 260, 3693, 817, 30],
)
SMOLLM2_PROMPTS = [[*_SYSTEM, 2, 198, 1, 4093, 198, *ids, 2, 198, 1, 520, 9531, 198] for ids in _QUESTIONS]
TINY_PROMPTS = [
    [17, 230, 45, 8, 121],
    [9, 9, 250, 31, 9, 9, 250, 31, 9],
    [200, 3],
    [64, 128, 192, 256, 5, 77, 140, 33, 299, 12, 81],
]


@dataclass(frozen=True)
class Model:
    """Describe a model to record, and what is sensible to ask of it."""

    name: str
    source: str
    layers: int
    exit_layer: int
    prompts: list[list[int]]
    new_tokens: int
    adapter: str | None = None


@dataclass(frozen=True)
class Load:
    """Hold arguments of load_generator, and the names of the ways to decode with what it gives."""

    name: str
    ways: tuple[str, ...]
    arguments: dict[str, Any] = field(default_factory=dict)


def smollm2() -> Model:
    return Model("smollm2", "smollm2", SMOLLM2_LAYERS, 15, SMOLLM2_PROMPTS, 24, adapter="smollm2")


def tiny_model(tied: bool) -> LlamaForCausalLM:
    """Return a random Llama, always the same: tied, of numbers that bfloat16 holds, or untied, of others.

    Ten times the usual spread, as in tests/conftest.py: else random blocks change next to nothing.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=TINY_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    return model.bfloat16().float() if tied else model


def tiny(tied: bool, folder: Path) -> Model:
    """Save the tiny model into `folder`, with a random exit classifier, and return its description."""
    tiny_model(tied).save_pretrained(folder)
    torch.manual_seed(1)
    classifier = {"certainty.linear.weight": torch.randn(1, 32), "certainty.linear.bias": torch.zeros(1)}
    save_file(classifier, folder / "exits.safetensors")
    return Model("tiny_tied" if tied else "tiny_untied", str(folder), TINY_LAYERS, 2, TINY_PROMPTS, 40)


# Ways to decode.

GREEDY_WITHOUT_COPY = (
    *("autoregressive", "exit", "layers FixedDraft", "layers ConfidenceDraft", "layers CostAwareDraft"),
    *("layers CriterionDraft", "ngram FixedDraft", "ngram CostAwareDraft", "any CostAwareDraft"),
    *("Entropy", "Margin", "Saturation", "LearnedExit"),
)
SAMPLED_WITHOUT_COPY = tuple(
    f"{way}, sampled" for way in ("autoregressive", "exit", "layers FixedDraft", "layers rejection", "ngram FixedDraft")
)
FEW = ("autoregressive", "exit", "layers FixedDraft", "layers FixedDraft, sampled")
WITH_COPY = (
    *("weights FixedDraft", "weights of the exit FixedDraft", "weights ConfidenceDraft", "weights CostAwareDraft"),
    *("weights CriterionDraft", "any CostAwareDraft", "weights FixedDraft, sampled", "weights rejection, sampled"),
)
WITH_ADAPTER = (
    *("adapter FixedDraft", "adapter ConfidenceDraft", "adapter CostAwareDraft", "adapter CriterionDraft"),
    *("any CostAwareDraft", "adapter FixedDraft, sampled", "adapter rejection, sampled"),
)


def loads(model: Model) -> list[Load]:
    """Return every way of loading `model` that is recorded, with layouts that a commit may no longer have."""
    every = [Load("auto", GREEDY_WITHOUT_COPY + SAMPLED_WITHOUT_COPY)]
    every.append(Load("auto for 4", FEW, {"batch_size": BATCH}))
    every += [
        Load(f"weights {name}", FEW, {"weights": name}) for name in ("plain", "packed", "transposed", "halved", "int8")
    ]
    every += [Load(f"drafts {name}", WITH_COPY, {"draft_weights": name}) for name in ("int8", "int4", "int8_dynamic")]
    if model.adapter is not None:
        every.append(Load("adapter", WITH_ADAPTER, {"exit_adapter": model.adapter}))
    every += [
        Load("bit_exact", FEW, {"bit_exact": True}),
        Load("bit_exact plain", FEW[:3], {"bit_exact": True, "weights": "plain"}),
        Load("bit_exact drafts int4", WITH_COPY[:2], {"bit_exact": True, "draft_weights": "int4"}),
    ]
    half = {"dtype": "bfloat16"}
    every += [
        Load("bfloat16", FEW, half),
        Load("bfloat16 not bit_exact", FEW, {**half, "bit_exact": False}),
        Load("bfloat16 bit_exact", FEW, {**half, "bit_exact": True}),
        Load("bfloat16 plain", FEW, {**half, "weights": "plain"}),
        Load("bfloat16 packed", FEW, {**half, "weights": "packed"}),
        Load("bfloat16 halved", FEW, {**half, "weights": "halved"}),
        Load("bfloat16 drafts int8", WITH_COPY[:2], {**half, "draft_weights": "int8"}),
    ]
    return every


def settings(way: str, model: Model) -> dict[str, Any]:
    """Return the settings of a way's name; policies and criteria are made anew, since they learn."""
    way, _, sampled = way.partition(", ")
    chosen: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": model.new_tokens}
    if sampled:
        chosen |= {"temperature": TEMPERATURE, "seed": SEED}
    if way == "exit":
        return chosen | {"exit_layer": model.exit_layer}
    if way in _CRITERIA:
        threshold = _THRESHOLDS[model.name.partition("_")[0]][way]
        return chosen | {"exit_criterion": _CRITERIA[way](threshold, first=2 * model.layers // 3)}
    if way == "autoregressive":
        return chosen
    draft, _, policy = way.rpartition(" ")
    if "exit" in draft or draft == "layers":
        chosen["exit_layer"] = model.exit_layer
    if draft != "any":
        chosen["draft"] = draft.split()[0]
    if policy == "rejection":
        return chosen | {"acceptance": "rejection", "num_speculations": 3}
    return chosen | {"draft_policy": _POLICIES[policy](), "num_speculations": 3 if draft == "layers" else 4}


_CRITERIA = {"Entropy": Entropy, "Margin": Margin, "Saturation": Saturation, "LearnedExit": LearnedExit}
_THRESHOLDS = {  # at which tokens exit at several layers: random models are hardly ever sure
    "smollm2": {"Entropy": 0.1, "Margin": 0.4, "Saturation": 0.96, "LearnedExit": 0.5},
    "tiny": {"Entropy": 0.91, "Margin": 0.02, "Saturation": 0.75, "LearnedExit": 0.5},
}
_POLICIES = {
    "FixedDraft": FixedDraft,
    "ConfidenceDraft": ConfidenceDraft,
    "CostAwareDraft": CostAwareDraft,
    "CriterionDraft": lambda: CriterionDraft(Margin(0.2)),
}


def write_costs(path: Path, model: Model, load: Load) -> None:
    """Write a costs_file that was not measured: nothing waits, and every commit plans by the same numbers."""
    rows = [1, 2, 4, 8, 16, 32, 64]
    times = {"rows": rows, "block": [1e-3 * (1 + n / 20) for n in rows], "head": [2e-3 * (1 + n / 20) for n in rows]}
    quick = {"rows": rows, "block": [3e-4 * (1 + n / 20) for n in rows], "head": [3e-4 * (1 + n / 20) for n in rows]}
    has_adapter = "exit_adapter" in load.arguments
    costs = {
        "num_layers": model.layers,
        "model": times,
        "draft": quick if "draft_weights" in load.arguments else None,
        "adapter": quick if has_adapter else None,
        "adapter_blocks": 2 if has_adapter else 0,
    }
    path.write_text(json.dumps({"device": "cpu", "costs": costs}))
