"""Several sources: their shares, their order, and rows of more than one kind in a batch."""

import json
from collections import Counter

import pytest
import torch

from lskip.data import TextData
from tests.data.test_order import fit
from tests.data.test_stream_store import batches

ROWS = {"text": 300, "pairs": 100, "more": 60}


@pytest.fixture
def make_data(tmp_path, tiny_tokenizer):
    """Return a function that makes the data of several of three files: two of text, one of pairs."""
    texts = ({"text": f"a{i} is alpha number {i}. " * (2 + i % 7)} for i in range(ROWS["text"]))
    more = ({"text": f"b{i} is another {i}; " * (2 + i % 5)} for i in range(ROWS["more"]))
    pairs = ({"prompt": f"c{i}?", "completion": f" number {i}" * (1 + i % 3)} for i in range(ROWS["pairs"]))
    for name, rows in {"text": texts, "more": more, "pairs": pairs}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(weights: dict[str, float], **arguments) -> TextData:
        source = [{"source": str(tmp_path / f"{name}.jsonl"), "weight": each} for name, each in weights.items()]
        fixed = {"source": source, "tokenizer": tiny_tokenizer, "cache_dir": str(tmp_path / "cache"), "batch_size": 4}
        return TextData(**{**fixed, "block_size": 48, "val_fraction": 0.2, "test_fraction": 0.0, **arguments})

    return make


STREAM = {"streaming": True, "max_val_blocks": 50}


@pytest.mark.parametrize("arguments", [{}, STREAM], ids=["stored", "streamed"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_each_source_has_its_share_of_the_rows(make_data, arguments, share):
    data = make_data({"text": share, "more": 1 - share}, **arguments)
    found = Counter()
    for batch in batches(data, 256):  # 1,024 rows
        found.update("a" if "alpha" in data.tokenizer.decode(row) else "b" for row in batch)
    assert abs(found["a"] / found.total() - share) <= 1 / found.total()


def test_all_rows_of_a_source_come_before_one_comes_again(make_data):
    data = make_data({"text": 1, "pairs": 3})
    rows = Counter()
    for batch in batches(data, 60):
        rows.update(text for text in map(data.tokenizer.decode, batch) if "?" in text)
    pairs = make_data({"pairs": 1}).documents("train").to_dict()
    rows = Counter(text.split("<|endoftext|>")[0] for text in rows.elements())
    assert set(rows) == {one + two for one, two in zip(*pairs.values(), strict=True)}
    assert max(rows.values()) - min(rows.values()) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("arguments", [{}, STREAM], ids=["stored", "streamed"])
def test_a_run_goes_on_with_the_next_batch(make_data, tmp_path, arguments):
    def data() -> TextData:
        return make_data({"text": 2, "pairs": 1}, **arguments)

    whole = fit(tmp_path / "whole", data(), max_steps=40)
    fit(tmp_path / "parts", data(), fail_at=13, max_steps=40)
    assert fit(tmp_path / "rest", data(), ckpt_path=tmp_path / "parts" / "last.ckpt", max_steps=40) == whole[12:]
    assert whole != fit(tmp_path / "seed", make_data({"text": 2, "pairs": 1}, seed=1, **arguments), max_steps=40)


@pytest.mark.parametrize("world", [2, 4])
def test_devices_share_the_batches_of_one(make_data, world):
    whole, shares = batches(make_data({"text": 2, "pairs": 1}), 20), []
    for rank in range(world):
        data = make_data({"text": 2, "pairs": 1}, batch_size=4 // world)
        data._share = lambda rank=rank: (world, rank)
        shares.append(batches(data, 20))
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        rows = [row for part in parts for row in part]  # each part is cut where its own rows end
        assert [row[: len(found)] for row, found in zip(batch, rows, strict=True)] == rows


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("documents", ["separate", "joined"])
def test_a_batch_of_text_and_pairs_is_what_each_kind_has_alone(make_data, documents, pack):
    """Labels, positions and ids of every row are those of a batch of its own source."""
    alone = {}
    for name in ("text", "pairs"):
        for batch in make_data({name: 1}, documents=documents, pack=pack, batch_size=1).train_dataloader():
            places = batch.get("position_ids", torch.arange(batch["input_ids"].shape[1])[None])
            length = int((batch["labels"][0] != -100).nonzero().max()) + 1
            key = tuple(batch["input_ids"][0, :length].tolist())
            alone[key] = batch["labels"][0, :length].tolist(), places[0, :length].tolist()
    data = make_data({"text": 1, "pairs": 1}, documents=documents, pack=pack)
    loader, kinds = iter(data.train_dataloader()), set()
    for _ in range(20):
        batch = next(loader)
        for ids, labels, places in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
            length = int((labels != -100).nonzero().max()) + 1
            expected = alone[tuple(ids[:length].tolist())]
            assert (labels[:length].tolist(), places[:length].tolist()) == expected
            kinds.add(bool((labels[1:length] == -100).any()))
    assert kinds == {True, False} or documents == "separate"


def test_validation_is_a_part_of_each_source(make_data):
    data = make_data({"text": 3, "pairs": 1}, max_val_blocks=12)
    found = [data.tokenizer.decode(row) for batch in data.val_dataloader() for row in batch["input_ids"]]
    assert Counter("alpha" in row for row in found) == {True: 9, False: 3}
    assert data.kind == "mixed" and data.training_documents is None
    assert len(data.blocks("train")) == sum(len(make_data({name: 1}).blocks("train")) for name in ("text", "pairs"))


def test_a_tokenizer_is_trained_on_all(make_data):
    data = make_data({"text": 1, "pairs": 1}, tokenizer=None, vocab_size=400)
    assert {"alpha", "number"} <= {token.strip("Ġ") for token in data.tokenizer.get_vocab()}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ([], r"source: \[\] names no text"),
        ([{"source": "stdlib", "weight": 0}], "source: weight of stdlib: 0 is not a number above 0"),
        ([{"source": "stdlib", "weight": "x"}], "source: weight of stdlib: 'x' is not a number above 0"),
        ([{"source": "stdlib", "wait": 1}], "source: an entry .*; each has source and, unless it is 1, weight"),
        ([{"weight": 1}], "source: an entry"),
        ("[stdlib, {source: x}", r"source: .* is no list such as \[{source: a.jsonl, weight: 3}"),
        ("{source: stdlib}", "source: .* is no list such as"),
        (["stdlib", 5], "source: 5 names no text"),
        ([{"source": "gone.jsonl"}], "source: no file or folder 'gone.jsonl'"),
        ([{"source": "stdlib", "weight": 1e-5}, "packages"], "weight of stdlib: 1e-05 of 1.00001 in all is less"),
    ],
)
def test_what_is_no_list_of_sources_is_refused(source, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        TextData(source)


def test_what_does_not_go_with_several(make_data, tmp_path):
    with pytest.raises(ValueError, match="group_by_length: true, but rows of several sources"):
        make_data({"text": 1, "pairs": 1}, group_by_length=True)
    with pytest.raises(ValueError, match=r"trainer.max_steps: not set, but with streaming, or with several sources"):
        fit(tmp_path, make_data({"text": 1, "pairs": 1}), max_epochs=1)
