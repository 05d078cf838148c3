"""Choosing a token from logits: greedy, or sampled with noise that draft and verification share."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lskip.inference.settings import GenerationSettings


class TokenChooser:
    """Logits [N, V] of N consecutive positions -> a token each.

    Sampling is argmax(processed logits + Gumbel noise), the noise a function of (seed, position) alone: an exact
    draw from the processed distribution. Draft and verification see the same noise, so a drafted token is
    accepted when it equals the verifier's own choice, and the text does not depend on whether, or how, it
    was drafted.
    """

    def __init__(self, settings: GenerationSettings, seed: int, eos_ids: tuple[int, ...], first_eos: int):
        """first_eos: the lowest absolute position at which a token of `eos_ids` may be chosen."""
        self.seed, self.greedy = seed, settings.temperature == 0
        self.eos_ids, self.first_eos = list(eos_ids), first_eos
        self.processors = LogitsProcessorList()
        if self.greedy:
            return
        if settings.temperature != 1:
            self.processors.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_k is not None:
            self.processors.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self.processors.append(TopPLogitsWarper(float(settings.top_p)))

    def __call__(self, logits: Tensor, position: int) -> Tensor:
        """logits [N, V], row i for the token at `position` + i -> token ids [N], on the logits' device."""
        if position < self.first_eos and self.eos_ids:
            logits = logits.clone()
            logits[: self.first_eos - position, self.eos_ids] = float("-inf")
        if self.greedy:
            return logits.argmax(-1)
        scores = self.processors(None, logits.float())
        noise = [gumbel_noise(self.seed, position + row, scores.shape[1]) for row in range(len(scores))]
        return (scores + torch.stack(noise).to(scores.device)).argmax(-1)


@lru_cache(maxsize=64)  # verification asks for what the draft has just used
def gumbel_noise(seed: int, position: int, size: int) -> Tensor:
    """float32 [size] on the CPU: Gumbel noise that depends on (seed, position) and nothing else."""
    # Philox is a function of key and counter. The position goes into the counter's highest word, so that
    # streams of different positions never meet.
    source = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, position]))
    exponential = np.maximum(source.standard_exponential(size), np.finfo(np.float64).tiny)
    return torch.from_numpy(-np.log(exponential)).float()
