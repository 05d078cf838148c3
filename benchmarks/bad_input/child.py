"""Running of a case in a forked process, with limits on time and memory."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.bad_input.verdict import Case, Seen, judge
from lskip.cli import main
from lskip.cli.commands import MODULES

MEMORY = 3 * 2**30  # bytes of addresses that a case may take beyond what is there when it begins
MOST_MEBIBYTES = 1000  # that it may take beyond what is in memory when it begins
LARGEST_KEPT = 8 * 2**20  # bytes of a file that are looked at for changes


ALWAYS = ("lskip.cli.fit", "jinja2", "gguf", "transformers.models.llama.modeling_llama")
LAZY = {
    "evaluate": ("lm_eval.evaluator", "lm_eval.tasks", "lskip.evaluation.lm_eval.exit_model"),
    "compare": ("tensorboard.backend.event_processing.event_accumulator", "matplotlib.pyplot"),
    "inspect": ("matplotlib.image", "torch.utils.tensorboard"),
    "serve": ("uvicorn", "lskip.serving.app"),
    "fit": ("peft", "pyarrow.parquet", "transformers.models.gpt2.modeling_gpt2"),
}
# beginning of Verdict.wrong -> kind
KINDS = {
    "traceback": "traceback",
    "hang": "hang",
    "crash": "crash",
    "memory": "memory",
    "exit code 0": "not refused",
    "exit code": "refused what is right",
    "wrong effect": "wrong effect",
    "ran": "ran a stranger's code",
    "left": "left something behind",
    "changed": "changed an input",
}


@dataclass(frozen=True)
class Verdict:
    """The outcome of a case; `wrong` is None if all is right."""

    wrong: str | None
    seconds: float
    mebibytes: int
    said: str

    @property
    def kind(self) -> str:
        """The kind of outcome: "right", "sentence", or one of KINDS."""
        if self.wrong is None:
            return "right"
        return next((kind for start, kind in KINDS.items() if self.wrong.startswith(start)), "sentence")


def import_for(commands: set[str]) -> None:
    """Import what these commands import when they run, so that forked processes need not."""
    used = {MODULES[command] for command in commands & MODULES.keys()}
    for name in {*used, *ALWAYS, *(name for command in commands for name in LAZY.get(command, ()))}:
        import_module(name)
    gc.collect()
    gc.freeze()  # children then need not collect these objects


def in_child(act: Callable[[], Any], log: Path) -> Any:
    """Return the JSON value that `act` computes in a forked process; RuntimeError with its log if it fails."""
    answer = log.with_suffix(".json")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for stream in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            answer.write_text(json.dumps(act()))
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1] != 0:
        raise RuntimeError(f"bad_input: nothing to try bad input on:\n{_read(log)[-3000:]}")
    return json.loads(answer.read_text())


def run_case(case: Case, here: Path, seconds: float) -> Verdict:
    """Run a case in a forked process, which is killed after `seconds`."""
    here.mkdir()
    report = here.parent / f"{here.name}.json"
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        _become_the_case(case, here, report)
    usage = _wait(child, began + seconds)
    spent = time.perf_counter() - began
    error = _read(here.parent / f"{here.name}.err")
    mebibytes = 0 if usage is None else usage.ru_maxrss // 1024
    if usage is None:
        return Verdict(f"hang: {_where(error)}", spent, mebibytes, error[-600:])
    if not report.exists():
        return Verdict(f"crash: {error[-300:]!r}", spent, mebibytes, error[-600:])
    found = json.loads(report.read_text())
    is_more = mebibytes > MOST_MEBIBYTES + found["mebibytes_before"]
    wrong = found["wrong"] or (f"memory: {mebibytes} MiB" if is_more else None)
    return Verdict(wrong, spent, mebibytes, found["said"])


def _own_mebibytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20


def _wait(child: int, end: float) -> resource.struct_rusage | None:
    """Wait for the child and return its resource usage; None if it had to be killed."""
    asked = killed = False
    while True:
        done, _, usage = os.wait4(child, os.WNOHANG)
        now = time.perf_counter()
        if done or now > end + 10:
            _kill_group(child)  # what it has started
            return None if killed else usage
        if now > end and not asked:
            os.kill(child, signal.SIGUSR2)  # it writes where it is
            asked = True
        if now > end + 0.5 and not killed:
            _kill_group(child)
            os.kill(child, signal.SIGKILL)
            killed = True
        time.sleep(0.005)


def _kill_group(child: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)


def _where(error: str) -> str:
    """Return the innermost line of lskip in a stack written by faulthandler."""
    lines = [line.strip() for line in error.splitlines() if "/lskip/" in line and "File" in line]
    return lines[0] if lines else error[-200:]


def _become_the_case(case: Case, here: Path, report: Path) -> None:
    """Run the case and leave the process."""
    try:
        os.setpgid(0, 0)
        out, err = (here.parent / f"{here.name}.{name}" for name in ("out", "err"))
        for path, stream in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (open(stream, "w", encoding="utf-8", closefd=False) for stream in (1, 2))  # noqa: SIM115
        faulthandler.register(signal.SIGUSR2, all_threads=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(here)
        case.prepare(here)
        before, mebibytes_before = contents(here), _own_mebibytes()
        _limit_memory()
        code = _exit_code(case, here)
        sys.stdout.flush()
        sys.stderr.flush()
        seen = Seen(code, _read(out), _read(err), here)
        wrong = judge(case, seen, before, contents(here))
        said = seen.sentence[-600:]
        report.write_text(json.dumps({"wrong": wrong, "said": said, "mebibytes_before": mebibytes_before}))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(0)


def _exit_code(case: Case, here: Path) -> int | None:
    code = None
    try:
        with case.around(here):
            code = main(case.command_line(here))
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException as error:
        if code is None or not isinstance(error, KeyboardInterrupt):  # a signal that came too late
            traceback.print_exc()
            return None
    return code


def _limit_memory() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))


def contents(folder: Path) -> dict[str, bytes]:
    """Return {relative path: content} of a folder; a link's content is its target, a folder's is b"/"."""
    found = {}
    for parent, folders, names in os.walk(folder):
        base = Path(parent)
        found |= {str((base / name).relative_to(folder)): b"/" for name in folders}
        for name in names:
            path = base / name
            if path.is_symlink():
                found[str(path.relative_to(folder))] = os.fsencode(os.readlink(path))
            elif path.is_file() and path.stat().st_size <= LARGEST_KEPT:
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace") if path.exists() else ""
