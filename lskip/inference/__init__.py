"""Decoding: autoregressive, from a fixed exit, or self-speculative, behind one object. No Lightning in here."""

from lskip.inference.cost_aware import CostAwareDraft
from lskip.inference.drafting import ConfidenceDraft, CriterionDraft, FixedDraft
from lskip.inference.exits import Entropy, LearnedExit, Margin, Saturation
from lskip.inference.generation import Generation, TextStream
from lskip.inference.generator import TextGenerator
from lskip.inference.loading import load_generator
from lskip.inference.settings import GenerationSettings

__all__ = [
    "ConfidenceDraft",
    "CostAwareDraft",
    "CriterionDraft",
    "Entropy",
    "FixedDraft",
    "Generation",
    "GenerationSettings",
    "LearnedExit",
    "Margin",
    "Saturation",
    "TextGenerator",
    "TextStream",
    "load_generator",
]
