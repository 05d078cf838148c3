"""Tokenizers against each other, by the tokens that they write."""

from copy import deepcopy

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lskip.data.tokenizer import same_tokens, tokenizer_key, train_bpe

TEXT = ["def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, 1))\n"] * 4


def wrap(bpe: Tokenizer, **more) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **{"eos_token": "<|endoftext|>", **more})


@pytest.fixture(scope="module")
def plain():
    return wrap(train_bpe(TEXT, 300))


def with_rule(plain, **rules) -> PreTrainedTokenizerFast:
    bpe = deepcopy(plain.backend_tokenizer)
    for name, rule in rules.items():
        setattr(bpe, name, rule)
    return wrap(bpe)


def other_merges(plain) -> PreTrainedTokenizerFast:
    vocab = {token: place for token, place in plain.get_vocab().items()}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.add_special_tokens(["<|endoftext|>"])
    return wrap(bpe)


def more_special(plain) -> PreTrainedTokenizerFast:
    tokenizer = deepcopy(plain)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|a|>"), AddedToken("<|b|>")]})
    return tokenizer


@pytest.mark.kind("K4 the data's tokenizer is not the model's")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param(more_special, "291 entries against 293", id="F12 three more special tokens"),
        pytest.param(
            lambda _: wrap(train_bpe(TEXT * 2 + ["zqzq"] * 99, 320)), "entries against", id="F14 more entries"
        ),
        pytest.param(lambda _: wrap(train_bpe(["zqzq zxzx"] * 99, 300)), "against", id="other words"),
        pytest.param(other_merges, "other merges", id="other merges"),
        pytest.param(lambda t: with_rule(t, normalizer=normalizers.NFKC()), "becomes", id="normalizer"),
        pytest.param(
            lambda t: with_rule(t, pre_tokenizer=pre_tokenizers.ByteLevel(True)), "becomes", id="prefix space"
        ),
        pytest.param(
            lambda t: with_rule(
                t,
                post_processor=processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 0)]),
            ),
            "becomes",
            id="begins each text",
        ),
        pytest.param(
            lambda t: wrap(deepcopy(t.backend_tokenizer), eos_token="!"), "eos_token '<|endoftext|>'", id="other end"
        ),
        pytest.param(lambda t: wrap(deepcopy(t.backend_tokenizer), bos_token="!"), "bos_token None", id="other begin"),
    ],
)
def test_what_differs_is_said(plain, change, words):
    other = change(plain)
    assert words in same_tokens(plain, other)
    assert same_tokens(other, plain) and same_tokens(other, change(plain)) is None


@pytest.mark.kind("K4 the data's tokenizer is not the model's")
def test_what_does_not_change_tokens_is_no_difference(plain, tmp_path):
    padded = deepcopy(plain)
    padded.pad_token, padded.chat_template = "!", "{{ messages }}"
    padded(["a", "a b"], padding=True)
    assert same_tokens(plain, padded) is None and tokenizer_key(plain) != tokenizer_key(padded)
    plain.save_pretrained(tmp_path)
    assert same_tokens(plain, PreTrainedTokenizerFast.from_pretrained(tmp_path)) is None
    no_rule = with_rule(plain, normalizer=normalizers.Sequence([]))  # written otherwise, and does the same
    assert same_tokens(plain, no_rule) is None
