"""A task of the user's own prompts, from a file."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from lskip.evaluation.tasks.scores import check_metrics
from lskip.evaluation.tasks.task import Example, Task
from lskip.utils.checks import check_texts
from lskip.utils.json_lines import ENDINGS, asked_of, read_json_lines, text_of
from lskip.utils.user_paths import user_path


class LocalTask(Task):
    """Your own prompts, from a .jsonl (.ndjson) file.

    A line is {"prompt": …, "reference": …} or {"messages": […], "reference": …}. The task is named after the file,
    without the extension.
    """

    def __init__(
        self,
        path: str,
        max_new_tokens: int = 96,
        metrics: list[str] | None = None,
        stop_strings: list[str] | None = None,
        chat: bool | None = None,
    ):
        """Read the file, so that a bad line is reported before a model is loaded.

        Args:
            path: the file.
            metrics: of its answers: rouge, bleu, edit_similarity, exact_match; null: edit_similarity.
            stop_strings: texts, each of which ends an answer; null: none.
            chat: whether a plain prompt goes through the chat template; null: when the model has one,
                and was not trained on pairs without it.

        Raises:
            ValueError: a bad argument, or a bad line, with its number. FileNotFoundError: no such file.
        """
        super().__init__(max_new_tokens)
        self.path, self.chat = user_path(path, "path"), chat
        self.metrics = self.metrics if metrics is None else tuple(metrics)
        check_metrics(self.metrics)
        check_texts("stop_strings", stop_strings or ())
        self.stop_strings = tuple(stop_strings or ())
        self._examples = read_examples(self.path)
        # A sweep resumes only with the same examples.
        self.content = hashlib.sha256(repr(self._examples).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        return self.path.stem

    def examples(self) -> Iterator[Example]:
        yield from self._examples


def read_examples(path: Path) -> list[Example]:
    """Return the examples in a .jsonl file.

    Raises:
        ValueError: a line is not an example, or there is none. FileNotFoundError: no such file.
    """
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"path: '{path}' is not a {' or '.join(ENDINGS)} file")
    lines = read_json_lines(path, "path")
    examples = [Example(asked_of(fields, where), text_of(fields, "reference", where)) for where, fields in lines]
    if not examples:
        raise ValueError(f"path: '{path}' holds no example")
    return examples
