"""One source of texts, pairs or conversations: its documents, and its rows of training and of what is held out."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lskip.data.cache import remove_litter
from lskip.data.chat import check_chat_template
from lskip.data.corpus import StoredCorpus
from lskip.data.documents import SplitRule, content_key, first_columns
from lskip.data.encoders import ENCODERS, Encoder
from lskip.data.formats import record_kind
from lskip.data.packed_rows import PackedRows
from lskip.data.rows import StoredRows, check_filled, rows_of, warn_of_left_out
from lskip.data.sources import open_source
from lskip.data.stream_store import StreamedTokens
from lskip.data.streaming import StreamedCorpus, stored_stream
from lskip.data.token_store import MOST_OF_AN_EXAMPLE, stored_tokens
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

    def content(self, split: str) -> str:
        """Return a hash of the documents of a split."""
        return content_key(self.corpus.documents(split))

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

    def training_rows(self, tokenizer: PreTrainedTokenizerBase) -> StoredRows | PackedRows:
        """Return the rows of training, packed where they should be."""
        rows = self.rows("train", tokenizer)
        return PackedRows(rows, tokenizer.eos_token_id) if self.reading.pack and self.kind != "text" else rows

    def stream(self, tokenizer: PreTrainedTokenizerBase) -> StreamedTokens:
        """Return the rows of training as a stream."""
        encoder, how = self._encoder(tokenizer, self.reading.block_size), self.reading
        return stored_stream(self.corpus, encoder, how.block_size, how.pack, how.seed, how.cache / "streams")

    def check_filled(self, split: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ValueError when a held-out split has no row."""
        documents = len(self.corpus.documents(split))
        check_filled(self.rows(split, tokenizer), documents, self.corpus.size, split, self.reading.rule)

    def _encoder(self, tokenizer: PreTrainedTokenizerBase, limit: int) -> Encoder:
        if self.kind == "chat":
            check_chat_template(tokenizer)
        return ENCODERS[self.kind](tokenizer, limit)
