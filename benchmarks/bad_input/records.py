"""Corrupted files that lskip itself wrote: tuned tasks, costs, sweeps, caches, events and checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from benchmarks.bad_input.checks import holds, prints_the_answer, trained
from benchmarks.bad_input.fixtures import SCRATCH, fit_arguments
from benchmarks.bad_input.models import cut, flip
from benchmarks.bad_input.options import BASES, FEW, TASK
from benchmarks.bad_input.verdict import Case, Right, done, either, refused
from lskip.cli import main

SAME = done(prints_the_answer())
ASK = ("--prompt=def f(x):", "--max_new_tokens=4", "--device=cpu")
TUNED = {
    "exit_layer": 2,
    "num_speculations": 2,
    "draft": "layers",
    "draft_weights": None,
    "exit_adapter": None,
    "device": "cpu",
    "speedup": 1.5,
}
ROWS = {"rows": [1, 2, 4], "block": [1e-5, 2e-5, 3e-5], "head": [1e-5, 2e-5, 3e-5]}
BROKEN = {
    "empty": b"",
    "cut": b'{"task": {"exit_layer": 2',
    "a list": b"[1]",
    "a number": b"5",
    "null": b"null",
    "noise": b"\xff\xfe\x00\x01",
    "nested 100,000 deep": b"[" * 100_000 + b"]" * 100_000,
    "5000 digits": b'{"task": ' + b"9" * 5000 + b"}",
    "utf-16": "{}".encode("utf-16"),
}


def cases(random: Random) -> Iterator[Case]:
    yield from tuned()
    yield from costs(random)
    yield from sweeps(random)
    yield from caches(random)
    yield from events(random)
    yield from resumed(random)


def tuned() -> Iterator[Case]:
    """Yield files tuned.json: refused by name, or used as a draft, which changes no text."""
    right = either(refused("task|tuned.json"), SAME)
    wrong = {
        "exit_layer": [0, -1, 99, "2", 1.5, [2], True],
        "num_speculations": [-1, "2", 1.5, None, 10**9],
        "draft": ["nope", 5, "weights", "adapter"],
        "draft_weights": ["int2", 5, {}],
        "exit_adapter": ["/nope", 5, "../../etc", "\x1b[2J"],
        "draft_tokens": ["/nope", 5, "../../etc", "\x1b[2J", "all"],
        "device": ["cuda", 5, None, "\x1b[2J"],
    }
    for name, values in wrong.items():
        for value in values:
            content = json.dumps({"task": {**TUNED, name: value}}).encode()
            yield with_tuned("generate", f"{name}: {str(value)[:30]!r}", right, content, *ASK)
    for name in TUNED:
        content = json.dumps({"task": {key: value for key, value in TUNED.items() if key != name}}).encode()
        yield with_tuned("generate", f"without {name}", right, content, *ASK)
    for what, content in BROKEN.items():
        yield with_tuned("generate", what, refused("task|tuned.json"), content, *ASK)
        if what in ("cut", "a list", "noise", "5000 digits"):
            yield with_tuned("tune", what, refused("task|tuned.json"), content, *TASK, *FEW, "--decoded_cells=1")


def with_tuned(command: str, what: str, right: Right, content: bytes, *arguments: str) -> Case:
    def prepare(here: Path) -> None:
        shutil.copytree(here.parent / "llama", here / "m")
        (here / "m" / "tuned.json").write_bytes(content)

    task = ("--task=task",) if command == "generate" else ()
    return Case(command, "tuned file", what, ("--model={here}/m", *task, *arguments), right, prepare)


def costs(random: Random) -> Iterator[Case]:
    """Yield costs files: refused by name, or used, which changes no text."""
    whole = {"num_layers": 4, "model": ROWS, "draft": None, "adapter": None, "adapter_blocks": 0}
    for name, value in [
        *(("num_layers", each) for each in (0, 5, "4", None, 10**9)),
        *(
            ("model", each)
            for each in (None, [], {}, {**ROWS, "rows": [1]}, {**ROWS, "rows": [2, 1, 4]}, {**ROWS, "block": [1]})
        ),
        *(("model", {**ROWS, "head": [each, 1, 1]}) for each in (0, -1, float("nan"), float("inf"), "x", 10**400)),
        *(("draft", each) for each in (5, {}, ROWS)),
        ("adapter_blocks", "x"),
        ("unknown", 1),
    ]:
        text = json.dumps({**whole, name: value}).encode()
        yield with_costs(
            f"{name}: {str(value)[:40]}", either(refused("costs"), SAME), lambda path, t=text: path.write_bytes(t)
        )
    for what, content in BROKEN.items():
        right = either(refused("costs"), SAME) if what == "empty" else refused("costs")
        yield with_costs(what, right, lambda path, c=content: path.write_bytes(c))
    for what, make in {
        "a folder": lambda path: path.mkdir(),
        "a link to itself": lambda path: path.symlink_to(path),
    }.items():
        yield with_costs(what, refused("costs_file"), make)
    yield with_costs("a link to nothing", either(refused("costs_file"), SAME), lambda path: path.symlink_to("nothing"))


def with_costs(what: str, right: Right, make: Callable[[Path], object]) -> Case:
    drafts = (
        "--exit_layer=2",
        "--num_speculations=2",
        "--draft_policy=CostAwareDraft",
        "--costs_file={here}/costs.json",
    )
    makes = ("costs.json", "nothing")
    return Case(
        "generate",
        "costs file",
        what,
        ("--model={place}/llama", *ASK, *drafts),
        right,
        lambda here: make(here / "costs.json"),
        makes=makes,
    )


def sweeps(random: Random) -> Iterator[Case]:
    """Yield files cells.jsonl of a resumed sweep."""
    first = {"sweep": {"task": "task", "model": "another"}}
    lines = {
        "another sweep": json.dumps(first),
        "no sweep": '{"part": "x"}',
        "a list": "[1]",
        "a number": "5",
        "sweep a list": '{"sweep": [1]}',
        "noise": "\0\1",
        "5000 digits": '{"sweep": ' + "9" * 5000 + "}",
        "nested 100,000 deep": "[" * 100_000,
        "an escape": '{"sweep": {"task": "\\u001b[2J"}}',
    }
    arguments = (*TASK, "--model={place}/llama", "--output={here}/out", *FEW, "--resume=true")
    for what, line in lines.items():
        yield Case(
            "sweep",
            "cells file",
            what,
            arguments,
            refused("output|model|task"),
            lambda here, t=line: ((here / "out").mkdir(), (here / "out" / "cells.jsonl").write_text(t + "\n")),
        )
    for what, part in {
        "no part": '{"a": 1}',
        "a part twice": '{"part": "x", "record": {}}\n{"part": "x", "record": 5}',
        "a record that is empty": '{"part": "layers exit_layer=2 num_speculations=2", "record": {}}',
        "a record of texts": '{"part": "layers exit_layer=2 num_speculations=2", "record": "x"}',
    }.items():
        right = either(refused("output|cells"), done(holds("sweep.json")))
        yield Case("sweep", "cells file", what, arguments, right, lambda here, p=part: begun_sweep(here, p))


def begun_sweep(here: Path, line: str) -> None:
    """Write a sweep's own first line and then another text."""

    main(
        Case("sweep", "", "", (*TASK, "--model={place}/llama", "--output={here}/out", *FEW), done()).command_line(here)
    )
    cells = here / "out" / "cells.jsonl"
    cells.write_text(cells.read_text().split("\n")[0] + "\n" + line + "\n")


def caches(random: Random) -> Iterator[Case]:
    """Yield cached data files cut, corrupted, emptied or missing: rebuilt, or refused by the file's name."""
    for kind in ("blocks", "documents", "tokenizers", "adapter_states"):
        acts: dict[str, Callable[[Path], object]] = {
            "empty": lambda path: path.write_bytes(b""),
            "gone": lambda path: path.unlink(),
            "noise": lambda path: path.write_bytes(b"\xff" * 500),
            "a folder": lambda path: (path.unlink(), path.mkdir()),
        }
        for _ in range(3):
            share = random.random()
            acts[f"cut at {share:.3f}"] = lambda path, s=share: cut(path, s)
            acts[f"flipped at {share:.3f}"] = lambda path, s=share: flip(path, s)
        for what, act in acts.items():
            yield damaged(kind, what, act, random.random())


def damaged(kind: str, what: str, act: Callable[[Path], object], which: float) -> Case:
    def prepare(here: Path) -> None:
        shutil.copytree(here.parent / "cache", here / "cache")
        files = sorted(path for path in (here / "cache" / kind).rglob("*") if path.is_file() and path.stat().st_size)
        act(files[int(which * len(files))])

    named = refused("cache")
    if kind == "adapter_states":
        arguments = tuple(each.replace("{place}/cache", "{here}/cache") for each in BASES["adapt"][0])
        return Case(
            "adapt", f"cache of {kind}", what, arguments, either(named, done(holds("adapter.safetensors"))), prepare
        )
    model = json.dumps(SCRATCH) if kind == "tokenizers" else None
    arguments = tuple(
        each.replace("{place}/cache", "{here}/cache") for each in fit_arguments("{place}", "{here}/out", model)
    )
    return Case("fit", f"cache of {kind}", what, arguments, either(named, done(trained(2))), prepare)


def events(random: Random) -> Iterator[Case]:
    """Yield event files of a run, which compare reads."""
    acts: dict[str, Callable[[Path], object]] = {
        "empty": lambda path: path.write_bytes(b""),
        "noise": lambda path: path.write_bytes(random.randbytes(900)),
        "gone": lambda path: path.unlink(),
        "a folder": lambda path: (path.unlink(), path.mkdir()),
        "a link to nothing": lambda path: (path.unlink(), path.symlink_to("x")),
    }
    for _ in range(4):
        share = random.random()
        acts[f"cut at {share:.3f}"] = lambda path, s=share: cut(path, s)
        acts[f"flipped at {share:.3f}"] = lambda path, s=share: flip(path, s)
    for what, act in acts.items():

        def prepare(here: Path, act=act) -> None:
            shutil.copytree(here.parent / "run", here / "run")
            for path in sorted((here / "run").glob("events.*")):
                act(path)

        right = either(refused("runs"), done(holds("out.png", folder=".")))
        yield Case(
            "compare", "events", what, ("{here}/run", "--figure={here}/out.png"), right, prepare, makes=("out.png",)
        )


def resumed(random: Random) -> Iterator[Case]:
    """Yield runs resumed from a corrupted checkpoint, or with other settings."""
    for _ in range(5):
        share = random.random()
        yield going_on(f"cut at {share:.3f}", refused("ckpt_path"), lambda path, s=share: cut(path, s))
        right = either(refused("ckpt_path"), done(trained(6, folder="run")))
        yield going_on(f"flipped at {share:.3f}", right, lambda path, s=share: flip(path, s))
    changed = {
        "--data.source={place}/prompts.txt": refused("source|data"),
        "--data.batch_size=2": either(done(trained(6, folder="run")), refused("batch_size")),
        "--optimizer=SGD": refused("optimizer"),
        "--model={place}/gpt2": refused("ckpt_path|model"),
        "--trainer.max_steps=2": either(done(trained(4, folder="run")), refused("max_steps")),
        "--trainer.max_steps=4": either(done(trained(4, folder="run")), refused("max_steps")),
        "--seed_everything=7": either(done(trained(6, folder="run")), refused("seed")),
        "--learned_exit=true": refused("ckpt_path|learned_exit"),
        "--low_rank=LowRank": refused("ckpt_path|low_rank|exit_layer"),
    }
    for more, right in changed.items():
        yield going_on(more, right, lambda path: None, more)


def going_on(what: str, right: Right, act: Callable[[Path], object], *more: str) -> Case:
    def prepare(here: Path) -> None:
        shutil.copytree(here.parent / "run", here / "run")
        act(here / "run" / "checkpoints" / "last.ckpt")

    base = fit_arguments("{place}", "{here}/run")
    arguments = (*base, "--trainer.max_steps=6", "--ckpt_path=last", *more)
    return Case("fit", "resumed", what, arguments, right, prepare, makes=("run",))
