"""Tasks: prompts with reference answers and metrics. Subclass Task to add one."""

from lskip.evaluation.tasks.local import LocalTask
from lskip.evaluation.tasks.task import Continuation, Example, Task

__all__ = ["Continuation", "Example", "LocalTask", "Task"]
