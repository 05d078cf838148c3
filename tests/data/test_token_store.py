"""Stored tokens: the rows of any block size, made by several processes, read by processes that load batches."""

import os
import pickle
import signal
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from lskip.data import token_store
from lskip.data.collation import collate
from lskip.data.encoders import ENCODERS
from lskip.data.rows import RowMaker
from lskip.utils.worker_processes import WorkerProcesses
from tests.data.test_chat import CHATML
from tests.data.test_datamodule import data_maker

TEXTS = [{"text": f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 7)} for i in range(90)]
PAIRS = [{"prompt": f"{i} " * (i % 23), "completion": f"yes {i}" * (1 + i % 5)} for i in range(90)]
CHATS = [
    {"messages": [{"role": "user", "content": "hey " * (i % 9)}, {"role": "assistant", "content": f"yo {i}" * (i % 4)}]}
    for i in range(90)
]


@pytest.fixture
def make(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", CHATML)
    return partial(data_maker(tmp_path, tiny_tokenizer), val_fraction=0.3, max_val_blocks=None)


def rows_one_by_one(data, split: str) -> list[dict]:
    documents = data.sources[0].corpus.documents(split)
    return list(RowMaker(ENCODERS[data.kind](data.tokenizer), data.block_size).rows(documents))


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("rows", [TEXTS, PAIRS, CHATS], ids=["texts", "pairs", "chats"])
@pytest.mark.parametrize("size", [2, 7, 150, 900])
def test_rows_of_any_block_size_are_those_of_the_documents(make, rows, size):
    """And what is read at one size is tokenized once for all."""
    data = make(rows, block_size=size)
    for split in ("train", "val"):
        expected, found = rows_one_by_one(data, split), data.blocks(split)
        assert len(found) == len(expected) and (len(found) > 5 or size != 150)
        for row, other in zip(found, expected, strict=True):
            assert row.keys() == other.keys() and all(np.array_equal(row[name], other[name]) for name in row)
        if found.lengths is not None:
            assert [int((row["labels"] != -100).nonzero()[0].max()) + 1 for row in expected] == found.lengths.tolist()
    assert len(list((data.cache / "tokens").iterdir())) == 2


def test_several_rows_at_once(make):
    blocks = make(PAIRS, block_size=64).blocks("train")
    one_by_one = [blocks[number] for number in range(len(blocks))]
    for chosen in (slice(3, 9), slice(None, None, 5), [7, 1], np.array([2, 2])):
        numbers = range(len(blocks))[chosen] if isinstance(chosen, slice) else chosen
        assert np.array_equal(blocks[chosen]["labels"], [one_by_one[number]["labels"] for number in numbers])
    assert np.array_equal(blocks[-1]["input_ids"], one_by_one[-1]["input_ids"])
    assert blocks[5:5]["input_ids"].shape == (0, 64)
    with pytest.raises(IndexError):
        blocks[len(blocks)]
    with pytest.raises(TypeError, match=r"rows\[:\]\['labels'\]"):
        blocks["labels"]


@pytest.mark.parametrize("size", [300, 70_000])
def test_tokens_of_a_large_vocabulary_are_kept_whole(make, size):
    words = Tokenizer(models.WordLevel({"<end>": 0} | {f"w{i}": i for i in range(1, size)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    rows = [{"text": f"w{size - 1 - i} w{1 + i}"} for i in range(60)]
    tokens = make(rows, tokenizer=tokenizer, block_size=3).blocks("train")[:]["input_ids"]
    assert tokens.max() >= size - 60 and (tokens[:, 2] == 0).all()


# Several processes


@pytest.fixture
def small_parts(monkeypatch):
    """Set what one process tokenizes before another's turn to about four documents, and count processes."""
    started = []
    start = WorkerProcesses._start
    monkeypatch.setattr(WorkerProcesses, "_start", lambda self: started.append(self) or start(self))
    monkeypatch.setattr(token_store, "PART", 600)
    monkeypatch.setattr(token_store, "available_cores", lambda: 3)
    return started


@pytest.mark.parametrize("rows", [TEXTS, PAIRS, CHATS], ids=["texts", "pairs", "chats"])
def test_several_processes_tokenize_what_one_does(make, tmp_path, monkeypatch, small_parts, rows):
    """Red where parts come back in another order, or a part's ends do not go on behind the part before."""
    many = make(rows, block_size=64)
    found = many.blocks("train")[:]
    assert len(small_parts) == 3
    monkeypatch.setattr(token_store, "available_cores", lambda: 1)
    one = make(rows, block_size=64, cache_dir=str(tmp_path / "other")).blocks("train")[:]
    assert len(small_parts) == 3 and all(np.array_equal(found[name], one[name]) for name in one)


def test_a_special_token_is_told_once_by_many_processes(make, small_parts, recwarn):
    rows = [{"text": f"{i}: <|endoftext|> " * 5} for i in range(200)]
    assert len(make(rows).blocks("train")) and len(small_parts) == 3
    assert sum("spells the special token" in str(each.message) for each in recwarn) == 1


def test_what_a_process_refuses_is_told_by_name(make, small_parts, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    data = make(CHATS)
    with pytest.raises(ValueError, match=r"line .*roles must alternate"):
        data.blocks("train")
    assert not list((data.cache / "tokens").glob(".unfinished-*"))


@pytest.mark.parametrize("package", ["torch", "lightning", "datasets"])
def test_what_helps_imports_little(package):
    """Each of them would be seconds and hundreds of megabytes in every process."""
    code = f"import sys, lskip.data.encoders; print({package!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"False"


def kill_itself(_, part: str) -> str:
    if part == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return part


def test_a_process_that_is_killed_is_no_wait_for_ever():
    with WorkerProcesses(2, kill_itself, None) as workers, pytest.raises(ValueError, match="ended by SIGKILL"):
        list(workers.map(["a", "b", "killed", *"cdefgh"]))


def test_parts_are_not_read_far_ahead():
    read = []
    with WorkerProcesses(2, kill_itself, None) as workers:
        answers = workers.map(read.append(i) or str(i) for i in range(1000))
        assert [next(answers) for _ in range(3)] == ["0", "1", "2"] and len(read) < 20


# Processes that load batches


@pytest.mark.parametrize("rows", [TEXTS, PAIRS], ids=["texts", "pairs"])
def test_a_process_is_not_sent_the_tokens(make, rows):
    """Red where another start method than fork would copy a corpus to each."""
    blocks = make(rows, block_size=16).blocks("train")
    size = len(pickle.dumps(blocks))
    more = [{name: text + str(number) for name, text in row.items()} for number in range(9) for row in rows]
    many = make(more, block_size=16).blocks("train")
    assert len(many) > 5 * len(blocks) and len(pickle.dumps(many)) < size + 16 * len(many) + 100
    assert np.array_equal(pickle.loads(pickle.dumps(many))[3]["input_ids"], many[3]["input_ids"])


def test_processes_load_batches_whatever_another_thread_does(make):
    """A thread that draws progress bars holds a lock while it does; a process forked then has it for ever."""
    blocks = make(TEXTS, block_size=16).blocks("train")
    with tqdm.get_lock():
        loader = DataLoader(blocks, batch_size=4, num_workers=2, collate_fn=collate, timeout=30)
        batches = torch.cat([batch["input_ids"] for batch in loader])
    assert np.array_equal(batches, blocks[:]["input_ids"])
