"""The command line; its entry point is `lskip.cli:main`."""

from lskip.cli.main import main

__all__ = ["main"]
