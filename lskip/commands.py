"""`lskip predict`, `generate` and `export`, as functions; their arguments are the command line's options."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Literal

from jsonargparse import ActionConfigFile, ArgumentParser
from tqdm import tqdm

from lskip.export import export
from lskip.inference import Generation, GenerationSettings, TextGenerator, load_generator
from lskip.prompt_file import Prompt, read_prompts, start_output
from lskip.usage_errors import explain

Dtype = Literal["float32", "bfloat16", "float16"]


def predict(
    prompts: str,
    output: str,
    model: str = "smollm2",
    max_new_tokens: int | None = None,
    exit_layer: int | None = None,
    num_speculations: int = 0,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool | None = None,
    dtype: Dtype = "float32",
    weights: Literal["auto", "plain", "packed", "transposed"] = "auto",
    draft_weights: Literal["int8", "int4"] | None = None,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
) -> None:
    """Answer a file of prompts: one JSON line each, written as soon as it is done.

    Args:
        prompts: a .txt file with a prompt a line, or .jsonl with {"prompt": …} or {"messages": …} a line;
            other keys are carried through.
        output: .jsonl file to write. A line has the keys of its prompt and text, tokens, seconds,
            acceptance_rate, tokens_per_round, finish_reason.
        model: a run folder, a checkpoint, an exported or downloaded folder, a hub name, a .gguf file, smollm2.
        max_new_tokens: tokens to generate at most; null takes the model's default.
        exit_layer: blocks that run before a token is read off, 1 to the model's layers; null runs all.
        num_speculations: tokens drafted, at exit_layer or by draft_weights, before the whole model verifies them;
            0 does not draft.
        temperature: 0 takes the likeliest token; null takes the model's default.
        top_k: sample among so many likeliest tokens; null takes the model's default.
        top_p: sample among the likeliest that together reach this probability; null takes the model's default.
        seed: of sampling.
        chat: whether a plain prompt goes through the chat template; null: when the model has one.
        dtype: of the weights in memory.
        weights: how they are held while decoding; auto takes what is fastest on this machine.
        draft_weights: drafts come from a copy of the model in int8 or int4; null: from its own first layers.
        device: cpu, cuda …; auto takes a GPU where there is one.
        overwrite: start over an existing output.
        resume: go on with an existing output, after the prompts that it answers.
    """
    settings = _settings(locals())
    asked = read_prompts(Path(prompts))
    done, mode = start_output(Path(output), asked, overwrite, resume)
    generator = load_generator(model, dtype=dtype, weights=weights, draft_weights=draft_weights, device=device)
    for prompt in asked[done:]:
        prompt.check(generator, settings)
    with open(output, mode, encoding="utf-8") as file:
        bar = tqdm(asked[done:], initial=done, total=len(asked), unit="prompt", desc="predict")
        for prompt in bar:
            generation = _answer(generator, prompt, settings, bar.n, len(asked))
            file.write(json.dumps({**prompt.fields, **_counts(generation)}, ensure_ascii=False) + "\n")
            file.flush()


def _answer(generator: TextGenerator, prompt: Prompt, settings: dict, finished: int, total: int) -> Generation:
    try:
        return generator.generate(prompt.content, **settings)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f", {finished} of {total} prompts are done; go on with --resume true") from None


def _counts(generation: Generation) -> dict:
    return {
        "text": generation.text,
        "tokens": len(generation.token_ids),
        "seconds": round(generation.seconds, 4),
        "acceptance_rate": generation.acceptance_rate,
        "tokens_per_round": generation.tokens_per_round,
        "finish_reason": generation.finish_reason,
    }


def generate(
    prompt: str,
    model: str = "smollm2",
    max_new_tokens: int | None = None,
    exit_layer: int | None = None,
    num_speculations: int = 0,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool | None = None,
    dtype: Dtype = "float32",
    weights: Literal["auto", "plain", "packed", "transposed"] = "auto",
    draft_weights: Literal["int8", "int4"] | None = None,
    device: str = "auto",
) -> None:
    """Answer one prompt: the text on standard output as it comes, the counts on standard error.

    Args:
        prompt: the text to continue or to answer.
        model: a run folder, a checkpoint, an exported or downloaded folder, a hub name, a .gguf file, smollm2.
        max_new_tokens: tokens to generate at most; null takes the model's default.
        exit_layer: blocks that run before a token is read off, 1 to the model's layers; null runs all.
        num_speculations: tokens drafted, at exit_layer or by draft_weights, before the whole model verifies them;
            0 does not draft.
        temperature: 0 takes the likeliest token; null takes the model's default.
        top_k: sample among so many likeliest tokens; null takes the model's default.
        top_p: sample among the likeliest that together reach this probability; null takes the model's default.
        seed: of sampling.
        chat: whether the prompt goes through the chat template; null: when the model has one.
        dtype: of the weights in memory.
        weights: how they are held while decoding; auto takes what is fastest on this machine.
        draft_weights: drafts come from a copy of the model in int8 or int4; null: from its own first layers.
        device: cpu, cuda …; auto takes a GPU where there is one.
    """
    settings = _settings(locals())
    if not prompt:
        raise ValueError("prompt: is empty; give some text to continue")
    generator = load_generator(model, dtype=dtype, weights=weights, draft_weights=draft_weights, device=device)
    stream = generator.stream(prompt, **settings)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    print(_summary(stream.generation), file=sys.stderr)


def _summary(generation: Generation) -> str:
    parts = [f"{len(generation.token_ids)} tokens", f"{generation.tokens_per_second:.1f} tokens/s"]
    if generation.acceptance_rate is not None:
        parts.append(f"acceptance_rate {generation.acceptance_rate:.2f}")
        parts.append(f"tokens_per_round {generation.tokens_per_round:.2f}")
    return f"[{', '.join(parts)}, {generation.finish_reason}]"


def _settings(arguments: dict) -> dict:
    """The generation settings among a command's arguments; what is null is the model's to decide.

    Raises:
        ValueError: a value that no model allows, before any model is loaded.
    """
    names = [field.name for field in fields(GenerationSettings)]
    settings = {name: arguments[name] for name in names if arguments.get(name) is not None}
    GenerationSettings(**settings)
    return settings


_COMMANDS = {"predict": predict, "generate": generate, "export": export}


def run_command(arguments: list[str]) -> None:
    """Run `predict`, `generate` or `export`: the first argument says which, the others are its options."""
    name, *options = arguments
    parser = ArgumentParser(prog=f"lskip {name}", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file with the options below")
    added = parser.add_function_arguments(_COMMANDS[name])
    try:
        values = parser.parse_args(options)
    except argparse.ArgumentError as error:
        raise ValueError(explain(str(error), parser, {})) from error
    _COMMANDS[name](**{argument: values[argument] for argument in added})
