"""All thirteen algorithms on one task, with equally many sampled responses: the figure of the README.

Every algorithm has its own switches (`research.rl.algorithms`), among them where its KL penalty is; what all share is
the base model of a seed, the problems, the number of responses, two minibatches for each rollout, the learning rate.
ReMax's greedy responses count, and so do those that DAPO samples to replace groups without a signal.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.plots import plt
from experiments.tables.base import Claim, Results, Table, Verdict, over_seeds, verdict
from experiments.tables.reinforce_pp import arms, large, small
from experiments.tables.reinforce_pp.arms import Plan
from research.rl import trainer as rl
from research.rl.algorithms import ALGORITHMS
from research.rl.losses import LossConfig
from research.tasks import TaskConfig

ROUNDS = 2  # of DAPO's sampling; it makes as many rollouts fewer
FAMILIES = {  # panels of the figure; GRPO is in all of them
    "a baseline of its own": ("ppo", "remax", "reinforce", "reinforce_pp"),
    "the group's mean": ("dr_grpo", "rloo", "batch_std", "reinforce_pp_baseline"),
    "GRPO's advantage, another loss": ("dapo", "gspo", "cispo", "minimax_grpo"),
}
COLORS = (
    *("C0", "C1", "C2", "C3"), *("C4", "C5", "C9", "#d6006e"), *("C8", "#1b7837", "#b15928", "#003f5c"),
)  # fmt: skip
TITLES = {
    "ppo": "PPO", "grpo": "GRPO", "dr_grpo": "Dr.GRPO", "rloo": "RLOO", "remax": "ReMax", "reinforce": "REINFORCE",
    "reinforce_pp": "REINFORCE++", "reinforce_pp_baseline": "REINFORCE++ w/ Baseline", "batch_std": "batch std",
    "dapo": "DAPO", "gspo": "GSPO", "cispo": "CISPO", "minimax_grpo": "MiniMax-01's GRPO",
}  # fmt: skip


def matched(config: rl.Config) -> rl.Config:
    """The same number of responses sampled for every algorithm, or at most that for DAPO; two minibatches."""
    rollout, loop_ = config.rollout, config.loop
    if config.estimator == "remax":  # one response to each prompt is the greedy one
        rollout = dataclasses.replace(rollout, group_size=rollout.group_size - 1)
    if ALGORITHMS[config.estimator].rounds > 1:
        rollout = dataclasses.replace(rollout, rounds=ROUNDS)
        loop_ = dataclasses.replace(loop_, steps=loop_.steps // ROUNDS)
    return dataclasses.replace(config, rollout=rollout, loop=loop_, loss=LossConfig(), updates=2)


_SUMS = TaskConfig(options=small.SUMS)


def _small(arm: str, seed: int) -> rl.Config:
    return matched(small.config(arm, seed, task=_SUMS, steps=40))


def _large(arm: str, seed: int) -> rl.Config:
    return matched(large.config(arm, seed, task=TaskConfig("countdown")))


PLANS = {
    "cpu": Plan(
        tuple(ALGORITHMS), small.arithmetic, _small, small.RATES[:1],
        tests={"held-out": dataclasses.replace(_SUMS, seed=1000, test_size=200)},
        validation=dataclasses.replace(_SUMS, seed=1001, test_size=200), problems=200,
    ),
    "gpu": Plan(
        tuple(ALGORITHMS), large.start, _large, large.RATES[:1],
        tests={"held-out": TaskConfig("countdown", seed=1000, test_size=200)},
        validation=TaskConfig("countdown", seed=1001, test_size=200), problems=200,
    ),
}  # fmt: skip


def _held_out(run: Mapping[str, Any]) -> float:
    return run["tests"]["held-out"]["pass@1"]


def _all_improve(results: Results) -> Verdict:
    base = {seed: _held_out(figures) for seed, figures in results["base"].items()}
    gains = {
        arm: over_seeds([_held_out(arms.chosen(f, "shared")) - base[s] for s, f in results[arm].items()])
        for arm in ALGORITHMS
    }  # fmt: skip
    numbers = {
        "base": over_seeds(list(base.values())),
        **{f"{arm}: gain": gain for arm, gain in gains.items()},
    }
    return verdict(
        all(gain.low > 0 for gain in gains.values()),
        any(gain.high < 0 for gain in gains.values()),
        numbers | arms.update_sizes(results, tuple(ALGORITHMS)),
    )


def responses(config: rl.Config, run: Mapping[str, Any]) -> np.ndarray:
    """Sampled in all, before each rollout of a run."""
    rollout = config.rollout
    each = rollout.prompts * (rollout.group_size + (config.estimator == "remax"))
    counts = np.array([each * record.get("rounds", 1.0) for record in run["training"]])
    return np.cumsum(counts) - counts


def figure(results: Results, path: pathlib.Path, plan: Plan = PLANS["cpu"]) -> None:
    """Learning curves by family, each beside GRPO's, and the end on held-out problems."""
    figure_ = plt.figure(figsize=(14.5, 4), layout="constrained")
    left, right = figure_.subfigures(1, 2, width_ratios=(3, 1.35))
    axes = [*left.subplots(1, len(FAMILIES), sharey=True), right.subplots()]
    others = (name for names in FAMILIES.values() for name in names)
    colors = {"grpo": "black"} | dict(zip(others, COLORS, strict=True))
    for axis, (title, names) in zip(axes, FAMILIES.items(), strict=False):
        for arm in ("grpo", *names):
            if not results.get(arm):
                continue
            found = [
                _curve(plan.config(arm, seed), arms.chosen(f, "shared"))
                for seed, f in results[arm].items()
            ]
            last = min(x[-1] for x, _ in found)
            at = np.linspace(0, last, 60)
            values = np.array([np.interp(at, x, y) for x, y in found])
            style = {"color": colors[arm], "ls": "--" if arm == "grpo" else "-"}
            axis.plot(at, values.mean(axis=0), label=TITLES[arm], lw=1.8, **style)
            axis.fill_between(
                at, values.min(axis=0), values.max(axis=0), color=colors[arm], alpha=0.12, lw=0
            )
        axis.set(title=title, xlabel="responses sampled")
        axis.legend(frameon=False, fontsize=8, loc="lower right")
    axes[0].set_ylabel("pass@1 on fresh problems")
    _ends(axes[3], results, colors)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure_.savefig(path, dpi=150)
    plt.close(figure_)


def _curve(
    config: rl.Config, run: Mapping[str, Any], width: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """(responses sampled before, running mean of pass@1) of the rollouts of a run."""
    values = np.array([record["pass@1"] for record in run["training"]])
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return responses(config, run), (sums[ends] - sums[starts]) / (ends - starts)


def _ends(axis, results: Results, colors: Mapping[str, str]) -> None:
    """Held-out pass@1 of each algorithm, best on top, with its interval and its seeds."""
    levels = {arm: arms.level(results, arm, _held_out) for arm in ALGORITHMS if results.get(arm)}
    ranked = sorted(levels, key=lambda arm: levels[arm].value)
    for place, arm in enumerate(ranked):
        level, color = levels[arm], colors[arm]
        axis.plot(
            [level.low, level.high],
            [place, place],
            color=color,
            lw=5,
            alpha=0.35,
            solid_capstyle="butt",
        )
        seeds = [_held_out(arms.chosen(f, "shared")) for f in results[arm].values()]
        axis.plot(seeds, [place] * len(seeds), "|", color=color, ms=7)
        axis.plot(level.value, place, "o", color=color, ms=5)
    axis.set_yticks(range(len(ranked)), [TITLES[arm] for arm in ranked], fontsize=8)
    if results.get("base"):
        base = arms.over_base(results, _held_out).value
        axis.axvline(base, color="gray", ls=":")
        axis.annotate(" base", (base, len(ranked) - 1), fontsize=8, color="gray", va="center")
    axis.set(title="held-out pass@1 at the end", xlabel="seeds, mean, 95 % interval")


TABLE = Table(
    name="reinforce_pp/comparison",
    title="Thirteen algorithms at equal samples",
    scales={scale: plan.runs() for scale, plan in PLANS.items()},
    claims=[
        Claim(
            "C",
            "Every algorithm improves on the base model in the same number of responses",
            "not in the paper, whose Tables 1 to 4 compare up to four",
            "the gain of held-out pass@1 is above 0 for every algorithm (lower bounds); refuted if that of any is "
            "below 0 (upper bound).",
            ("base", *ALGORITHMS),
            _all_improve,
        )
    ],
    figure=figure,
    seeds=(0, 1, 2, 3, 4),
)  # fmt: skip
