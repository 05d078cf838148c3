"""Scored tokens of prompts, completions and conversations; tokenizers."""

import json

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lskip.data.collation import collate
from lskip.data.encoders import ChatEncoder, PairEncoder
from lskip.data.tokenizer import tokenizer_key
from tests.data.test_datamodule import data_maker, made

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}\n{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LAST_ONLY = "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m.content }}{% endfor %}"


@pytest.fixture
def text_data(tmp_path, tiny_tokenizer):
    return data_maker(tmp_path, tiny_tokenizer)


@pytest.fixture
def chat_tokenizer(tiny_tokenizer):
    """Return a function (template) -> a copy of the tiny tokenizer with that chat template."""

    def make(template: str | None) -> PreTrainedTokenizerFast:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=tiny_tokenizer.backend_tokenizer, eos_token="<|endoftext|>"
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


# Masking: a token a byte, so that rows can be written by hand


@pytest.fixture(scope="module")
def bytes_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<end>"])}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


def spelled(tokenizer, labels: np.ndarray) -> str:
    """Return the labels as text: . where a token is not scored, $ for the end."""
    names = {-100: ".", tokenizer.eos_token_id: "$"}
    return "".join(names.get(int(label)) or tokenizer.decode([int(label)]) for label in labels)


def test_prompt_is_masked_and_the_end_is_scored(bytes_tokenizer):
    rows = made(PairEncoder(bytes_tokenizer), {"prompt": ["2+2=", "hi"], "completion": ["4", "you all there"]}, 10)
    assert [spelled(bytes_tokenizer, labels) for labels in rows["labels"]] == ["....4$....", "..you all "]
    assert [spelled(bytes_tokenizer, ids) for ids in rows["input_ids"]] == ["2+2=4$$$$$", "hiyou all "]


def test_pairs_with_nothing_scored_are_left_out_with_a_warning(text_data, bytes_tokenizer):
    rows = [{"prompt": f"{i:03d}" + "p" * (20 if i % 3 == 0 else 2), "completion": "yes"} for i in range(90)]
    data = text_data(rows, tokenizer=bytes_tokenizer, block_size=12)
    long = sum(len(prompt) > 20 for prompt in data.documents("train")["prompt"])
    with pytest.warns(UserWarning, match=f"{long} of {len(data.documents('train'))} train examples left out"):
        blocks = data.blocks("train")
    assert len(blocks) == len(data.documents("train")) - long and long > 10
    assert {spelled(bytes_tokenizer, labels) for labels in blocks[:]["labels"]} == {".....yes$..."}
    batch = next(iter(data.train_dataloader()))
    assert (batch["labels"][:, :5] == -100).all() and (batch["input_ids"] >= 0).all()


@pytest.mark.parametrize(
    ("completions", "length"),
    [(["four", "4"], 7), (["four", "as many as fit"], 10), (["4", "5"], 4)],
    ids=["longest", "cut", "short"],
)
def test_a_batch_ends_behind_its_last_scored_token(bytes_tokenizer, completions, length):
    rows = made(PairEncoder(bytes_tokenizer), {"prompt": ["2:", "1:"], "completion": completions}, 10)
    batch = collate([dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)])
    assert batch["input_ids"].shape == batch["labels"].shape == (2, length)
    for name in rows:
        assert batch[name].tolist() == [row[:length].tolist() for row in rows[name]]
    assert all((row[length:] == -100).all() for row in rows["labels"])


def test_a_batch_without_a_scored_token_is_as_long_as_its_rows():
    row = {"input_ids": np.arange(6, dtype=np.int32), "labels": np.full(6, -100, np.int32)}
    assert collate([row, row])["input_ids"].shape == (2, 6)


def test_pad_token_fills_where_there_is_one(chat_tokenizer):
    tokenizer = chat_tokenizer(None)
    tokenizer.pad_token = "!"
    row = made(PairEncoder(tokenizer), {"prompt": ["a"], "completion": ["b"]}, 12)
    assert row["input_ids"][0][3:].tolist() == [tokenizer.convert_tokens_to_ids("!")] * 9


CONVERSATION = [
    {"role": "user", "content": "hey"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "ok"},
    {"role": "assistant", "content": "bye"},
]


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_every_assistant_turn_is_scored(bytes_tokenizer, template):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_tokenizer.backend_tokenizer, eos_token="<end>")
    tokenizer.chat_template = template
    row = made(ChatEncoder(tokenizer), {"messages": [json.dumps(CONVERSATION)]}, 60)
    written = "<user>hey\n<assistant>yo\n<user>ok\n<assistant>bye\n"
    assert spelled(tokenizer, row["input_ids"][0]) == written + "$" * 12
    expected = "." * 21 + "yo\n" + "." * 9 + "." * 11 + "bye\n"
    assert spelled(tokenizer, row["labels"][0]) == expected + "." * (60 - len(expected))


def test_messages_from_a_file(text_data, chat_tokenizer):
    rows = [{"messages": [{"role": "user", "content": f"{i}"}, *CONVERSATION[1:]]} for i in range(60)]
    batch = next(iter(text_data(rows, tokenizer=chat_tokenizer(CHAT), block_size=64).train_dataloader()))
    scored = [row[row != -100].tolist() for row in batch["labels"]]
    assert {chat_tokenizer(None).decode(row) for row in scored} == {"yo\nbye\n"}


def test_a_template_that_rewrites_history_is_refused(chat_tokenizer):
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        made(ChatEncoder(chat_tokenizer(LAST_ONLY)), {"messages": [json.dumps(CONVERSATION)]}, 60)


def test_a_template_that_refuses_a_conversation(chat_tokenizer):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="roles must alternate"):
        made(ChatEncoder(chat_tokenizer(template)), {"messages": [json.dumps(CONVERSATION)]}, 60)


# Tokenizer


@pytest.mark.parametrize("text", ["  two spaces", "\n\ttab ", "héllo ≠ 世界 🙂", "a  b   c ,  . don't", "\x00\x7f"])
def test_trained_tokenizer_gives_any_text_back(text_data, text):
    tokenizer = text_data(tokenizer=None, vocab_size=300).tokenizer
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token == "<|endoftext|>" and len(tokenizer) <= 300


def test_with_split_digits_each_is_a_token_and_the_text_is_the_same(text_data):
    rows = [{"text": f"{number} and {number} again"} for number in range(1, 60)] * 3
    for split_digits in (False, True):
        tokenizer = text_data(rows, tokenizer=None, vocab_size=400, split_digits=split_digits).tokenizer
        text = "42 and 424242 again, 7\n"
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        longest = max(sum(c.isdigit() for c in token) for token in tokenizer.convert_ids_to_tokens(ids))
        assert (longest == 1) == split_digits


def test_tokenizer_key_ignores_earlier_calls_and_sees_changes(chat_tokenizer):
    tokenizer = chat_tokenizer(None)
    key = tokenizer_key(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    padded_key = tokenizer_key(tokenizer)
    tokenizer(["a", "a long text"], padding=True, truncation=True, max_length=3)
    assert tokenizer_key(tokenizer) == padded_key != key
    assert tokenizer_key(chat_tokenizer(CHAT)) != key


def test_tokenizers_that_cannot_serve(text_data, tiny_tokenizer):
    endless = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="has no end-of-text token"):
        text_data(tokenizer=endless).setup("fit")
    rows = [{"messages": CONVERSATION}]
    with pytest.raises(ValueError, match="has no chat template"):
        text_data(rows).setup("fit")
