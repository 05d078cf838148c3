"""From a setting to something that runs it."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from benchmarks.decoding.llama_cpp_peer import LlamaCpp, LlamaCppProcess, write_files
from benchmarks.decoding.lskip_runs import Generators, Lskip
from benchmarks.decoding.runs import Contestant
from benchmarks.decoding.settings import Setting
from benchmarks.decoding.transformers_peer import Assistants, Transformers
from lskip.inference.stopping import end_tokens
from lskip.models.exit_adapter import ExitAdapter
from lskip.models.pretrained import load_model


class Contestants:
    """What contestants share: the model, its generators, assistants, and llama.cpp's process."""

    def __init__(
        self,
        source: str,
        model: PreTrainedModel,
        assistant: PreTrainedModel | None,
        release: bool = False,
        exit_adapter: ExitAdapter | None = None,
    ):
        """
        Args:
            source: what --model said.
            assistant: of two-model drafting; None: copies of the model's first blocks.
            release: lskip converts the model instead of copying it; then one contestant can be built, not more.
            exit_adapter: of lskip's draft "adapter".

        Raises:
            ValueError: the assistant does not go with the model.
        """
        self.source, self.model = source, model
        self.generators = Generators(model, release, exit_adapter)
        self.assistants = Assistants(model, assistant)
        self.llama_cpp: LlamaCppProcess | None = None

    def start_llama_cpp(self, python: str, files: Path, context: int, log: Path) -> None:
        """Starts its process and writes its model files into `files`.

        Raises:
            ValueError: the model cannot be written for it.
            RuntimeError: llama.cpp could not read or write them.
        """
        self.llama_cpp, self.files, self.context = LlamaCppProcess(python, log), files, context
        write_files(self.llama_cpp, self.source, self.model, files)

    def build(self, setting: Setting) -> Contestant:
        """Raises ValueError or RuntimeError where the setting does not work here."""
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
    """Model, on `device`, and tokenizer, or None; quietly. Raises what `load_model` raises."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, tokenizer = load_model(source, dtype=getattr(torch, dtype))
    return model.to(device), tokenizer
