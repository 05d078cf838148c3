"""Scaled rotary embeddings in GGUF files, which transformers drops: linear, YaRN's, and Llama 3's."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

FREQUENCIES = "rope_freqs.weight"  # a tensor: how many times slower than without scaling each pair of a head rotates
SCALED = ("linear", "yarn")  # by metadata, and in transformers by the same names
# Of Llama 3.1 and after. The file holds but the factors that come of these and one number.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def scaling_of(
    values: Mapping[str, Any], architecture: str, frequencies: np.ndarray | None, theta: float, head_dim: int
) -> dict[str, Any]:
    """Return the file's scaling as transformers' `rope_parameters` have it; {}: none, or one that is not known here.

    Args:
        values: metadata.
        frequencies: the tensor of this name, [head_dim / 2]; None: there is none.
        theta: base of the frequencies.
    """
    kind, factor = (values.get(f"{architecture}.rope.scaling.{name}") for name in ("type", "factor"))
    if frequencies is not None:
        if len(frequencies) != head_dim // 2:
            return {}
        factor = float(frequencies.max())
        known = np.allclose(frequencies, llama3_frequencies(theta, head_dim, factor), rtol=1e-4)
        return {"rope_type": "llama3", "factor": factor, **LLAMA3} if known else {}
    if kind not in SCALED or factor is None:
        return {}
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    length = values.get(f"{architecture}.rope.scaling.original_context_length")
    if not isinstance(length, int):
        return {}
    return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": length}


def llama3_frequencies(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """Return how many times slower than without scaling each pair of a head rotates in Llama 3, [head_dim / 2].

    Waves longer than the first context are stretched by `factor`, short ones are left, those between in part.
    """
    length, low, high = (LLAMA3[n] for n in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    kept = np.clip((length / waves - low) / (high - low), 0, 1)
    return (1 / (kept + (1 - kept) / factor)).astype(np.float32)
