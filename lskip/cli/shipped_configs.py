"""`lskip configs`: list or copy the configs that come with lskip."""

import shutil
from pathlib import Path

from lskip.cli.config_files import shipped_config, shipped_configs
from lskip.utils.console import say
from lskip.utils.user_paths import user_path

USAGE = """usage: lskip configs                    the configs that come with lskip: --config takes their names
       lskip configs copy NAME [DEST]   a copy to change: into a folder, or as a file of another name"""


def run_configs(arguments: list[str]) -> None:
    """Run `lskip configs`; the first argument is the command's name.

    Raises:
        ValueError: unknown arguments or no such config. OSError: the copy cannot be written.
    """
    match arguments[1:]:
        case []:
            print("\n".join(_listed()))
        case ["-h" | "--help"] | ["copy", "-h" | "--help"]:
            print(USAGE)
        case ["copy", name]:
            copy_config(name, Path())
        case ["copy", name, place]:
            copy_config(name, user_path(place, "DEST"))
        case others:
            raise ValueError(f"{' '.join(others)!r} is not understood; there are: lskip configs, and: copy NAME [DEST]")


def copy_config(name: str, place: Path) -> None:
    """Copy a config into a folder, or to a new file; ValueError, OSError if that is impossible."""
    source = shipped_config(name)
    target = place / source.name if place.is_dir() else place
    if target.exists():
        raise FileExistsError(f"DEST: '{target}' exists already")
    shutil.copyfile(source, target)
    say(f"config: {target}")


def _listed() -> list[str]:
    configs = shipped_configs()
    width = max(map(len, configs))
    return [f"{name.ljust(width)}  {_first_line(path)}".rstrip() for name, path in configs.items()]


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        line = file.readline()
    return line.lstrip("# ").rstrip() if line.startswith("#") else ""
