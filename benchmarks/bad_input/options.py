"""Allowed values of every option of the commands other than fit, validate and test, and cases of bad values."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

from benchmarks.bad_input.checks import answers, holds, json_holds, numbered, prints_the_answer
from benchmarks.bad_input.checks import texts as texts_of
from benchmarks.bad_input.data_options import DATA
from benchmarks.bad_input.fixtures import PROMPTS, adapt_arguments
from benchmarks.bad_input.values import (
    Domain,
    a_class,
    choice,
    file_to_read,
    flag,
    names,
    place_to_write,
    real,
    text,
    texts,
    whole,
    wholes,
)
from benchmarks.bad_input.verdict import Case, Done, Seen, done, refused

DRAFTS = ("layers", "int8", "int4", "ngram", "adapter")
POLICIES = ("FixedDraft", "ConfidenceDraft", "CostAwareDraft")
DTYPES = ("float32", "bfloat16", "float16")
LOADING = {
    "model": file_to_read(),
    "dtype": choice(*DTYPES),
    "weights": choice("auto", "plain", "packed", "halved", "int8", good=("plain", "packed", "int8")),
    "draft_weights": choice("int8", "int4", null=True),
    "device": choice("auto", "cpu", good=("cpu",)),
    "bit_exact": flag(null=True, good=("true", "false", "null")),
    "costs_file": place_to_write(),
    "exit_adapter": file_to_read(),
    "draft_tokens": file_to_read(),
}
DECODING = {
    "max_new_tokens": whole(1, null=True),
    "exit_layer": whole(1, 4, null=True, good=(4,)),
    "exit_criterion": a_class(),
    "num_speculations": whole(0, null=True),
    "draft": choice("layers", "weights", "ngram", "adapter", null=True),
    "draft_policy": a_class(),
    "acceptance": choice("shared_noise", "rejection", good=("rejection",)),
    "temperature": real(0, null=True, good=(0, "0.0", "-0.0")),
    "top_k": whole(1, null=True, good=(1, 300, 10**30)),
    "top_p": real(0, 1, low_too=False, null=True, good=(1, 1e-12)),
    "min_p": real(0, 1, null=True, good=(0, 1)),
    "repetition_penalty": real(0, low_too=False, null=True, good=(1,)),
    "stop_strings": texts(good=('["~~~"]', "[]", "null")),
    "json_schema": file_to_read(),
    "regex": text(good=("[a-z]{5}", "null")),
    "seed": whole(0, 2**64 - 1, null=True, good=(0, 2**64 - 1)),
    "chat": flag(null=True, good=("false", "null")),
}
RESUMED = {"overwrite": flag(good=("true",)), "resume": flag(good=("true",))}
COUNTS = {"num_prompts": whole(1), "rounds": whole(1), "batch_size": whole(1, good=(1, 64))}
GRID = {"drafts": names(*DRAFTS), "exit_layers": wholes(1), "num_speculations": wholes(1)}
OPTIONS: dict[str, dict[str, Domain]] = {
    "generate": {"prompt": text(), "task": text(), "json": flag(), **DECODING, **LOADING},
    "predict": {
        "prompts": file_to_read(),
        "output": place_to_write(),
        "task": text(),
        "batch_size": whole(1, good=(1, 2, 10**4)),
        "completions": flag(good=("true",)),
        **RESUMED,
        **DECODING,
        **LOADING,
    },
    "export": {
        "model": file_to_read(),
        "output": place_to_write(),
        "dtype": choice(*DTYPES, good=DTYPES),
        "exit_layer": whole(1, 3, null=True, good=(1, 3)),
        "num_speculations": whole(1, null=True),
        "draft": whole(1, 3, null=True, good=(1, 3)),
        "gguf": flag(good=("true",)),
    },
    "sweep": {
        "task": a_class(),
        "output": place_to_write(),
        **GRID,
        "policies": names(*POLICIES, good=(f"[{','.join(POLICIES)}]",)),
        **COUNTS,
        "exits": choice("2,last", null=True, good=("1,2,last", " 3 , last", "4")),
        "scored_prompts": whole(1),
        **RESUMED,
        **LOADING,
    },
    "tune": {
        "task": a_class(),
        **GRID,
        **COUNTS,
        "decoded_cells": whole(1, good=(10**6,)),
        "criterion": choice("Entropy", "Margin", null=True, good=("Entropy", "null")),
        "precision": real(0, 1, low_too=False, null=True, good=("null",)),
        **LOADING,
    },
    "evaluate": {
        "tasks": names("own"),
        "model": file_to_read(),
        "exits": choice("2,last", good=("1,2,last", "4")),
        "output": place_to_write(),
        "include_path": file_to_read(),
        "limit": real(0, low_too=False, null=True),
        "num_fewshot": whole(0, null=True),
        "batch_size": whole(1),
        "chat": flag(),
        "dtype": choice(*DTYPES),
        "device": choice("auto", "cpu"),
        "overwrite": flag(),
        "confirm_run_unsafe_code": flag(),
        "exit_adapter": file_to_read(),
        "weights": choice("auto", "int8", good=("int8",)),
    },
    "compare": {"runs": file_to_read(), "figure": place_to_write()},
    "data": {**DATA, "split": choice("train", "val", "test", good=("train", "val")), "show": whole(0, good=(0, 1))},
    "inspect": {
        "output": place_to_write(),
        "model": file_to_read(),
        "text": text(good=("def f(x):", "🙂 \u202e", "[1, 2]", "null and void")),
        "text_tokens": whole(2, good=(2, 10**9)),
        "dtype": choice(*DTYPES),
        "device": choice("auto", "cpu"),
        "overwrite": flag(good=("true",)),
        "data": file_to_read(),
        "split": choice("train", "val", "test", null=True),
        "block_size": whole(2, 128),
        "num_blocks": whole(1),
        "batch_size": whole(1, good=(1, 10**6)),
    },
    "adapt": {
        "output": place_to_write(),
        "model": file_to_read(),
        "exit_layer": whole(1, 3, good=(1, 3)),
        "num_blocks": whole(1, 4, good=(1, 4)),
        "joins_last_state": flag(good=("false",)),
        "vocabulary": whole(16, null=True, good=(10**6, "null")),
        "device": choice("auto", "cpu"),
        "start": file_to_read(),
        "resume": flag(),
        "prompts": file_to_read(),
        "answers": names("x"),
        "max_new_tokens": whole(1),
        "answers_at_once": whole(1),
        "block_size": whole(2, 128),
        "chat": flag(null=True),
        "cache_dir": place_to_write(),
        "max_steps": whole(1, null=True),
        "max_minutes": real(0, low_too=False, null=True),
        "batch_size": whole(1, good=(1,)),
        "lr": real(0, low_too=False),
        "warmup_steps": whole(0, good=(0,)),
        "target": choice("kl", "lk", good=("lk",)),
        "unroll": whole(1, good=(1,)),
        "decay": real(0, low_too=False),
        "unroll_every": whole(1, good=(7,)),
        "ema": real(0, 1, low_too=False, high_too=False, null=True, good=("null",)),
        "precision": choice("32-true", "bf16-mixed"),
        "val_every": whole(1),
        "val_answers": whole(1),
        "checkpoint_every": whole(1),
        "seed": whole(0),
    },
}
NOT_TRIED = {"help", "config", "print_config"}  # `--config` has cases of its own
TASK = ("--task=LocalTask", "--task.path={place}/task.jsonl", "--task.max_new_tokens=4")
FEW = ("--num_prompts=2", "--rounds=1", "--num_speculations=[2]", "--exit_layers=[2]")
EXPORTED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md")
SHORT = ("--max_new_tokens=4", "--device=cpu")
# What stands before the option that is tried, and what a good value must bring.
BASES: dict[str, tuple[tuple[str, ...], Done]] = {
    "generate": (("--prompt=def f(x):", "--model={place}/llama", *SHORT), done(prints_the_answer())),
    "predict": (
        ("--prompts={place}/prompts.txt", "--model={place}/llama", "--output={here}/out.jsonl", *SHORT),
        done(answers(numbered(PROMPTS))),
    ),
    "export": (("--model={place}/llama", "--output={here}/out", "--exit_layer=2"), done(holds(*EXPORTED))),
    "sweep": ((*TASK, "--model={place}/llama", "--output={here}/out", *FEW), done(holds("sweep.json", "sweep.csv"))),
    "tune": ((*TASK, "--model={here}/model", *FEW, "--decoded_cells=1"), done(holds("tuned.json", folder="model"))),
    "evaluate": (
        (
            "--tasks=own",
            "--include_path={here}/tasks",
            "--model={place}/llama",
            "--output={here}/out.json",
            "--limit=2",
        ),
        done(json_holds("out.json", lambda found: found["results"])),
    ),
    "compare": (("{place}/run", "--figure={here}/out.png"), done(holds("out.png", folder="."))),
    "data": (
        ("--source={place}/data.jsonl", "--tokenizer={place}/llama", "--cache_dir={place}/cache", "--block_size=16"),
        done(lambda seen: None if " positions computed for each" in seen.out else f"printed {seen.out!r}"),
    ),
    "inspect": (
        ("--model={place}/llama", "--output={here}/out", "--data={place}/data.jsonl", "--block_size=16"),
        done(holds("report.json", "figure.png", "settling.html")),
    ),
    "adapt": ((*adapt_arguments("{place}"), "--output={here}/out"), done(holds("adapter.safetensors", "metrics.json"))),
}
EXTRA = {  # without which an option says nothing
    "draft_policy": ("--exit_layer=2", "--num_speculations=2"),
    "acceptance": ("--exit_layer=2", "--num_speculations=2"),
    "exit_adapter": ("--num_speculations=2",),
    "draft_tokens": ("--exit_layer=2", "--num_speculations=2"),
    "costs_file": ("--exit_layer=2", "--num_speculations=2", "--draft_policy=CostAwareDraft"),
    "draft": ("--exit_layer=2", "--num_speculations=2"),
    "split": ("--data={place}/data.jsonl",),
}
MAKES = ("out", "out.jsonl", "out.json", "out.png", "model")


def cases(random: Random) -> Iterator[Case]:
    """Yield random bad values and the good values of every option."""
    for command, options in OPTIONS.items():
        count = 3 if command in ("export", "compare", "evaluate") else 2 if command in ("generate", "inspect") else 1
        for option, domain in options.items():
            for kind, value in random.sample(domain.bad, min(count, len(domain.bad))):
                yield bad_value(command, option, kind, value)
            for value in random.sample(domain.good, min(2, len(domain.good))):
                yield good_value(command, option, value)
    yield from by_hand()


def by_hand() -> Iterator[Case]:
    """Yield cases outside the tables: JSON output, standard input, `lskip configs`, unknown commands."""
    base = BASES["generate"][0]

    def is_json(seen: Seen) -> str | None:
        answer = json.loads(seen.out)
        said = texts_of(seen.here.parent / "llama", (PROMPTS[0],))[0]
        return None if (answer["prompt"], answer["text"]) == (PROMPTS[0], said) else f"printed {seen.out!r}"

    yield Case("generate", "legal", "json=true", (*base, "--json=true"), done(is_json))
    yield Case("generate", "missing", "an empty standard input", (*base, "--prompt=-"), refused("prompt"))
    for arguments, words in {
        ("nope",): "configs",
        ("copy",): "copy",
        ("copy", "nope"): "nope",
        ("copy", "quickstart", "/proc/lskip/x"): "/proc/lskip/x",
        ("copy", "quickstart", "{place}/data.jsonl"): "data.jsonl",
        ("copy", "../../../etc/passwd"): "passwd",
        ("copy", "\x1b[2J"): "2J",
    }.items():
        yield Case("configs", "choice", " ".join(arguments), arguments, refused(words))
    for name in ("fitt", "", "FIT", "--fit", "🙂", "\x1b[2J", "x" * 5000, "../fit"):
        yield Case(name, "choice", "no command", (), Done(lambda seen: None if "fit" in seen.err else "lists none", 2))


def bad_value(command: str, option: str, kind: str, value: str) -> Case:
    what = f"{option}={value[:60]!r}"
    named = "runs|not UTF-8" if option == "runs" else option  # a word that is no text is told before what it is
    return Case(command, kind, what, arguments(command, option, value), refused(named), odd_files, makes=MAKES)


def good_value(command: str, option: str, value: str) -> Case:
    right = BASES[command][1]
    return Case(
        command, "legal", f"{option}={value!r}", arguments(command, option, value), right, odd_files, makes=MAKES
    )


def arguments(command: str, option: str, value: str) -> tuple[str, ...]:
    base = BASES[command][0]
    if option == "runs":
        return (base[0], value, *base[1:])
    extra = EXTRA.get(option, ()) if command in ("generate", "predict") else ()
    if option == "prompts" and command == "adapt":
        base = tuple(argument for argument in base if not argument.startswith("--answers="))
    return (*base, *extra, f"--{option}={value}")


def odd_files(here: Path) -> None:
    """Make the files that values name: dangling links, a pipe without a writer, a copy of a model, a task."""
    (here / "loop").symlink_to("loop")
    (here / "loop.jsonl").symlink_to("loop.jsonl")
    (here / "dangling").symlink_to("not_there")
    (here / "empty").mkdir()
    os.mkfifo(here / "fifo")
    os.mkfifo(here / "fifo.jsonl")
    shutil.copytree(here.parent / "llama", here / "model")
    own_task(here / "tasks")


def own_task(folder: Path, **changed) -> None:
    """Write a task of lm-eval with four documents into a folder."""
    folder.mkdir()
    documents = [{"question": f"def f{i}(a, b):", "choices": ["return a", "+", "r"], "answer": i % 3} for i in range(4)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    files = {"data_files": {"test": str(folder / "documents.jsonl")}, "cache_dir": str(folder.parent / "cache")}
    task = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": files,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "own.yaml").write_text(json.dumps({**task, **changed}))
