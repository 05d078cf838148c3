"""Decoding: autoregressive, from a fixed exit, or self-speculative, behind one object. No Lightning in here."""

from lskip.inference.generation import Generation, TextStream
from lskip.inference.generator import TextGenerator, load_generator
from lskip.inference.settings import GenerationSettings

__all__ = ["Generation", "GenerationSettings", "TextGenerator", "TextStream", "load_generator"]
