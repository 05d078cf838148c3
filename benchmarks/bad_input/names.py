"""Names of files and folders with a special meaning for a library, a markup language, a shell or a terminal."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from benchmarks.bad_input.checks import answers, both, holds, numbered, prints_the_answer, trained
from benchmarks.bad_input.data import DOCUMENTS, FIT, lines, trained_on
from benchmarks.bad_input.fixtures import PROMPTS, fit_arguments
from benchmarks.bad_input.options import BASES, own_task
from benchmarks.bad_input.verdict import Case, Check, Seen, done, either, refused

NAMES = (
    *(
        "d[1]",
        "d*",
        "d?",
        "{d}",
        "d::e",
        "d e",
        "é🙂",
        "d#e",
        "d%20e",
        "d&e",
        "$(touch MARK)",
        "`touch MARK`",
        "; touch MARK",
    ),
    *(
        "[red]d",
        "[b]d[-b]",
        "<b>d<b>",
        "d\ne",
        "d\x1b[2Je",
        "\u202ed",
        "d'e",
        'd"e',
        "d\\e",
        "--d",
        "d=e",
        "d,e",
        "null",
        "5",
    ),
    *("hub:d", "file:d", "d.tar", "con", "d" * 200),
)


def cases(random: Random) -> Iterator[Case]:
    for name in NAMES:
        for make in random.sample(MAKERS, 3):
            yield make(name)
    yield from page()


# A name in each place where one may be given; a file of a like name lies beside it, which must not be taken.


def data_file(name: str) -> Case:
    """Return a case of a data file of this name beside one of other content."""

    def prepare(here: Path) -> None:
        (here / f"{name}.jsonl").write_bytes(lines())
        (here / "d1.jsonl").write_bytes(lines([{"text": "OTHER " * 9}] * 3))

    return data_case(f"data {name[:20]!a}", f"{name}.jsonl", prepare)


def data_folder(name: str) -> Case:
    """Return a case of a data folder of this name beside one of other content."""

    def prepare(here: Path) -> None:
        for folder, content in ((name, lines()), ("d1", lines([{"text": "OTHER " * 9}] * 3))):
            (here / folder).mkdir()
            (here / folder / "train.jsonl").write_bytes(content)

    return data_case(f"data folder {name[:20]!a}", name, prepare)


def data_case(what: str, source: str, prepare: Callable[[Path], None]) -> Case:
    right = either(done(trained_on(DOCUMENTS)), refused("source"))
    arguments = (*FIT, f"--data.source={{here}}/{source}")
    return Case("fit", "names", what, arguments, right, prepare, makes=("out", "seen"))


def model_folder(name: str) -> Case:
    arguments = (f"--model={{here}}/{name}", "--prompt=def f(x):", "--max_new_tokens=4", "--device=cpu")
    prepare = lambda here: shutil.copytree(here.parent / "llama", here / name)  # noqa: E731
    return Case(
        "generate",
        "names",
        f"model {name[:20]!a}",
        arguments,
        either(done(prints_the_answer()), refused("model")),
        prepare,
    )


def run_folder(name: str) -> Case:
    arguments = (*fit_arguments("{place}", f"{{here}}/{name}"), "--checkpoint.every_n_train_steps=1")
    right = either(done(trained(2, folder=name)), refused("run_folder"))
    return Case("fit", "names", f"run {name[:20]!a}", arguments, right, makes=(name,))


def prompts_file(name: str) -> Case:
    prepare = lambda here: (here / f"{name}.txt").write_text("\n".join(PROMPTS))  # noqa: E731
    arguments = (
        f"--prompts={{here}}/{name}.txt",
        f"--output={{here}}/{name}.jsonl",
        "--model={place}/llama",
        "--max_new_tokens=4",
    )
    right = either(done(answers(numbered(PROMPTS), file=f"{name}.jsonl")), refused("prompts|output"))
    return Case("predict", "names", f"prompts {name[:20]!a}", arguments, right, prepare, makes=(f"{name}.jsonl",))


def exported(name: str) -> Case:
    right = either(done(holds("model.safetensors", "README.md", folder=name)), refused("output"))
    arguments = ("--model={place}/llama", f"--output={{here}}/{name}", "--exit_layer=2")
    return Case("export", "names", f"export {name[:20]!a}", arguments, right, makes=(name,))


def inspected(name: str) -> Case:
    def prepare(here: Path) -> None:
        shutil.copytree(here.parent / "llama", here / name)
        (here / f"{name}.jsonl").write_bytes(lines())

    arguments = (
        f"--model={{here}}/{name}",
        f"--data={{here}}/{name}.jsonl",
        "--output={here}/out",
        "--block_size=16",
        "--num_blocks=2",
    )
    right = either(done(both(holds("report.json", "settling.html"), no_markup(name))), refused("model|data"))
    return Case("inspect", "names", f"inspect {name[:20]!a}", arguments, right, prepare)


def compared(name: str) -> Case:
    prepare = lambda here: shutil.copytree(here.parent / "run", here / name)  # noqa: E731
    arguments = (f"{{here}}/{name}", "--figure={here}/out.png")
    right = either(done(both(holds("out.png", folder="."), named_whole(name))), refused("runs|no such option"))
    return Case("compare", "names", f"compare {name[:20]!a}", arguments, right, prepare, makes=("out.png",))


def swept(name: str) -> Case:
    def prepare(here: Path) -> None:
        shutil.copytree(here.parent / "llama", here / name)
        shutil.copy(here.parent / "task.jsonl", here / f"{name}.jsonl")

    base = tuple(each for each in BASES["sweep"][0] if not each.startswith(("--task.path", "--model")))
    arguments = (*base, f"--model={{here}}/{name}", f"--task.path={{here}}/{name}.jsonl")
    return Case(
        "sweep",
        "names",
        f"sweep {name[:20]!a}",
        arguments,
        either(done(holds("sweep.json", "sweep.png")), refused("model|path")),
        prepare,
    )


def tuned(name: str) -> Case:
    def prepare(here: Path) -> None:
        shutil.copytree(here.parent / "llama", here / name)
        shutil.copy(here.parent / "task.jsonl", here / f"{name}.jsonl")

    base = tuple(each for each in BASES["tune"][0] if not each.startswith(("--task.path", "--model")))
    arguments = (*base, f"--model={{here}}/{name}", f"--task.path={{here}}/{name}.jsonl")
    right = either(done(holds("tuned.json", folder=name)), refused("model|path"))
    return Case("tune", "names", f"tune {name[:20]!a}", arguments, right, prepare, makes=(name,))


def adapted(name: str) -> Case:
    arguments = (*BASES["adapt"][0], f"--output={{here}}/{name}")
    right = either(done(holds("adapter.safetensors", "metrics.json", folder=name)), refused("output"))
    return Case("adapt", "names", f"adapt {name[:20]!a}", arguments, right, makes=(name,))


def evaluated(name: str) -> Case:
    arguments = (*BASES["evaluate"][0], f"--output={{here}}/{name}.json", f"--include_path={{here}}/{name}")
    right = either(done(holds(f"{name}.json", folder=".")), refused("output|include_path|tasks"))
    return Case(
        "evaluate",
        "names",
        f"evaluate {name[:20]!a}",
        arguments,
        right,
        lambda here: own_task(here / name),
        makes=(f"{name}.json",),
    )


MAKERS = [
    *(data_file, data_folder, model_folder, run_folder, prompts_file, exported),
    *(inspected, compared, swept, tuned, adapted, evaluated),
]


def no_markup(name: str) -> Check:
    """Check that a page shows a name as text, not as markup."""

    def check(seen: Seen) -> str | None:
        page = (seen.here / "out" / "settling.html").read_text(encoding="utf-8")
        return f"{name!r} stands in the page as it is" if "<" in name and f"/{name}" in page else None

    return check


def named_whole(name: str) -> Check:
    """Check that a table shows a name in full, with markup as text and unprintable characters escaped."""

    def check(seen: Seen) -> str | None:
        if not name.isprintable() or len(name) > 30:
            return None
        return None if name in seen.out else f"{name!r} is not in the table"

    return check


def page() -> Iterator[Case]:
    """Yield texts with HTML, for the page of inspect."""
    for text in (
        "</script><script>open('MARK')</script>",
        "<img src=x onerror=alert(1)>",
        "<!--",
        "${alert(1)}",
        "&lt;b&gt;",
    ):

        def check(seen: Seen, text=text) -> str | None:
            page = (seen.here / "out" / "settling.html").read_text(encoding="utf-8")
            return f"{text!r} stands in the page as it is" if text in page and "<" in text else None

        arguments = (
            "--model={place}/llama",
            "--output={here}/out",
            "--data={place}/data.jsonl",
            "--block_size=16",
            f"--text={text}",
        )
        yield Case("inspect", "HTML", text, arguments, done(check))
