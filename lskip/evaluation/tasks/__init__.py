"""Tasks: prompts, what they should bring, and how that is scored. Subclass Task for one of your own."""

from lskip.evaluation.tasks.local import LocalTask
from lskip.evaluation.tasks.task import Continuation, Example, Task

__all__ = ["Continuation", "Example", "LocalTask", "Task"]
