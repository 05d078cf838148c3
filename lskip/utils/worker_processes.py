"""Processes that each call one function, for work that a single core would take long for.

Not of multiprocessing: its forks inherit locks that another thread holds, and wait for them for ever; its other ways of
starting import the user's script anew, which then must not train at its top level.
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from lskip.utils.user_errors import how_it_ended

ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def available_cores() -> int:
    """Return the number of cores that this process may use, where the system says so, else of all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerProcesses:
    """Processes that call `work(first, part)`, in a with statement.

    Args:
        count: of processes.
        work: a function that can be imported.
        first: its first argument, sent to each process once.

    Raises:
        ValueError: a process has ended (as where memory is short); and what `work` raises.
    """

    def __init__(self, count: int, work: Callable[[Any, Any], Any], first: Any):
        self.count, self.begin = count, pickle.dumps((work, first))
        self.processes: list[subprocess.Popen] = []
        self.mine = threading.local()  # one thread for each process waits for its answers

    def __enter__(self) -> "WorkerProcesses":
        self.pool = ThreadPoolExecutor(self.count, initializer=self._start)
        return self

    def __exit__(self, *error) -> None:
        for process in self.processes:
            process.kill()
        self.pool.shutdown(cancel_futures=True)
        for process in self.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):  # of a part that it did not read
                    pipe.close()

    def map(self, parts: Iterable[Any]) -> Iterator[Any]:
        """Yield `work(first, part)` of each part, in their order; few parts are read ahead."""
        waiting: deque = deque()
        for part in parts:
            waiting.append(self.pool.submit(self._call, part))
            if len(waiting) > 2 * self.count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _start(self) -> None:
        command = [sys.executable, "-P", "-c", "from lskip.utils.worker_processes import main; main()"]
        variables = {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.processes.append(process)
        self.mine.process = process
        process.stdin.write(self.begin)

    def _call(self, part: Any) -> Any:
        process = self.mine.process
        try:
            pickle.dump(part, process.stdin)
            process.stdin.flush()
            answer, error = pickle.load(process.stdout)
        except (OSError, EOFError) as broken:
            raise ValueError(f"a process that helps this one {how_it_ended(process.wait())}") from broken
        if error is not None:
            raise error
        return answer


def main() -> None:
    """Answer what the parent sends by stdin, until it closes it or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C, to all: the parent ends this process
    parent, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is no answer
    work, first = pickle.load(parent)
    while True:
        try:
            part = pickle.load(parent)
        except EOFError:
            return
        try:
            answer = work(first, part), None
        except Exception as error:
            answer = None, error
        try:
            pickle.dump(answer, answers)
            answers.flush()
        except BrokenPipeError:
            os._exit(1)  # the parent has ended
