"""Every command and program of the README is one that this version understands."""

import functools
import re
import shlex
from pathlib import Path

import pytest

from lskip.cli import commands, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    lskip (.+)$", README, re.M)
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.S)


def test_there_are_commands_of_each_kind():
    kinds = {"fit", "validate", "generate", "predict", "export", "adapt"}
    kinds |= {"inspect", "sweep", "tune", "evaluate", "compare"}
    assert {command.split()[0] for command in COMMANDS} == kinds
    assert len(PROGRAMS) >= 2


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[0] in ("fit", "validate")])
def test_training_command_parses(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as left:
        main([*shlex.split(command), "--print_config"])
    assert left.value.code == 0
    assert "model:" in capsys.readouterr().out


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[0] not in ("fit", "validate")])
def test_plain_command_parses(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    called = []
    function = commands.command_named(command.split()[0])
    stand_in = functools.wraps(function)(lambda *lists, **arguments: called.append(arguments))
    monkeypatch.setattr(commands, "command_named", lambda name: stand_in)
    assert main(shlex.split(command)) == 0
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
