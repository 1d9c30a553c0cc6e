"""What the study's base model for knights and knaves is trained on: companies that talk of their number of knights.

    Ada : exactly 2 . Ben : at least 1 . Cleo : at most 1 ?
    <think> 0 : Ada knave Ben knave Cleo knight 1 . 1 : Ada knave Ben knight Cleo knight 2 . 2 : Ada knight Ben knight
    Cleo knave 2 . </think> <answer> Ada knight Ben knight Cleo knave </answer> $

If all statements are of that kind, a number of knights says who of them tells the truth. The reliable way tries 0, 1, 2
and so on, writes down who is then what and how many knights that makes, and stops where it is the number tried. A share
of the examples takes it; the others try one number and believe it, or think of nothing and guess. So the base model
knows the words and seldom gets to the end, which leaves something for reinforcement learning to find.
"""

import operator
import random
from collections.abc import Mapping, Sequence
from typing import Any

from research.tasks import knights

PAD, END = "<pad>", "$"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
WORDS = (PAD, *knights.WORDS, *TAGS, END)
# Kinds of statements, and when they hold: compare(number of knights, the number that is said).
SAYS = {"exactly": operator.eq, "at least": operator.ge, "at most": operator.le}
MIXTURE = {"worked": 0.3, "hasty": 0.3, "guess": 0.4}


def examples(task: knights.Knights, count: int, seed: int) -> list[tuple[str, str]]:
    """`count` training problems with responses of the mixture; the task is terse, its statements of kinds in `SAYS`."""
    rng = random.Random(f"knights base/{seed}")
    start = 1_000_000 * (seed + 1)  # training problems of reinforcement learning begin at 0
    pairs = []
    for index in range(start, start + count):
        problem = task.problem("train", index)
        way = rng.choices(list(MIXTURE), MIXTURE.values())[0]
        pairs.append((problem.question, _response(problem.data, way, rng)))
    return pairs


def _response(data: Mapping[str, Any], way: str, rng: random.Random) -> str:
    names, right = data["names"], sum(data["kinds"])
    tried = {"worked": range(right + 1), "hasty": [rng.randint(0, len(names))], "guess": []}[way]
    found = [rng.random() < 0.5 for _ in names]
    thoughts = []
    for number in tried:
        found = [SAYS[kind](number, count) for kind, count in data["statements"]]
        thoughts.append(f"{number} : {_terse(names, found)} {sum(found)} . ")
    return f"<think> {''.join(thoughts)}</think> <answer> {_terse(names, found)} </answer> {END}"


def _terse(names: Sequence[str], kinds: Sequence[bool]) -> str:
    return " ".join(f"{n} {'knight' if k else 'knave'}" for n, k in zip(names, kinds, strict=True))
