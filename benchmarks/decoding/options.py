"""The command line of the decoding benchmark, checked before anything runs."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command_line import command_parser
from benchmarks.decoding.contestant_builder import Contestants, load
from benchmarks.decoding.llama_cpp_peer import find_python
from benchmarks.decoding.settings import BASES, DRAFTS, METHODS, POLICIES, Grid, Setting, default_exit_layers
from lskip.inference.prompt_file import read_prompts
from lskip.inference.text import encode_prompt
from lskip.models.exit_adapter import find_adapter, load_adapter

# --quick sets what was not named: it shows that everything runs; its times say nothing.
DEFAULTS = {"max_new_tokens": 100, "num_speculations": (2, 4, 6), "batch_sizes": (1,), "limit_prompts": None}
DEFAULT_DRAFTS = tuple(draft for draft in DRAFTS if draft not in ("layers_uncached", "adapter"))
QUICK = {"max_new_tokens": 8, "num_speculations": (2,), "batch_sizes": (1, 2), "limit_prompts": 2}


@dataclass
class Job:
    """What is to be run, all of it checked.

    Attributes:
        options: the command line, nothing left open.
        shared: the model and what the contestants share of it.
        prompts: token ids.
        settings: to be measured.
        llama_cpp_python: the interpreter for llama.cpp; None: there is none.
    """

    options: argparse.Namespace
    shared: Contestants
    prompts: list[list[int]]
    settings: list[Setting]
    llama_cpp_python: str | None

    @property
    def context(self) -> int:
        """The most positions that a text needs."""
        return max(map(len, self.prompts)) + self.options.max_new_tokens


def words(text: str) -> tuple[str, ...]:
    """The parts of `text` between commas, each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",")))


def numbers(text: str) -> tuple[int, ...]:
    """ArgumentTypeError unless `text` is a list of whole numbers above 0."""
    if not all(word.isdecimal() and int(word) for word in words(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers from 1 up, like 2,4")
    return tuple(sorted({int(word) for word in words(text)}))


def number(text: str) -> int:
    """ArgumentTypeError unless `text` is a whole number above 0."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def make_parser(description: str) -> argparse.ArgumentParser:
    parser = command_parser("benchmarks.decoding.run", description)
    add = parser.add_argument
    add("--model", required=True, help="smollm2, a run, a folder, a .gguf file")
    add("--prompts", required=True, type=Path, help=".jsonl or .txt, as `lskip predict` takes it")
    add("--out", required=True, type=Path, help="folder for the results")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--methods", type=words, default=METHODS, help=f"of {', '.join(METHODS)}; {' and '.join(BASES)} always run")
    add("--drafts", type=words, default=DEFAULT_DRAFTS, help=f"of self_speculative: {', '.join(DRAFTS)}")
    add("--policies", type=words, default=POLICIES, help=f"of drafts: {', '.join(POLICIES)}")
    add("--exit_layers", type=numbers, help="default: a quarter, half and three quarters of the model")
    add("--num_speculations", type=numbers, help="default: 2,4,6; policies other than fixed get the largest")
    add("--batch_sizes", type=numbers, help="default: 1; what was fastest alone, and autoregressive, in these batches")
    add("--max_new_tokens", type=number, help="default: 100; every text has exactly as many")
    add("--limit_prompts", type=number, help="take this many of the prompts")
    add("--repeats", type=number, default=1, help="how often all prompts are gone over")
    add("--assistant", help="model for hf_assistant (as --model); default: copies of the first E blocks")
    add("--exit_adapter", help="folder of an exit adapter for the model, or smollm2; adds adapter to the drafts")
    add("--llama_cpp_python", help="interpreter that has llama_cpp; default: this one, if it has")
    add("--memory", action="store_true", help="then measure peak memory too, each setting in a process of its own")
    add("--threads", type=number, default=2)
    add("--device", default="cpu")
    add("--quick", action="store_true", help="as little as shows that it runs; its times say nothing")
    return parser


def prepare(options: argparse.Namespace) -> Job:
    """Check the options, fill in what they leave open, and load the model.

    Raises:
        ValueError, FileNotFoundError: what is wrong, in one sentence.
    """
    check_names(options)
    if options.exit_adapter is not None and "adapter" not in options.drafts:
        options.drafts += ("adapter",)
    fill_in(options, QUICK if options.quick else DEFAULTS)
    written = read_prompts(options.prompts)[: options.limit_prompts]
    wants_llama_cpp = "llama_cpp" in options.methods
    python = find_python(options.llama_cpp_python) if wants_llama_cpp else None
    folder = find_adapter(options.exit_adapter) if options.exit_adapter else None
    model, tokenizer = load(options.model, options.dtype, options.device)
    assistant = load(options.assistant, options.dtype, options.device)[0] if options.assistant else None
    adapter = load_adapter(folder, model) if folder else None
    shared = Contestants(options.model, model, assistant, exit_adapter=adapter)
    choose_exit_layers(options, model.config.num_hidden_layers)
    prompts = [encode_prompt(prompt.content, tokenizer, None, model.config.vocab_size) for prompt in written]
    job = Job(options, shared, prompts, settings_of(options), python)
    positions = model.config.max_position_embeddings
    if job.context > positions:
        raise ValueError(
            f"max_new_tokens: {options.max_new_tokens} after a prompt of {job.context - options.max_new_tokens} tokens"
            f" is more than the model's context of {positions}"
        )
    return job


def fill_in(options: argparse.Namespace, defaults: dict) -> None:
    """Set what the command line has not named."""
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def check_names(options: argparse.Namespace) -> None:
    """ValueError for a method, draft or policy that there is not."""
    for name, known in (("methods", METHODS), ("drafts", DRAFTS), ("policies", POLICIES)):
        for value in getattr(options, name):
            if value not in known:
                raise ValueError(f"{name}: {value!r} is not one of {', '.join(known)}")
    if options.exit_adapter is None and "adapter" in options.drafts:
        raise ValueError("drafts: 'adapter' needs --exit_adapter, the folder of one for this model")


def choose_exit_layers(options: argparse.Namespace, num_layers: int) -> None:
    """Fill in exit_layers; raise ValueError for one that does not exit early."""
    if options.exit_layers is None:
        exits = default_exit_layers(num_layers)
        options.exit_layers = exits[len(exits) // 2 :][:1] if options.quick else exits
    for exit_layer in options.exit_layers:
        if exit_layer >= num_layers:
            raise ValueError(f"exit_layers: {exit_layer} is not from 1 to {num_layers - 1}, below the last layer")


def settings_of(options: argparse.Namespace) -> list[Setting]:
    return Grid(
        precision=options.dtype,
        methods=options.methods,
        drafts=options.drafts,
        policies=options.policies,
        exit_layers=options.exit_layers,
        num_speculations=options.num_speculations,
        assistant_given=options.assistant is not None,
    ).settings()
