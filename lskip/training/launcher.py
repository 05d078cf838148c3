"""The processes that Lightning starts for a training on several devices: watched, and ended together."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from lskip.utils.console import say
from lskip.utils.interrupts import ENDING
from lskip.utils.user_errors import how_it_ended, lost_a_process

GRACE = 10.0  # seconds that the others have to end by themselves after one has ended
ASKED = [128 + each for each in (signal.SIGINT, *ENDING)]  # exit codes
_PARENT = "LSKIP_STARTED_BY"


class RankLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher of processes of rank 1 and up, which leaves none behind.

    Lightning's own kills this process, without a word, where another ends with an error, and leaves the others where
    this one does.
    """

    def launch(self, function: Callable, *arguments: Any, trainer: Trainer | None = None, **settings: Any) -> Any:
        """Start the other processes and return `function(*arguments, **settings)` of this one.

        Raises:
            ValueError: another process has ended; which, and how.
        """
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if self.cluster_environment.creates_processes_externally:
            _end_with(os.environ.get(_PARENT))
            return function(*arguments, **settings)
        if self.num_nodes > 1:
            address = f"{self.cluster_environment.main_address}:{self.cluster_environment.main_port}"
            say(f"waiting for the processes of {self.num_nodes} nodes at {address}")
        os.environ[_PARENT] = str(os.getpid())
        self._call_children_scripts()
        _set_num_threads_if_needed(self.num_processes)
        over = threading.Event()
        threading.Thread(target=self._watch, args=(over,), daemon=True).start()
        try:
            return function(*arguments, **settings)
        except Exception as error:
            over.set()
            ended = self._first_ended(GRACE) if lost_a_process(error) else None
            self._end_others(GRACE)
            if ended is None:
                raise
            raise ValueError(_sentence(*ended)) from error
        except BaseException:
            self._end_others(0)
            raise
        finally:
            over.set()
            del os.environ[_PARENT]

    def _watch(self, over: threading.Event) -> None:
        """End all processes where one has ended with an error and this one does not notice: it waits for it."""
        while not over.wait(1):
            if ended := self._first_ended(0):
                if not over.wait(GRACE):
                    self._end_others(0)
                    say(f"lskip: error: {_sentence(*ended)}", sys.stderr)
                    code = ended[1] if ended[1] > 0 else 128 - ended[1]
                    os._exit(code if code in ASKED else 1)  # who asks one process to end asks all
                return

    def _first_ended(self, patience: float) -> tuple[int, int] | None:
        """Return rank and exit code of the first process that ended with an error, within so many seconds.

        None: none did.
        """
        until = time.monotonic() + patience
        while True:
            for rank, process in enumerate(self.procs, start=1):
                if process.poll():
                    return rank, process.returncode
            if time.monotonic() >= until:
                return None
            time.sleep(0.2)

    def _end_others(self, patience: float) -> None:
        """Kill the other processes, after so many seconds in which each may still say why it ends."""
        until = time.monotonic() + patience
        while time.monotonic() < until and any(process.poll() is None for process in self.procs):
            time.sleep(0.2)
        for process in self.procs:
            process.kill()


def _sentence(rank: int, code: int) -> str:
    return f"the process of rank {rank} {how_it_ended(code)}, and the run with it"


def _end_with(parent: str | None) -> None:
    """End this process as soon as its parent has ended, for which a collective operation may wait for ever."""

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1)
        time.sleep(GRACE)
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def watched(trainer: Trainer) -> Trainer:
    """Return the Trainer with RankLauncher in place of its launcher of processes, where it has one."""
    launcher = trainer.strategy.launcher
    if type(launcher) is _SubprocessScriptLauncher:
        processes = launcher.num_processes, launcher.num_nodes
        trainer.strategy._launcher = RankLauncher(launcher.cluster_environment, *processes)
    return trainer
