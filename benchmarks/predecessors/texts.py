"""Texts of the predecessors' benchmark, from installed packages, split by sentence template."""

from __future__ import annotations

import hashlib
import math
import re
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from lskip.data.home_assistant import read_pairs
from lskip.data.tokenizer import END_OF_TEXT, train_bpe

HELD_OUT = 0.15  # of the sentence templates
RAREST = 100  # sentences that an intent must have
HOURS = {"hours": 1, "minutes": 1 / 60, "seconds": 1 / 3600}


class Sentence(NamedTuple):
    """What is said, and what is to be told of it: the number of its intent, or ln of a duration in hours."""

    text: str
    target: float
    held_out: bool


def intents(per_template: int) -> list[Sentence]:
    """What people say to a smart home, and which of Home Assistant's intents it is: classification."""
    rows = [(pair["prompt"].strip(), pair["completion"].split()[0], pair["group"]) for pair in read_pairs(per_template)]
    counts = {intent: sum(row[1] == intent for row in rows) for intent in {row[1] for row in rows}}
    kept = sorted(intent for intent, count in counts.items() if count >= RAREST)
    numbers = {intent: number for number, intent in enumerate(kept)}
    return [Sentence(text, numbers[i], is_held_out(group)) for text, i, group in rows if i in numbers]


def durations(per_template: int) -> list[Sentence]:
    """What people say about timers, and ln of the hours for which a timer is set, or by which changed: regression.

    Numbers stand in digits or words, in one to three units, halves among them; many sentences also name another
    duration (that of the timer that is to be changed), which does not count.
    """
    sentences = []
    for pair in read_pairs(per_template):
        slots = dict(re.findall(r"\[SL:(hours|minutes|seconds) (\d+) \]", pair["completion"]))
        hours = sum(HOURS[unit] * int(number) for unit, number in slots.items())
        if hours:
            sentences.append(Sentence(pair["prompt"].strip(), math.log(hours), is_held_out(pair["group"])))
    return sentences


def is_held_out(template: str) -> bool:
    digest = hashlib.sha256(template.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT


class Sentences(Dataset):
    """Tokenized sentences; batches are what TaskModule takes."""

    def __init__(self, sentences: list[Sentence], tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype):
        self.ids = tokenizer([sentence.text for sentence in sentences]).input_ids
        self.targets = torch.tensor([sentence.target for sentence in sentences], dtype=dtype)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[list[int], Tensor]:
        return self.ids[index], self.targets[index]


def collate(rows: list[tuple[list[int], Tensor]]) -> dict[str, Tensor]:
    """{"input_ids" [B, S], padded at the right, "lengths" [B], "targets" [B]}."""
    lengths = [len(ids) for ids, _ in rows]
    input_ids = np.zeros((len(rows), max(lengths)), np.int64)
    for row, (ids, _) in zip(input_ids, rows, strict=True):
        row[: len(ids)] = ids
    targets = torch.stack([target for _, target in rows])
    return {"input_ids": torch.from_numpy(input_ids), "lengths": torch.tensor(lengths), "targets": targets}


def loaders(sentences: list[Sentence], vocab_size: int, batch_size: int, dtype: torch.dtype, seed: int):
    """(training batches in random order, held-out batches), with a tokenizer made of the training sentences."""
    train, held_out = ([s for s in sentences if s.held_out is side] for side in (False, True))
    bpe = train_bpe([sentence.text for sentence in train], vocab_size)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT)
    order = torch.Generator().manual_seed(seed)
    settings = {"batch_size": batch_size, "collate_fn": collate}
    return (
        DataLoader(Sentences(train, tokenizer, dtype), shuffle=True, generator=order, drop_last=True, **settings),
        DataLoader(Sentences(held_out, tokenizer, dtype), **settings),
    )
