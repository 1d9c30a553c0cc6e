"""Tasks for the tests of data/crashes.py, in a module that a new process imports quickly."""

import os


def double_or_die(task: int) -> tuple[int, str]:
    if task == 3:
        os._exit(7)  # as a crash in a library does
    return 2 * task, ""


def nothing() -> None:
    pass
