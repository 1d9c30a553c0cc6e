"""Table 2: training on thirty problems, tested on others of the same generator.

The paper trains on the 30 problems of AIME 2024, and compares after so many steps, where the arms differ in training
accuracy too. Here it is compared at equal steps, and at the training accuracy that every arm of a seed reaches.
"""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import plots
from experiments.tables.base import Claim, Results, Table, Verdict, over_seeds, verdict
from experiments.tables.reinforce_pp import arms, large, small
from experiments.tables.reinforce_pp.arms import Plan
from research.core.loop import LoopConfig
from research.rl.trainer import EvalConfig
from research.tasks import TaskConfig

ITEMS, HELD_OUT, GROUP = 30, 300, 8
ARMS = ("grpo", "reinforce_pp", "reinforce_pp_baseline")
ACCURACY = 0.95  # at most; less where an arm of the seed does not get there


def _small(arm: str, seed: int):
    return small.config(
        arm,
        seed,
        task=TaskConfig(train_size=ITEMS, test_size=HELD_OUT),
        steps=60,
        max_new_tokens=39,
        prompts=ITEMS,
        group_size=GROUP,
        eval=EvalConfig(problems=HELD_OUT, samples=16),
        loop=LoopConfig(steps=60, eval_every=15),
    )


def _large(arm: str, seed: int):
    return large.config(
        arm,
        seed,
        task=TaskConfig("countdown", train_size=ITEMS, test_size=HELD_OUT),
        prompts=ITEMS,
        group_size=GROUP,
        eval=EvalConfig(problems=HELD_OUT, samples=16),
        loop=LoopConfig(steps=200, eval_every=20, checkpoint_every=50),
    )


PLANS = {
    "cpu": Plan(
        ARMS, small.arithmetic, _small, small.RATES,
        tests={"held-out": TaskConfig(seed=1000, test_size=HELD_OUT)},
        validation=TaskConfig(seed=1001, test_size=HELD_OUT), problems=HELD_OUT,
    ),
    "gpu": Plan(
        ARMS, large.start, _large, large.RATES,
        tests={"held-out": TaskConfig("countdown", seed=1000, test_size=HELD_OUT)},
        validation=TaskConfig("countdown", seed=1001, test_size=HELD_OUT), problems=HELD_OUT,
    ),
}  # fmt: skip


def train_accuracy(run: Mapping[str, Any]) -> list[tuple[int, float]]:
    """(step, accuracy on the training problems of the policy after it) at the evaluated steps.

    The rollout of a step shows the policy before it; those just before and just after an evaluation are averaged.
    """
    by_step = {r["step"]: r["pass@1"] for r in run["training"]}
    found = []
    for evaluation in run["evaluations"]:
        step = evaluation["step"]
        near = [by_step[s] for s in (step, step + 1) if s in by_step]
        found.append((step, float(np.mean(near))))
    return found


def at_accuracy(run: Mapping[str, Any], accuracy: float, key: str) -> float:
    """A held-out figure where training accuracy first reaches `accuracy`, interpolated between evaluations.

    Raises ValueError if it never does. Above `accuracy` from the first evaluation on: the figure there.
    """
    points = [
        (x, e[key]) for (_, x), e in zip(train_accuracy(run), run["evaluations"], strict=True)
    ]
    for before, after in zip([points[0], *points], points, strict=False):
        if after[0] >= accuracy:
            share = (accuracy - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 1.0
            return before[1] + max(share, 0.0) * (after[1] - before[1])
    raise ValueError(f"training accuracy never reaches {accuracy}")


def common_accuracy(runs: Sequence[Mapping[str, Any]]) -> float:
    """The highest training accuracy that all of them reach, at most `ACCURACY`."""
    return min([ACCURACY, *(max(x for _, x in train_accuracy(run)) for run in runs)])


def _compared(results: Results, arm: str, matching: str) -> dict[str, Any]:
    """GRPO's and the arm's held-out figures at equal accuracy, and after all steps; over seeds."""
    pairs = [
        tuple(arms.chosen(results[a][seed], matching) for a in (arm, "grpo")) for seed in sorted(results[arm])
    ]  # fmt: skip
    levels = [common_accuracy(pair) for pair in pairs]
    figures: dict[str, Any] = {"training accuracy compared at": over_seeds(levels)}
    for key in ("pass@16", "pass@1"):
        gaps = [
            at_accuracy(one, x, key) - at_accuracy(other, x, key)
            for (one, other), x in zip(pairs, levels, strict=True)
        ]
        ends = [one["evaluations"][-1][key] - other["evaluations"][-1][key] for one, other in pairs]
        figures |= {
            f"{key}, equal accuracy": over_seeds(gaps),
            f"{key}, equal steps": over_seeds(ends),
        }
    figures["training accuracy, equal steps"] = over_seeds(
        [train_accuracy(one)[-1][1] - train_accuracy(other)[-1][1] for one, other in pairs]
    )
    return figures


def _overfits_less(arm: str, at: str, results: Results) -> Verdict:
    def judge(matching: str) -> Verdict:
        figures = _compared(results, arm, matching)
        gap = figures[f"pass@16, {at}"]
        return verdict(gap.low > 0, gap.high < 0, figures)

    return arms.in_both(judge, arms.update_sizes(results, ("grpo", arm)))


def _figure(results: Results, path: pathlib.Path) -> None:
    shown = [arm for arm in ARMS if results.get(arm)]
    panels = {
        "accuracy on the 30 training problems": arms.curves(results, shown, "pass@1"),
        "held-out pass@16": arms.curves(results, shown, "pass@16", "evaluations"),
        "held-out pass@1": arms.curves(results, shown, "pass@1", "evaluations"),
        "entropy, nats per token": arms.curves(results, shown, "entropy"),
    }
    plots.curves(path, panels, smooth=1)


_RULE = "difference of held-out pass@16 above 0 (lower bound) at the shared and at each method's best learning rate"
TABLE = Table(
    name="reinforce_pp/overfit",
    title="REINFORCE++: training on thirty problems (Table 2)",
    scales={scale: plan.runs() for scale, plan in PLANS.items()},
    claims=[
        Claim(
            f"T2-{number}",
            f"{name} overfits less than GRPO, at {at}",
            "AIME-24, 30 problems: train 71.0 and 95.0, AIME-25 N=16 40.0 and 0.4; REINFORCE++, GRPO (Table 2; units "
            "may be mixed)",
            f"{_RULE}; refuted if the upper bound is below 0 at both.",
            ("grpo", arm),
            functools.partial(_overfits_less, arm, at),
        )
        for number, name, arm, at in (
            ("1", "REINFORCE++", "reinforce_pp", "equal accuracy"),
            ("2", "REINFORCE++", "reinforce_pp", "equal steps"),
            ("3", "REINFORCE++ w/ Baseline", "reinforce_pp_baseline", "equal accuracy"),
            ("4", "REINFORCE++ w/ Baseline", "reinforce_pp_baseline", "equal steps"),
        )
    ],
    figure=_figure,
    seeds=(0, 1, 2, 3, 4),
)
