"""A seeded fuzz test: bad and odd input to every command, file and field of lskip, with the right outcome of each.

    python -m benchmarks.bad_input.run --out bad_input.json
    python -m benchmarks.bad_input.run --only 'predict · jsonl' --seed 5

A right outcome is either one sentence that names the field, with exit code 2, or an effect that is checked: the number
of lines, the texts of transformers, the text that a run was trained on. No case may show a traceback, hang, use a
gigabyte, call what a file names (it would leave a file MARK), change inputs, or leave files behind when refused.

Each case runs in a process forked from this one, which has imported what they need. Linux only. The first cases are
faults planted in lskip: the exit code is 3 if one of them is not detected. It is 1 if a case is wrong, or if a table of
allowed values misses an option of the command line.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.command_line import command_parser

os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
# Set before the imports: a forked process should have one thread.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.bad_input.cases import all_cases, chosen, options_without_cases
from benchmarks.bad_input.child import KINDS, Verdict, import_for, in_child, run_case
from benchmarks.bad_input.fixtures import make_place
from benchmarks.bad_input.planted import PLANTS, missed_plants
from benchmarks.bad_input.verdict import Case
from benchmarks.environment import environment
from lskip.cli.commands import MODULES
from lskip.utils.output_files import write_json

HANG = 30.0  # seconds
LIMIT = 900  # cases
COMMANDS = {*MODULES, "fit", "validate", "test", "plan", "configs"}
console = Console(width=140)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    cases = chosen(all_cases(options.seed), options.only, options.limit, options.seed)
    import_for({case.command for case in cases})
    place = Path(tempfile.mkdtemp(prefix="bad_input_", dir=options.folder))
    try:
        in_child(lambda: make_place(place), place / "place.log")
        missed = None if options.no_plants else missed_plants(place)
        verdicts = run_all(cases, place, options.hang_seconds, options.keep)
        unknown = in_child(options_without_cases, place / "options.log")
    finally:
        if not options.keep:
            shutil.rmtree(place, ignore_errors=True)
    print_outcome(cases, verdicts, missed, unknown)
    if options.out is not None:
        write_json(options.out, record_of(options, cases, verdicts, missed, unknown))
    wrong = any(verdict.wrong for verdict in verdicts)
    return 3 if missed else int(wrong or bool(unknown))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.bad_input.run", __doc__)
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of the cases")
    add("--limit", type=int, default=LIMIT, help="so many of the cases, drawn by the seed")
    add("--only", default="", metavar="TEXT", help="those whose names (command · kind · what) hold this text")
    add("--out", type=Path, help="JSON file to write")
    add("--hang_seconds", type=float, default=HANG, help="after which a case is a hang")
    add("--folder", type=Path, help="where the cases' folders are made; by default where temporary files go")
    add("--keep", action="store_true", help="leave the folders of wrong cases where they are")
    add("--no_plants", action="store_true", help="leave out the planted faults")
    return parser.parse_args(arguments)


def run_all(cases: list[Case], place: Path, seconds: float, keep: bool) -> list[Verdict]:
    """Return the verdicts of all cases; wrong ones are printed at once."""
    verdicts = []
    for number, case in enumerate(tqdm(cases, unit="case", mininterval=5)):
        here = place / f"{number:04d}"
        verdict = run_case(case, here, seconds)
        verdicts.append(verdict)
        if verdict.wrong is not None:
            tqdm.write(f"{case.name}\n  {in_words(case, here)}\n  {verdict.wrong}")
        if not keep or verdict.wrong is None:
            shutil.rmtree(here, ignore_errors=True)
    return verdicts


def in_words(case: Case, here: Path, longest: int = 100) -> str:
    """Return the command line for printing, with long arguments cut."""
    line = case.command_line(here)
    cut = [part if len(part) <= longest else f"{part[:longest]}…" for part in line]
    return f"lskip {shlex.join(cut)}".encode("unicode_escape").decode()


def command_of(case: Case) -> str:
    """Return the case's command, or "none" if there is no such command."""
    return case.command if case.command in COMMANDS else "none"


def print_outcome(
    cases: list[Case], verdicts: list[Verdict], missed: dict[str, str] | None, unknown: list[str]
) -> None:
    for name, of in (("command", command_of), ("kind", lambda case: case.kind)):
        console.print(table_of(name, of, cases, verdicts))
    seconds, mebibytes = (max((getattr(v, key) for v in verdicts), default=0) for key in ("seconds", "mebibytes"))
    right = sum(verdict.wrong is None for verdict in verdicts)
    console.print(f"{right} of {len(cases)} right; the slowest took {seconds:.1f} s, the largest {mebibytes} MiB")
    if missed is not None:
        console.print(f"planted faults: {len(PLANTS) - len(missed)} of {len(PLANTS)} seen", highlight=False)
    for name, seen in (missed or {}).items():
        console.print(f"planted and not seen: {name} ({seen})", markup=False)
    for name in unknown:
        console.print(f"no table says what may be given to {name}", markup=False)


def table_of(name: str, of: Callable[[Case], str], cases: list[Case], verdicts: list[Verdict]) -> Table:
    """Return a table of verdicts by command or by kind of input."""
    counts = Counter((of(case), verdict.kind) for case, verdict in zip(cases, verdicts, strict=True))
    found = [kind for kind in ("right", *KINDS.values(), "sentence") if any(key[1] == kind for key in counts)]
    table = Table(name, "cases", *found, title=f"By {name}", title_justify="left")
    for group in dict.fromkeys(map(of, cases)):
        total = sum(count for key, count in counts.items() if key[0] == group)
        table.add_row(group, str(total), *(str(counts[group, kind] or "") for kind in found))
    return table


def record_of(
    options: argparse.Namespace,
    cases: list[Case],
    verdicts: list[Verdict],
    missed: dict[str, str] | None,
    unknown: list[str],
) -> dict:
    """Return the record: environment, counts, and every wrong case."""
    pairs = list(zip(cases, verdicts, strict=True))
    counts = {
        name: {
            group: dict(Counter(v.kind for c, v in pairs if of(c) == group)) for group in dict.fromkeys(map(of, cases))
        }
        for name, of in (("commands", command_of), ("kinds", lambda case: case.kind))
    }
    return {
        **environment(torch.device("cpu")),
        "seed": options.seed,
        "only": options.only,
        "cases": len(cases),
        "right": sum(verdict.wrong is None for verdict in verdicts),
        "planted": None if missed is None else {"seen": len(PLANTS) - len(missed), "missed": missed},
        "options_without_cases": unknown,
        "slowest_seconds": round(max((verdict.seconds for verdict in verdicts), default=0), 1),
        **counts,
        "wrong": [
            {
                "case": case.name,
                "command": in_words(case, Path("HERE")),
                "wrong": ascii(verdict.wrong),
                "said": verdict.said,
            }
            for case, verdict in pairs
            if verdict.wrong is not None
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
