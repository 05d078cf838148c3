"""Decoding behind one object: autoregressive, early exit or self-speculative. Nothing in here imports Lightning."""

from lskip.inference.drafting.cost_aware import CostAwareDraft
from lskip.inference.drafting.drafter import Drafter
from lskip.inference.drafting.policies import ConfidenceDraft, CriterionDraft, FixedDraft
from lskip.inference.drafting.registry import register_drafter
from lskip.inference.exit_criteria import Entropy, LearnedExit, Margin, MeasuredExit, Saturation
from lskip.inference.generation import Generation, TextStream
from lskip.inference.generator import TextGenerator
from lskip.inference.loading import load_generator
from lskip.inference.settings import GenerationSettings

__all__ = [
    "ConfidenceDraft",
    "CostAwareDraft",
    "CriterionDraft",
    "Drafter",
    "Entropy",
    "FixedDraft",
    "Generation",
    "GenerationSettings",
    "LearnedExit",
    "Margin",
    "MeasuredExit",
    "Saturation",
    "TextGenerator",
    "TextStream",
    "load_generator",
    "register_drafter",
]
