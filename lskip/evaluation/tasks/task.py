"""The base classes of tasks: prompts with reference answers and metrics."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

from lskip.utils.checks import check_whole


class Example(NamedTuple):
    """One item of a task.

    Attributes:
        prompt: a text, or chat messages.
        reference: what the answer should be.
        problem: the HumanEval problem, for pass@1; None elsewhere.
    """

    prompt: str | list[dict[str, str]]
    reference: str
    problem: dict[str, Any] | None = None


class Task(ABC):
    """A set of examples to answer and score, for which `sweep` and `tune` choose exit_layer and num_speculations.

    Attributes:
        metrics: names in lskip.evaluation.tasks.scores.METRICS.
        stop_strings: each ends an answer and is no part of it.
        chat: whether a plain prompt goes through the chat template; None: when the model has one, and
            was not trained on pairs without it.
        max_new_tokens: of an answer, at most.
    """

    metrics: tuple[str, ...] = ("edit_similarity",)
    stop_strings: tuple[str, ...] = ()
    chat: bool | None = None

    def __init__(self, max_new_tokens: int = 96):
        """Set the length of an answer; ValueError unless it is a whole number from 1 up."""
        check_whole("max_new_tokens", max_new_tokens, 1)
        self.max_new_tokens = max_new_tokens

    @property
    def name(self) -> str:
        """The name of the task for `--task` of generate and predict."""
        return type(self).__name__

    @abstractmethod
    def examples(self) -> Iterator[Example]:
        """Yield all examples, in the same order each time.

        Raises:
            ValueError, FileNotFoundError: the examples cannot be read.
        """

    def settings(self) -> dict[str, Any]:
        """Return the GenerationSettings of its answers: greedy, so that texts can be compared."""
        return {
            "temperature": 0.0,
            "repetition_penalty": 1.0,
            "max_new_tokens": self.max_new_tokens,
            "stop_strings": self.stop_strings,
            "chat": self.chat,
        }

    def answer(self, text: str, example: Example) -> str:
        """Return the part of a generated text that is scored: up to the first stop string."""
        ends = [place for stop in self.stop_strings if (place := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))]


class Continuation(Task):
    """A task of continuing documents; answers are cut to the length of the references."""

    metrics = ("edit_similarity", "bleu")
    chat = False

    def __init__(self, max_new_tokens: int = 96, prompt_characters: int = 640, reference_characters: int = 320):
        """Set the lengths of answers, prompts and references; ValueError unless all are whole numbers from 1 up."""
        super().__init__(max_new_tokens)
        check_whole("prompt_characters", prompt_characters, 1)
        check_whole("reference_characters", reference_characters, 1)
        self.prompt_characters, self.reference_characters = prompt_characters, reference_characters

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """Yield the texts, in the same order each time."""

    def examples(self) -> Iterator[Example]:
        """Yield one example per document, without documents too short for a prompt and a reference."""
        for text in self.documents():
            text = text.strip()
            # At a line break if one is near, since real prompts hardly ever end within a word.
            cut = text.rfind("\n", self.prompt_characters // 2, self.prompt_characters) + 1 or self.prompt_characters
            reference = text[cut : cut + self.reference_characters]
            if len(reference) == self.reference_characters:
                yield Example(text[:cut], reference)

    def answer(self, text: str, example: Example) -> str:
        return super().answer(text, example)[: len(example.reference)]
