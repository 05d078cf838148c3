"""The LightningDataModule that turns texts, pairs and conversations into batches of tokens."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, Literal

import torch
from datasets import Dataset, concatenate_datasets
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lskip.data.arguments import (
    check_cache,
    check_fractions,
    check_limits,
    check_sizes,
    check_text_column,
    check_tokenizer_source,
    named_sources,
)
from lskip.data.collation import DOCUMENTS, border_of, collate
from lskip.data.documents import NOT_CONTENT, SplitRule, content_key, in_turns, texts_of
from lskip.data.loading import (
    EndlessBatches,
    EndlessLoader,
    ResumableLoader,
    ResumableSampler,
    check_ends,
    held_out_loader,
)
from lskip.data.mixture import Endless, EndlessRows, MixedRows, SeveralRows, with_all_columns
from lskip.data.rows import Row, StoredRows
from lskip.data.stream_store import StreamedTokens
from lskip.data.text_source import Reading, TextSource
from lskip.data.tokenizer import check_tokenizer, trained_tokenizer
from lskip.utils.checks import check_choice

GPU_WORKERS = 2
STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ()}


class TextData(LightningDataModule):
    """Batches of tokens from plain text, prompt and completion pairs, or conversations.

    Batches are {"input_ids", "labels"}, each int64 [batch_size, block_size] (pairs and conversations: as many columns
    as the longest row needs); labels are aligned with the inputs (the model shifts them) and -100 where a token is not
    scored. The columns of the source decide: `messages` (a conversation in each row, every assistant turn is scored; a
    `completion` beside them is the last), `prompt` and `completion` (a pair, the completion is scored), or `text`
    (packed, with the end-of-text token after each, and cut into blocks); else `conversations` (ShareGPT's: from human,
    gpt, system or tool, and value) or `instruction`, `input` and `output` (a pair, with Stanford Alpaca's prompt).
    `tools` beside `messages` are passed to the chat template. A conversation or pair longer than a block is cut at the
    right, and left out with a warning if nothing scored remains. A special token that a text spells is plain text.

    Documents are de-duplicated and split by the sha256 of their content: the split is the same on every machine, no
    copy is on both sides, and the tokenizer is trained on the training split alone. Where rows have a column `group`,
    the split is by the sha256 of that, and all documents of a group stay on one side (of copies that of the first
    counts, in a stream each); with `val_within_groups` validation is other documents of the groups of training.

    Training order is a function of (seed, batch number): a run resumed with `ckpt_path` gets the batches that it would
    have got uninterrupted. Validation and test are in a fixed order, each row once however many devices there are.

    Args:
        source: "stdlib" (the Python source of this interpreter's standard library), "packages" (of the installed
            packages), "home_assistant" (pairs: what is said to a smart home, and its parse), a file (.jsonl, .ndjson,
            .json, .parquet, .txt or any other UTF-8 text), a folder of text or of rows (the kind of most files; others
            are left out with a warning), or else a dataset of the hub as name, name:config or name:config:split. A
            .txt is split at blank lines into documents of at least 4000 characters; without any, at each line. Or a
            list of them with weights, [{source: a.jsonl, weight: 3}, {source: b}]: of 4 rows of training, 3 are of the
            first. They repeat without end (set trainer.max_steps); max_val_blocks is shared as rows are.
        tokenizer: any source of load_tokenizer (lskip.models.pretrained): smollm2, a folder, a hub name …; or a
            tokenizer; null trains a byte-level BPE on the training split.
        vocab_size: entries of the trained tokenizer; not used when `tokenizer` is given.
        split_digits: each digit is a token of a tokenizer trained here, as of Llama's: numbers are easier to copy.
        block_size: tokens in a row.
        batch_size: rows in a batch, on each device.
        val_fraction: share of the documents held out for validation; 0: none, and a fit is not validated.
        test_fraction: share of the documents held out for test; may be 0.
        val_within_groups: hold out for validation documents of the groups of training (new sentences of known
            templates), in the place of whole groups. Without groups it changes nothing.
        text_column: the column of the text; null looks for messages, prompt and completion, then text.
        max_val_blocks: the most rows of validation, and of test; null: all.
        streaming: read during training, for a corpus larger than the disk. Training documents are then not
            de-duplicated, and they repeat without end (set trainer.max_steps). max_val_blocks must be set.
        num_workers: processes that load batches; 0: none; null: 2 for a GPU, else none.
        group_by_length: make batches of rows of similar length, so that little is padded; not of text or a stream.
        documents: in one row of text: separate (attention stays inside each, its positions begin at 0, and its first
            token is not scored; that costs a mask in attention), or joined, as one long text; null: separate, and in a
            run that goes on as it began.
        pack: put several pairs or conversations of training into one row, each kept apart, which layer dropout drops.
        seed: of the training order; null: the run's seed_everything, and 0 outside of `lskip fit`.
        cache_dir: folder of cached documents, tokenizers and tokens; null is ~/.cache/lskip.

    Raises:
        ValueError, FileNotFoundError: for plain arguments when the object is made, for the source when it is read.
    """

    def __init__(
        self,
        source: list[dict[str, Any] | str] | str = "stdlib",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        vocab_size: int = 4096,
        block_size: int = 256,
        batch_size: int = 16,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        text_column: str | None = None,
        max_val_blocks: int | None = 512,
        streaming: bool = False,
        num_workers: int | None = None,
        seed: int | None = None,
        cache_dir: str | None = None,
        val_within_groups: bool = False,
        split_digits: bool = False,
        group_by_length: bool = False,
        documents: Literal["separate", "joined"] | None = None,
        pack: bool = False,
    ):
        super().__init__()
        named = named_sources(source)
        check_tokenizer_source(tokenizer)
        self.seed = 0 if seed is None else seed
        check_sizes(vocab_size, block_size, batch_size, num_workers, self.seed)
        check_fractions(val_fraction, test_fraction)
        check_text_column(text_column)
        check_limits(max_val_blocks, streaming, group_by_length, pack, len(named))
        self.source, self.tokenizer_source = source, tokenizer
        self.vocab_size, self.split_digits = vocab_size, split_digits
        self.block_size, self.batch_size, self.streaming = block_size, batch_size, streaming
        self.rule = SplitRule(val_fraction, test_fraction, val_within_groups)
        if documents is not None:
            check_choice("documents", documents, DOCUMENTS)
        self.num_workers, self.are_apart = num_workers, documents != "joined"
        self.group_by_length, self.pack = group_by_length, pack
        self.cache = check_cache(cache_dir)
        self.training_documents: dict[str, str] | None = None  # kind and hash; None: not read yet, or streamed
        self._blocks: dict[str, StoredRows] = {}
        reading = Reading(text_column, self.rule, block_size, streaming, pack, self.seed, self.cache)
        self.weights, most = [weight for _, weight in named], max_val_blocks
        shares = [most and max(1, round(most * weight / sum(self.weights))) for weight in self.weights]
        self.sources = [TextSource(name, reading, share) for (name, _), share in zip(named, shares, strict=True)]

    def prepare_data(self) -> None:
        """Download, split and tokenize into the cache, in one process for each machine."""
        self.setup(self.trainer.state.fn if self.trainer else None)

    def setup(self, stage: str | None = None) -> None:
        """Open the splits that `stage` needs, from the cache that prepare_data has filled."""
        for split in STAGES.get(stage, ("train", "val")):
            if not (self.streaming and split == "train"):
                self.blocks(split)

    def train_dataloader(self) -> DataLoader:
        if self.streaming or len(self.sources) > 1:
            return self._endless_loader()
        (source,), (world, rank) = self.sources, self._share()
        blocks, lengths = source.training_rows(self.tokenizer), None
        if self.group_by_length:
            lengths = blocks.lengths
        sampler = ResumableSampler(blocks, self.batch_size, self.seed, self._batches_done, world, rank, lengths)
        if not len(sampler):
            raise ValueError(
                f"batch_size: {self.batch_size} on {world} device(s), but the training split has only "
                f"{len(blocks)} rows of {self.block_size} tokens"
            )
        return ResumableLoader(blocks, sampler=sampler, **self._loading(), drop_last=True)

    def val_dataloader(self) -> DataLoader | list:
        fits = self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        return [] if fits and not self.rule.val_fraction else self._held_out_loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._held_out_loader("test")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer: given, loaded or trained."""
        tokenizer = self.tokenizer_source
        if tokenizer is None:
            kind = "bpe digits" if self.split_digits else "bpe"
            samples = [source.sample_key for source in self.sources]
            folder = self.cache / "tokenizers" / content_key(kind, *samples, self.vocab_size)
            texts = in_turns(texts_of(source.corpus.training_sample()) for source in self.sources)
            tokenizer = trained_tokenizer(texts, self.vocab_size, folder, self.split_digits)
        elif isinstance(tokenizer, str):
            from lskip.models.pretrained import load_tokenizer  # slow import: only when needed

            tokenizer = load_tokenizer(tokenizer, "tokenizer")
        return check_tokenizer(tokenizer)

    def documents(self, split: str) -> Dataset:
        """Return the raw documents of "train", "val" or "test", ordered by the hash of their content.

        Columns: text, or prompt and completion, or messages (as JSON text); those of all sources. With streaming only
        the held-out documents that were read; "train" raises ValueError.
        """
        check_choice("split", split, ("train", "val", "test"))
        found = [source.corpus.documents(split).remove_columns(list(NOT_CONTENT)) for source in self.sources]
        return found[0] if len(found) == 1 else concatenate_datasets(found)

    def blocks(self, split: str) -> StoredRows:
        """Return all rows of "train", or up to max_val_blocks of "val" or "test".

        A row, blocks[3], has numpy input_ids [block_size], and labels [block_size] for pairs and conversations;
        blocks[3:5] has those of two, each [2, block_size].
        """
        check_choice("split", split, ("train", "val", "test"))
        if split not in self._blocks:
            parts = [source.rows(split, self.tokenizer) for source in self.sources]
            self._blocks[split] = parts[0] if len(parts) == 1 else SeveralRows(parts, self._finish)
            if split == "train":
                contents = [source.content("train") for source in self.sources]
                content = contents[0] if len(contents) == 1 else content_key(contents)
                self.training_documents = {"kind": self.kind, "sha256": content}
        return self._blocks[split]

    @property
    def kind(self) -> str:
        """text, pairs or chat; mixed, where the sources are not of one kind."""
        kinds = {source.kind for source in self.sources}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    def _held_out_loader(self, split: str) -> DataLoader:
        for source in self.sources if not len(self.blocks(split)) else ():
            source.check_filled(split, self.tokenizer)
        return held_out_loader(self.blocks(split), *self._share(), **self._loading())

    def _endless_loader(self) -> EndlessLoader:
        check_ends(self.trainer)
        loader = EndlessLoader(EndlessBatches(self._training, self.batch_size, *self._share()), **self._loading())
        loader.position = self._batches_done
        return loader

    @cached_property
    def _streams(self) -> list[StreamedTokens]:
        return [source.stream(self.tokenizer) for source in self.sources] if self.streaming else []

    @cached_property
    def _training(self) -> Endless:
        """The rows of training by their numbers, of a stream or of several sources."""
        rows = self._streams or [EndlessRows(each.training_rows(self.tokenizer), self.seed) for each in self.sources]
        return rows[0] if len(rows) == 1 else MixedRows(rows, self._finish, self.weights, self.seed)

    @cached_property
    def _finish(self) -> list[Callable[[Row], Row] | None]:
        """For each source the function that gives its rows the columns of all; None: they have them."""
        if self.kind != "mixed":
            return [None] * len(self.sources)
        border = border_of(self.tokenizer) if self.are_apart else None
        return [partial(with_all_columns, border=border if each.kind == "text" else None) for each in self.sources]

    def state_dict(self) -> dict:
        """Return where a stream's present part begins, which a run that goes on elsewhere begins to read from."""
        if not self.streaming or self.trainer is None:
            return {}
        row = self._batches_done() * self.batch_size * self._share()[0]
        counts = [row] if len(self.sources) == 1 else self._training.counts(row)
        segments = [stream.around(count) for stream, count in zip(self._streams, counts, strict=True)]
        return {"block_size": self.block_size, "segments": segments}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned, unless its rows were of another length."""
        if self.streaming and state.get("block_size") == self.block_size:
            for stream, segments in zip(self._streams, state["segments"], strict=True):
                stream.add(segments)

    def _loading(self) -> dict:
        """Return the arguments of every loader, with a generator of its own in place of the global one."""
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        workers = GPU_WORKERS if self.num_workers is None and on_gpu else self.num_workers or 0
        sizes = {"batch_size": self.batch_size, "num_workers": workers, "pin_memory": on_gpu}
        own = torch.Generator().manual_seed(self.seed)
        return {**sizes, "collate_fn": self._collate, "generator": own}

    @cached_property
    def _collate(self) -> Callable:
        """The function that makes batches of rows, of which only those of text hold several documents."""
        are_apart = self.are_apart and self.kind == "text"
        return partial(collate, border=border_of(self.tokenizer)) if are_apart else collate

    def _share(self) -> tuple[int, int]:
        """Return the number of data-parallel processes, and the rank of this one."""
        shares = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return (shares["num_replicas"], shares["rank"]) if shares else (1, 0)

    def _batches_done(self) -> int:
        """Return the number of finished micro-batches; `ready` would also count an interrupted one."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed if self.trainer else 0
