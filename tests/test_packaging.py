"""What a pip-installed user gets: the list of packages is written by hand, so it is compared with the folders."""

import importlib.util
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_folder_is_packaged():
    ours = ("lskip", "callbacks", "configs")
    folders = [path for top in ours for path in [ROOT / top, *sorted((ROOT / top).rglob("*"))] if path.is_dir()]
    names = {".".join(path.relative_to(ROOT).parts) for path in folders if path.name != "__pycache__"}
    expected = {name if name.startswith("lskip") else f"lskip.{name}" for name in names}
    assert set(SETUPTOOLS["packages"]) == expected


def test_callbacks_are_found_from_the_checkout():
    assert importlib.util.find_spec("lskip.callbacks").origin == str(ROOT / "callbacks" / "__init__.py")
