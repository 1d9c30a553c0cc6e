"""Table 3: reinforcement learning from a base model on easy problems, tested on these and on harder ones.

Chained sums: trained on 3 and 4 operands, tested on 5, and on 6 and 7, which the base model has seen, and seldom gets
right.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.tables.base import Claim, Results, Table, Verdict, verdict
from experiments.tables.reinforce_pp import arms, large, small
from experiments.tables.reinforce_pp.arms import Plan
from research.tasks import TaskConfig

ARMS = ("grpo", "reinforce_pp", "reinforce_pp_baseline")
EASY, HARD, HARDER = "in distribution", "harder", "hardest"
EQUAL = 0.02  # pass@1 this close counts as equal

_SMALL = {EASY: (3, 4), HARD: (5, 5), HARDER: (6, 7)}  # operands
_LARGE = {EASY: (3, 3), HARD: (4, 4), HARDER: (5, 5)}  # numbers of a countdown


def _sums(low: int, high: int, seed: int = 1000) -> TaskConfig:
    return TaskConfig(
        seed=seed, min_difficulty=low, max_difficulty=high, test_size=200, options=small.SUMS
    )


def _countdown(low: int, high: int, seed: int = 1000) -> TaskConfig:
    return TaskConfig(
        "countdown", seed=seed, min_difficulty=low, max_difficulty=high, test_size=200
    )


def _small(arm: str, seed: int):
    return small.config(arm, seed, task=_sums(*_SMALL[EASY]), steps=40)


def _large(arm: str, seed: int):
    return large.config(arm, seed, task=_countdown(*_LARGE[EASY]))


PLANS = {
    "cpu": Plan(
        ARMS, small.arithmetic, _small, small.RATES,
        tests={name: _sums(*limits) for name, limits in _SMALL.items()},
        validation=_sums(*_SMALL[EASY], seed=1001), problems=200,
    ),
    "gpu": Plan(
        ARMS, large.start, _large, large.RATES,
        tests={name: _countdown(*limits) for name, limits in _LARGE.items()},
        validation=_countdown(*_LARGE[EASY], seed=1001), problems=200,
    ),
}  # fmt: skip


def _of(*tests: str):
    def read(run: Mapping[str, Any]) -> float:
        return float(np.mean([run["tests"][test]["pass@1"] for test in tests]))

    return read


def _gaps(results: Results, matching: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for arm in ("reinforce_pp_baseline", "reinforce_pp"):
        for name, tests in {
            EASY: (EASY,),
            HARD: (HARD,),
            HARDER: (HARDER,),
            "both harder": (HARD, HARDER),
        }.items():
            found[f"{arm} - grpo, {name}"] = arms.difference(
                results, arm, "grpo", _of(*tests), matching
            )
    return found


def _harder(results: Results) -> Verdict:
    def judge(matching: str) -> Verdict:
        numbers = _gaps(results, matching)
        gap = numbers["reinforce_pp_baseline - grpo, both harder"]
        return verdict(gap.low > 0, gap.high < 0, numbers)

    return arms.in_both(judge, arms.update_sizes(results, ARMS))


def _equal(results: Results) -> Verdict:
    def judge(matching: str) -> Verdict:
        gap = _gaps(results, matching)[f"reinforce_pp_baseline - grpo, {EASY}"]
        levels = {f"{arm}, {EASY}": arms.level(results, arm, _of(EASY), matching) for arm in ARMS}
        close, far = -EQUAL < gap.low and gap.high < EQUAL, gap.low > EQUAL or gap.high < -EQUAL
        return verdict(close, far, levels | {f"reinforce_pp_baseline - grpo, {EASY}": gap})

    base = {f"base, {name}": arms.over_base(results, _of(name)) for name in _SMALL}
    return arms.in_both(judge, base)


def _figure(results: Results, path: pathlib.Path) -> None:
    def points(run: Mapping[str, Any]) -> list[tuple[float, float]]:
        return [(place, _of(test)(run)) for place, test in enumerate(_SMALL)]

    title = f"pass@1: 0 {EASY}, 1 {HARD}, 2 {HARDER}"
    arms.figure(results, path, ARMS, title=title, xlabel="test", points=points)


_PAPER = (
    "Qwen2.5-Math base, REINFORCE++ and GRPO: AIME-24 21.04, 18.96; AMC-23 60.47, 59.22; MATH-500 72.00, 73.00 (Table "
    "3)"
)
_NEEDS = ("base", *ARMS)
TABLE = Table(
    name="reinforce_pp/transfer",
    title="REINFORCE++: from a base model, on easy problems (Table 3)",
    scales={scale: plan.runs() for scale, plan in PLANS.items()},
    claims=[
        Claim(
            "T3-1",
            "REINFORCE++ does better than GRPO on problems harder than those of training",
            _PAPER,
            "mean pass@1 of the two harder tests, w/ Baseline less GRPO's, above 0 (lower bound) at the shared and at "
            "each method's best learning rate; refuted if the upper bound is below 0 at both.",
            _NEEDS,
            _harder,
        ),
        Claim(
            "T3-2",
            "and equally well on problems like those of training",
            _PAPER,
            f"the interval of the difference of pass@1 lies within ±{EQUAL} at both rates; refuted if it lies "
            "outside at both.",
            _NEEDS,
            _equal,
        ),
    ],
    figure=_figure,
    seeds=(0, 1, 2, 3, 4),
)  # fmt: skip
