"""The table of families: from what tests said to the page, and no row that the page lacks."""

from types import SimpleNamespace

import pytest

from lskip.models.families import FAMILIES

pytestmark = pytest.mark.usefixtures("process_settings")


def report(nodeid, when, outcome):
    return SimpleNamespace(nodeid=nodeid, when=when, outcome=outcome, passed=outcome == "passed")


def test_a_cell_says_what_its_test_said():
    from benchmarks.families.matrix import Outcomes, table

    outcomes = Outcomes()
    for nodeid, when, outcome in [
        ("tests/models/test_families.py::test_train[llama]", "call", "passed"),
        ("tests/models/test_families.py::test_train[llama]", "teardown", "passed"),
        ("tests/models/test_families.py::test_batch[llama]", "call", "failed"),
        ("tests/models/test_families.py::test_export[llama]", "setup", "failed"),
        ("tests/models/test_families.py::test_train[opt]", "call", "passed"),
        ("tests/models/test_families.py::test_train[opt]", "teardown", "failed"),
        ("tests/models/test_families.py::test_longrope", "call", "failed"),
    ]:
        outcomes.pytest_runtest_logreport(report(nodeid, when, outcome))
    rows = {line.split("|")[1].strip(): line for line in table(outcomes.by_cell).splitlines() if line.startswith("|")}
    assert rows["llama"] == "| llama | yes | not run here | not run here | **no** | **no** |"
    assert rows["opt"] == "| opt | **no** | not run here | not run here | not run here | not run here |"


def test_only_what_stands_between_the_marks_is_written():
    from benchmarks.families.matrix import BEGIN, END, with_table

    page = with_table(f"before\n{BEGIN}old\n{END}after\n", "new")
    assert page == f"before\n{BEGIN}\nnew\n{END}after\n" and with_table(page, "new") == page
    with pytest.raises(ValueError, match="needs the lines"):
        with_table("before\n", "new")


def test_the_page_has_a_row_for_every_family():
    from benchmarks.families.matrix import BEGIN, END, PAGE

    written = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert [line.split("|")[1].strip() for line in written.splitlines() if line.startswith("|")][2:] == list(FAMILIES)
