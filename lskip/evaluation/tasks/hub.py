"""Tasks on data sets of the Hugging Face hub, or on local copies of them."""

from collections.abc import Iterator

from lskip.evaluation.tasks.task import Continuation, Example, Task


def read_rows(source: str, columns: tuple[str, ...], cache_dir: str | None) -> Iterator[dict[str, str]]:
    """Stream the rows of a source; no more is downloaded than is read.

    Raises:
        ValueError, FileNotFoundError: it cannot be read, or a column is missing.
    """
    from lskip.data.sources import open_source  # imports datasets and Lightning, which takes seconds

    rows, _ = open_source(source, streaming=True)
    for row in rows:
        for name in columns:
            if not isinstance(row.get(name), str):
                raise ValueError(f"source: '{source}' has no text in the column '{name}'; it has {', '.join(row)}")
        yield row


class _HubTask(Task):
    """A task with one prompt per row: `template` around the column `question`; the reference is the column `target`."""

    source = template = question = target = ""

    def __init__(self, max_new_tokens: int = 96, source: str | None = None, cache_dir: str | None = None):
        """Set the source of the rows.

        Args:
            source: another source with the same columns: a .jsonl or .parquet file, a folder, or a hub name as name,
                name:config or name:config:split. null: the usual one.
            cache_dir: folder of cached data sets; null: ~/.cache/lskip.
        """
        super().__init__(max_new_tokens)
        self.source, self.cache_dir = source or self.source, cache_dir

    def examples(self) -> Iterator[Example]:
        for row in read_rows(self.source, (self.question, self.target), self.cache_dir):
            yield Example(self.template.format(row[self.question].strip()), row[self.target].strip())


class CnnDmSummarization(_HubTask):
    """Summarize an article of CNN/DailyMail (arXiv 1602.06023); the reference is its highlights."""

    metrics = ("rouge",)
    stop_strings = ("\n\n",)
    source, question, target = "abisee/cnn_dailymail:3.0.0:test", "article", "highlights"
    template = "Article: {}\n\nSummary of the article in three sentences:\n"


class XsumSummarization(_HubTask):
    """Summarize an article of XSUM (arXiv 1808.08745) in one sentence."""

    metrics = ("rouge",)
    stop_strings = ("\n",)
    source, question, target = "EdinburghNLP/xsum::test", "document", "summary"
    template = "Article: {}\n\nSummary of the article in one sentence: "


class TopV2(_HubTask):
    """Parse requests to an assistant, of TOPv2 (arXiv 2010.03546)."""

    metrics = ("exact_match", "edit_similarity")
    stop_strings = ("\n",)
    chat = False
    source, question, target = "WillHeld/top_v2::test", "utterance", "semantic_parse"
    template = "{}\n"


class CnnDmContinuation(Continuation):
    """Continue an article of CNN/DailyMail."""

    metrics = ("rouge", "edit_similarity")

    def __init__(
        self,
        max_new_tokens: int = 96,
        prompt_characters: int = 640,
        reference_characters: int = 320,
        source: str = CnnDmSummarization.source,
        cache_dir: str | None = None,
    ):
        """Set lengths and source.

        Args:
            source: as in CnnDmSummarization.
            cache_dir: as in CnnDmSummarization.
        """
        super().__init__(max_new_tokens, prompt_characters, reference_characters)
        self.source, self.cache_dir = source, cache_dir

    def documents(self) -> Iterator[str]:
        for row in read_rows(self.source, ("article",), self.cache_dir):
            yield row["article"]
