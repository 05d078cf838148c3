"""One source of texts, pairs or conversations: its documents, and its rows of training and of what is held out."""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lskip.data.cache import remove_litter
from lskip.data.chat import check_chat_template
from lskip.data.corpus import StoredCorpus
from lskip.data.documents import SplitRule, content_key, first_columns
from lskip.data.encoders import ENCODERS, Encoder
from lskip.data.formats import record_kind
from lskip.data.packed_rows import PackedRows, TrainingRows
from lskip.data.rows import StoredRows, rows_of, warn_of_left_out
from lskip.data.sources import open_source
from lskip.data.stream_store import StreamedTokens, StreamReader
from lskip.data.streaming import StreamedCorpus
from lskip.data.token_store import MOST_OF_AN_EXAMPLE, TokenStore, stored_tokens
from lskip.data.tokenizer import tokenizer_key
from lskip.utils.output_files import make_writable


@dataclass(frozen=True)
class Reading:
    """How sources are read: arguments of TextData."""

    text_column: str | None
    rule: SplitRule
    block_size: int
    streaming: bool
    pack: bool
    seed: int
    cache: Path


class TextSource:
    """The documents and rows of one source.

    Args:
        name: as `data.source`.
        most_held_out: rows of validation, and of test; None: all.
    """

    def __init__(self, name: str, reading: Reading, most_held_out: int | None):
        self.name, self.reading, self.most_held_out = name, reading, most_held_out
        self._rows: dict[str, StoredRows] = {}
        self._contents: dict[str, str] = {}

    @cached_property
    def corpus(self) -> StoredCorpus | StreamedCorpus:
        how = self.reading
        make_writable(how.cache, "cache_dir")
        remove_litter(how.cache)
        rows, key = open_source(self.name, how.streaming)
        kind = record_kind(first_columns(rows, self.name), how.text_column, self.name)
        if not how.streaming:
            return StoredCorpus(rows, key, kind, how.text_column, how.rule, how.cache / "documents")
        key = content_key(self.name, key)
        return StreamedCorpus(rows, key, kind, how.text_column, how.rule, self.most_held_out, how.block_size)

    @property
    def kind(self) -> str:
        """text, pairs or chat."""
        return self.corpus.kind

    @property
    def sample_key(self) -> Dataset | str:
        """What tells a tokenizer's training documents: these, or of a stream, unread, where they come from."""
        return self._stream_key if self.reading.streaming else self.corpus.training_sample()

    def content(self, split: str) -> str:
        """Return a hash of the documents of a split."""
        if split not in self._contents:  # it takes seconds of millions of documents
            self._contents[split] = content_key(self.corpus.documents(split))
        return self._contents[split]

    def rows(self, split: str, tokenizer: PreTrainedTokenizerBase) -> StoredRows:
        """Return all rows of "train", or up to `most_held_out` of "val" or "test", of stored tokens."""
        if split not in self._rows:
            encoder = self._encoder(tokenizer, MOST_OF_AN_EXAMPLE)
            key = content_key(self.kind, self.content(split), tokenizer_key(tokenizer))
            store = stored_tokens(self.corpus.documents(split), encoder, self.reading.cache / "tokens" / key, split)
            most = None if split == "train" else self.most_held_out
            self._rows[split] = rows_of(store, tokenizer, self.reading.block_size, most)
            warn_of_left_out(self._rows[split], split)
        return self._rows[split]

    def training_rows(self, tokenizer: PreTrainedTokenizerBase) -> TrainingRows:
        """Return the rows of training, packed where they should be."""
        return self._packed(self.rows("train", tokenizer), tokenizer)

    def stream(self, tokenizer: PreTrainedTokenizerBase) -> StreamedTokens:
        """Return the rows of training as a stream, packed where they should be."""
        corpus, how = self.corpus, self.reading
        key = content_key(self._stream_key, tokenizer_key(tokenizer), how.block_size, self._packs, how.seed)
        return StreamedTokens(
            StreamReader(corpus.rows, how.seed),
            partial(corpus.records, split="train"),
            self._encoder(tokenizer, how.block_size),
            partial(self._rows_of_segment, tokenizer=tokenizer),
            how.cache / "streams" / key,
        )

    def check_filled(self, split: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ValueError when a held-out split has no row."""
        if len(self.rows(split, tokenizer)):
            return
        documents, size, rule = len(self.corpus.documents(split)), self.reading.block_size, self.reading.rule
        if documents and self.kind != "text":
            raise ValueError(
                f"block_size: in none of the {documents} {split} examples is anything scored within {size} tokens"
            )
        fraction = rule.val_fraction if split == "val" else rule.test_fraction
        of = "" if self.corpus.size is None else f" of {self.corpus.size}"
        raise ValueError(
            f"{split}_fraction: {fraction} leaves {documents}{of} documents for {split}, which do not fill one row of "
            f"{size} tokens: too small a corpus, or too small a fraction"
        )

    @property
    def _stream_key(self) -> str:
        return content_key(self.corpus.key, self.reading.text_column, self.reading.rule)

    @property
    def _packs(self) -> bool:
        return self.reading.pack and self.kind != "text"

    def _packed(self, rows: StoredRows, tokenizer: PreTrainedTokenizerBase) -> TrainingRows:
        return PackedRows(rows, tokenizer.eos_token_id) if self._packs else rows

    def _rows_of_segment(self, store: TokenStore, tokenizer: PreTrainedTokenizerBase) -> TrainingRows:
        return self._packed(rows_of(store, tokenizer, self.reading.block_size), tokenizer)

    def _encoder(self, tokenizer: PreTrainedTokenizerBase, limit: int) -> Encoder:
        if self.kind == "chat":
            check_chat_template(tokenizer)
        return ENCODERS[self.kind](tokenizer, limit)
