"""States of a frozen model on its answers, cached on disk: the training data of an exit adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm
from transformers import PreTrainedModel

from lskip.adapters.answers import AnswerRow
from lskip.adapters.row_store import RowStore
from lskip.data.loading import ResumableLoader, ResumableSampler
from lskip.models.decoder import Decoder
from lskip.utils.console import warn

SPLITS = ("train", "held_out")
GREEDY_SHARE = 0.98  # of an answer's tokens that are the argmax; near ties may differ in greedy answers
ROWS_AT_ONCE = 8  # in a forward pass; a kill loses at most so many


class AnswerStates(Dataset):
    """Rows with their states, memory-mapped.

    A row of S tokens is a dict: token_ids [S]; exit_states and last_states [S, D] in bfloat16, the latter after the
    final norm; scored [S], true where the next token is the answer's; for held-out rows choices [S], the model's argmax
    where scored, else -1.
    """

    def __init__(self, rows: Sequence[AnswerRow], stores: Sequence[RowStore]):
        """Map the rows from `stores`, which hold all their parts."""
        self.rows, self.lengths = rows, np.array([len(row.token_ids) for row in rows])
        self._parts = {
            name: (store.mapped(name), [store.place(row.digest) for row in rows])
            for store in stores
            for name in store.widths
        }

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, name: str, index: int) -> np.ndarray:
        """Return a part of one row, [S, width]."""
        numbers, places = self._parts[name]
        return numbers[places[index]]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {"token_ids": torch.tensor(self.rows[index].token_ids, dtype=torch.int32)}
        for name in self._parts:
            numbers = torch.from_numpy(np.array(self.part(name, index)))
            row[name] = numbers.view(torch.bfloat16) if name.endswith("states") else numbers.squeeze(1)
        positions = torch.arange(len(row["token_ids"]))
        row["scored"] = (positions >= self.rows[index].prompt_length - 1) & (positions < len(positions) - 1)
        return row

    def greedy(self) -> np.ndarray:
        """Return bool [rows]: which held-out answers are greedy, up to a few near ties."""
        shares = [
            np.mean(self.part("choices", index)[row.prompt_length - 1 : -1, 0] == row.token_ids[row.prompt_length :])
            for index, row in enumerate(self.rows)
        ]
        return np.array(shares) >= GREEDY_SHARE

    def answer_tokens(self) -> np.ndarray:
        """Return the tokens of all answers, [N]."""
        return np.concatenate([row.token_ids[row.prompt_length :] for row in self.rows])


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return a batch [B, S, …], padded at the right with zeros, which are not scored."""
    return {name: pad_sequence([row[name] for row in rows], batch_first=True) for name in rows[0]}


class StateCache:
    """A frozen model's states on rows at one exit and at the last layer, cached on disk.

    For new rows or another exit_layer only the missing states are computed; a kill loses the last few rows. As a
    context manager it locks the cache, for which other processes wait; mapped states stay readable after it.

    Attributes:
        answers: token_ids of the model's answers, by a digest of their prompts.
    """

    def __init__(self, model: PreTrainedModel, exit_layer: int, cache: Path):
        """Choose the subfolder of `cache` for this model and the states after `exit_layer` blocks."""
        self.decoder, self.exit_layer = Decoder(model), exit_layer
        folder, width = cache / _key(self.decoder), self.decoder.hidden_size
        self.answers = RowStore(folder / "answers", {"token_ids": (np.int32, 1)})
        self._stores = {}
        for split in SPLITS:
            choices = {"choices": (np.int32, 1)} if split == "held_out" else {}
            # bfloat16, stored as int16 since NumPy has no such type
            early = RowStore(folder / split / f"exit_{exit_layer}", {"exit_states": (np.int16, width)})
            last = RowStore(folder / split / "last", {"last_states": (np.int16, width), **choices})
            self._stores[split] = early, last
        self._lock = FileLock(folder / ".lock")

    def __enter__(self) -> StateCache:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            rank_zero_info(f"waiting for another process that writes states of this model ({self._lock.lock_file})")
            self._lock.acquire()
        for store in (self.answers, *self._stores["train"], *self._stores["held_out"]):
            store.open()
        return self

    def __exit__(self, *_) -> None:
        self._lock.release()

    def add(self, row: AnswerRow, exit_states: Tensor, last_states: Tensor) -> None:
        """Store states [S, D] of a row that were computed elsewhere; the last layer's are after the final norm."""
        for store in self._stores[_side(row)]:
            store.append([row.digest], [_parts_of(row, exit_states, last_states, self.decoder)])

    def states(self, rows: list[AnswerRow]) -> tuple[AnswerStates, AnswerStates]:
        """Return (training rows, held-out rows) with their states, after computing missing or damaged ones."""
        sides = {split: [row for row in rows if _side(row) == split] for split in SPLITS}
        for split, stores in self._stores.items():
            digests = [row.digest for row in sides[split]]
            for store in stores:
                if damaged := store.forget_damaged(digests):
                    warn(f"cache_dir: '{store.folder}': {damaged} rows are damaged, and computed again")
        missing = {split: self._missing(split, side) for split, side in sides.items()}
        tokens = sum(len(row.token_ids) for groups in missing.values() for group in groups for row in group)
        with tqdm(total=tokens, unit="token", unit_scale=True, desc="states", disable=not tokens) as bar:
            for split, (known, new) in missing.items():
                self._fill(split, known, self.exit_layer, bar)
                self._fill(split, new, self.decoder.num_layers, bar)
        return tuple(AnswerStates(sides[split], self._stores[split]) for split in SPLITS)

    def _missing(self, split: str, rows: list[AnswerRow]) -> tuple[list[AnswerRow], list[AnswerRow]]:
        """Return the rows of one side that lack only this exit's states, and those that lack all."""
        early, last = self._stores[split]
        known = [row for row in rows if row.digest in last and row.digest not in early]
        return known, [row for row in rows if row.digest not in last]

    def _fill(self, split: str, rows: list[AnswerRow], depth: int, bar: tqdm) -> None:
        """Run `depth` blocks on rows and store their states."""
        early, last = self._stores[split]
        for start in range(0, len(rows), ROWS_AT_ONCE):
            batch = rows[start : start + ROWS_AT_ONCE]
            parts = _states_of(batch, self.decoder, self.exit_layer, depth)
            for store in (early,) if depth == self.exit_layer else (early, last):
                store.append([row.digest for row in batch], parts)
            bar.update(sum(len(row.token_ids) for row in batch))


def _side(row: AnswerRow) -> str:
    return "held_out" if row.held_out else "train"


def _key(decoder: Decoder) -> str:
    """Return a hash of the model: dtype, config, and a part of each weight."""
    digest = hashlib.sha256(repr((decoder.dtype, decoder.config.to_json_string())).encode())
    for parameter in decoder.model.parameters():  # its first values, since fine-tuning changes all
        some = parameter.detach().flatten()[:256].float().cpu()
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:32]


@torch.inference_mode()
def _states_of(rows: Sequence[AnswerRow], decoder: Decoder, exit_layer: int, depth: int) -> list[dict[str, np.ndarray]]:
    """Return the stored parts of each row; only the exit's states if `depth` is `exit_layer`."""
    x = decoder.embed(pad_sequence([torch.tensor(row.token_ids) for row in rows], batch_first=True).to(decoder.device))
    inputs = decoder.block_inputs(x)
    for block in range(depth):
        x = decoder.block(block, x, inputs)
        if block + 1 == exit_layer:
            exit_states = x
    last_states = [None] * len(rows) if depth == exit_layer else decoder.norm(x)
    return [_parts_of(row, *states, decoder) for row, *states in zip(rows, exit_states, last_states, strict=True)]


def _parts_of(
    row: AnswerRow, exit_states: Tensor, last_states: Tensor | None, decoder: Decoder
) -> dict[str, np.ndarray]:
    """Return the stored parts of a row from its states, [S or more, D]."""
    parts, length = {"exit_states": _bits(exit_states[: len(row.token_ids)])}, len(row.token_ids)
    if last_states is None:
        return parts
    last_states = last_states[:length].bfloat16()
    parts["last_states"] = _bits(last_states)
    if row.held_out:
        scored = slice(row.prompt_length - 1, length - 1)
        parts["choices"] = np.full((length, 1), -1, np.int32)
        predicted = decoder.head(last_states[scored].to(decoder.device, decoder.dtype)).argmax(-1)
        parts["choices"][scored, 0] = predicted.cpu()
    return parts


def _bits(states: Tensor) -> np.ndarray:
    """Return states in bfloat16 as the int16 of the same bits."""
    return states.bfloat16().view(torch.int16).cpu().numpy()


class AnswerData(LightningDataModule):
    """Batches of states of training answers, in a resumable order, and of held-out answers."""

    def __init__(self, train: AnswerStates, held_out: AnswerStates, batch_size: int, val_answers: int, seed: int):
        """Take `val_answers` held-out answers for validation."""
        super().__init__()
        self.train, self.held_out = train, held_out
        self.batch_size, self.val_answers, self.seed = batch_size, val_answers, seed

    def train_dataloader(self) -> DataLoader:
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        sampler = ResumableSampler(
            self.train, self.batch_size, self.seed, lambda: progress.total.processed, lengths=self.train.lengths
        )
        own = torch.Generator().manual_seed(self.seed)  # else a loader draws from the global one
        return ResumableLoader(self.train, self.batch_size, sampler=sampler, collate_fn=collate, generator=own)

    def val_dataloader(self) -> DataLoader:
        return self.held_out_loader(self.val_answers)

    def held_out_loader(self, num_answers: int | None = None) -> DataLoader:
        """Return a loader of the greedy held-out answers (all, if none is greedy), or of a fixed sample of them."""
        greedy = self.held_out.greedy()
        rows = np.flatnonzero(greedy) if greedy.any() else np.arange(len(greedy))
        picked = np.random.default_rng(0).permutation(rows)[:num_answers]
        rows = Subset(self.held_out, np.sort(picked).tolist())  # in order of length, for little padding
        return DataLoader(rows, self.batch_size, collate_fn=collate, generator=torch.Generator())
