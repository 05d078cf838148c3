"""The help of fit, validate and test names what lskip does, and shows the arguments of the data."""

import inspect
import subprocess
import sys

import pytest

from lskip.cli import main
from lskip.data import TextData


def help_of(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    assert left.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_of_the_data_is_that_of_the_default_class(capsys):
    shown = help_of(capsys, "fit", "--data.help")
    assert all(f"--data.{name}" in shown for name in inspect.signature(TextData).parameters)


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_help_offers_no_checkpoint_that_is_refused(capsys, tmp_path, command):
    shown = help_of(capsys, command, "--help")
    assert "--data.help" in shown and "--data.source" in shown
    for word in ("best", "hpc", "registry"):
        assert f'"{word}"' not in shown and f"{word}:" not in shown
        assert main([command, "--model=smollm2", f"--run_folder={tmp_path}", f"--ckpt_path={word}"]) == 2
        assert f"ckpt_path: '{word}'" in capsys.readouterr().err


def test_training_does_not_wait_for_the_import_of_decoding():
    code = "import sys, lskip.cli.fit; print([name for name in sys.modules if name.startswith('lskip.inference')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
