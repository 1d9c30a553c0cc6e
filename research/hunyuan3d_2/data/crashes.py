"""Work in processes, some of which die of what they are given."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

Result = tuple[Any, Any, str]  # (task, what was done, why it failed or '')


def as_completed(
    run: Callable[[Any], tuple[Any, str]],
    tasks: Sequence[Any],
    workers: int,
    start: Callable[[], None],
) -> Iterator[Result]:
    """(task, *run(task)) of each task, in the order they end; `workers` = 0: one after another, here.

    A task whose process dies (a library may crash on a damaged mesh) gives (task, None, reason): the
    tasks that were under way then are tried again, each in a process of its own.
    """
    if not workers:
        yield from ((task, *run(task)) for task in tasks)
        return
    waiting = list(reversed(tasks))
    while waiting:
        suspects = yield from _until_broken(run, waiting, workers, start)
        for task in suspects:
            if (yield from _until_broken(run, [task], 1, start)):
                yield task, None, "the process that prepared it died; the mesh may be damaged"


def _until_broken(run, waiting: list[Any], workers: int, start) -> Iterator[Result]:
    """Takes tasks from the end of `waiting`; returns those that were under way when a process died."""
    pool = futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start)
    busy: dict[futures.Future, Any] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < 2 * workers:
                task = waiting.pop()
                busy[pool.submit(run, task)] = task
            ended, _ = futures.wait(busy, return_when=futures.FIRST_COMPLETED)
            for future in ended:
                if isinstance(future.exception(), futures.process.BrokenProcessPool):
                    return list(busy.values())
                yield busy.pop(future), *future.result()
        return []
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
