"""Decoding: autoregressive, from a fixed exit, or self-speculative, behind one object. No Lightning in here."""

from lskip.inference.drafting import ConfidenceDraft, CostAwareDraft, FixedDraft
from lskip.inference.exits import Entropy, Margin, Saturation
from lskip.inference.generation import Generation, TextStream
from lskip.inference.generator import TextGenerator
from lskip.inference.loading import load_generator
from lskip.inference.settings import GenerationSettings

__all__ = [
    "ConfidenceDraft",
    "CostAwareDraft",
    "Entropy",
    "FixedDraft",
    "Generation",
    "GenerationSettings",
    "Margin",
    "Saturation",
    "TextGenerator",
    "TextStream",
    "load_generator",
]
