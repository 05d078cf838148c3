"""Every command that writes, on a full or read-only disk, beside a second writer, or interrupted at any moment."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import torch

from benchmarks.bad_input.checks import answers, holds, json_holds, numbered, trained
from benchmarks.bad_input.faults import full_disk, read_only, second_writer, signalled
from benchmarks.bad_input.fixtures import PROMPTS, fit_arguments
from benchmarks.bad_input.options import BASES, EXPORTED, own_task
from benchmarks.bad_input.verdict import Case, Check, Seen, done, either, refused
from lskip.cli import main

# command -> (arguments, option of the output, check of a complete output)
FIT = tuple(fit_arguments("{place}", "{here}/w/out"))
SAVING = ("--checkpoint.every_n_train_steps=1",)
WRITERS: dict[str, tuple[tuple[str, ...], str, Check]] = {
    "predict": (BASES["predict"][0], "output", answers(numbered(PROMPTS), file="w/out.jsonl")),
    "export": (BASES["export"][0], "output", holds(*EXPORTED, folder="w/out")),
    "sweep": (BASES["sweep"][0], "output", holds("sweep.json", "sweep.csv", "sweep.png", folder="w/out")),
    "tune": (BASES["tune"][0], "task|tuned|model", holds("tuned.json", folder="w/model")),
    "evaluate": (BASES["evaluate"][0], "output", json_holds("w/out.json", lambda found: found["results"])),
    "compare": (BASES["compare"][0], "figure", holds("out.png", folder="w")),
    "inspect": (BASES["inspect"][0], "output", holds("report.json", "figure.png", "settling.html", folder="w/out")),
    "adapt": (BASES["adapt"][0], "output", holds("adapter.safetensors", "metrics.json", folder="w/out")),
    "fit": ((*FIT, *SAVING), "run_folder", trained(2, folder="w/out")),
    "validate": (tuple(fit_arguments("{place}", "{here}/w/out", "{place}/run")), "run_folder", lambda seen: None),
    "test": (tuple(fit_arguments("{place}", "{here}/w/out", "{place}/run")), "run_folder", lambda seen: None),
}
AGAIN = {"predict": "--resume=true", "sweep": "--resume=true", "fit": "--ckpt_path=last", "adapt": "--resume=true"}
REPEATABLE = ("tune", "compare", "validate", "test")  # write over what is there
SPACE = "No space|space left|disk"


def cases(random: Random) -> Iterator[Case]:
    for command in WRITERS:
        yield from full(command, random)
        yield from unwritable(command)
        yield two_writers(command)
        yield from stopped(command, random)
    yield terminated()
    yield from devices()


def arguments_of(command: str) -> tuple[str, ...]:
    """Return the arguments with outputs below {here}/w."""
    arguments = WRITERS[command][0]
    return tuple(a.replace("{here}/out", "{here}/w/out").replace("{here}/model", "{here}/w/model") for a in arguments)


def prepare(here: Path) -> None:
    (here / "w").mkdir()
    shutil.copytree(here.parent / "llama", here / "w" / "model")
    own_task(here / "tasks")


def case(command: str, kind: str, what: str, right, around: Callable) -> Case:
    answers = ("w/out.jsonl", "w/.out.jsonl.settings.json")  # those that are begun stay, with how they were begun
    leaves = (*answers, "w/out", "w/out.json", "w/out.png", "w/model", "w/second", "w/second.err")
    return Case(command, kind, what, arguments_of(command), right, prepare, around, leaves, leaves)


def full(command: str, random: Random) -> Iterator[Case]:
    """Yield full disks: an error, after which the command, or its way to resume, completes the output."""
    _, _, whole = WRITERS[command]
    for room in (0, int(10 ** random.uniform(1.5, 4)), int(10 ** random.uniform(3, 6))):
        right = either(refused(SPACE, check=goes_on(command)), done(whole))
        yield case(command, "full disk", f"{room} bytes", right, lambda here, room=room: full_disk(here / "w", room))


def goes_on(command: str) -> Check:
    """Check that the same command, or its way to resume, then completes the output."""
    whole = WRITERS[command][2]

    def check(seen: Seen) -> str | None:
        line = Case(command, "", "", arguments_of(command), refused()).command_line(seen.here)
        code = main(line)
        if code != 0 and command in ("sweep", "inspect", "evaluate", "predict", "adapt", "fit"):
            more = AGAIN.get(command, "--overwrite=true")
            code = main([*line, more])
        if code == 2 and command == "adapt":
            return None  # it does not write into a folder that holds something, and says so
        return f"then {command} ends with {code}" if code != 0 else whole(seen)

    return check


def unwritable(command: str) -> Iterator[Case]:
    """Yield a read-only disk: refused by name before any work."""
    _, field, _ = WRITERS[command]
    right = refused(field, check=lambda seen: "began to work" if "100%" in seen.err else None)
    yield case(command, "read-only", "all of it", right, lambda here: read_only(here / "w"))


def two_writers(command: str) -> Case:
    """Return a case of two simultaneous writers: one is refused by name or both end, and the output is complete."""
    _, field, whole = WRITERS[command]

    def check(seen: Seen) -> str | None:
        other = (seen.here / "second").read_text()
        said = (seen.here / "second.err").read_text()
        if "Traceback" in said:
            return f"the second: {said[-200:]!r}"
        codes = sorted([str(seen.code), other])
        if codes != ["0", "2"] and (codes != ["0", "0"] or command not in REPEATABLE):
            return f"exit codes {codes}"
        return whole(seen)

    right = either(done(check), refused(field, check=check))
    line = Case(command, "", "", arguments_of(command), refused())
    found = case(command, "two writers", "at once", right, lambda here: second_writer(line.command_line(here), here))
    return Case(
        **{
            **vars(found),
            "makes": (*found.makes, "second", "second.err"),
            "leaves": (*found.leaves, "second", "second.err"),
        }
    )


def stopped(command: str, random: Random) -> Iterator[Case]:
    """Yield Ctrl-C at random moments: one line of output, and the command can be repeated."""
    _, _, whole = WRITERS[command]
    for _ in range(3):
        after = random.uniform(0.0, 0.7)
        right = either(done(goes_on(command), code=130), done(whole))
        yield case(
            command,
            "Ctrl-C",
            f"after {after:.2f} s",
            right,
            lambda here, s=after: signalled(signal.SIGINT, lambda: True, s),
        )


def terminated() -> Case:
    """Return a case of SIGTERM during a fit, which must save as Ctrl-C does."""

    def check(seen: Seen) -> str | None:
        path = seen.here / "w" / "out" / "checkpoints" / "last.ckpt"
        if not path.is_file():
            return "nothing was saved"
        step = torch.load(path, weights_only=True)["global_step"]
        return None if step > 1 else f"saved step {step}"

    def begun(here: Path) -> Callable[[], bool]:
        return lambda: (here / "w" / "steps").is_file() and len((here / "w" / "steps").read_bytes()) > 10

    saved = either(*(done(check, code=code) for code in (130, 143)))
    found = case("fit", "SIGTERM", "in the middle", saved, lambda here: signalled(signal.SIGTERM, begun(here)))
    counting = "class_path: benchmarks.bad_input.probe.SeenText, init_args: {path: '{here}/w/steps'}"
    counted = f"--trainer.callbacks={{{counting}}}"
    more = ("--trainer.max_steps=2000", "--checkpoint.every_n_train_steps=1000000", counted)
    return Case(**{**vars(found), "arguments": (*FIT, *more), "makes": (*found.makes, "w/steps")})


def devices() -> Iterator[Case]:
    """Yield outputs that are devices."""
    few = ("--prompts={place}/prompts.txt", "--model={place}/llama", "--max_new_tokens=4", "--device=cpu")
    yield Case("predict", "device", "/dev/full", (*few, "--output=/dev/full"), refused("output|/dev/full|space"))
    yield Case("predict", "device", "/dev/null", (*few, "--output=/dev/null"), done())
    yield Case(
        "predict",
        "device",
        "a link to /dev/full",
        (*few, "--output={here}/o.jsonl"),
        refused("output|o.jsonl|space"),
        lambda here: (here / "o.jsonl").symlink_to("/dev/full"),
    )
    yield Case(
        "evaluate",
        "device",
        "/dev/full",
        (*BASES["evaluate"][0], "--output=/dev/full", "--overwrite=true"),
        refused("output|space"),
        lambda here: own_task(here / "tasks"),
    )
