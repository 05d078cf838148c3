"""The entry point of `lskip` and `python -m lskip`: runs a command and turns errors into one line."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from lskip import __version__
from lskip.utils.interrupts import ended_by_signals
from lskip.utils.ranks import launched, rank
from lskip.utils.user_errors import is_users_mistake, one_line
from lskip.utils.user_paths import did_you_mean

HELP = """usage: lskip COMMAND [options]

  fit        train with layer dropout and early exit loss
  data       rows of a data set as a run would get them: documents, positions, what is scored
  plan       memory, FLOPs and hours of a fit, before it runs: without weights and without data
  validate   perplexity and agreement of every layer on held-out text
  test       the same on the test split
  predict    answer a file of prompts, one JSON line each
  generate   answer one prompt, streamed
  chat       talk with a model in the terminal
  serve      answer clients of OpenAI's interface, many at a time
  sweep      speed-up of every way to draft on the prompts of a task: table, figure, advice
  tune       the best way to draft for a task, in minutes; generate and predict use it with --task
  inspect    what every layer would say, by depth and token by token: table, figure, page
  adapt      train an exit adapter for a model that stays as it is
  export     a run as a transformers folder, its draft, and GGUF files
  evaluate   every exit on the tasks of lm-eval-harness
  compare    runs side by side, and their perplexity by depth
  configs    the configs that come with lskip: a list, a copy

`lskip COMMAND --help` shows the options, `lskip fit … --print_config` the whole configuration.
`lskip --version` says which this is. Set LSKIP_TRACEBACK=1 to see where an error comes from.
"""
_TRAINING = ("fit", "validate", "test")
_PLANNING = ("plan",)
_DECODING = ("predict", "generate", "chat", "serve")
_PLAIN = ("data", *_DECODING, "export", "adapt", "sweep", "tune", "evaluate", "compare", "inspect")
COMMANDS = (*_TRAINING, *_PLANNING, *_PLAIN, "configs")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for the user's mistakes, 130 after Ctrl-C, 143 after SIGTERM.

    Args:
        arguments: the command and its options; None: those of this process, which then ends with the command.
    """
    of_process = arguments is None
    arguments = sys.argv[1:] if of_process else list(arguments)
    _open_closed_streams()
    try:
        code = _outcome(arguments, of_process)
    except KeyboardInterrupt:
        code = 130  # a second Ctrl-C, while the first was reported
    except OSError as error:
        code = _complain_of_output(error)
    try:
        sys.stdout.flush()
    except OSError as error:
        # Else Python would flush, and report, once more when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or _complain_of_output(error)
    return code


def _outcome(arguments: list[str], of_process: bool) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if arguments else 2
    command = arguments[0]
    if command == "--version":
        print(f"lskip {__version__}")
        return 0
    if command not in COMMANDS:
        return _complain("", f"{command!r} is not one of {', '.join(COMMANDS)}{did_you_mean(command, COMMANDS)}")
    if command in _PLAIN and (launch := launched()) and launch.processes > 1:
        return _complain(command, f"{launch.launcher} started {launch.processes} processes; this command is for one")
    _be_quiet()
    try:
        _check_text(arguments)
        with ended_by_signals(""):
            run = _command(command)
            with _own_modules(), _plain_warnings():
                run(arguments)
    except KeyboardInterrupt as interrupt:
        if of_process:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the report
        if rank() == 0:  # of processes that end together one says so
            _complain(command, f"interrupted{interrupt}", "")
        return getattr(interrupt, "exit_code", 130)
    except BrokenPipeError:
        raise
    except BaseException as error:  # panics of Rust libraries are no Exception
        if os.environ.get("LSKIP_TRACEBACK") == "1" or not is_users_mistake(error):
            raise
        return _complain(command, one_line(error))
    return 0


def _complain(command: str, sentence: str, kind: str = "error: ") -> int:
    of_rank = f", rank {rank()}" if rank() > 0 else ""
    with suppress(OSError):
        print(f"{f'lskip {command}'.rstrip()}{of_rank}: {kind}{sentence}", file=sys.stderr)
    return 2


def _check_text(arguments: list[str]) -> None:
    for argument in arguments:
        if "\0" in argument or any("\ud800" <= character <= "\udfff" for character in argument):
            raise ValueError(f"{argument.partition('=')[0]!r}: not UTF-8 text, or with a NUL in it")


def _command(name: str) -> Callable[[list[str]], None]:
    """Return the function that runs a command; importing it imports the libraries that it needs."""
    if name == "configs":
        from lskip.cli.shipped_configs import run_configs

        return run_configs
    if name in _TRAINING:
        from lskip.cli.fit import run_training

        return run_training
    if name in _PLANNING:
        from lskip.cli.plan import run_plan

        return run_plan
    from lskip.cli.commands import command_named, run_command

    command_named(name)
    return run_command


@contextmanager
def _own_modules() -> Iterator[None]:
    """Append the working directory to sys.path, so that options can name the user's own classes.

    Appended after the libraries are imported, so that no file there can shadow one of them.
    """
    folder = os.path.abspath(os.curdir)
    known = folder in sys.path
    if not known:
        sys.path.append(folder)
    try:
        yield
    finally:
        if not known:
            sys.path.remove(folder)


def _open_closed_streams() -> None:
    # After `lskip … >&-` the stream is None, and libraries would fail to write to it.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _complain_of_output(error: OSError) -> int:
    if isinstance(error, BrokenPipeError):
        return 141  # the reader has closed the pipe (`lskip generate … | head`)
    return _complain("", f"standard output: {error.strerror}")


def _be_quiet() -> None:
    """Silence warnings of libraries that a user of the command line cannot act on."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for message in _HINTS:
        warnings.filterwarnings("ignore", message=message)
    # It warns of a missing package for 4-bit products, which lskip does not use.
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings as one line each, without the source line."""
    with_code = warnings.formatwarning
    if os.environ.get("LSKIP_TRACEBACK") != "1":
        warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = with_code


_HINTS = (
    ".*does not have many workers.*",  # rows are precomputed: workers would only copy them
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*exists and is not empty.*",
    ".*Total length of `.*` across ranks is zero.*",  # from data.val_fraction: 0
    ".*is not supported by the model summary.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*torch\\.jit\\..* is deprecated.*",  # used by the fused blocks
)
