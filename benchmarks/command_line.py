"""The command line of a benchmark, run as `python -m benchmarks.FOLDER.FILE` from the repository's root."""

from __future__ import annotations

import argparse


def command_parser(module: str, description: str) -> argparse.ArgumentParser:
    """Return a parser whose help shows the command and the description as it is formatted."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {module}", description=description, formatter_class=formatter)
