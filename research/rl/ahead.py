"""One call that runs in a thread while its caller goes on."""

import concurrent.futures
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Ahead:
    """Holds at most one call that was started and whose result nobody has taken.

    A call is known by its function, its first argument (that very object) and the others (their values), so nothing is
    taken for the result of another call.
    """

    def __init__(self):
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "ahead")
        self._call: tuple | None = None
        self._future: concurrent.futures.Future | None = None

    def start(self, function: Callable[..., T], first: Any, *others: Any) -> None:
        self.drop()
        self._call = function, first, others
        self._future = self._pool.submit(function, first, *others)

    def result(self, function: Callable[..., T], first: Any, *others: Any) -> T:
        """Of the call if it was started, or else of calling now. Raises what the call raised."""
        call, future = self._call, self._future
        if call and call[0] == function and call[1] is first and call[2] == others:
            self._call = self._future = None
            return future.result()
        self.drop()
        return function(first, *others)

    def wait(self) -> None:
        """Until nothing runs."""
        if self._future is not None:
            concurrent.futures.wait([self._future])

    def drop(self) -> None:
        """Waits, and forgets the result."""
        self.wait()
        self._call = self._future = None
