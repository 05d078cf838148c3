"""Printing of sentences and tables: control characters in names and paths are escaped, nothing is cut off."""

import sys
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lskip.utils.untrusted import printable

WIDTH = 1000  # of a table that goes to a file or a pipe


def say(sentence: str, file: TextIO | None = None, flush: bool = False) -> None:
    """Print one line to `file`, standard output by default, its control characters escaped.

    Args:
        flush: also where it is no terminal, which would keep it until the command ends.
    """
    print(printable(sentence, keep=""), file=file, flush=flush)


def warn(sentence: str) -> None:
    """Print one line that begins with "warning: " on standard error, its control characters escaped."""
    say(f"warning: {sentence}", sys.stderr)


class _PlainConsole(Console):
    def render_str(self, text: str, **options) -> Text:
        return super().render_str(printable(text), **options)


def plain_console() -> Console:
    """Return a console on standard output that reads no markup and no emoji codes and escapes control characters."""
    console = _PlainConsole(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def plain_table(*columns: str, title: str, right: int = 0) -> Table:
    """Return an empty table whose cells wrap where the terminal is too narrow.

    Args:
        right: index of the first right-aligned column (numbers).
    """
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number >= right else "left", overflow="fold")
    return table
