"""Grading in processes that can be killed.

An answer can make its verifier run for hours, fill the memory or crash the interpreter. So each
worker is a process of its own that talks over a pipe, and its parent kills it when an answer has
had its time; only that answer is lost. There are no signals and no threads in this, so a pool
works from any thread.
"""

import collections
import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from typing import IO, Any

from research.tasks.base import Problem, Verifier

Grade = tuple[str, str]  # right | wrong | unparsed | timeout | error, and why

_CHUNK = 16  # answers sent to a worker at a time: enough to keep it busy while its parent is not
_START_S = 120.0  # for importing SymPy on a busy machine
_COMMAND = "import sys; from research.rewards.worker import main; main(int(sys.argv[1]))"


@dataclasses.dataclass(eq=False)
class _Worker:
    process: subprocess.Popen
    connection: Any
    log: IO[bytes]  # its stderr
    deadline: float  # of getting ready, then of the answer at the head of `pending`
    ready: bool = False
    pending: collections.deque[int] = dataclasses.field(default_factory=collections.deque)

    @property
    def busy(self) -> bool:
        return not self.ready or bool(self.pending)

    def kill(self) -> int:
        """Ends the process, leaving nothing of it behind, and returns its exit code."""
        self.process.kill()
        code = self.process.wait()
        self.connection.close()
        self.log.close()
        return code


class Pool:
    """Runs a verifier over answers in worker processes, with a deadline for each answer.

    Workers start when `grade` is first called, and again when one was lost. They are fresh
    interpreters: the verifier's class must be importable, and starting one neither copies this
    process nor runs its main module again.
    """

    def __init__(self, verifier: Verifier, workers: int, timeout_s: float):
        """workers: processes; 0 takes one for each CPU of this process, at most 8."""
        if timeout_s <= 0 or workers < 0:
            raise ValueError(f"timeout_s={timeout_s} must be > 0 and workers={workers} >= 0")
        self._setup = pickle.dumps((verifier, timeout_s))
        self._size = workers or min(8, _cpus())
        self._timeout_s = timeout_s
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        weakref.finalize(self, _kill_all, self._workers)  # at exit, too

    def grade(self, calls: Sequence[tuple[Problem, str]]) -> list[Grade]:
        """One grade for each (problem, answer), in order.

        'timeout' for an answer whose worker had to be killed; 'error' where the verifier raised
        anything but Unparsed, or its process died.

        Raises RuntimeError if a worker cannot start.
        """
        with self._lock:
            try:
                return self._grade([pickle.dumps(call) for call in calls])
            except BaseException:  # half done: the pipes hold grades that nobody waits for
                _kill_all(self._workers)
                raise

    def close(self) -> None:
        """Ends the workers; `grade` would start new ones."""
        with self._lock:
            _kill_all(self._workers)

    def _grade(self, calls: list[bytes]) -> list[Grade]:
        grades: dict[int, Grade] = {}
        queue = collections.deque(range(len(calls)))
        while len(grades) < len(calls):
            self._staff(len(queue))
            for worker in self._workers:
                if not worker.busy and queue:
                    self._feed(worker, queue, calls)
            for worker in self._wait():
                self._receive(worker, grades, queue)
            for worker in [w for w in self._workers if w.busy and time.monotonic() >= w.deadline]:
                if not worker.connection.poll():  # or its grade came just in time
                    self._expire(worker, grades, queue)
        return [grades[index] for index in range(len(calls))]

    def _staff(self, waiting: int) -> None:
        for worker in [w for w in self._workers if not w.busy and w.process.poll() is not None]:
            self._dismiss(worker)  # it died with nothing to do, so no answer is to blame
        free = sum(not worker.pending for worker in self._workers)
        for _ in range(min(self._size - len(self._workers), waiting - free)):
            self._workers.append(self._start())

    def _start(self) -> _Worker:
        ours, theirs = multiprocessing.Pipe()
        log = tempfile.TemporaryFile()
        process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,  # an interrupt from the keyboard is for the run, not for this
        )
        theirs.close()
        with contextlib.suppress(OSError):  # dead already, which `_receive` finds out
            ours.send_bytes(self._setup)
        return _Worker(process, ours, log, time.monotonic() + _START_S)

    def _feed(self, worker: _Worker, queue: collections.deque, calls: list[bytes]) -> None:
        share = -(-len(queue) // (2 * self._size))  # less towards the end, so that all end together
        chunk = [queue.popleft() for _ in range(min(_CHUNK, share))]
        worker.pending.extend(chunk)
        worker.deadline = time.monotonic() + self._timeout_s
        with contextlib.suppress(OSError):
            worker.connection.send([calls[index] for index in chunk])

    def _wait(self) -> list[_Worker]:
        busy = {worker.connection: worker for worker in self._workers if worker.busy}
        first = min(worker.deadline for worker in busy.values())
        timeout = max(0.0, first - time.monotonic())
        return [busy[c] for c in multiprocessing.connection.wait(list(busy), timeout)]

    def _receive(self, worker: _Worker, grades: dict[int, Grade], queue: collections.deque) -> None:
        try:
            kind, note = worker.connection.recv()
        except (EOFError, OSError):
            self._bury(worker, grades, queue)
            return
        if kind == "failed":
            raise RuntimeError(f"a grading worker could not start:\n{note}")
        if kind == "ready":
            worker.ready = True
            return
        grades[worker.pending.popleft()] = kind, note
        worker.deadline = time.monotonic() + self._timeout_s

    def _bury(self, worker: _Worker, grades: dict[int, Grade], queue: collections.deque) -> None:
        """The process died by itself: of the answer it was at, or before it got to any."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(1.0)  # for its exit code
        if not worker.ready:
            worker.log.seek(0)
            said = worker.log.read().decode(errors="replace").strip()
            raise RuntimeError(f"a grading worker died while starting:\n{said[-2000:]}")
        code = self._dismiss(worker)
        grades[worker.pending.popleft()] = "error", f"the grading process died, exit code {code}"
        queue.extendleft(reversed(worker.pending))

    def _expire(self, worker: _Worker, grades: dict[int, Grade], queue: collections.deque) -> None:
        self._dismiss(worker)
        if not worker.ready:
            raise RuntimeError(f"a grading worker was not ready within {_START_S:.0f} s")
        grades[worker.pending.popleft()] = "timeout", f"killed after {self._timeout_s:g} s"
        queue.extendleft(reversed(worker.pending))

    def _dismiss(self, worker: _Worker) -> int:
        self._workers.remove(worker)
        return worker.kill()


def _kill_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()


def _cpus() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1
