"""Special tokens that a text spells, those that tokenizers add, and long texts in pieces."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import lskip.data.text_tokens as text_tokens
from lskip.data.encoders import PairEncoder, TextEncoder
from lskip.data.text_tokens import cut_text, encode_plain
from lskip.data.tokenizer import train_bpe
from lskip.models.encoding import open_ended
from tests.data.test_datamodule import data_maker, made, texts
from tests.data.test_tokenizer import TEXT

SPECIAL = "K15 special tokens around and inside text"
LONG = "B21 one long line"


@pytest.mark.kind(SPECIAL, "F57")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("own", [False, True], ids=["given", "trained"])
def test_f57_an_end_of_text_that_documents_spell(tmp_path, tiny_tokenizer, own, streaming):
    rows = [{"text": f"def f{i}(x):\n    return '<|endoftext|>' * {i}\n" * 3} for i in range(60)]
    make = data_maker(tmp_path, None if own else tiny_tokenizer)
    data = make(rows, vocab_size=300, val_fraction=0.5, test_fraction=0, streaming=streaming, max_val_blocks=10**4)
    with pytest.warns(UserWarning, match=r"line \d+ spells the special token '<\|endoftext\|>'"):
        ids = np.array(data.blocks("val")[:]["input_ids"]).reshape(-1)
    assert abs((ids == data.tokenizer.eos_token_id).sum() - len(data.documents("val"))) <= 1
    text = "<end>".join(data.documents("val")["text"]) + "<end>"
    parts = np.split(ids, np.flatnonzero(ids == data.tokenizer.eos_token_id))
    assert text.startswith("<end>".join(data.tokenizer.decode(part[part != 0]) for part in parts))


@pytest.mark.kind(SPECIAL)
@pytest.mark.parametrize("spelled", ["<|endoftext|>", "a<|endoftext|>", "<|endoftext|><|endoftext|> b"])
def test_pairs_that_spell_it(tiny_tokenizer, spelled):
    for prompt, completion in ((spelled, "yes"), ("hey", spelled)):
        row = made(PairEncoder(tiny_tokenizer), {"prompt": [prompt], "completion": [completion]}, 80)
        label = row["labels"][0]
        assert tiny_tokenizer.decode(label[label != -100]) == completion + "<|endoftext|>"
        assert (label == 0).sum() == 1


@pytest.mark.kind(SPECIAL)
def test_texts_that_spell_none_are_tokenized_as_ever(tiny_tokenizer):
    text = "def f(a):\n    return a < b | c\n"
    assert encode_plain(tiny_tokenizer, [text]) == [tiny_tokenizer(text).input_ids]


def around(tokenizer, template: str) -> PreTrainedTokenizerFast:
    bpe = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    bpe.post_processor = processors.TemplateProcessing(template, None, [("<|endoftext|>", 0), ("!", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")


@pytest.mark.kind(SPECIAL)
@pytest.mark.parametrize(
    ("template", "before"),
    [
        pytest.param("$A <|endoftext|>", [], id="adds an end"),
        pytest.param("! $A", [1], id="adds a begin"),
        pytest.param("! $A <|endoftext|>", [1], id="adds both"),
        pytest.param("<|endoftext|> $A", [0], id="the end is the begin"),
        pytest.param("<|endoftext|> $A <|endoftext|>", [0], id="the end around it"),
        pytest.param("$A", [], id="adds nothing"),
    ],
)
def test_what_a_tokenizer_puts_around_a_text(tiny_tokenizer, template, before):
    tokenizer = around(tiny_tokenizer, template)
    for text in ("def f", "", "a <|endoftext|>"):
        inside = tiny_tokenizer(text).input_ids
        assert open_ended(tokenizer, [text]) == [before + inside]
    plain = encode_plain(tiny_tokenizer, texts(9))
    packed = made(TextEncoder(tokenizer), {"text": texts(9)}, 7)["input_ids"]
    stream = [token for ids in plain for token in (*before, *ids, 0)]
    assert np.array_equal(np.concatenate(packed), stream[: len(packed) * 7])
    pair = made(PairEncoder(tokenizer), {"prompt": ["a"], "completion": ["b"]}, 30)
    expected = [*before, *tiny_tokenizer("a").input_ids, *tiny_tokenizer("b").input_ids, 0]
    assert pair["input_ids"][0][: len(expected)].tolist() == expected


# Long texts


def metaspace() -> PreTrainedTokenizerFast:
    """Return a tokenizer without pre-tokenization that begins each text with a space of its own (Llama 2)."""
    merges = [("a", "b"), ("ab", "ab"), ("\u2581", "ab"), ("\u2581", "\u2581"), ("c", "\n")]
    vocab = {each: place for place, each in enumerate(["<unk>", *"abc\n\u2581.", *map("".join, merges)])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    bpe.decoder = decoders.Replace("\u2581", " ")
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", eos_token=".")


def byte_level() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=train_bpe(TEXT, 300), eos_token="<|endoftext|>")


def digits() -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    words = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    return tokenizer


@pytest.mark.kind(LONG, "B21")
@pytest.mark.parametrize("make", [byte_level, digits, metaspace])
@pytest.mark.parametrize("unit", ["ab c ab\n", "a  b   c\n\n", "return a + 12345 ", "ab\tc\r\n", "x" * 50 + " "])
def test_a_long_text_has_the_same_tokens_in_pieces(make, unit):
    tokenizer, text = make(), unit * (3000 // len(unit))
    pieces = list(cut_text(tokenizer, text, size=500))
    assert len(pieces) >= 6 and [is_last for _, is_last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(piece) <= 500 for piece, _ in pieces)
    if (make, unit) != (metaspace, "ab\tc\r\n"):  # no space, and this one writes one before each text
        assert in_pieces(tokenizer, pieces) == encode_plain(tokenizer, [text])[0]


def in_pieces(tokenizer, pieces) -> list[int]:
    return [token for ids in encode_plain(tokenizer, [piece for piece, _ in pieces]) for token in ids]


@pytest.mark.kind(LONG)
@pytest.mark.parametrize("make", [byte_level, digits, metaspace])
@pytest.mark.parametrize("unit", ["abab", "\n", " ", "\u4f60\u597d\u3002"])
def test_a_long_text_without_a_place_to_cut_loses_nothing(make, unit):
    tokenizer, text = make(), unit * (3000 // len(unit))
    pieces = list(cut_text(tokenizer, text, size=500))
    assert all(len(piece) <= 500 for piece, _ in pieces)
    assert "".join(piece for piece, _ in pieces) == text
    assert abs(len(in_pieces(tokenizer, pieces)) - len(encode_plain(tokenizer, [text])[0])) <= 2 * len(pieces)


@pytest.mark.kind(LONG)
@pytest.mark.parametrize("streaming", [False, True])
def test_blocks_of_long_documents_are_those_of_whole_ones(tmp_path, tiny_tokenizer, monkeypatch, streaming):
    rows = [{"text": f"def f{i}(x): return x + {i}\n" * (1 + i % 40)} for i in range(60)]
    make, fixed = data_maker(tmp_path, tiny_tokenizer), {"val_fraction": 0.5, "streaming": streaming}
    whole = make(rows, **fixed).blocks("val")[:]["input_ids"]
    monkeypatch.setattr(text_tokens, "PIECE", 300)
    monkeypatch.setattr(cut_text, "__defaults__", (300,))
    cut = make(rows, **fixed, cache_dir=str(tmp_path / "other")).blocks("val")[:]["input_ids"]
    assert np.array_equal(whole, cut)


@pytest.mark.kind(LONG)
def test_of_a_long_pair_no_more_is_tokenized_than_a_row_needs(tiny_tokenizer, monkeypatch):
    seen = []
    real = text_tokens.encode_plain
    monkeypatch.setattr(text_tokens, "encode_plain", lambda t, texts: seen.extend(texts) or real(t, texts))
    monkeypatch.setattr(text_tokens, "PIECE", 300)
    monkeypatch.setattr(cut_text, "__defaults__", (300,))
    row = made(PairEncoder(tiny_tokenizer, 64), {"prompt": ["ab"], "completion": ["c d " * 100_000]}, 64)
    assert (row["labels"][0] != -100).sum() == 64 - len(tiny_tokenizer("ab").input_ids)
    assert sum(map(len, seen)) < 20_000
