"""`lskip predict` and `generate` as functions, and how a command's arguments become options of the command line."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser
from tqdm import tqdm

from lskip.checks import check_whole
from lskip.export import export
from lskip.inference import Generation, GenerationSettings, TextGenerator, load_generator
from lskip.inference.drafting import DraftPolicy
from lskip.inference.exits import ExitCriterion
from lskip.prompt_file import Prompt, put_in_order, read_prompts, start_output
from lskip.usage_errors import explain, innermost


@dataclass(frozen=True)
class LoadingOptions:
    """Which model, and how it is held.

    Attributes:
        model: a run folder, a checkpoint, an exported or downloaded folder, a hub name, a .gguf file, smollm2.
        dtype: of the weights in memory.
        weights: how they are held while decoding; auto takes what is fastest on this machine.
        draft_weights: a copy of the model in int8 or int4 that may draft; null: none.
        device: cpu, cuda …; auto takes a GPU where there is one.
        bit_exact: a text is the same to the bit alone, in any batch, with and without drafts, in bfloat16 too;
            costs some speed. null: in bfloat16 on a CPU.
        compiled: run the blocks through torch.compile; for GPUs.
        costs_file: JSON file that keeps what a pass costs on this machine, which CostAwareDraft goes by; made where
            there is none. null: measured each time, which takes seconds.
        exit_adapter: folder of an exit adapter that was trained for this model; with num_speculations it drafts.
            null: none.
    """

    model: str = "smollm2"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    weights: Literal["auto", "plain", "packed", "transposed"] = "auto"
    draft_weights: Literal["int8", "int4"] | None = None
    device: str = "auto"
    bit_exact: bool | None = None
    compiled: bool = False
    costs_file: str | None = None
    exit_adapter: str | None = None

    def load(self) -> TextGenerator:
        """ValueError, FileNotFoundError: as load_generator."""
        return load_generator(**vars(self))


@dataclass(frozen=True)
class DecodingOptions:
    """How a prompt is continued.

    Attributes:
        max_new_tokens: tokens to generate at most; null takes the model's default.
        exit_layer: blocks that run before a token is read off, 1 to the model's layers; null runs all.
        exit_criterion: stops each token at the first layer that is sure enough (Entropy, Margin, Saturation; another
            text, not verified); null: none.
        num_speculations: tokens drafted, at most, before the whole model verifies them; 0 does not draft.
        draft: what drafts: layers (the first exit_layer blocks), weights (the draft_weights), ngram (what followed
            the same tokens earlier in the text) or adapter (the exit_adapter); null: the exit_adapter, else the
            draft_weights, else the layers.
        draft_policy: decides round by round how many tokens are drafted, and by what; null: num_speculations always.
        acceptance: which drafted tokens are kept when sampling; shared_noise gives the same text as without drafts,
            rejection keeps more of them.
        temperature: 0 takes the likeliest token; null takes the model's default.
        top_k: sample among so many likeliest tokens; null takes the model's default.
        top_p: sample among the likeliest that together reach this probability; null takes the model's default.
        min_p: sample among those with at least this share of the likeliest one's probability; null takes the
            model's default.
        repetition_penalty: above 1 makes tokens that were there before less likely; null takes the model's default.
        stop_strings: a list of texts, each of which ends the answer where it appears; null takes the model's default.
        seed: of sampling; null: another one each time.
        chat: whether a plain prompt goes through the chat template; null: when the model has one.
    """

    max_new_tokens: int | None = None
    exit_layer: int | None = None
    exit_criterion: ExitCriterion | None = None
    num_speculations: int = 0
    draft: Literal["layers", "weights", "ngram", "adapter"] | None = None
    draft_policy: DraftPolicy | None = None
    acceptance: Literal["shared_noise", "rejection"] = "shared_noise"
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_strings: list[Any] | None = None  # of texts: GenerationSettings says so in a plain sentence
    seed: int | None = 0
    chat: bool | None = None

    def settings(self) -> dict:
        """Generation settings; what is null is left to the model.

        Raises:
            ValueError: a value that no model allows, before any model is loaded.
        """
        settings = {name: value for name, value in vars(self).items() if value is not None}
        GenerationSettings(**settings)
        for name in ("draft", "draft_policy"):
            if name in settings and not self.num_speculations:
                raise ValueError(
                    f"num_speculations: 0 drafts nothing, but {name} is given; say how many tokens at most"
                )
        return settings


def predict(
    prompts: str,
    output: str,
    decoding: DecodingOptions,
    loading: LoadingOptions,
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
        batch_size: prompts that are answered together; one that is done makes room for the next.
        overwrite: start over an existing output.
        resume: go on with an existing output, with the prompts that it does not answer yet.
    """
    settings = decoding.settings()
    check_whole("batch_size", batch_size, 1)
    asked, path = read_prompts(Path(prompts)), Path(output)
    answered, mode = start_output(path, asked, overwrite, resume)
    missing = [index for index in range(len(asked)) if index not in answered]
    if missing:
        generator = loading.load()
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


def generate(prompt: str, decoding: DecodingOptions, loading: LoadingOptions) -> None:
    """Answer one prompt: the text on standard output as it comes, the counts on standard error.

    Args:
        prompt: the text to continue or to answer.
        decoding: how it is continued.
        loading: which model.
    """
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


_CLASSES = {"draft_policy": DraftPolicy, "exit_criterion": ExitCriterion}


def run_command(arguments: list[str]) -> None:
    """Run `predict`, `generate`, `export` or `adapt`: the first argument says which, the others are its options."""
    name, *options = arguments
    command = command_named(name)
    parser = ArgumentParser(prog=f"lskip {name}", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="YAML file with the options below")
    # Arguments that stand for a group of options.
    groups = {key: kind for key, kind in get_type_hints(command).items() if is_dataclass(kind)}
    plain = parser.add_function_arguments(command, skip=set(groups))
    members = {key: parser.add_class_arguments(kind) for key, kind in groups.items()}
    values = _parse(parser, options)
    given = {key: kind(**{member: values[member] for member in members[key]}) for key, kind in groups.items()}
    command(**{key: values[key] for key in plain}, **given)


def command_named(name: str) -> Callable[..., None]:
    """The function that runs a command."""
    if name == "adapt":
        from lskip.adapt import adapt  # brings Lightning, which the others do without

        return adapt
    return {"predict": predict, "generate": generate, "export": export}[name]


def _parse(parser: ArgumentParser, options: list[str]):
    """The options' values, classes among them built.

    Raises:
        ValueError: one sentence on what is wrong with them.
    """
    try:
        values = parser.parse_args(options)
    except argparse.ArgumentError as error:
        raise ValueError(explain(str(error), parser, _CLASSES)) from error
    try:
        return parser.instantiate_classes(values)
    except ValueError as error:
        raise ValueError(innermost(str(error))) from error
