"""The process that grades answers for `pool.Pool`. Runs without JAX, and dies with its parent."""

import contextlib
import multiprocessing.connection
import pickle
import resource
import time
import traceback

from research.tasks.base import Unparsed, Verifier

_MEMORY_BYTES = 4 << 30


def main(descriptor: int) -> None:
    """Serves the connection at that file descriptor until its other end is closed.

    The first message is a pickled (verifier, timeout in seconds); it is answered by ('ready', '')
    or ('failed', why). The others are lists of pickled (problem, answer) pairs; each of these is
    answered by one (outcome, note).
    """
    connection = multiprocessing.connection.Connection(descriptor)
    _limit(resource.RLIMIT_AS, _MEMORY_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    try:
        verifier, timeout_s = pickle.loads(connection.recv_bytes())
        verifier.prepare()
    except Exception:
        connection.send(("failed", traceback.format_exc(limit=-3)))
        return
    connection.send(("ready", ""))
    while True:
        try:
            chunk = connection.recv()
        except EOFError:
            return
        for call in chunk:
            # The parent kills this process in time; should it be gone itself, the kernel does.
            _limit(resource.RLIMIT_CPU, int(time.process_time() + 2 * timeout_s) + 5)
            connection.send(_grade(verifier, call))


def _grade(verifier: Verifier, call: bytes) -> tuple[str, str]:
    try:
        problem, answer = pickle.loads(call)
        return ("right" if verifier(problem, answer) else "wrong"), ""
    except Unparsed as error:
        return "unparsed", str(error)
    except Exception as error:  # whatever a verifier trips over
        return "error", f"{type(error).__name__}: {str(error)[:200]}"


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    with contextlib.suppress(OSError, ValueError):  # not every system has every limit
        resource.setrlimit(kind, (value, hard))
