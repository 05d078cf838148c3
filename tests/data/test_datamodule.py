"""TextData: split by content, packing, trained tokenizer, caches."""

import hashlib
import json

import numpy as np
import pytest
import torch

from lskip.data import TextData
from lskip.data.documents import split_of
from lskip.data.encoders import Encoder, TextEncoder
from lskip.data.rows import RowMaker


def texts(count: int = 120) -> list[str]:
    return [f"def f{i}(x):\n    return x + {i * i}\n" * (1 + i % 4) for i in range(count)]


def split_by_hand(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "val" if place < 0.2 else "test" if place < 0.4 else "train"


def write_jsonl(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data_maker(folder, tokenizer):
    """Return a function (rows, **arguments) -> TextData on 120 small functions; val and test a fifth each."""

    def make(rows: list[dict] | None = None, **arguments) -> TextData:
        if "source" not in arguments:
            rows = [{"text": text} for text in texts()] if rows is None else rows
            arguments["source"] = write_jsonl(folder / "corpus.jsonl", rows)
        fixed = {"tokenizer": tokenizer, "block_size": 16, "batch_size": 4, "val_fraction": 0.2, "test_fraction": 0.2}
        return TextData(**{**fixed, "cache_dir": str(folder / "cache"), **arguments})

    return make


@pytest.fixture
def text_data(tmp_path, tiny_tokenizer):
    return data_maker(tmp_path, tiny_tokenizer)


def rows_of(loader) -> list[list[int]]:
    return [row for batch in loader for row in batch["input_ids"].tolist()]


# The split


def test_split_is_the_hash_of_the_text(text_data):
    data = text_data()
    for split in ("train", "val", "test"):
        expected = [text for text in texts() if split_by_hand(text) == split]
        assert expected and set(data.documents(split)["text"]) == set(expected)


def test_split_of_pairs_is_the_hash_of_both_columns(text_data):
    rows = [{"prompt": f"a{i}", "completion": f"b{i}"} for i in range(60)]
    found = {row["prompt"] for row in text_data(rows).documents("val")}
    by_hand = {r["prompt"] for r in rows if split_by_hand(json.dumps([r["prompt"], r["completion"]])) == "val"}
    assert found == by_hand and found


def test_split_boundaries():
    half = "8" + "0" * 63  # exactly 0.5
    assert [split_of(half, 0.5, 0.1), split_of(half, 0.51, 0.1), split_of(half, 0.3, 0.2)] == ["test", "val", "train"]
    assert split_of("f" * 64, 0.5, 0.49) == "train"


def test_a_copy_is_kept_once_and_crosses_nothing(text_data, tmp_path):
    once = text_data(source=write_jsonl(tmp_path / "once.jsonl", [{"text": text} for text in texts()]))
    shuffled = [*texts(), *texts()[::-1], "", "   "]
    twice = text_data(source=write_jsonl(tmp_path / "twice.jsonl", [{"text": text} for text in shuffled]))
    for split in ("train", "val", "test"):
        assert twice.documents(split)["text"][:] == once.documents(split)["text"][:]  # the order too
        assert np.array_equal(twice.blocks(split)[:]["input_ids"], once.blocks(split)[:]["input_ids"])


def test_no_validation_text_in_training_blocks(text_data):
    rows = [{"text": f"<{i:04d}>" * 10} for i in range(100)]
    data = text_data(rows)
    train = data.tokenizer.decode(np.array(data.blocks("train")[:]["input_ids"]).reshape(-1))
    marks = {split: {text[:6] for text in data.documents(split)["text"]} for split in ("train", "val", "test")}
    assert not any(mark in train for mark in marks["val"] | marks["test"])
    assert sum(mark in train for mark in marks["train"]) >= len(marks["train"]) - 1  # the end may not fill a block


def test_trained_tokenizer_sees_the_training_split_only(text_data):
    rows = [{"text": f"common words here {i}"} for i in range(200)]
    secret = next(f"zqxj{i}" for i in range(1000) if split_by_hand(f"zqxj{i} " * 50) == "val") + " "
    data = text_data([*rows, {"text": secret * 50}], tokenizer=None, vocab_size=300)
    merged = " ".join(token for token in data.tokenizer.get_vocab() if len(token) > 1)
    assert "zq" not in merged and "com" in merged  # 50 repeats would have been the first merge


# Packing


def naive_blocks(documents: list[str], tokenizer, size: int) -> np.ndarray:
    stream = [token for text in documents for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    return np.array([stream[i : i + size] for i in range(0, len(stream) - size + 1, size)])


@pytest.mark.parametrize("split", ["train", "val"])
def test_packing_is_concatenation(text_data, tiny_tokenizer, split):
    data = text_data()
    expected = naive_blocks(data.documents(split)["text"][:], tiny_tokenizer, 16)
    assert len(expected) > 10 and np.array_equal(data.blocks(split)[:]["input_ids"], expected)


def made(encoder: Encoder, documents: dict[str, list[str]], size: int) -> dict[str, list[np.ndarray]]:
    """Return the rows of documents given by columns, by columns too."""
    each = (dict(zip(documents, values, strict=True)) for values in zip(*documents.values(), strict=True))
    rows = list(RowMaker(encoder, size).rows(each))
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_what_fills_no_row_is_kept_for_the_next_documents(tiny_tokenizer):
    maker, blocks = RowMaker(TextEncoder(tiny_tokenizer), 7), []
    for text in texts(9):
        blocks += [row["input_ids"] for row in maker.rows([{"text": text}])]
    assert np.array_equal(blocks, naive_blocks(texts(9), tiny_tokenizer, 7))


def test_batches(text_data):
    batch = next(iter(text_data(documents="joined").train_dataloader()))
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        "input_ids": ((4, 16), torch.int64),
        "labels": ((4, 16), torch.int64),
        "scored_positions": ((60,), torch.int64),  # all but the last of each row, which predicts nothing known
        "scored_tokens": ((60,), torch.int64),
    }
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert torch.equal(batch["scored_tokens"], batch["labels"][:, 1:].flatten())
    assert batch["input_ids"].data_ptr() != batch["labels"].data_ptr()


def test_loaders_leave_the_global_random_stream_alone(text_data):
    data = text_data()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    rows_of(data.train_dataloader()), rows_of(data.val_dataloader())
    assert torch.equal(before, torch.get_rng_state())


def test_validation_is_in_order_complete_and_capped(text_data):
    everything = text_data(max_val_blocks=None)
    blocks = np.array(everything.blocks("val")[:]["input_ids"])
    assert rows_of(everything.val_dataloader()) == blocks.tolist()
    assert len(blocks) % 4  # the last batch is a partial one
    assert rows_of(text_data(max_val_blocks=3).val_dataloader()) == blocks[:3].tolist()
    assert rows_of(text_data().test_dataloader()) == text_data().blocks("test")[:]["input_ids"].tolist()


# Caches


def test_the_second_set_up_tokenizes_nothing(text_data, monkeypatch):
    source = text_data(tokenizer=None, vocab_size=300)
    source.setup("fit")
    first = np.array(source.blocks("train")[:]["input_ids"])

    def forbidden(*_):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(TextEncoder, "runs", forbidden)
    monkeypatch.setattr("lskip.data.tokenizer.train_bpe", forbidden)
    monkeypatch.setattr("lskip.data.corpus.read_records", forbidden)
    again = text_data(source=source.source, tokenizer=None, vocab_size=300)
    again.setup("fit")
    assert np.array_equal(again.blocks("train")[:]["input_ids"], first)
    short = text_data(source=source.source, tokenizer=None, vocab_size=300, block_size=8)
    short.setup("fit")
    assert np.array_equal(short.blocks("train")[: 2 * len(first)]["input_ids"].reshape(first.shape), first)
    with pytest.raises(AssertionError):
        text_data(source=source.source, tokenizer=None, vocab_size=301).setup("fit")


def test_a_kill_while_tokenizing_leaves_no_half_cache(text_data, monkeypatch):
    data, original, calls = text_data(), TextEncoder.runs, []

    def killed(self, batch):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr(TextEncoder, "runs", killed)
    with pytest.raises(KeyboardInterrupt):
        data.blocks("train")
    monkeypatch.setattr(TextEncoder, "runs", original)
    whole = text_data(source=data.source, cache_dir=str(data.cache.parent / "other")).blocks("train")
    assert len(text_data(source=data.source).blocks("train")) == len(whole)


def test_a_changed_file_is_read_again(text_data):
    before = len(text_data().documents("train"))
    after = len(text_data([{"text": text} for text in texts(300)]).documents("train"))
    assert after > before


def test_everything_written_lies_in_cache_dir(text_data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    text_data(tokenizer=None, vocab_size=300).setup("fit")
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"documents", "tokenizers", "tokens"}
    assert not (tmp_path / "home").exists()


def test_only_the_stage_that_runs_is_tokenized(text_data):
    data = text_data()
    data.setup("validate")
    assert set(data._blocks) == {"val"}
    data.setup("predict")
    assert set(data._blocks) == {"val"}
