"""Tables and sentences that hold names which others chose: shown as they are, never carried out, never cut."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lskip.utils.untrusted import printable

WIDTH = 1000  # where no terminal says how wide it is: a table takes what it needs


class _PlainConsole(Console):
    def render_str(self, text: str, **options) -> Text:
        return super().render_str(printable(text), **options)


def plain_console() -> Console:
    """A console on standard output for which [bold] is a word, :smile: too, and an escape is written out."""
    console = _PlainConsole(markup=False, emoji=False)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def plain_table(*columns: str, title: str, right: int = 0) -> Table:
    """A table whose cells go on in the next line where a terminal is too narrow for them.

    Args:
        right: columns from this one on stand at the right: numbers.
    """
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number >= right else "left", overflow="fold")
    return table
