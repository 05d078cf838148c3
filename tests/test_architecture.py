"""The house: which room may import which, no circles, files and functions that fit a screen.

A room is a file or a folder at the top of lskip, callbacks/ among them; inside inference/ it is one of that folder's.
Imports for type checkers count. `python -m tests.test_architecture` prints the drawing.
"""

import ast
import shutil
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

METHOD = {"curricula", "flops", "layer_dropout", "losses", "low_rank", "optimization", "schedules", "targets"}
# What a room may import; whoever needs more says here why.
MAY_IMPORT = {
    "utils": set(),
    "targets": {"utils"},
    "losses": {"targets", "utils"},
    "models": {"utils", "losses"},  # readout and exit_heads compute losses
    **{room: {"models", "utils"} for room in METHOD - {"targets", "losses"}},
    "data": {"models", "utils"},
    "inference": {"models", "utils"},  # never Lightning, data, training or evaluation
    "training": {"data", "models", "utils", *METHOD},  # data: the tokenizer of a run against its data's
    "evaluation": {"data", "inference", "losses", "models", "utils"},  # losses: rows that fit in memory at once
    "callbacks": {"evaluation", "models", "training", "utils", *METHOD},
    "export": {"models", "utils"},
    "module": {"models", "training", "utils", *METHOD},
    "task_module": {"inference", "models", "module", "utils"},  # inference: exit criteria classify too
    "planning": {"models", "module", "training", "utils", *METHOD},
    "adapters": {"callbacks", "data", "inference", "models", "training", "utils", *METHOD},
    "serving": {"inference", "utils"},
    "cli": {
        *("callbacks", "data", "evaluation", "inference", "models", "module", "planning", "serving", "training"),
        "utils",
        *METHOD,
    },
    "__main__": {"cli"},
}
# Inside inference/: from the text down to the matrix, never back.
FLOORS = ["generator", "decoding", "drafting", "runners", "layers"]


def files(root: Path = ROOT) -> dict[str, Path]:
    """Return every module of the package by its dotted name, without the package's."""
    found = {"callbacks." + path.stem: path for path in (root / "callbacks").glob("*.py")}
    found |= {".".join(p.relative_to(root / "lskip").with_suffix("").parts): p for p in (root / "lskip").rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in found.items() if name != "__init__"}


def imports(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Return what each module imports of the package, in functions and for type checkers too."""
    return {name: _imports_of(path, modules) - {name} for name, path in modules.items()}


def _imports_of(path: Path, modules: dict[str, Path]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in named:
            name = name.removeprefix("lskip.") if name.startswith("lskip.") else ""
            found |= {each for each in (name, name.rpartition(".")[0]) if each in modules}
    return found


def arrows(graph: dict[str, set[str]], inside: str = "") -> dict[tuple[str, str], list[str]]:
    """Return the arrows between rooms, at the top or inside a folder, and the imports that each stands for."""
    found = defaultdict(list)
    for source, targets in graph.items():
        for target in targets:
            if source.startswith(inside) and target.startswith(inside):
                rooms = source.removeprefix(inside).split(".")[0], target.removeprefix(inside).split(".")[0]
                if rooms[0] != rooms[1]:
                    found[rooms].append(f"{source} -> {target}")
    return found


def cycle(edges) -> list[str] | None:
    """Return a circle among edges (source, target); None: there is none."""
    graph = defaultdict(set)
    for source, target in edges:
        graph[source].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def drawing(root: Path = ROOT) -> str:
    """Return folders, arrows between rooms and circles, in words."""
    modules = files(root)
    graph = imports(modules)
    lines = []
    for title, inside in (("lskip", ""), ("lskip.inference", "inference.")):
        found = arrows(graph, inside)
        rooms = sorted({room for pair in found for room in pair})
        lines.append(f"{title}: {len(rooms)} rooms, {len(found)} arrows, circle: {cycle(found) or 'none'}")
        lines += [f"  {room} -> {' '.join(sorted(b for a, b in found if a == room)) or '(nothing)'}" for room in rooms]
    edges = [(source, target) for source, targets in graph.items() for target in targets]
    return "\n".join([*lines, f"files: {len(modules)}, {len(edges)} imports, circle: {cycle(edges) or 'none'}"])


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return imports(files())


def test_no_room_imports_what_it_may_not(graph):
    print(drawing())
    assert [line for (a, b), lines in arrows(graph).items() if b not in MAY_IMPORT[a] for line in lines] == []


def test_inside_inference_imports_go_down(graph):
    found = arrows(graph, "inference.")
    back = [pair for pair in found if set(pair) <= set(FLOORS) and FLOORS.index(pair[0]) > FLOORS.index(pair[1])]
    assert [line for pair in back for line in found[pair]] == []
    assert cycle(found) is None


def test_no_file_is_in_a_circle(graph):
    assert cycle((source, target) for source, targets in graph.items() for target in targets) is None


def test_decoding_needs_no_lightning():
    forbidden = ("import lightning", "from lightning", "import datasets", "from datasets")
    named = ("inference", "models", "utils")
    lines = {f"{name}: {line}" for name, path in files().items() if name.startswith(named) for line in path.open()}
    assert [line for line in lines if line.partition(": ")[2].strip().startswith(forbidden)] == []


@pytest.mark.parametrize(
    ("place", "line", "said"),
    [
        ("utils/checks.py", "from lskip.models.decoder import Decoder", "utils.checks -> models.decoder"),
        ("inference/text.py", "from lskip.data import TextData", "inference.text -> data"),
        ("models/families.py", "import lskip.cli.entry", "models.families -> cli.entry"),
    ],
)
def test_an_import_against_the_rules_is_seen(tmp_path, place, line, said):
    for folder in ("lskip", "callbacks"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.safetensors", "*.pyc"))
    target = tmp_path / "lskip" / place
    target.write_text(f"{target.read_text()}\n\nif TYPE_CHECKING:\n    {line}\n")
    found = arrows(imports(files(tmp_path)))
    wrong = [each for (a, b), lines in found.items() if b not in MAY_IMPORT[a] for each in lines]
    assert said in wrong


def test_files_and_functions_fit_a_screen():
    """At most 300 lines a file, 60 a function."""
    long = []
    for name, path in files().items():
        text = path.read_text(encoding="utf-8")
        long += [f"{name}: {text.count(chr(10))} lines"] if text.count("\n") > 300 else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{name}.{node.name}: {node.end_lineno - node.lineno + 1} lines")
    assert long == []


if __name__ == "__main__":
    print(drawing())
