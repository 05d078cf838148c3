"""The command line: `lskip` and `python -m lskip`. Finds the command, runs it, and turns errors into one line."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

from lskip.user_errors import is_users_mistake, one_line

HELP = """usage: lskip COMMAND [options]

  fit        train with layer dropout and early exit loss
  validate   perplexity and agreement of every layer on held-out text
  test       the same on the test split
  predict    answer a file of prompts, one JSON line each
  generate   answer one prompt, streamed
  sweep      speed-up of every way to draft on the prompts of a task: table, figure, advice
  tune       the best way to draft for a task, in minutes; --task goes by it
  inspect    what every layer would say, by depth and token by token: table, figure, page
  adapt      train an exit adapter for a model that stays as it is
  export     a run as a transformers folder, its draft, and GGUF files
  evaluate   every exit on the tasks of lm-eval-harness
  compare    runs side by side, and their perplexity by depth

`lskip COMMAND --help` shows the options, `lskip fit … --print_config` the whole configuration.
Set LSKIP_TRACEBACK=1 to see where an error comes from.
"""
_TRAINING = ("fit", "validate", "test")
_PLAIN = ("predict", "generate", "export", "adapt", "sweep", "tune", "evaluate", "compare", "inspect")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for the user's mistakes, 130 after Ctrl-C, 143 after SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    command = arguments[0]
    if command not in _TRAINING + _PLAIN:
        print(f"lskip: error: {command!r} is not one of {', '.join(_TRAINING + _PLAIN)}", file=sys.stderr)
        return 2
    _be_quiet()
    try:
        _command(command)(arguments)
    except KeyboardInterrupt as interrupt:
        print(f"lskip {command}: interrupted{interrupt}", file=sys.stderr)
        return getattr(interrupt, "exit_code", 130)
    except BrokenPipeError:
        # The reader of our output has gone (`lskip generate … | head`): nothing is left to do or to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("LSKIP_TRACEBACK") == "1" or not is_users_mistake(error):
            raise
        print(f"lskip {command}: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _command(name: str) -> Callable[[list[str]], None]:
    if name in _TRAINING:
        from lskip.training_cli import run_training

        return run_training
    from lskip.commands import run_command

    return run_command


def _be_quiet() -> None:
    """Silence hints that no user of this command line can act on; real warnings stay."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for message in _HINTS:
        warnings.filterwarnings("ignore", message=message)


_HINTS = (
    ".*does not have many workers.*",  # blocks are ready made: workers would only copy them
    ".*your dataloader is not resumable.*",  # TextData is: its position follows from the batches done
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*exists and is not empty.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
)
