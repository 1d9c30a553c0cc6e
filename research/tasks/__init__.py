"""Problems with verifiable answers: generated ones, and those read from files.

make('arithmetic'), make('countdown', max_difficulty=5), make('knights'),
make('tool_arithmetic'), make('gsm8k', train_file=..., test_file=...), make('math', test_file=...),
make('gym:chain_sum')
"""

import ast
import dataclasses
import difflib
import inspect
from typing import Any

from research.tasks import files
from research.tasks.arithmetic import Arithmetic
from research.tasks.base import Problem, Split, Task, Unparsed
from research.tasks.countdown import Countdown
from research.tasks.gym import GymTask
from research.tasks.knights import Knights
from research.tasks.tool_arithmetic import ToolArithmetic

__all__ = ["Problem", "Split", "Task", "TaskConfig", "Unparsed", "make"]


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """A task for a configuration file. Fields left at 0 or '' take the task's own default.

    name: arithmetic, countdown, knights, tool_arithmetic, gsm8k, math or gym:NAME.
    test_size: number of test problems, for tasks that generate them.
    train_size: number of training problems, for the same; without, there is no end of them.
    min_difficulty, max_difficulty: the task's own scale.
    train_file, test_file: .jsonl files, for gsm8k and math.
    options: further settings of the task, each as 'name=value'.
    """

    name: str = "arithmetic"
    seed: int = 0
    test_size: int = 0
    train_size: int = 0
    min_difficulty: int = 0
    max_difficulty: int = 0
    train_file: str = ""
    test_file: str = ""
    options: tuple[str, ...] = ()


def make(spec: str | TaskConfig, *, seed: int = 0, **options: Any) -> Task:
    """The task of that name (or configuration) with its options.

    Raises ValueError for an unknown name or option, naming the nearest one.
    """
    if isinstance(spec, TaskConfig):
        return make(spec.name, seed=spec.seed, **_options(spec), **options)
    name, colon, dataset = spec.partition(":")
    if name == "gym" and colon:
        return GymTask(dataset, seed=seed, **options)
    if spec not in _TASKS:
        names = [*_TASKS, "gym:NAME"]
        near = difflib.get_close_matches(spec, names, 1, 0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        raise ValueError(f"no task {spec!r}; {hint}")
    known = [p for p in inspect.signature(_TASKS[spec]).parameters if p != "seed"]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, 1, 0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"task {spec!r} has no option {option!r}; {hint}")
    return _TASKS[spec](seed=seed, **options)


def _gsm8k(*, train_file: str = "", test_file: str = "", seed: int = 0) -> Task:
    return files.FileTask("gsm8k", files.read_gsm8k, train=train_file, test=test_file, seed=seed)


def _math(*, train_file: str = "", test_file: str = "", seed: int = 0) -> Task:
    return files.FileTask("math", files.read_math, train=train_file, test=test_file, seed=seed)


_TASKS = {
    "arithmetic": Arithmetic,
    "countdown": Countdown,
    "knights": Knights,
    "tool_arithmetic": ToolArithmetic,
    "gsm8k": _gsm8k,
    "math": _math,
}


def _options(config: TaskConfig) -> dict[str, Any]:
    options = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in ("name", "seed", "options") and getattr(config, field.name)
    }
    for option in config.options:
        name, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"options={config.options}: {option!r} is not 'name=value'")
        try:
            options[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            options[name] = value
    return options
