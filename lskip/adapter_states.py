"""What an exit adapter is trained on: a frozen model's states on answers of its own, computed once, kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lskip.data.documents import fraction_of, text_digest
from lskip.data.loading import ResumableLoader, ResumableSampler
from lskip.decoder import Decoder
from lskip.inference.generator import end_tokens
from lskip.inference.text import encode_prompt

SPLITS = ("train", "held_out")
HELD_OUT = 0.03  # of the prompts
GREEDY_SHARE = 0.98  # of an answer's tokens: so many are the model's likeliest if nothing was sampled
ROWS_AT_ONCE = 8  # of the frozen model's pass; also what a kill loses at most
# Each file holds the tokens of all rows one after another, without padding; bfloat16 as the integers of its bits.
FILES = {"token_ids": np.int32, "exit_states": np.int16, "last_states": np.int16, "choices": np.int32}
ROWS_FILE = "rows.bin"  # int32 [rows, 2]: tokens, and how many of them are the prompt; written last


@dataclass(frozen=True)
class AnswerRow:
    """A prompt and its answer, as tokens.

    Attributes:
        token_ids: both, one after the other.
        prompt_length: how many are the prompt's. Positions from its last to the last but one predict the answer.
        held_out: whether nothing is trained on it.
    """

    token_ids: tuple[int, ...]
    prompt_length: int
    held_out: bool


def read_answers(
    paths: list[Path],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    chat: bool | None = None,
) -> list[AnswerRow]:
    """The answers in files that `lskip predict` wrote, each once, cut to `block_size` tokens, shortest first.

    What is held out is decided by the hash of the prompt, so that all answers to a prompt are on the same side.

    Args:
        chat: as the prompts were given to the model: through the chat template or not; None: where it has one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no answer (with file and number), or a side of the split without any.
    """
    ends = end_tokens(model, tokenizer)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else min(ends, default=None)
    rows = {}
    for path in paths:
        for fields in _lines(path):
            prompt = fields["prompt"] if "prompt" in fields else fields["messages"]
            ids = encode_prompt(prompt, tokenizer, chat, model.config.vocab_size)
            answer = tokenizer(fields["text"], add_special_tokens=False)["input_ids"]
            if fields.get("finish_reason") == "eos" and end is not None:
                answer.append(end)
            if answer and len(ids) < block_size:
                rows[AnswerRow(tuple([*ids, *answer][:block_size]), len(ids), is_held_out(prompt))] = None
    for held_out in (False, True):
        if not any(row.held_out == held_out for row in rows):
            side = "is held out" if held_out else "is left to train on"
            raise ValueError(f"answers: of {len(rows)} answers within {block_size} tokens none {side}; give more")
    return sorted(rows, key=lambda row: len(row.token_ids))


def is_held_out(prompt: str | list[dict]) -> bool:
    """Whether a prompt, a text or chat messages, is among the 3 % that are held out."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return fraction_of(text_digest(text)) < HELD_OUT


def _lines(path: Path) -> Iterator[dict]:
    if not path.is_file():
        raise FileNotFoundError(f"answers: there is no file '{path}'")
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"answers: line {number} of '{path}' is not JSON ({error.msg})") from error
        asked = isinstance(fields, dict) and ("prompt" in fields) != ("messages" in fields)
        if not asked or not isinstance(fields.get("text"), str):
            raise ValueError(f"answers: line {number} of '{path}' is not what `lskip predict` writes")
        yield fields


class AnswerStates(Dataset):
    """The states of one split, mapped from the disk. A row is a dict, S its tokens:

    token_ids [S]; exit_states and last_states [S, D] in bfloat16, the last layer's after the final norm; scored [S],
    true where the next token is the answer's; for held-out rows choices [S], the model's own likeliest next token
    where scored, else -1.
    """

    def __init__(self, folder: Path):
        lengths = np.fromfile(folder / ROWS_FILE, np.int32).reshape(-1, 2)
        self.lengths, self.prompt_lengths = lengths[:, 0], lengths[:, 1]
        self.offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        paths = {name: folder / f"{name}.bin" for name in FILES}
        flat = {name: np.memmap(path, FILES[name], "r") for name, path in paths.items() if path.exists()}
        self.parts = {name: part.reshape(self.offsets[-1], -1) for name, part in flat.items()}

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        place = slice(self.offsets[index], self.offsets[index + 1])
        row = {name: torch.from_numpy(np.array(part[place])) for name, part in self.parts.items()}
        for name, part in row.items():
            row[name] = part.view(torch.bfloat16) if name.endswith("states") else part.squeeze(1)
        positions = torch.arange(int(self.lengths[index]))
        row["scored"] = (positions >= int(self.prompt_lengths[index]) - 1) & (positions < len(positions) - 1)
        return row

    def greedy(self) -> np.ndarray:
        """bool [rows]: which held-out answers are what the model says without sampling (but for a near tie or two)."""
        choices, following = self.parts["choices"][:, 0], np.roll(self.parts["token_ids"][:, 0], -1)
        scored, right = (
            np.add.reduceat(flags.astype(np.int64), self.offsets[:-1])
            for flags in (choices >= 0, (choices >= 0) & (choices == following))
        )
        return right >= GREEDY_SHARE * scored

    def answer_tokens(self) -> np.ndarray:
        """The tokens of all answers, int32 [N]."""
        starts = np.repeat(self.offsets[:-1] + self.prompt_lengths, self.lengths)
        return self.parts["token_ids"][np.arange(self.offsets[-1]) >= starts, 0]


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch [B, S, …], padded at the right with zeros (nothing there is scored)."""
    return {name: pad_sequence([row[name] for row in rows], batch_first=True) for name in rows[0]}


def frequent_words(
    rows: list[AnswerRow], size: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Tensor:
    """At most [size] token ids, ascending: what ends a text, and the most frequent tokens of the training answers."""
    answers = [np.array(row.token_ids[row.prompt_length :]) for row in rows if not row.held_out]
    counts = np.bincount(np.concatenate(answers), minlength=model.config.vocab_size)
    counts[list(end_tokens(model, tokenizer))] = counts.max() + 1
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:size]))


def answer_states(
    model: PreTrainedModel, rows: list[AnswerRow], exit_layer: int, cache: Path
) -> tuple[AnswerStates, AnswerStates]:
    """(to train on, held out): what `model`, as it is, computes on `rows`; from `cache` as far as it is there.

    Args:
        rows: of `read_answers`.
        exit_layer: blocks that run before the states of the exit.
        cache: a folder of many such; a process that is killed goes on from the last few rows.
    """
    decoder = Decoder(model)
    folder = cache / _key(decoder, rows, exit_layer)
    total = sum(len(row.token_ids) for row in rows)
    with tqdm(total=total, unit="token", unit_scale=True, desc="states") as bar:
        for split in SPLITS:
            part = [row for row in rows if row.held_out == (split == "held_out")]
            _fill(folder / split, part, decoder, exit_layer, bar)
    return AnswerStates(folder / "train"), AnswerStates(folder / "held_out")


def _key(decoder: Decoder, rows: list[AnswerRow], exit_layer: int) -> str:
    """Of all that the states depend on. Rows rather than files: template and block_size are in them."""
    digest = hashlib.sha256(repr((rows, exit_layer, decoder.dtype, decoder.config.to_json_string())).encode())
    for parameter in decoder.model.parameters():  # a little of each: any fine-tuning changes all of what it trains
        some = parameter.detach().flatten()[:256].float().cpu()
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:32]


def _fill(folder: Path, rows: list[AnswerRow], decoder: Decoder, exit_layer: int, bar: tqdm) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    done = _cut_to_whole_rows(folder, rows, decoder.hidden_size)
    bar.update(sum(len(row.token_ids) for row in rows[:done]))
    names = [name for name in FILES if name != "choices" or rows[0].held_out]
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.bin").open("ab")) for name in names}
        written = stack.enter_context((folder / ROWS_FILE).open("ab"))
        for start in range(done, len(rows), ROWS_AT_ONCE):
            batch = rows[start : start + ROWS_AT_ONCE]
            for parts in _states_of(batch, decoder, exit_layer):
                for name, file in files.items():
                    file.write(parts[name].contiguous().cpu().numpy().astype(FILES[name], copy=False).tobytes())
            for file in files.values():
                file.flush()
            written.write(np.array([(len(row.token_ids), row.prompt_length) for row in batch], np.int32).tobytes())
            written.flush()
            bar.update(sum(len(row.token_ids) for row in batch))


def _cut_to_whole_rows(folder: Path, rows: list[AnswerRow], width: int) -> int:
    """How many rows are there already; what a kill left of further ones is cut off."""
    path = folder / ROWS_FILE
    done = path.stat().st_size // 8 if path.exists() else 0
    if done < len(rows):
        done -= done % ROWS_AT_ONCE
    tokens = sum(len(row.token_ids) for row in rows[:done])
    sizes = {f"{name}.bin": np.dtype(kind).itemsize * tokens for name, kind in FILES.items()}
    sizes |= {f"{name}.bin": width * sizes[f"{name}.bin"] for name in FILES if name.endswith("states")}
    for name, size in {**sizes, ROWS_FILE: 8 * done}.items():
        if (folder / name).exists():
            with (folder / name).open("r+b") as file:
                file.truncate(size)
    return done


@torch.inference_mode()
def _states_of(rows: list[AnswerRow], decoder: Decoder, exit_layer: int) -> Iterator[dict[str, Tensor]]:
    """For each row what the files hold of it."""
    tokens = [torch.tensor(row.token_ids) for row in rows]
    x = decoder.embed(pad_sequence(tokens, batch_first=True).to(decoder.device))
    inputs = decoder.block_inputs(x)
    for block in range(decoder.num_layers):
        x = decoder.block(block, x, inputs)
        if block + 1 == exit_layer:
            exit_states = x.bfloat16()
    last_states = decoder.norm(x).bfloat16()
    for index, row in enumerate(rows):
        length, first = len(row.token_ids), row.prompt_length - 1
        parts = {"token_ids": tokens[index]}
        parts["exit_states"] = exit_states[index, :length].view(torch.int16)
        parts["last_states"] = last_states[index, :length].view(torch.int16)
        if row.held_out:
            choices = torch.full((length,), -1)
            scored = last_states[index, first : length - 1].to(decoder.dtype)
            choices[first : length - 1] = decoder.head(scored).argmax(-1).cpu()
            parts["choices"] = choices
        yield parts


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
