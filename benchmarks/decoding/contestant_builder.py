"""Building of contestants: objects that run a setting of the decoding benchmark."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from benchmarks.decoding.llama_cpp_peer import LlamaCpp, LlamaCppProcess, write_files
from benchmarks.decoding.lskip_methods import Generators, Lskip
from benchmarks.decoding.measuring import Contestant
from benchmarks.decoding.settings import Setting
from benchmarks.decoding.transformers_peer import Assistants, Transformers
from lskip.inference.stopping import end_tokens
from lskip.models.exit_adapter import ExitAdapter
from lskip.models.pretrained import load_model


class Contestants:
    """The builder of contestants, with what they share: the model, generators, assistants, llama.cpp's process."""

    def __init__(
        self,
        source: str,
        model: PreTrainedModel,
        assistant: PreTrainedModel | None,
        release: bool = False,
        exit_adapter: ExitAdapter | None = None,
    ):
        """Prepare to build contestants for a model.

        Args:
            source: value of --model.
            assistant: of two-model drafting; None: copies of the model's first blocks.
            release: lskip converts the model instead of copying it; only one contestant can then be built.
            exit_adapter: of lskip's draft "adapter".

        Raises:
            ValueError: the assistant does not go with the model.
        """
        self.source, self.model = source, model
        self.generators = Generators(model, release, exit_adapter)
        self.assistants = Assistants(model, assistant)
        self.llama_cpp: LlamaCppProcess | None = None

    def start_llama_cpp(self, python: str, files: Path, context: int, log: Path) -> None:
        """Start llama.cpp's process and write its model files into `files`.

        Raises:
            ValueError: the model cannot be written for it.
            RuntimeError: llama.cpp could not read or write them.
        """
        self.llama_cpp, self.files, self.context = LlamaCppProcess(python, log), files, context
        write_files(self.llama_cpp, self.source, self.model, files)

    def build(self, setting: Setting) -> Contestant:
        """Return the contestant for a setting; ValueError or RuntimeError if it does not work here."""
        if setting.method == "llama_cpp":
            ends = end_tokens(self.model, None)
            return LlamaCpp(self.llama_cpp, self.files, setting, ends, self.context)
        if setting.method.startswith("hf_"):
            return Transformers(self.model, self.assistants, setting)
        return Lskip(self.generators, setting)

    def close(self) -> None:
        if self.llama_cpp is not None:
            self.llama_cpp.close()


def load(source: str, dtype: str, device: str) -> tuple:
    """Return (model on `device`, tokenizer or None), without progress bars; raises as `load_model` does."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = load_model(source, dtype=getattr(torch, dtype))
    return model.to(device), tokenizer
