"""Tasks on data sets of the Hugging Face hub, or on local copies of them."""

from __future__ import annotations

from collections.abc import Iterator

from lskip.evaluation.tasks.task import Continuation, Example, Task


def read_rows(source: str, columns: tuple[str, ...], cache_dir: str | None) -> Iterator[dict[str, str]]:
    """Rows of a source, streamed: no more is downloaded than is read.

    Raises:
        ValueError, FileNotFoundError: it cannot be read, or a column is missing.
    """
    from lskip.data.sources import open_source  # brings datasets and Lightning: only when examples are asked for

    rows, _ = open_source(source, streaming=True)
    for row in rows:
        for name in columns:
            if not isinstance(row.get(name), str):
                raise ValueError(f"source: '{source}' has no text in the column '{name}'; it has {', '.join(row)}")
        yield row


class _HubTask(Task):
    """One prompt a row: `template` around the column `question`; the reference is the column `target`."""

    source = template = question = target = ""

    def __init__(self, max_new_tokens: int = 96, source: str | None = None, cache_dir: str | None = None):
        """
        Args:
            source: the same columns from elsewhere: a .jsonl or .parquet file, a folder, or a hub name as name,
                name:config or name:config:split. null: the usual one.
            cache_dir: where data sets are kept; null is ~/.cache/lskip.
        """
        super().__init__(max_new_tokens)
        self.source, self.cache_dir = source or self.source, cache_dir

    def examples(self) -> Iterator[Example]:
        for row in read_rows(self.source, (self.question, self.target), self.cache_dir):
            yield Example(self.template.format(row[self.question].strip()), row[self.target].strip())


class CnnDmSummarization(_HubTask):
    """CNN/DailyMail (arXiv 1602.06023): the highlights of an article."""

    metrics = ("rouge",)
    stop_strings = ("\n\n",)
    source, question, target = "abisee/cnn_dailymail:3.0.0:test", "article", "highlights"
    template = "Article: {}\n\nSummary of the article in three sentences:\n"


class XsumSummarization(_HubTask):
    """XSUM (arXiv 1808.08745): an article in one sentence."""

    metrics = ("rouge",)
    stop_strings = ("\n",)
    source, question, target = "EdinburghNLP/xsum::test", "document", "summary"
    template = "Article: {}\n\nSummary of the article in one sentence: "


class TopV2(_HubTask):
    """TOPv2 (arXiv 2010.03546): what is said to an assistant, and its parse."""

    metrics = ("exact_match", "edit_similarity")
    stop_strings = ("\n",)
    chat = False
    source, question, target = "WillHeld/top_v2::test", "utterance", "semantic_parse"
    template = "{}\n"


class CnnDmContinuation(Continuation):
    """CNN/DailyMail: an article, continued."""

    metrics = ("rouge", "edit_similarity")

    def __init__(
        self,
        max_new_tokens: int = 96,
        prompt_characters: int = 640,
        reference_characters: int = 320,
        source: str = CnnDmSummarization.source,
        cache_dir: str | None = None,
    ):
        """source, cache_dir: as in CnnDmSummarization."""
        super().__init__(max_new_tokens, prompt_characters, reference_characters)
        self.source, self.cache_dir = source, cache_dir

    def documents(self) -> Iterator[str]:
        for row in read_rows(self.source, ("article",), self.cache_dir):
            yield row["article"]
