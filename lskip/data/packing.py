"""Documents to rows of exactly `block_size` tokens. Labels follow transformers: aligned with the inputs,
shifted inside the model, -100 where a token is not scored."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from lskip.data.chat import conversation_tokens

NOT_SCORED = -100


class TextPacker:
    """Joins texts with the end-of-text token after each and cuts the stream into blocks.

    It keeps the tokens that do not fill a block for the next call, so only those at the very end are lost.
    """

    columns = ("input_ids",)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, block_size: int):
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.rest: list[int] = []

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list]:
        for ids in open_ended(self.tokenizer, batch["text"]):
            self.rest += ids
            self.rest.append(self.tokenizer.eos_token_id)
        count = len(self.rest) // self.block_size
        full, self.rest = self.rest[: count * self.block_size], self.rest[count * self.block_size :]
        return {"input_ids": list(np.array(full, np.int32).reshape(count, self.block_size))}


class PairEncoder:
    """One row a prompt and completion: the completion and the end of text are scored, the prompt is not."""

    columns = ("input_ids", "labels")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, block_size: int):
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list]:
        rows = [padded(*example, self.block_size, self.pad) for example in self.examples(batch)]
        scored = [row for row in rows if (row[1][1:] != NOT_SCORED).any()]  # the first label has no input before it
        return {"input_ids": [ids for ids, _ in scored], "labels": [labels for _, labels in scored]}

    def examples(self, batch: dict[str, list[str]]) -> Iterator[tuple[list[int], list[bool]]]:
        """(tokens, which of them are scored) of each example."""
        prompts = open_ended(self.tokenizer, batch["prompt"])
        completions = self.tokenizer(batch["completion"], add_special_tokens=False, verbose=False).input_ids
        for prompt, completion in zip(prompts, completions, strict=True):
            answer = [*completion, self.tokenizer.eos_token_id]
            yield prompt + answer, [False] * len(prompt) + [True] * len(answer)


class ChatEncoder(PairEncoder):
    """One row a conversation, through the tokenizer's chat template: every assistant turn is scored."""

    def examples(self, batch: dict[str, list[str]]) -> Iterator[tuple[list[int], list[bool]]]:
        for messages in batch["messages"]:
            yield conversation_tokens(self.tokenizer, json.loads(messages))


ENCODERS = {"text": TextPacker, "pairs": PairEncoder, "chat": ChatEncoder}


def open_ended(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokens of each text with what the tokenizer puts before it, and no end of text after it."""
    rows = tokenizer(texts, verbose=False).input_ids
    return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in rows]


def padded(ids: list[int], scored: list[bool], size: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids [size], labels [size]): cut or filled at the right."""
    input_ids, labels = np.full(size, pad, np.int32), np.full(size, NOT_SCORED, np.int32)
    count = min(len(ids), size)
    input_ids[:count] = ids[:count]
    labels[:count] = np.where(scored[:count], ids[:count], NOT_SCORED)
    return input_ids, labels


def encode_documents(documents: Dataset, encoder: TextPacker | PairEncoder, path: Path, split: str) -> Dataset:
    """All rows of `documents`, tokenized once: written to `path` (when whole) and read from there afterwards."""
    row = List(Value("int32"), length=encoder.block_size)
    blocks = documents.map(
        encoder,
        batched=True,
        batch_size=64,  # small, for a progress bar that moves
        remove_columns=documents.column_names,
        features=Features({name: row for name in encoder.columns}),
        cache_file_name=str(path),
        load_from_cache_file=True,
        # By default the fingerprint hashes the tokenizer object, which differs from run to run.
        new_fingerprint=path.stem,
        desc=f"Tokenizing {split}",
    )
    return blocks.with_format("numpy")


def collate(rows: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """{"input_ids", "labels"}, each int64 [B, S]; packed text is its own labels.

    S is block_size; where a pair or conversation is a row, it is cut behind the last token that any row is scored
    on: what follows is padding, which would cost as much as text.
    """
    batch = {name: torch.from_numpy(np.stack([row[name] for row in rows]).astype(np.int64)) for name in rows[0]}
    if "labels" not in batch:
        return {"input_ids": batch["input_ids"], "labels": batch["input_ids"].clone()}
    scored = (batch["labels"] != NOT_SCORED).any(0)
    size = len(scored) - int(scored.flip(0).int().argmax())  # no row scored: block_size
    return {name: batch[name][:, :size] for name in ("input_ids", "labels")}
