"""`lskip predict` and `generate`: answers to a file of prompts, or to one."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from typing import Any

from tqdm import tqdm

from lskip.cli.predict_output import AnswerFile, answer_place, put_in_order, start_output
from lskip.cli.predict_settings import (
    answer_settings,
    check_answers,
    check_by_answering,
    check_same_settings,
    forget_settings,
    keep_settings,
)
from lskip.evaluation.sweep.tuned import tuned_options
from lskip.inference import Generation, GenerationSettings
from lskip.inference.drafting.drafter import Available
from lskip.inference.drafting.policies import DraftPolicy
from lskip.inference.options import DecodingOptions, LoadingOptions
from lskip.inference.prompt_file import Prompt, read_prompts, read_standard_input
from lskip.utils.checks import check_unicode, check_whole
from lskip.utils.untrusted import MAX_BYTES, printable
from lskip.utils.user_paths import user_path


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
            other keys are carried through. - is standard input, in either form.
        output: .jsonl file to write, in the end in the order of the prompts. A line has the keys of its prompt and
            line, text, tokens, seconds, acceptance_rate, tokens_per_round, finish_reason, seed.
        decoding: how a prompt is continued. The prompt of index i (from 0, blank lines left out) has seed + i.
        loading: which model.
        task: a task that lskip tune has tuned for this model: it says what drafts where the options do not. null: none.
        batch_size: prompts that are answered together; one that is done makes room for the next.
        overwrite: start over an existing output.
        resume: go on with an existing output, with the prompts that it does not answer yet; with the same settings.
    """
    decoding, loading = tuned_options(task, decoding, loading)
    settings = decoding.settings()
    check_whole("batch_size", batch_size, 1)
    source = user_path(prompts, "prompts")
    asked = read_prompts(source)
    with answer_place(user_path(output, "output"), source) as path:
        answered, mode = start_output(path, asked, overwrite, resume)
        _check_exit(decoding, loading)
        how = answer_settings(decoding, loading)
        is_known = not answered or check_same_settings(path, how)
        if not is_known:
            check_answers(path, asked, decoding)
        missing = [index for index in range(len(asked)) if index not in answered]
        said = "all were there"
        if missing:
            generator = loading.load(min(batch_size, len(missing)))
            chosen = generator.settings(**settings)
            if not is_known:
                check_by_answering(path, asked, generator, chosen)
            ids = [asked[index].encode(generator, chosen) for index in missing]
            outcomes = generator.generate_batch(ids, batch_size, missing, **settings)
            with AnswerFile(path, mode, partial(keep_settings, path, how)) as file:
                said = _write_answers(file, asked, outcomes, len(answered))
        put_in_order(path)
        forget_settings(path)
    print(printable(f"{len(asked)} answers in '{output}' ({said})", keep=""), file=sys.stderr)


def _check_exit(decoding: DecodingOptions, loading: LoadingOptions) -> None:
    """ValueError for layers that the model does not have, or a draft without any, before its weights are read."""
    if decoding.exit_layer is None and not decoding.num_speculations:
        return
    from lskip.models.pretrained import find_source, load_config  # brings the GGUF reader and the hub client

    if find_source(loading.model).kind == "gguf":
        return  # to read its config takes as long as to load it
    layers = getattr(load_config(loading.model), "num_hidden_layers", None)
    if layers is not None and loading.exit_adapter is None:
        GenerationSettings(**decoding.settings()).check_model(Available(layers, loading.draft_weights is not None))


def _write_answers(file: AnswerFile, asked: list[Prompt], outcomes, done: int) -> str:
    """Writes the answers as they come; returns how many tokens they had, and how fast they came."""
    tokens, began = 0, time.perf_counter()
    with tqdm(initial=done, total=len(asked), unit="prompt", desc="predict") as bar:
        try:
            for index, generation in outcomes:
                file.write({**asked[index].fields, "line": asked[index].line, **_counts(generation)})
                tokens += len(generation.token_ids)
                bar.set_postfix_str(speed := _speed(tokens, time.perf_counter() - began), refresh=False)
                bar.update()
        except KeyboardInterrupt as pressed:
            message = f", {bar.n} of {len(asked)} prompts are done; go on with --resume true"
            raise type(pressed)(message) from None
    return f"{tokens} tokens, {speed}"


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds if seconds else 0.0:.1f} tokens/s"


def _counts(generation: Generation) -> dict:
    return {
        "text": generation.text,
        "tokens": len(generation.token_ids),
        "seconds": round(generation.seconds, 4),
        "acceptance_rate": generation.acceptance_rate,
        "tokens_per_round": generation.tokens_per_round,
        "finish_reason": generation.finish_reason,
        "seed": generation.seed,
    }


def generate(
    prompt: str, decoding: DecodingOptions, loading: LoadingOptions, task: str | None = None, json: bool = False
) -> None:
    """Answer one prompt: the text on standard output as it comes, the counts on standard error.

    A terminal is shown control characters of the text written out; a file or a pipe gets the text as it is.

    Args:
        prompt: the text to continue or to answer; - reads it from standard input, without a newline at its end.
        decoding: how it is continued.
        loading: which model.
        task: a task that lskip tune has tuned for this model: it says what drafts where the options do not. null: none.
        json: print one JSON object instead, when the answer is done: prompt, text and counts.
    """
    decoding, loading = tuned_options(task, decoding, loading)
    settings = decoding.settings()
    prompt = _prompt_text(prompt)
    _check_exit(decoding, loading)
    interrupt = None
    stream = loading.load().stream(prompt, **settings)
    try:
        for piece in stream:
            if not json:
                _show(piece)
    except KeyboardInterrupt as pressed:
        interrupt = pressed
    if json:
        _show_json(prompt, stream.generation)
    else:
        _show("\n")
        print(_summary(stream.generation, decoding.draft_policy), file=sys.stderr)
    if interrupt is not None:
        raise interrupt


def _prompt_text(prompt: str) -> str:
    if prompt == "-":
        prompt = read_standard_input("prompt", MAX_BYTES)
        prompt = prompt.removesuffix("\r\n") if prompt.endswith("\r\n") else prompt.removesuffix("\n")
    if not prompt:
        raise ValueError("prompt: is empty; give some text to continue")
    check_unicode("prompt", prompt)
    return prompt


def _show(text: str) -> None:
    """Prints on standard output. Whatever a model says moves no terminal's cursor and sets no title."""
    if sys.stdout.isatty():
        text = printable(text)
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ValueError(f"standard output: {error.strerror}") from error


def _show_json(prompt: str, generation: Generation) -> None:
    fields = {"prompt": prompt, "prompt_tokens": generation.prompt_tokens, **_counts(generation)}
    _show(json.dumps(fields, ensure_ascii=False) + "\n")


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
