"""The tokenizer of a run: a byte-level BPE trained on the training split, or one that exists already."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lskip.data.cache import cached_folder

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # every byte, and the end of text
TRAINING_CHARACTERS = 32_000_000  # more text changes the merges little and takes minutes


def trained_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocab_size` entries, trained on `texts`; read from `folder` if it is there.

    It reproduces any text exactly (`decode(encode(text)) == text`) and ends a text with `<|endoftext|>`.
    At most the first 32 million characters are used.
    """

    def write(target: Path) -> None:
        bpe = train_bpe(first_characters(texts, TRAINING_CHARACTERS), vocab_size)
        PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT).save_pretrained(target)

    return PreTrainedTokenizerFast.from_pretrained(cached_folder(folder, write))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, seen in training or not
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
    """`tokenizer` itself; ValueError if it cannot end a document."""
    if tokenizer.eos_token_id is None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise ValueError(f"tokenizer: '{name}' has no end-of-text token (eos_token), which separates documents")
    return tokenizer


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of what a tokenizer does: the same for equal tokenizers in any process, whatever it did before."""
    special = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template]
    return hashlib.sha256(repr((vocabulary_and_rules(tokenizer), special)).encode()).hexdigest()


def vocabulary_and_rules(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        # Left behind by earlier calls with padding or truncation, not part of what it does here.
        return json.dumps({key: rules[key] for key in sorted(rules) if key not in ("padding", "truncation")})
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return repr([(path.name, path.read_bytes()) for path in sorted(Path(folder).iterdir())])
