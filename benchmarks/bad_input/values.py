"""Bad and good values of each kind of option, defined independently of lskip."""

from __future__ import annotations

import os
from dataclasses import dataclass

# (kind of fault, value). Bytes that are no UTF-8 arrive on the command line as lone surrogates.
NOT_UTF8 = os.fsdecode(b"\xff\xfe")
ODD_TEXTS = (
    ("unicode", "🙂"),
    ("unicode", "2\u202e3"),
    ("unicode", NOT_UTF8),
    ("unicode", "x\u2028y"),
    ("control", "\x1b[2J\x1b]0;owned\x07"),
    ("control", "a\nb"),
    ("long", "x" * 100_000),
    ("nesting", "[" * 3000),
    ("nesting", "{a: " * 500),
    ("alias", "{a: &a [1], b: &b [*a, *a, *a], c: [*b, *b, *b]}"),
    ("tag", "!!python/object/apply:os.system ['touch MARK']"),
    ("class", '{"class_path": "os.system", "init_args": {"command": "touch MARK"}}'),
    ("class", '{"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "MARK"]}}'),
)
NO_NUMBERS = (
    ("type", "x"),
    ("type", "[1, 2]"),
    ("type", "{a: 1}"),
    ("type", "--"),
    ("type", "1,5"),
    ("type", "2 3"),
    ("missing", ""),
    ("NaN", "nan"),
    ("NaN", ".nan"),
    ("huge", "inf"),
    ("huge", ".inf"),
    ("huge", "-.inf"),
    ("huge", "9" * 5000),
)
CLASSES = (
    "os.system",
    "subprocess.Popen",
    "subprocess.check_output",
    "builtins.exec",
    "builtins.eval",
    "pathlib.Path.touch",
    "shutil.rmtree",
    "functools.partial",
    "lskip.cli.entry.main",
    "torch.load",
    "runpy.run_path",
)


@dataclass(frozen=True)
class Domain:
    """The values of an option.

    Attributes:
        bad: (kind of fault, value as it is typed) each.
        good: values that must be taken.
    """

    bad: tuple[tuple[str, str], ...]
    good: tuple[str, ...] = ()


def whole(low: int, high: int | None = None, null: bool = False, good: tuple = (), also: tuple = ()) -> Domain:
    """Whole numbers from `low` to `high`; of `good` each must be taken, `also` is refused as well."""
    beyond = [low - 1, -(10**30)] if low > 0 or low == 0 else [low - 1]
    beyond += [] if high is None else [high + 1, 10**30]
    bad = [*NO_NUMBERS, *ODD_TEXTS, ("type", "1.5"), ("type", "2.5e0"), *(("range", str(value)) for value in beyond)]
    bad += [] if null else [("missing", "null")]
    return Domain((*bad, *also), tuple(map(str, good)))


def real(
    low: float | None = None,
    high: float | None = None,
    low_too: bool = True,
    high_too: bool = True,
    null: bool = False,
    good: tuple = (),
    also: tuple = (),
    infinite: bool = False,
) -> Domain:
    """Numbers from `low` to `high`, these among them or not; `infinite`: also without end."""
    beyond = [] if low is None else [low - 0.5, -1e30, *([] if low_too else [low])]
    beyond += [] if high is None else [high + 0.5, 1e30, *([] if high_too else [high])]
    endless = {"inf", ".inf", "-.inf", "1e400", "9" * 5000}
    bad = [*NO_NUMBERS, *ODD_TEXTS, ("huge", "1e400"), *(("range", repr(value)) for value in beyond)]
    bad = [each for each in bad if not (infinite and each[1] in endless)]
    bad += [] if null else [("missing", "null")]
    return Domain((*bad, *also), tuple(map(str, good)))


def flag(null: bool = False, good: tuple = ()) -> Domain:
    """true or false."""
    bad = [*ODD_TEXTS, ("type", "maybe"), ("type", "2"), ("type", "[true]"), ("type", "1.5"), ("missing", "")]
    bad += [] if null else [("missing", "null")]
    return Domain(tuple(bad), good)


def choice(*names: str, null: bool = False, good: tuple = ()) -> Domain:
    """One of some names."""
    near = [names[0][:-1], f"{names[0]}x", f" {names[0]};"]
    bad = [*ODD_TEXTS, ("type", "3"), ("type", f"[{names[0]}]"), ("missing", "")]
    bad += [("choice", name) for name in near] + ([] if null else [("missing", "null")])
    return Domain(tuple(bad), good)


def wholes(low: int, good: tuple = ()) -> Domain:
    """A list of whole numbers from `low` up; not an empty one."""
    texts = ["x", "[x]", "[[2]]", "[1.5]", "[null]", "{a: 2}", "[2"]
    bad = [*ODD_TEXTS, *(("type", text) for text in texts)]
    bad += [("missing", "[]"), ("range", f"[{low - 1}]"), ("range", f"[2,{low - 1}]"), ("NaN", "[.nan]")]
    return Domain(tuple(bad), good)


def names(*allowed: str, good: tuple = ()) -> Domain:
    """A list of some of these; not an empty one."""
    texts = ["x", "[x]", f"[[{allowed[0]}]]", "[1]", "[null]", f"{{a: {allowed[0]}}}", f"[{allowed[0]}"]
    bad = [*ODD_TEXTS, *(("type", text) for text in texts), ("missing", "[]"), ("choice", f"[{allowed[0]},nope]")]
    return Domain(tuple(bad), good)


def a_class(good: tuple = ()) -> Domain:
    """A class by its name, which brings no code of anybody else."""
    wrong = ["Nope", "nope.Nope", "5", "[]", "os", "builtins.int", "torch.nn.Linear", "collections.OrderedDict", "."]
    objects = ["{class_path: 5}", "{class_path: [os.system]}", "{init_args: {a: 1}}", "{class_path: ''}"]
    bad = [*ODD_TEXTS, *(("class", text) for text in [*wrong, *objects, *CLASSES]), ("missing", "")]
    named = (("class", f'{{"class_path": "{path}", "init_args": {{"command": "touch MARK"}}}}') for path in CLASSES)
    return Domain((*bad, *named), good)


def file_to_read(good: tuple = ()) -> Domain:
    """A file that is there."""
    named = ["{here}/none", "{here}/empty", "{place}/prompts.txt/x", "/dev/zero", "/dev/null", "/proc/self/mem"]
    links = ["{here}/loop", "{here}/dangling", "{here}/fifo", "{here}/fifo.jsonl", "{here}/loop.jsonl"]
    odd = ["~nobody_here/x.jsonl", "", "x" * 5000 + ".jsonl", "🙂", "a\nb.txt", NOT_UTF8, "..", "\x1b[2J.txt", "[a, b]"]
    by_kind = {"missing": named, "link": links, "path": odd}
    return Domain(tuple((kind, path) for kind, paths in by_kind.items() for path in paths), good)


def place_to_write(good: tuple = ()) -> Domain:
    """A file or folder that can be made."""
    named = ["/proc/lskip/x", "{place}/prompts.txt/x", "{here}/loop/x", "/dev/null/x", "{here}/fifo/x"]
    odd = ["", "{here}/" + "x" * 300, "x" * 5000]
    return Domain((*(("missing", path) for path in named), *(("path", path) for path in odd if path not in good)), good)


def text(good: tuple = ()) -> Domain:
    """Any text but none."""
    return Domain((("missing", ""),), good)


def texts(good: tuple = ()) -> Domain:
    """A list of texts, none of them empty."""
    wrong = ["[[a]]", "[1]", "[null]", "['a', '']", "[true]", "[1.5]", "[{a: b}]", "['']"]
    return Domain(tuple(("type", each) for each in wrong), good)


def anything(good: tuple = ()) -> Domain:
    """Nothing is refused for itself."""
    return Domain((), good)
