"""Every command and program of the README and the docs is one that this version understands."""

import functools
import re
import shlex
from pathlib import Path

import pytest

from lskip.cli import commands, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {"README.md": README, **{path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md")}}
COMMANDS = re.findall(r"^    lskip (.+)$", README, re.M)
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.S)
# One goes on with a run that is not there, others name classes of the reader's own.
ELSEWHERE = re.compile(r"--ckpt_path last|mine\.|…")
OF_DOCS = sorted({c for page in PAGES.values() for c in re.findall(r"^    lskip (.+)$", page, re.M)} - {*COMMANDS})
OF_DOCS = [command for command in OF_DOCS if not ELSEWHERE.search(command)]


TRAINING = ("fit", "validate", "test", "plan")


def test_there_are_commands_of_each_kind():
    kinds = {"fit", "validate", "generate", "predict", "export", "adapt"}
    kinds |= {"inspect", "sweep", "tune", "evaluate", "compare"}
    assert {command.split()[0] for command in COMMANDS} == kinds
    assert len(PROGRAMS) >= 2


@pytest.mark.parametrize("command", [c for c in COMMANDS + OF_DOCS if c.split()[0] in TRAINING])
def test_training_command_parses(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as left:
        main([*shlex.split(command, comments=True), "--print_config"])
    assert left.value.code == 0
    assert "model:" in capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS + OF_DOCS if c.split()[0] not in (*TRAINING, "configs")])
def test_plain_command_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    called = []
    function = commands.command_named(command.split()[0])
    stand_in = functools.wraps(function)(lambda *lists, **arguments: called.append(arguments))
    monkeypatch.setattr(commands, "command_named", lambda name: stand_in)
    assert main(shlex.split(command, comments=True)) == 0
    assert len(called) == 1


@pytest.mark.parametrize("program", PROGRAMS)
def test_program_imports_what_exists(program):
    imports = [line for line in program.splitlines() if line.startswith(("from ", "import "))]
    exec("\n".join(imports), {})
    compile(program, "README", "exec")


def test_files_named_in_the_readme_exist():
    named = re.findall(r"`((?:lskip|callbacks|configs|benchmarks)/[\w./]*)`", README)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    place = ROOT if name == "README.md" else ROOT / "docs"
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[name])]
    assert [link for link in links if link and "://" not in link and not (place / link).exists()] == []


def test_the_readme_is_short():
    assert len(README.split()) <= 1200
