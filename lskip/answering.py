"""`lskip predict` and `generate`: answers to a file of prompts, or to one."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lskip.checks import check_whole
from lskip.command_options import DecodingOptions, LoadingOptions
from lskip.evaluation.tuned import tuned_options
from lskip.inference import Generation
from lskip.inference.drafting import DraftPolicy
from lskip.prompt_file import Prompt, put_in_order, read_prompts, start_output


def predict(
    prompts: str,
    output: str,
    decoding: DecodingOptions,
    loading: LoadingOptions,
    task: str | None = None,
    batch_size: int = 8,
    overwrite: bool = False,
    resume: bool = False,
) -> None:
    """Answer a file of prompts, several at a time: one JSON line each, written as soon as it is done.

    Args:
        prompts: a .txt file with a prompt a line, or .jsonl with {"prompt": …} or {"messages": …} a line;
            other keys are carried through.
        output: .jsonl file to write, in the end in the order of the prompts. A line has the keys of its prompt and
            line, text, tokens, seconds, acceptance_rate, tokens_per_round, finish_reason, seed.
        decoding: how a prompt is continued. The prompt of index i (from 0, blank lines left out) has seed + i.
        loading: which model.
        task: a task that lskip tune has tuned for this model: it says what drafts where the options do not. null: none.
        batch_size: prompts that are answered together; one that is done makes room for the next.
        overwrite: start over an existing output.
        resume: go on with an existing output, with the prompts that it does not answer yet.
    """
    decoding, loading = tuned_options(task, decoding, loading)
    settings = decoding.settings()
    check_whole("batch_size", batch_size, 1)
    asked, path = read_prompts(Path(prompts)), Path(output)
    answered, mode = start_output(path, asked, overwrite, resume)
    missing = [index for index in range(len(asked)) if index not in answered]
    if missing:
        generator = loading.load(min(batch_size, len(missing)))
        chosen = generator.settings(**settings)
        for index in missing:
            asked[index].check(generator, chosen)
        outcomes = generator.generate_batch([asked[i].content for i in missing], batch_size, missing, **settings)
        with path.open(mode, encoding="utf-8") as file:
            _write_answers(file, asked, outcomes, len(answered))
    put_in_order(path)


def _write_answers(file, asked: list[Prompt], outcomes, done: int) -> None:
    tokens, began = 0, time.perf_counter()
    with tqdm(initial=done, total=len(asked), unit="prompt", desc="predict") as bar:
        try:
            for index, generation in outcomes:
                file.write(json.dumps(_row(asked[index], generation), ensure_ascii=False) + "\n")
                file.flush()
                tokens += len(generation.token_ids)
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - began):.1f} tokens/s", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            message = f", {bar.n} of {len(asked)} prompts are done; go on with --resume true"
            raise KeyboardInterrupt(message) from None


def _row(prompt: Prompt, generation: Generation) -> dict:
    return {
        **prompt.fields,
        "line": prompt.line,
        "text": generation.text,
        "tokens": len(generation.token_ids),
        "seconds": round(generation.seconds, 4),
        "acceptance_rate": generation.acceptance_rate,
        "tokens_per_round": generation.tokens_per_round,
        "finish_reason": generation.finish_reason,
        "seed": generation.seed,
    }


def generate(prompt: str, decoding: DecodingOptions, loading: LoadingOptions, task: str | None = None) -> None:
    """Answer one prompt: the text on standard output as it comes, the counts on standard error.

    Args:
        prompt: the text to continue or to answer.
        decoding: how it is continued.
        loading: which model.
        task: a task that lskip tune has tuned for this model: it says what drafts where the options do not. null: none.
    """
    decoding, loading = tuned_options(task, decoding, loading)
    settings = decoding.settings()
    if not prompt:
        raise ValueError("prompt: is empty; give some text to continue")
    stream = loading.load().stream(prompt, **settings)
    interrupt = None
    try:
        for piece in stream:
            print(piece, end="", flush=True)
    except KeyboardInterrupt as pressed:
        interrupt = pressed
    print(flush=True)
    print(_summary(stream.generation, decoding.draft_policy), file=sys.stderr)
    if interrupt is not None:
        raise interrupt


def _summary(generation: Generation, policy: DraftPolicy | None) -> str:
    parts = [f"{len(generation.token_ids)} tokens", f"{generation.tokens_per_second:.1f} tokens/s"]
    if generation.acceptance_rate is not None:
        parts.append(f"acceptance_rate {generation.acceptance_rate:.2f}")
        parts.append(f"tokens_per_round {generation.tokens_per_round:.2f}")
    if generation.mean_exit_layer is not None:
        parts.append(f"mean exit layer {generation.mean_exit_layer:.1f}")
    if generation.finish_reason is not None:
        parts.append(generation.finish_reason)
    learnt = policy.summary() if policy is not None else {}
    return f"[{', '.join(parts)}]" + (f"\n[{type(policy).__name__}: {_in_words(learnt)}]" if learnt else "")


def _in_words(value: Any) -> str:
    """A policy's summary, which may hold tables in tables, on one line."""
    if isinstance(value, dict):
        parts = [
            (name, f"({_in_words(part)})" if isinstance(part, dict) else _in_words(part))
            for name, part in value.items()
        ]
        return ", ".join(f"{name} {part}" for name, part in parts)
    return f"{value:.2f}" if isinstance(value, float) else str(value)
