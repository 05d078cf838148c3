"""Training of a byte-level BPE tokenizer, and comparison of tokenizers."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lskip.data.cache import cached_folder

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # all bytes and the end of text
TRAINING_CHARACTERS = 32_000_000  # more text changes the merges little and takes minutes
# Texts that normalizers, pre-tokenizers and post-processors treat differently.
PROBES = (
    "a",
    " a",
    "a  b",
    "x = 2024;\n\n\tif y:\n    pass",
    "don't SAY Caf\u00e9 e\u0301 \ufb01",
    "你好, мир! \U0001f30d",
    "",
)


def trained_tokenizer(
    texts: Iterable[str], vocab_size: int, folder: Path, split_digits: bool = False
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of at most `vocab_size` entries, trained on `texts` or read from `folder`.

    It reproduces any text exactly (`decode(encode(text)) == text`); its end of text is `<|endoftext|>`. At most the
    first 32 million characters are used.

    Args:
        split_digits: make every digit a token by itself.
    """

    def write(target: Path) -> None:
        bpe = train_bpe(first_characters(texts, TRAINING_CHARACTERS), vocab_size, split_digits)
        with os_errors():
            PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT).save_pretrained(target)

    return PreTrainedTokenizerFast.from_pretrained(cached_folder(folder, write))


@contextmanager
def os_errors() -> Iterator[None]:
    """Raise an OSError in place of the bare Exception of package tokenizers where a file cannot be written."""
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)$", str(error))
        if type(error) is not Exception or number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def train_bpe(texts: Iterable[str], vocab_size: int, split_digits: bool = False) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, words]) if split_digits else words
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all bytes, also those not in the training text
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        yield text[:limit]
        limit -= len(text)
        if limit <= 0:
            return


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return `tokenizer`; raise ValueError if it has no end-of-text token."""
    if tokenizer.eos_token_id is None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise ValueError(f"tokenizer: '{name}' has no end-of-text token (eos_token), which separates documents")
    return tokenizer


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer's behaviour, equal for equal tokenizers in any process."""
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template]
    return hashlib.sha256(repr((vocabulary_and_rules(tokenizer), special)).encode()).hexdigest()


def vocabulary_and_rules(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # Padding and truncation are leftovers of earlier calls.
        return json.dumps({key: rules[key] for key in sorted(rules) if key not in ("padding", "truncation")})
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return repr([(path.name, path.read_bytes()) for path in sorted(Path(folder).iterdir())])


def same_tokens(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    """Return, in a few words, why `a` and `b` tokenize some text differently; None where they do not.

    Padding and chat templates are not compared, since they do not change the tokens of a text.
    """
    special = [tuple(getattr(each, name) for name in ("bos_token", "eos_token")) for each in (a, b)]
    if vocabulary_and_rules(a) == vocabulary_and_rules(b) and special[0] == special[1]:
        return None
    if len(a) != len(b):
        return f"{len(a)} entries against {len(b)}"
    differing = sorted(set(a.get_vocab().items()) ^ set(b.get_vocab().items()), key=lambda entry: entry[1])
    if differing:
        place = differing[0][1]
        texts = [each.convert_ids_to_tokens(place) for each in (a, b)]
        return f"entry {place} is {texts[0]!r} against {texts[1]!r}"
    for name, first, second in zip(("bos_token", "eos_token"), *special, strict=True):
        if first != second:
            return f"{name} {first!r} against {second!r}"
    if set(a.all_special_tokens) != set(b.all_special_tokens):
        return f"special tokens {a.all_special_tokens} against {b.all_special_tokens}"
    if a.is_fast and b.is_fast and merges_of(a) != merges_of(b):
        return "other merges"
    return next(filter(None, (differs_on(text, a, b) for text in PROBES)), None)


def merges_of(tokenizer: PreTrainedTokenizerBase) -> list | None:
    """Return the merges of a fast tokenizer's BPE; None for other models."""
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges")


def differs_on(text: str, a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> str | None:
    first, second = (each(text, verbose=False).input_ids for each in (a, b))
    return None if first == second else f"{text!r} becomes {first[:8]} against {second[:8]}"
