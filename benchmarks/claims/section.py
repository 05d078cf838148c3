"""A section of the claims report: table, claims and figures of one question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from benchmarks.claims.statistics import Claim


@dataclass(frozen=True)
class Section:
    """The section of one question.

    Attributes:
        header, rows: of its table.
        figures: file name -> figure.
    """

    title: str
    header: Sequence[str]
    rows: list[Sequence[str]]
    claims: list[Claim]
    figures: dict[str, Figure]
    note: str = ""

    def markdown(self) -> str:
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        pictures = "\n".join(f"![{self.title}]({name})" for name in self.figures)
        claims = "\n".join(claim.line() for claim in self.claims)
        return "\n\n".join(filter(None, [f"### {self.title}", self.note, table, claims, pictures])) + "\n"
