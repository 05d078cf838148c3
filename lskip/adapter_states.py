"""What an exit adapter is trained on: a frozen model's states on answers of its own, computed once, kept on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm
from transformers import PreTrainedModel

from lskip.adapter_answers import AnswerRow
from lskip.data.loading import ResumableLoader, ResumableSampler
from lskip.decoder import Decoder
from lskip.row_store import RowStore

SPLITS = ("train", "held_out")
GREEDY_SHARE = 0.98  # of an answer's tokens: so many are the model's likeliest if nothing was sampled
ROWS_AT_ONCE = 8  # of the frozen model's pass; also what a kill loses at most


class AnswerStates(Dataset):
    """Rows with their states, mapped from the disk. A row is a dict, S its tokens:

    token_ids [S]; exit_states and last_states [S, D] in bfloat16, the last layer's after the final norm; scored [S],
    true where the next token is the answer's; for held-out rows choices [S], the model's own likeliest next token
    where scored, else -1.
    """

    def __init__(self, rows: Sequence[AnswerRow], stores: Sequence[RowStore]):
        """stores: hold all parts of all rows."""
        self.rows, self.lengths = rows, np.array([len(row.token_ids) for row in rows])
        self._parts = {
            name: (store.mapped(name), [store.start(row.digest) for row in rows])
            for store in stores
            for name in store.widths
        }

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, name: str, index: int) -> np.ndarray:
        """[S, width], of one row."""
        numbers, starts = self._parts[name]
        return numbers[starts[index] : starts[index] + self.lengths[index]]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {"token_ids": torch.tensor(self.rows[index].token_ids, dtype=torch.int32)}
        for name in self._parts:
            numbers = torch.from_numpy(np.array(self.part(name, index)))
            row[name] = numbers.view(torch.bfloat16) if name.endswith("states") else numbers.squeeze(1)
        positions = torch.arange(len(row["token_ids"]))
        row["scored"] = (positions >= self.rows[index].prompt_length - 1) & (positions < len(positions) - 1)
        return row

    def greedy(self) -> np.ndarray:
        """bool [rows]: which held-out answers are what the model says without sampling (but for a near tie or two)."""
        shares = [
            np.mean(self.part("choices", index)[row.prompt_length - 1 : -1, 0] == row.token_ids[row.prompt_length :])
            for index, row in enumerate(self.rows)
        ]
        return np.array(shares) >= GREEDY_SHARE

    def answer_tokens(self) -> np.ndarray:
        """The tokens of all answers, [N]."""
        return np.concatenate([row.token_ids[row.prompt_length :] for row in self.rows])


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch [B, S, …], padded at the right with zeros (nothing there is scored)."""
    return {name: pad_sequence([row[name] for row in rows], batch_first=True) for name in rows[0]}


def answer_states(
    model: PreTrainedModel, rows: list[AnswerRow], exit_layer: int, cache: Path
) -> tuple[AnswerStates, AnswerStates]:
    """(to train on, held out): what `model`, as it is, computes on `rows`; from `cache` as far as it is there.

    Further answers, or another exit_layer, cost only what is new about them. A process that is killed goes on from the
    last few rows; a second one waits for the first.

    Args:
        rows: of `read_answers`.
        exit_layer: blocks that run before the states of the exit.
        cache: a folder of many such.
    """
    decoder = Decoder(model)
    folder = cache / _key(decoder)
    sides = {split: [row for row in rows if row.held_out == (split == "held_out")] for split in SPLITS}
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        return tuple(_filled(folder / split, side, decoder, exit_layer) for split, side in sides.items())


def _key(decoder: Decoder) -> str:
    """Of all that the states of a row depend on, but for the row."""
    digest = hashlib.sha256(repr((decoder.dtype, decoder.config.to_json_string())).encode())
    for parameter in decoder.model.parameters():  # a little of each: any fine-tuning changes all of what it trains
        some = parameter.detach().flatten()[:256].float().cpu()
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:32]


def _filled(folder: Path, rows: list[AnswerRow], decoder: Decoder, exit_layer: int) -> AnswerStates:
    """One side's states, what is missing computed and added."""
    width = decoder.hidden_size
    choices = {"choices": (np.int32, 1)} if folder.name == "held_out" else {}
    # bfloat16 as the integers of its bits
    last = RowStore(folder / "last", {"last_states": (np.int16, width), **choices})
    early = RowStore(folder / f"exit_{exit_layer}", {"exit_states": (np.int16, width)})
    for store in (last, early):
        store.cut()
    new = [row for row in rows if row.digest not in last]
    known = [row for row in rows if row.digest in last and row.digest not in early]
    missing = sum(len(row.token_ids) for row in (*new, *known))
    with tqdm(total=missing, unit="token", unit_scale=True, desc="states", disable=not missing) as bar:
        for group, depth, stores in ((known, exit_layer, [early]), (new, decoder.num_layers, [early, last])):
            for start in range(0, len(group), ROWS_AT_ONCE):
                batch = group[start : start + ROWS_AT_ONCE]
                parts = _states_of(batch, decoder, exit_layer, depth)
                for store in stores:
                    store.append([row.digest for row in batch], parts)
                bar.update(sum(len(row.token_ids) for row in batch))
    return AnswerStates(rows, (early, last))


@torch.inference_mode()
def _states_of(rows: Sequence[AnswerRow], decoder: Decoder, exit_layer: int, depth: int) -> list[dict[str, np.ndarray]]:
    """For each row what the stores hold of it; the exit's states alone where no more than `exit_layer` blocks run."""
    x = decoder.embed(pad_sequence([torch.tensor(row.token_ids) for row in rows], batch_first=True).to(decoder.device))
    inputs = decoder.block_inputs(x)
    for block in range(depth):
        x = decoder.block(block, x, inputs)
        if block + 1 == exit_layer:
            exit_states = x.bfloat16()
    found = [{"exit_states": _integers(states, row)} for states, row in zip(exit_states, rows, strict=True)]
    if depth == exit_layer:
        return found
    for row, parts, states in zip(rows, found, decoder.norm(x).bfloat16(), strict=True):
        parts["last_states"] = _integers(states, row)
        if row.held_out:
            scored = slice(row.prompt_length - 1, len(row.token_ids) - 1)
            parts["choices"] = np.full((len(row.token_ids), 1), -1, np.int32)
            parts["choices"][scored, 0] = decoder.head(states[scored].to(decoder.dtype)).argmax(-1).cpu()
    return found


def _integers(states: Tensor, row: AnswerRow) -> np.ndarray:
    """bfloat16 [S or more, D], padded -> the integers of its bits [S, D]."""
    return states[: len(row.token_ids)].view(torch.int16).cpu().numpy()


class AnswerData(LightningDataModule):
    """Batches of states: of the training answers in an order that a resumed run goes on with, of held-out ones."""

    def __init__(self, train: AnswerStates, held_out: AnswerStates, batch_size: int, val_answers: int, seed: int):
        """val_answers: held-out ones that validation looks at."""
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
        """The held-out answers, or always the same few of them: greedy ones, which decoding is measured on."""
        greedy = self.held_out.greedy()
        rows = np.flatnonzero(greedy) if greedy.any() else np.arange(len(greedy))
        picked = np.random.default_rng(0).permutation(rows)[:num_answers]
        rows = Subset(self.held_out, np.sort(picked).tolist())  # by length, for little padding
        return DataLoader(rows, self.batch_size, collate_fn=collate, generator=torch.Generator())
