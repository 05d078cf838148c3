"""Streams: every document once an epoch, in an order that neither devices, workers, kills nor machines change."""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial

import pytest

from lskip.data import TextData, stream_store
from lskip.data.stream_store import StreamReader
from lskip.data.token_store import TokenStore
from tests.data.test_order import fit

DOCUMENTS = 240


@pytest.fixture
def make_data(tmp_path, tiny_tokenizer, monkeypatch):
    """Return a function that makes the data of four files, read in segments of some twenty documents."""
    monkeypatch.setattr(stream_store, "FIRST", 1000)
    monkeypatch.setattr(stream_store, "LARGEST", 1000)
    monkeypatch.setattr(stream_store, "READ_AHEAD", 4)
    source = tmp_path / "corpus"
    source.mkdir()
    for file in range(4):
        rows = ({"text": f"file {file} line {i} " * (1 + i % 5)} for i in range(DOCUMENTS // 4))
        (source / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**arguments) -> TextData:
        fixed = {"source": str(source), "tokenizer": tiny_tokenizer, "cache_dir": str(tmp_path / "cache")}
        sizes = {"block_size": 32, "batch_size": 4, "val_fraction": 0.1, "test_fraction": 0.0, "streaming": True}
        return TextData(**{**fixed, **sizes, **arguments})

    return make


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Return a list that gets the text of each row of the source that is read for training."""
    found, real = [], StreamReader.read

    def reading(reader, begin, characters):
        for row in real(reader, begin, characters):
            found.append(row["text"])
            yield row

    monkeypatch.setattr(StreamReader, "read", reading)
    return found


def batches(data: TextData, count: int, position: int = 0) -> list:
    loader = data.train_dataloader()
    loader.position = lambda: position
    found = iter(loader)
    return [next(found)["input_ids"].tolist() for _ in range(count)]


def one_epoch(data: TextData) -> int:
    """Return how many batches of a stream hold its first epoch."""
    rows = data.train_dataloader().dataset.rows
    rows.row(1500)  # beyond the first epoch: its segments are known then
    return next(s.first for s in sorted(rows.known.values()) if s.begin["epoch"] == 1) // data.batch_size


def test_streamed_documents_are_those_of_the_stored_split(make_data):
    stored, streamed = make_data(streaming=False, block_size=8), make_data(block_size=8)
    assert streamed.documents("val")["text"][:] == stored.documents("val")["text"][:]
    assert (streamed.blocks("val")[:]["input_ids"] == stored.blocks("val")[:]["input_ids"]).all()
    epoch = one_epoch(streamed)
    tokens = Counter(token for batch in batches(streamed, epoch) for row in batch for token in row)
    expected = Counter(
        token for text in stored.documents("train")["text"] for token in stored.tokenizer(text).input_ids
    )
    expected[stored.tokenizer.eos_token_id] += len(stored.documents("train"))
    lost = expected.total() - tokens.total()
    assert not tokens - expected and lost < 0.05 * expected.total()  # the last tokens of a segment, and of the epoch


def test_every_document_is_stored_once_in_an_epoch(make_data, monkeypatch):
    """Whole documents, in the order in which they are stored: rows are shuffled."""
    monkeypatch.setattr(stream_store, "KEPT", 10**6)
    data, stored = make_data(), make_data(streaming=False)
    rows = data.train_dataloader().dataset.rows
    rows.row(1500)
    stores = {int(path.name.rpartition("-")[2]): TokenStore(path) for path in data.cache.glob("streams/*-*")
              if path.is_dir() and path.name[0] != "."}  # fmt: skip
    last = next(s.number for s in sorted(rows.known.values()) if s.begin["epoch"] == 1)
    found = Counter()
    for store in (stores[number] for number in range(last)):
        found.update(data.tokenizer.decode(store.tokens[slice(*store.place(n))]) for n in range(len(store)))
    assert last > 3 and found == Counter(f"{text}<|endoftext|>" for text in stored.documents("train")["text"])


def pairs_of(make_data, tmp_path, **arguments) -> TextData:
    path = tmp_path / "pairs.jsonl"
    rows = ({"prompt": f"{n} is ", "completion": f"number {n} " * (1 + n % 4)} for n in range(200))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_data(source=str(path), block_size=64, batch_size=1, **arguments)


@pytest.mark.parametrize("pack", [False, True])
def test_every_pair_comes_once_in_an_epoch(make_data, tmp_path, pack):
    data, stored = pairs_of(make_data, tmp_path, pack=pack), pairs_of(make_data, tmp_path, streaming=False)
    text = "".join(data.tokenizer.decode(batch[0]) for batch in batches(data, one_epoch(data)))
    found = Counter(text.replace("<|padding|>", "").split("<|endoftext|>")) - Counter({"": 10**4})
    assert found == Counter(p + c for p, c in zip(*stored.documents("train").to_dict().values(), strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_anywhere(make_data, workers):
    data = make_data(num_workers=workers)
    whole = batches(data, 40)
    assert whole != batches(make_data(seed=1), 40)
    for done in (1, 2, 13, 33):
        assert batches(data, 40 - done, position=done) == whole[done:]
    assert batches(make_data(), 40) == whole


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_devices_reads_the_same_batches(make_data, world):
    whole, shares = batches(make_data(), 20), []
    for rank in range(world):
        data = make_data(batch_size=4 // world)
        data._share = lambda rank=rank: (world, rank)
        shares.append(batches(data, 20))
    assert [[row for part in parts for row in part] for parts in zip(*shares, strict=True)] == whole


def test_an_epoch_is_another_order(make_data):
    data = make_data()
    epoch = one_epoch(data)
    first, second = (batches(data, epoch - 1, position) for position in (0, epoch))
    as_sets = [{tuple(row) for batch in found for row in batch} for found in (first, second)]
    assert first != second and len(as_sets[0] & as_sets[1]) < len(as_sets[0])


def test_a_kill_while_a_segment_is_written_loses_nothing(make_data, tmp_path, monkeypatch):
    whole = batches(make_data(), 30)
    real, killed = stream_store.write_tokens, []

    def broken(folder, *more):
        real(folder, *more)
        killed.append(folder)
        if len(killed) % 2:
            raise RuntimeError

    monkeypatch.setattr(stream_store, "write_tokens", broken)
    make = partial(make_data, cache_dir=str(tmp_path / "another"))
    data, found = make(), []
    while len(found) < 30:
        try:
            found += batches(data, 1, position=len(found))
        except RuntimeError:
            data = make()
    assert found == whole and len(killed) > 4


def test_a_stream_needs_little_disk_and_reads_again_what_was_removed(make_data):
    data = make_data()
    whole = batches(data, 60)
    kept = [path for path in (data.cache / "streams").iterdir() if path.name[0] != "."]
    kept = [path for path in kept if path.is_dir()]
    assert max(int(path.name.rpartition("-")[2]) for path in kept) > 8 and len(kept) <= 6
    assert batches(make_data(), 60) == whole


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_on_another_machine_a_run_reads_from_its_segment_on(make_data, tmp_path, read):
    arguments = {"max_steps": 40, "limit_val_batches": 0}
    whole = fit(tmp_path / "whole", make_data(), **arguments)
    fit(tmp_path / "parts", make_data(), fail_at=31, **arguments)
    data = make_data(cache_dir=str(tmp_path / "elsewhere"))
    read.clear()
    assert fit(tmp_path / "rest", data, ckpt_path=tmp_path / "parts" / "last.ckpt", **arguments) == whole[30:]
    first = data.tokenizer.decode(whole[0][0])
    assert 0 < len(read) < DOCUMENTS and first


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_with_rows_of_another_length_goes_on(make_data, tmp_path):
    fit(tmp_path / "parts", make_data(), fail_at=11, max_steps=40)
    longer = make_data(block_size=64)
    seen = fit(tmp_path / "rest", longer, ckpt_path=tmp_path / "parts" / "last.ckpt", max_steps=12)
    assert seen == batches(make_data(block_size=64), 2, position=10)


def test_a_changed_segment_is_made_again(make_data):
    whole = batches(make_data(), 8)
    for thread in threading.enumerate():  # the one that makes the next segment, whose folder is renamed
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(timeout=30)
    for path in (make_data().cache / "streams").glob("*/tokens.*"):
        path.write_bytes(bytes(path.stat().st_size))
    with pytest.warns(match="is not as it was written"):
        assert batches(make_data(), 8) == whole


def test_a_stream_trains_its_tokenizer_on_training_text(make_data):
    tokenizer = make_data(tokenizer=None, vocab_size=300).tokenizer
    assert tokenizer.get_vocab() == make_data(streaming=False, tokenizer=None, vocab_size=300).tokenizer.get_vocab()


def test_an_endless_stream_needs_max_steps(make_data, tmp_path):
    with pytest.raises(ValueError, match=r"trainer.max_steps: not set"):
        fit(tmp_path, make_data(), max_epochs=1)
    with pytest.raises(ValueError, match="kept nowhere with streaming"):
        make_data().documents("train")


def test_a_stream_without_a_row(make_data):
    with pytest.raises(ValueError, match="the stream holds no training row of block_size tokens"):
        batches(make_data(block_size=4096), 1)


SLOWLY = """
import sys, time
from lskip.data import TextData, stream_store
stream_store.FIRST = stream_store.LARGEST = 10_000
read = stream_store.StreamReader.read
def slowly(reader, begin, characters):
    for row in read(reader, begin, characters):
        time.sleep(0 if begin == stream_store.BEGIN else 0.5)  # what is made ahead takes a minute
        yield row
stream_store.StreamReader.read = slowly
data = TextData(sys.argv[1], vocab_size=300, block_size=32, batch_size=2, streaming=True, cache_dir=sys.argv[2])
print(next(iter(data.train_dataloader()))["input_ids"].shape, flush=True)
"""


def test_a_process_ends_while_a_segment_is_made(make_data, tmp_path):
    """Red where it waits for the thread that makes it, or where that brings Python down."""
    source = make_data().source
    command = [sys.executable, "-c", SLOWLY, source, str(tmp_path / "c")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "torch.Size" in process.stdout.readline()
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and time.monotonic() - began < 15 and "Fatal" not in errors, errors
