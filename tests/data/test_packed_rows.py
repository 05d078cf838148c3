"""Pairs and conversations in one row: each whole, once, and trained as if alone."""

import json
from copy import deepcopy

import numpy as np
import pytest
import torch

from lskip.data.packed_rows import fill_rows
from lskip.module import LayerSkipModule
from tests.data.test_datamodule import data_maker

PAIRS = [{"prompt": f"{n} " * (n % 12), "completion": f"yes {n}" * (1 + n % 7)} for n in range(200)]


@pytest.fixture
def text_data(tmp_path, tiny_tokenizer):
    return data_maker(tmp_path, tiny_tokenizer)


@pytest.mark.parametrize("size", [1, 7, 60, 100])
def test_rows_hold_each_example_once_and_have_little_room(size):
    lengths = np.random.default_rng(0).integers(1, size + 1, 500)
    rows = fill_rows(lengths, size)
    assert sorted(example for row in rows for example in row) == list(range(500))
    assert all(lengths[row].sum() <= size for row in rows)
    assert len(rows) * size <= 1.25 * lengths.sum() + size


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [([2, 5, 3, 1, 3, 2], [[1, 3], [2, 4], [0, 5]]), ([6, 6], [[0], [1]]), ([1, 1, 1], [[0, 1, 2]])],
)
def test_the_longest_first_each_where_the_least_room_is(lengths, rows):
    """Rows of 6, by hand."""
    assert fill_rows(np.array(lengths), 6) == rows


def talk(asked: str, answered: str) -> list[dict]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def examples_of(batch: dict) -> list[tuple[list[int], list[int]]]:
    """Return the tokens and labels of each example of a batch, by its positions; padding scores nothing."""
    found = []
    for ids, labels, places in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        parts = np.split(np.arange(len(ids)), np.flatnonzero(places.numpy() == 0)[1:])
        found += [(ids[part].tolist(), labels[part].tolist()) for part in parts]
    return [(ids, labels) for ids, labels in found if max(labels) >= 0]


@pytest.mark.parametrize("kind", ["pairs", "chat"])
def test_a_packed_epoch_has_the_examples_of_one_that_is_not(tmp_path, text_data, kind, tiny_tokenizer):
    rows = PAIRS
    if kind == "chat":
        tokenizer = deepcopy(tiny_tokenizer)
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        text_data = data_maker(tmp_path, tokenizer)
        rows = [{"messages": talk(row["prompt"] or "?", row["completion"])} for row in PAIRS]
    sizes = {"block_size": 128, "batch_size": 1}
    plain, packed = (text_data(rows, pack=pack, **sizes).train_dataloader() for pack in (False, True))
    alone = []
    for batch in plain:
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        alone.append((ids, [-100, *labels[1:]]))
    together = [example for batch in packed for example in examples_of(batch)]
    assert sorted(together) == sorted(alone)
    assert len(list(packed)) < 0.5 * len(list(plain))
    computed = sum(batch["input_ids"].numel() for batch in packed)
    assert computed <= 1.1 * sum(len(ids) for ids, _ in alone)


def test_the_loss_is_the_mean_over_the_scored_tokens_of_each_alone(text_data, tiny_model):
    module = LayerSkipModule(tiny_model("llama"), lr_scheduler=None).train()
    module.exit_weights.values = [0.1, 0.2, 0.3, 0.4]
    batch = next(iter(text_data(PAIRS, pack=True, block_size=64).train_dataloader()))
    losses, counts = [], []
    for ids, labels in examples_of(batch):
        one = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
        counts.append(sum(label >= 0 for label in labels[1:]))
        losses.append(module.early_exit_loss(one, 0)[0] * counts[-1])
    torch.testing.assert_close(module.early_exit_loss(batch, 0)[0], sum(losses) / sum(counts), rtol=1e-5, atol=1e-5)


def test_held_out_rows_hold_one_each_and_text_is_as_it_was(text_data):
    data = text_data(PAIRS, pack=True, block_size=64)
    assert all("position_ids" not in batch for batch in data.val_dataloader())
    texts = [next(iter(text_data(pack=pack).train_dataloader()))["input_ids"] for pack in (True, False)]
    assert torch.equal(*texts)


def test_what_does_not_go_with_it_is_refused(text_data):
    with pytest.raises(ValueError, match=r"^group_by_length: true, but"):
        text_data(PAIRS, pack=True, group_by_length=True)


def test_the_order_of_packed_rows_is_resumed(text_data):
    """Each row of an epoch once, and the same from any position on."""
    whole = text_data(PAIRS, pack=True, block_size=64, batch_size=2)
    batches = [json.dumps(batch["input_ids"].tolist()) for batch in whole.train_dataloader()]
    assert len(set(batches)) == len(batches)
    rest = text_data(PAIRS, pack=True, block_size=64, batch_size=2)
    rest._batches_done = lambda: 5
    found = [json.dumps(batch["input_ids"].tolist()) for batch in rest.train_dataloader()]
    assert found[: len(batches) - 5] == batches[5:]
