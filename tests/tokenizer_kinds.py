"""Small tokenizers of every kind, which differ in how they write spaces and parts of words."""

from __future__ import annotations

from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = "stop the naïve Σtop 🙂🙃 stop\n\nend 語尾 a b ab aab end.\n do n't , ! ? isn't"
BITS = ["中", "a", "🌍", "\n", "!", " ", "b", "é", "the ", " st"]


def byte_fallback(marks_spaces: bool) -> Tokenizer:
    """Return a tokenizer with byte fallback (Llama 2), in which an invalid run of bytes is unreadable as a whole."""
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"!abstop▁ ", "▁a", "▁the", "st", "op", "▁▁"]
    vocabulary = {name: place for place, name in enumerate(names)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    parts = [decoders.ByteFallback(), decoders.Fuse()]
    if marks_spaces:
        parts = [decoders.Replace("▁", " "), *parts, decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(parts)
    return bpe


def byte_level() -> Tokenizer:
    """Return a byte-level tokenizer (GPT-2)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([WORDS] * 4, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, **TRAINER))
    return bpe


def metaspace() -> Tokenizer:
    """Return a tokenizer that marks spaces inside tokens and drops one at the start of decoded text (sentencepiece)."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    bpe.train_from_iterator([WORDS], trainers.BpeTrainer(vocab_size=80, **TRAINER))
    return bpe


def word_pieces() -> Tokenizer:
    """Return a tokenizer that marks continuations of a word by ## and tidies spaces up (BERT)."""
    words = Tokenizer(models.WordPiece(unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=True)
    words.train_from_iterator([WORDS] * 3, trainers.WordPieceTrainer(vocab_size=90, **TRAINER))
    return words


TRAINER = {"special_tokens": ["<unk>", "</s>"], "show_progress": False}
KINDS = {
    "byte fallback": lambda: byte_fallback(False),
    "byte fallback with spaces marked": lambda: byte_fallback(True),
    "byte level": byte_level,
    "metaspace": metaspace,
    "word pieces": word_pieces,
}


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose id 1 ends a text."""
    tokenizer = KINDS[kind]()
    tokenizer.add_special_tokens(["<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def random_tokens(tokenizer: PreTrainedTokenizerFast, draw: Random) -> list[int]:
    """Return random tokens, or those of a text, perhaps cut inside a character, with a few others inserted."""
    if draw.random() < 0.4:
        return [draw.randrange(len(tokenizer)) for _ in range(draw.randint(1, 40))]
    ids = tokenizer("".join(draw.choices(BITS, k=25)), add_special_tokens=False)["input_ids"]
    ids = ids[: draw.randint(1, len(ids))]
    for _ in range(draw.randint(0, 2)):
        ids.insert(draw.randint(0, len(ids)), draw.choice([0, 1, len(tokenizer) - 1, draw.randrange(len(tokenizer))]))
    return ids


def in_rounds(ids: list[int], draw: Random, most: int = 6) -> list[list[int]]:
    """Return the same tokens in chunks of random sizes."""
    rounds = []
    while ids:
        size = draw.randint(1, most)
        rounds.append(ids[:size])
        ids = ids[size:]
    return rounds
