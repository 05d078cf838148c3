"""Probes: what earlier exits say of positions that verification has run, and whether that became the text."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lskip.inference.drafting.draft import Draft
from lskip.inference.drafting.drafter import Runners
from lskip.inference.drafting.round import Chooser, find_argmax


@dataclass
class Probe:
    """A look at some exits in one round.

    Where an exit would have chosen the token that the text got, a draft of that exit would have been accepted: its
    blocks see the same tokens, and it chooses with the same noise.

    Attributes:
        runners: of the model; its exits are read as when they draft.
        exits: blocks after which to look, each below the last.
        agreed: by exit and slot, whether its choice was the text's, at successive positions; filled by the round.
    """

    runners: Runners
    exits: list[int]
    agreed: dict[int, list[list[bool]]] = field(default_factory=dict)

    def read(self, states: dict[int, Tensor], drafted: Tensor, chooser: Chooser) -> Tensor:
        """Return each exit's choices [exits, A, d + 1] after the text and after each of `drafted` [A, d].

        Args:
            states: [A, d + 1, D] by number of blocks.
        """
        said = []
        for exit_layer in self.exits:
            runner, x = self.runners.reading_drafts(self.runners.model, exit_layer), states[exit_layer]
            found = find_argmax(runner, x, chooser, drafted)
            said.append(chooser.choose(runner.decode(x), drafted) if found is None else found)
        return torch.stack(said)

    def compare(self, said: Tensor, tokens: list[list[int]]) -> None:
        """Compare what `read` gave with the tokens that each slot got."""
        self.agreed |= {
            exit_layer: hits(each, tokens) for exit_layer, each in zip(self.exits, said.tolist(), strict=True)
        }


def hits(said: list[list[int]], came: list[list[int]]) -> list[list[bool]]:
    """Return, by slot, whether what was said is what came, as far as both go."""
    pairs = zip(said, came, strict=True)
    return [[one == other for one, other in zip(*pair, strict=False)] for pair in pairs]


def agreements(
    probed: tuple[Draft, ...],
    probe: Probe | None,
    foreseen: dict[Draft, list[list[int]]],
    tokens: list[list[int]],
) -> dict[Draft, list[list[bool]]]:
    """Return, by draft and slot, whether it would have chosen the tokens that came, at successive positions.

    What was foreseen counts up to the first wrong token: behind it a draft has no sense. Where nothing was foreseen for
    a text but something for another, its draft would have been empty beside the other's: a wrong token.
    """
    agreed = {}
    for draft in probed:
        if draft in foreseen:
            runs = hits(foreseen[draft], tokens)
            runs = [run or [False] for run in runs] if any(runs) else runs
            agreed[draft] = [run[: run.index(False) + 1] if False in run else run for run in runs]
        elif probe is not None and draft.exit_layer in probe.agreed:
            agreed[draft] = probe.agreed[draft.exit_layer]
    return agreed
