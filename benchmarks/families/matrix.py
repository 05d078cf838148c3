"""The table of families and features in docs/families.md, from a run of tests/models/test_families.py.

python -m benchmarks.families.matrix            runs the tests and writes the table
python -m benchmarks.families.matrix --check    runs the tests; the exit code is 1 if the table differs
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import transformers

from benchmarks.command_line import command_parser
from lskip.models.families import FAMILIES

ROOT = Path(__file__).parents[2]
TESTS, PAGE = ROOT / "tests" / "test_families.py", ROOT / "docs" / "families.md"
BEGIN, END = "<!-- written by benchmarks/families/matrix.py -->\n", "<!-- end -->\n"
COLUMNS = {
    "train": "test_train",
    "fixed exit": "test_fixed_exit",
    "self-speculative": "test_self_speculative",
    "batch": "test_batch",
    "export": "test_export",
}


class Outcomes:
    """Pytest plugin: (test, family) -> passed, failed or skipped."""

    def __init__(self):
        self.by_cell: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report) -> None:
        found = re.fullmatch(r".*::(\w+)\[(\w+)\]", report.nodeid)
        # A test that breaks while it is set up or cleaned up has no call that passed.
        if found and (report.when == "call" or not report.passed):
            self.by_cell[found[1], found[2]] = report.outcome


def run_tests() -> Outcomes:
    outcomes = Outcomes()
    pytest.main([str(TESTS), "-q", "-k", " or ".join(COLUMNS.values())], plugins=[outcomes])
    return outcomes


def table(by_cell: dict[tuple[str, str], str]) -> str:
    """Markdown, a row a family. A cell whose test did not run says so."""
    words = {"passed": "yes", "failed": "**no**", "skipped": "not run here"}
    lines = [f"| family (`model_type`) | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family in FAMILIES:
        cells = [words[by_cell.get((test, family), "skipped")] for test in COLUMNS.values()]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"With transformers {transformers.__version__}.", ""])


def with_table(page: str, written: str) -> str:
    """The page with what stands between its two marks replaced.

    Raises:
        ValueError: a mark is missing.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE}: needs the lines {BEGIN.strip()!r} and {END.strip()!r}, the table's place")
    return f"{before}{begin}\n{written}\n{end}{after}"


def main() -> None:
    parser = command_parser("benchmarks.families.matrix", __doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    new = with_table(page, "")  # a page without marks is known before the tests run
    new = with_table(page, table(run_tests().by_cell))
    if check and new != page:
        sys.exit(f"{PAGE}: is not what the tests say; run python -m benchmarks.families.matrix")
    if not check:
        PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
