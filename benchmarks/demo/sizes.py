"""How much of everything the demo does."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """How much of everything: the demo's own by default, far less in its test.

    Attributes:
        fit: further arguments for `lskip fit`, of both models.
        small_blocks: of the plain small model.
        items: held-out requests of each kind whose parses are scored, at every exit.
        tune_prompts: of these, how many `lskip tune` measures.
        tuned_cells: cells that it decodes: near its best forecast the order is open.
        requests: of each kind, how many are decoded in turns.
        turns: how often each.
        shown: requests that are shown with their parse.
        hf_exits, hf_lengths, hf_requests: the grid for transformers' `assistant_early_exit`, and requests for a cell.
        prompts, new_tokens, blocks: chat prompts that SmolLM2 answers, tokens an answer, blocks of text in its table.
        smollm2_drafts: (what drafts for SmolLM2, which has not learned to exit; how many tokens at a time).
    """

    fit: tuple[str, ...] = ()
    small_blocks: int = 3
    items: int = 200
    tune_prompts: int = 30
    tuned_cells: int = 10
    requests: int = 20
    turns: int = 2
    shown: int = 4
    hf_exits: tuple[int, ...] = (1, 2, 4)
    hf_lengths: tuple[int, ...] = (3, 5, 8)
    hf_requests: int = 4
    prompts: int = 5
    new_tokens: int = 64
    blocks: int = 4
    smollm2_drafts: tuple[tuple[str, int], ...] = (("int8", 5), ("int4", 16), ("adapter", 2))
