"""The command line; its entry point is `lskip.cli:main`."""

from lskip.cli.entry import main

__all__ = ["main"]
