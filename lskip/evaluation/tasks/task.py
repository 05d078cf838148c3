"""Tasks: prompts, what they should bring, and how that is scored. Subclass Task for one of your own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

from lskip.utils.checks import check_whole


class Example(NamedTuple):
    """One item of a task.

    Attributes:
        prompt: a text, or chat messages.
        reference: what the answer should be.
        problem: what pass@1 needs of a HumanEval problem; None elsewhere.
    """

    prompt: str | list[dict[str, str]]
    reference: str
    problem: dict[str, Any] | None = None


class Task(ABC):
    """Where exit_layer and num_speculations are chosen for. A subclass says where its examples come from.

    Attributes:
        metrics: names in task_scores.METRICS.
        stop_strings: each ends an answer and is no part of it.
        chat: whether a plain prompt goes through the chat template; None: when the model has one.
        max_new_tokens: of an answer, at most.
    """

    metrics: tuple[str, ...] = ("edit_similarity",)
    stop_strings: tuple[str, ...] = ()
    chat: bool | None = None

    def __init__(self, max_new_tokens: int = 96):
        """ValueError unless a whole number from 1 up."""
        check_whole("max_new_tokens", max_new_tokens, 1)
        self.max_new_tokens = max_new_tokens

    @property
    def name(self) -> str:
        """What `--task` of generate and predict calls it."""
        return type(self).__name__

    @abstractmethod
    def examples(self) -> Iterator[Example]:
        """All examples, in an order that is the same each time.

        Raises:
            ValueError, FileNotFoundError: why there are none, in one sentence.
        """

    def settings(self) -> dict[str, Any]:
        """How its prompts are answered: GenerationSettings. Greedy, so that texts can be compared."""
        return {
            "temperature": 0.0,
            "repetition_penalty": 1.0,
            "max_new_tokens": self.max_new_tokens,
            "stop_strings": self.stop_strings,
            "chat": self.chat,
        }

    def answer(self, text: str, example: Example) -> str:
        """What of a generated text is scored."""
        ends = [place for stop in self.stop_strings if (place := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))]


class Continuation(Task):
    """The beginning of a document, to be continued as it goes on. Its answers are as long as the references."""

    metrics = ("edit_similarity", "bleu")
    chat = False

    def __init__(self, max_new_tokens: int = 96, prompt_characters: int = 640, reference_characters: int = 320):
        """ValueError unless all are whole numbers from 1 up."""
        super().__init__(max_new_tokens)
        check_whole("prompt_characters", prompt_characters, 1)
        check_whole("reference_characters", reference_characters, 1)
        self.prompt_characters, self.reference_characters = prompt_characters, reference_characters

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """The texts, in an order that is the same each time."""

    def examples(self) -> Iterator[Example]:
        """Documents that are too short for a prompt and a reference are left out."""
        for text in self.documents():
            text = text.strip()
            # Between two lines where one ends near: models are hardly ever asked to go on within a word.
            cut = text.rfind("\n", self.prompt_characters // 2, self.prompt_characters) + 1 or self.prompt_characters
            reference = text[cut : cut + self.reference_characters]
            if len(reference) == self.reference_characters:
                yield Example(text[:cut], reference)

    def answer(self, text: str, example: Example) -> str:
        return super().answer(text, example)[: len(example.reference)]
