"""llama.cpp in a process of its own: reads one JSON request a line, answers with one JSON line.

Needs llama_cpp and nothing of lskip, so that any interpreter with llama_cpp can run it. Requests:

    {"do": "version"}                                                                 -> {"version": "…"}
    {"do": "quantize", "source": path, "target": path, "precision": "F32"}            -> {}
    {"do": "load", "name": …, "path": …, "context": 200, "threads": 2, "lookup": 0}   -> {}
    {"do": "generate", "name": …, "ids": […], "max_new_tokens": 100}                  -> {"tokens": […], "seconds": …,
                                                                       "rounds": …, "drafted": …}
    {"do": "memory"}                                                                  -> {"mib": …}

Errors are answered with {"error": "…"}. llama.cpp's own output goes to stderr.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time

import llama_cpp
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

FILE_TYPES = {"F32": 0, "BF16": 32, "Q8_0": 7}  # llama.cpp's enum llama_ftype


class CountedLookup(LlamaPromptLookupDecoding):
    """llama.cpp's draft-free speculation, which says how much it drafted."""

    calls = drafted = 0

    def __call__(self, input_ids, /, **kwargs):
        guess = super().__call__(input_ids, **kwargs)
        self.calls += 1
        self.drafted += len(guess)
        return guess


class Worker:
    """The models that were loaded, by name."""

    def __init__(self):
        self.models: dict[str, llama_cpp.Llama] = {}

    def answer(self, request: dict) -> dict:
        """Carry out a request (see the module)."""
        return getattr(self, request.pop("do"))(**request)

    def version(self) -> dict:
        return {"version": llama_cpp.__version__}

    def quantize(self, source: str, target: str, precision: str) -> dict:
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.nthread, settings.ftype, settings.allow_requantize = 2, FILE_TYPES[precision], True
        if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)):
            raise RuntimeError(f"{source} could not be written as {precision}")
        return {}

    def load(self, name: str, path: str, context: int, threads: int, lookup: int) -> dict:
        """lookup: tokens that prompt lookup drafts; 0: none."""
        draft = CountedLookup(num_pred_tokens=lookup) if lookup else None
        self.models[name] = llama_cpp.Llama(
            path,
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            draft_model=draft,
            logits_all=draft is not None,  # left out, llama_cpp keeps too few rows of logits for a draft
            verbose=False,
        )
        return {}

    def generate(self, name: str, ids: list[int], max_new_tokens: int) -> dict:
        """Greedy; end-of-text tokens are tokens like others. The prompt's own pass is part of the seconds."""
        model = self.models[name]
        draft = model.draft_model
        model.reset()  # else a prompt that it has seen would be free
        if draft is not None:
            draft.calls = draft.drafted = 0
        tokens = []
        begin = time.perf_counter()
        for token in model.generate(ids, temp=0.0):
            tokens.append(token)
            if len(tokens) == max_new_tokens:
                break
        seconds = time.perf_counter() - begin
        # The first pass comes before the first draft; the last one's tokens are not drafted from.
        rounds, drafted = (len(tokens), 0) if draft is None else (draft.calls + 1, draft.drafted)
        return {"tokens": tokens, "seconds": seconds, "rounds": rounds, "drafted": drafted}

    def memory(self) -> dict:
        from benchmarks.decoding.memory import peak_resident_mib

        return {"mib": peak_resident_mib()}


def main() -> None:
    # llama.cpp prints where it likes: answers get the real stdout to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        try:
            answer = worker.answer(json.loads(line))
        except Exception as error:  # the other process decides what an error means
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
