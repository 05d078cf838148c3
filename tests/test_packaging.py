"""Installation by pip: the packages of the wheel, and a user's own classes in an empty folder."""

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import lskip.cli.main
from tests.conftest import make_config

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def test_every_folder_is_packaged():
    ours = ("lskip", "callbacks", "configs")
    folders = [path for top in ours for path in [ROOT / top, *sorted((ROOT / top).rglob("*"))] if path.is_dir()]
    names = {".".join(path.relative_to(ROOT).parts) for path in folders if path.name != "__pycache__"}
    expected = {name if name.startswith("lskip") else f"lskip.{name}" for name in names}
    assert set(SETUPTOOLS["packages"]) == expected


def test_callbacks_are_found_from_the_checkout_and_nothing_else_of_it():
    assert importlib.util.find_spec("lskip.callbacks").origin == str(ROOT / "callbacks" / "__init__.py")
    assert list(importlib.util.find_spec("lskip.configs").submodule_search_locations) == [str(ROOT / "configs")]
    for name in ("tests", "benchmarks", "docs"):
        assert importlib.util.find_spec(f"lskip.{name}") is None


def test_the_version_is_said_and_is_the_packages(capsys):
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "lskip.__version__"}
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert lskip.cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lskip {lskip.__version__}\n"


MINE = """
from lightning.pytorch import Callback
from helper import WORD
from lskip.curricula import ExitCurriculum
from lskip.data import TextData
from lskip.schedules import Schedule


class EveryOther(ExitCurriculum):
    def __init__(self, period: int = 2):
        self.period = period

    def is_on(self, step, total, block, num_layers):
        return block % self.period == 0


class Half(Schedule):
    needs_total = False

    def __call__(self, index, count):
        return 0.5


class Watch(Callback):
    def __init__(self, name: str = "x"):
        self.name = name

    def on_train_end(self, trainer, pl_module):
        print(self.name, WORD, pl_module.exit_weights.values, [round(rate, 2) for rate in pl_module.drop_rates.values])


class Texts(TextData):
    pass
"""
CONFIG = {
    "model": make_config(),
    "layer_dropout": {"p_max": 0.2, "depth": "mine.Half", "time": "Constant"},
    "early_exit_loss": {"curriculum": {"class_path": "mine.EveryOther", "init_args": {"period": 2}}},
    "data": {
        "class_path": "mine.Texts",
        "init_args": {"source": "docs.jsonl", "block_size": 16, "batch_size": 2, "cache_dir": "cache"},
    },
    "run_folder": "run",
    "trainer": {
        "max_steps": 2,
        "limit_val_batches": 2,
        "accelerator": "cpu",
        "callbacks": [{"class_path": "mine.Watch", "init_args": {"name": "WATCHED"}}],
    },
}
# Each would be imported in the place of the real one if the folder came first.
SHADOWS = ("yaml", "json", "torch", "lightning", "random", "pathlib", "jsonargparse", "tqdm")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a user's folder with mine.py, and with files that a stranger has put there."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    (folder / "helper.py").write_text("WORD = 'at the end'\n")
    rows = (json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n" * 4}) for i in range(60))
    (folder / "docs.jsonl").write_text("\n".join(rows))
    (folder / "own.yaml").write_text(json.dumps(CONFIG))
    for name in SHADOWS:
        (folder / f"{name}.py").write_text("open('MARK', 'w').close()\nraise ImportError('a stranger')\n")
    return folder


def run_in(folder: Path, *command: str, packages: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(packages), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )


def installed(tmp_path: Path) -> Path:
    """Return a folder with the files of this checkout's wheel, built from a copy, since building leaves files."""
    copy, wheels, packages = tmp_path / "copy", tmp_path / "wheels", tmp_path / "packages"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in files.decode().split("\0"):
        if name and not name.startswith(("docs/", "benchmarks/", "tests/")) and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, copy], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", packages, *wheels.iterdir()], check=True)
    return packages


@pytest.mark.kind("H2 own classes from the working directory", "H2", "M1")
@pytest.mark.skipif(int(version("setuptools").split(".")[0]) < 77, reason="too old to build lskip without a download")
def test_own_classes_train_in_an_empty_folder_from_an_installed_wheel(tmp_path, folder):
    packages = installed(tmp_path)
    lskip_command = str(packages / "bin" / "lskip")
    listed = run_in(folder, lskip_command, "configs", packages=packages)
    assert listed.returncode == 0 and listed.stdout.startswith("curriculum/all")
    (folder / "lskip.py").write_text("open('MARK', 'w').close()\n")

    trained = run_in(folder, lskip_command, "fit", "--config", "own.yaml", packages=packages)
    assert trained.returncode == 0, trained.stderr
    # Half of 0.2 in every block; exits 1 and 3 are on, of which the first weighs nothing, and the last always is.
    watched = next(line for line in trained.stdout.splitlines() if line.startswith("WATCHED"))
    assert watched.startswith("WATCHED at the end [0.0, 0.0, ") and watched.endswith("[0.1, 0.1, 0.1, 0.1]")
    assert not (folder / "MARK").exists()
    left = {path.name for path in folder.iterdir() if path.suffix != ".py"} - {"__pycache__"}
    assert left == {"cache", "docs.jsonl", "own.yaml", "run"}


@pytest.mark.kind("H2 own classes from the working directory", "H2")
def test_python_m_lskip_finds_own_classes_and_no_strangers_libraries(folder):
    failed = run_in(folder, "-m", "lskip", "validate", "--config", "own.yaml", "--data=mine.Gone", packages=ROOT)
    assert failed.stderr == "lskip validate: error: data: 'mine.Gone': module 'mine' has no attribute 'Gone'\n"
    assert not (folder / "MARK").exists()
