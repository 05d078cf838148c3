"""Which tokens `lskip inspect` reads of which data."""

import json
from pydoc_data.topics import topics

import pytest

from lskip.data.documents import split_of, text_digest
from lskip.evaluation.layers.inspect_data import DataOptions


def tokens(batches):
    return [token for batch in batches for token in batch["input_ids"].flatten().tolist()]


def test_the_default_is_the_help_topics_from_their_beginning(tiny_tokenizer):
    options = DataOptions(block_size=50, num_blocks=5, batch_size=2)
    batches = options.open().batches(tiny_tokenizer, options)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 50), (2, 50), (1, 50)]
    text = tiny_tokenizer.decode(tokens(batches))
    assert "\n\n".join(topics[name] for name in sorted(topics)).startswith(text)


@pytest.fixture
def documents(tmp_path):
    texts = [f"def f{i}(x):\n    return x + {i}\n" for i in range(200)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path / "data.jsonl", texts


@pytest.mark.parametrize("split", [None, "val", "train"])
def test_a_file_in_its_own_order_and_a_split_of_it(documents, tiny_tokenizer, split):
    path, texts = documents
    options = DataOptions(data=str(path), split=split, block_size=16, num_blocks=8)
    kept = [text for text in texts if split is None or split_of(text_digest(text), 0.05, 0.05) == split]
    assert len(kept) > 0 and (split is None) == (len(kept) == 200)
    text = tiny_tokenizer.decode(tokens(options.open().batches(tiny_tokenizer, options)))
    assert tiny_tokenizer.eos_token.join(kept).startswith(text)


def test_of_pairs_only_completions_are_scored(tmp_path, tiny_tokenizer):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "def add", "completion": "(a, b)"}) + "\n")
    options = DataOptions(data=str(tmp_path / "pairs.jsonl"), block_size=24)
    (batch,) = options.open().batches(tiny_tokenizer, options)
    scored = batch["labels"][0] != -100
    assert tiny_tokenizer.decode(batch["input_ids"][0, scored]) == "(a, b)<|endoftext|>"


def test_what_fills_no_block_is_refused(tmp_path, tiny_tokenizer):
    (tmp_path / "short.txt").write_text("def add")
    options = DataOptions(data=str(tmp_path / "short.txt"), block_size=512)
    with pytest.raises(ValueError, match=r"^data: .*short.txt does not fill one block_size of 512 tokens$"):
        options.open().batches(tiny_tokenizer, options)


@pytest.mark.parametrize("name", ["block_size", "num_blocks", "batch_size"])
def test_numbers_out_of_range(name):
    with pytest.raises(ValueError, match=f"^{name}: 0 is not a whole number from"):
        DataOptions(**{name: 0})
