"""Noise amplification: rewards of 0 and 1 with Gaussian noise of deviation 0.001, under local and global deviations.

A trained policy answers most requests either always or never right, so most groups have one reward but for the noise.
What these get of advantages is measured on its rollouts; then training goes on from it, with the noise and without.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.plots import plt
from experiments.tables.base import (
    Claim,
    Interval,
    Results,
    Run,
    Table,
    Verdict,
    over_seeds,
    verdict,
)
from experiments.tables.reinforce_pp import gold
from research.lm import checkpoints
from research.reinforce_pp import over_optimisation as study
from research.rl import advantages
from research.rl import trainer as rl
from research.rl.advantages import AdvantageConfig
from research.rl.whitening import Whitening

SIGMA = 1e-3
LOCAL, GLOBAL = "grpo", "reinforce_pp_baseline"
ARMS = tuple(f"{name}-{kind}" for name in (LOCAL, GLOBAL) for kind in ("clean", "noisy"))


@dataclasses.dataclass(frozen=True, eq=False)
class Settings:
    """first: steps that make the trained policy, by GRPO without noise; steps: those after it. group: responses to each
    of `prompts` prompts of a rollout; measured: prompts of the rollout that advantages are measured on.
    """

    base: gold.Settings
    first: int
    steps: int
    prompts: int
    group: int
    rate: float
    measured: int = 128
    every: int = 4


SCALES = {
    "cpu": Settings(gold.SCALES["cpu"], first=40, steps=40, prompts=16, group=8, rate=2e-3),
    "gpu": Settings(
        gold.SCALES["gpu"], first=200, steps=200, prompts=64, group=16, rate=1e-6, measured=256, every=20
    ),
}  # fmt: skip


def config_of(s: Settings, estimator: str, seed: int, steps: int) -> rl.Config:
    return gold.run_of(
        s.base, estimator, seed, prompts=s.prompts, group=s.group, rate=s.rate, kl_coef=0.0, steps=steps, every=s.every
    )  # fmt: skip


def trained(s: Settings, estimator: str, noise: float, seed: int, directory, base, steps: int):
    """(parameters after training, figures at every evaluation, metrics)"""
    config, judge = config_of(s, estimator, seed, steps), judge_of(s, seed, base)
    rewarder = study.GoldRewarder(gold.task_of(s.base, seed), graded=False, noise=noise)
    name = f"{estimator} {noise:g} seed {seed}"
    return gold.judged(config, directory, base, judge, rewarder, name)


def judge_of(s: Settings, seed: int, base) -> study.Judge:
    model, params, tokenizer = base
    task = gold.task_of(s.base, seed)
    actor = gold.actor_of(s.base, model, tokenizer, task)
    return study.Judge(model, actor, task, params, None, problems=s.base.judged, seed=seed)


def policy(s: Settings, seed: int, directory: pathlib.Path, results: Any) -> dict[str, Any]:
    """Trains the policy, and measures the advantages that a rollout of it gets."""
    del results
    base = model, _, tokenizer = gold.base_of(s.base, seed, directory)
    params, curve, _ = trained(s, LOCAL, 0.0, seed, directory / "trained", base, s.first)
    task = gold.task_of(s.base, seed)
    actor = gold.actor_of(s.base, model, tokenizer, task)
    problems = [task.problem("train", 10**6 + i) for i in range(s.measured)]
    key = jax.random.key(seed)
    episodes = actor(
        jax.device_get(params), problems, key, study.sampling_of(actor), s.group, seed=seed
    )
    right = np.array([reward.parts["accuracy"] for reward in episodes.rewards])
    noise = SIGMA * np.random.default_rng([seed, 0x7015E]).standard_normal(len(right))
    return {
        "curve": curve,
        "figures": judge_of(s, seed, (model, jax.device_get(params), tokenizer))(params),
        "advantages": amplified(right, noise, episodes.completions.lengths, s.group),
    }


def amplified(
    right_N: np.ndarray, noise_N: np.ndarray, lengths_N: np.ndarray, group: int
) -> dict[str, dict[str, float]]:
    """What noise does to the advantages of groups whose rewards are all equal without it, by estimator.

    spread: root mean square of the responses' A about their group's mean. share: of the sum of |A| over all tokens,
    what these groups have. offset: root mean square of their groups' mean A. Each with the noise and ('clean') without.
    """
    mask = np.arange(lengths_N.max()) < lengths_N[:, None]
    groups = np.repeat(np.arange(len(right_N) // group), group)
    unanimous = np.ptp(right_N.reshape(-1, group), axis=1) == 0
    tokens = mask & np.repeat(unanimous, group)[:, None]
    found = {"groups": {"unanimous": float(unanimous.mean()), "right": float(right_N.mean())}}
    centred = AdvantageConfig(whiten=Whitening(recenter=False))
    for label, name, config in (
        (LOCAL, LOCAL, AdvantageConfig()),
        ("dr_grpo", "dr_grpo", AdvantageConfig()),
        (GLOBAL, GLOBAL, AdvantageConfig()),
        (f"{GLOBAL}, recenter=false", GLOBAL, centred),
    ):
        figures = {}
        for kind, extra in (("", noise_N), (" clean", 0.0)):
            A = advantages.estimate(name, right_N + extra, mask, groups, config=config).advantages
            rows = A[:, 0].astype(np.float64).reshape(-1, group)[unanimous]
            about = rows - rows.mean(axis=1, keepdims=True)
            figures |= {
                f"spread{kind}": float(np.sqrt(np.mean(about**2))) if len(rows) else 0.0,
                f"offset{kind}": float(np.sqrt(np.mean(rows.mean(axis=1) ** 2)))
                if len(rows)
                else 0.0,
                f"share{kind}": float(np.abs(A[tokens]).sum() / max(np.abs(A).sum(), 1e-12)),
            }
        found[label] = figures
    return found


def further(
    s: Settings, arm: str, seed: int, directory: pathlib.Path, results: Mapping[str, Any]
) -> dict[str, Any]:
    """Training from the trained policy; KL is from it."""
    estimator, kind = arm.rsplit("-", 1)
    start = directory.parent.parent / "policy" / directory.name / "trained"
    base = checkpoints.load(start)
    noise = SIGMA if kind == "noisy" else 0.0
    _, curve, history = trained(s, estimator, noise, seed, directory, base, s.steps)
    return {
        "base": results["policy"]["figures"],
        "curve": curve,
        "abs_advantage": gold.mean_of(history, "advantages/abs"),
        "grad_norm": gold.mean_of(history, "grad_norm"),
    }


# Verdicts.


def _amplifies(results: Results) -> Verdict:
    def of(label: str, key: str) -> Interval:
        return over_seeds([f["advantages"][label][key] for f in results["policy"].values()])

    local, whole = of(LOCAL, "spread"), of(GLOBAL, "spread")
    numbers = {
        "unanimous groups": of("groups", "unanimous"),
        f"{LOCAL}: spread": local,
        f"{GLOBAL}: spread": whole,
        "dr_grpo: spread": of("dr_grpo", "spread"),
        f"{LOCAL}: share of |A|": of(LOCAL, "share"),
        f"{GLOBAL}: share of |A|": of(GLOBAL, "share"),
        f"{GLOBAL}: share without noise": of(GLOBAL, "share clean"),
        f"{GLOBAL}, recenter=false: share": of(f"{GLOBAL}, recenter=false", "share"),
    }
    return verdict(
        local.low > 0.5 and whole.high < 10 * SIGMA,
        local.high < 0.5 or whole.low > 10 * SIGMA,
        numbers,
    )


def _harms(results: Results) -> Verdict:
    def lost(name: str, key: str) -> Interval:
        clean, noisy = results[f"{name}-clean"], results[f"{name}-noisy"]
        return over_seeds([gold.late(clean[s], key) - gold.late(noisy[s], key) for s in clean])

    names = (LOCAL, GLOBAL)
    excess = over_seeds(
        [
            sum(
                sign * gold.late(results[f"{name}-{kind}"][s], "right")
                for name, kind, sign in (
                    (LOCAL, "clean", 1), (LOCAL, "noisy", -1), (GLOBAL, "clean", -1), (GLOBAL, "noisy", 1),
                )
            )
            for s in results[f"{LOCAL}-clean"]
        ]
    )  # fmt: skip
    numbers = {f"{name}: right, lost to noise": lost(name, "right") for name in names}
    numbers |= {f"{name}: KL, clean - noisy": lost(name, "kl") for name in names}
    numbers |= {
        f"{arm}: right": over_seeds([gold.late(f, "right") for f in results[arm].values()])
        for arm in ARMS
    }
    numbers["more lost by the local one"] = excess
    local = numbers[f"{LOCAL}: right, lost to noise"]
    return verdict(local.low > 0 and excess.low > 0, local.high < 0 or excess.high < 0, numbers)


def figure(results: Results, path: pathlib.Path) -> None:
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    labels = (LOCAL, "dr_grpo", GLOBAL, f"{GLOBAL}, recenter=false")
    for at, figures in enumerate(results.get("policy", {}).values()):
        spreads = [figures["advantages"][label]["spread"] for label in labels]
        axes[0].plot(
            range(len(labels)), spreads, "o", color="C0", alpha=0.6, label=None if at else "noisy"
        )
    names = ["GRPO", "Dr.GRPO", "REINFORCE++\nbaseline", "the same,\nnot recentred"]
    axes[0].set_xticks(range(len(labels)), names, fontsize=8)
    axes[0].set(yscale="log", title="unanimous groups: spread of A from noise")
    for arm, color in zip(ARMS, ("C0", "C1", "C2", "C3"), strict=True):
        for at, figures in enumerate(results.get(arm, {}).values()):
            x = [point["step"] for point in figures["curve"]]
            for axis, key in ((axes[1], "right"), (axes[2], "kl")):
                y = [point[key] for point in figures["curve"]]
                axis.plot(x, y, color=color, lw=0.9, label=None if at else arm)
    axes[1].set(title="right answers, held out", xlabel="step")
    axes[2].set(title="KL from the trained policy, nats", xlabel="step")
    for axis in axes:
        axis.grid(alpha=0.3)
    if axes[1].lines:
        axes[1].legend(frameon=False, fontsize=8)
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def runs(s: Settings) -> Sequence[Run]:
    return [
        Run("policy", functools.partial(policy, s)),
        *(Run(arm, functools.partial(further, s, arm), ("policy",)) for arm in ARMS),
    ]


TABLE = Table(
    name="reinforce_pp/noise",
    title="REINFORCE++: what small noise on rewards becomes",
    scales={scale: runs(s) for scale, s in SCALES.items()},
    claims=[
        Claim(
            "N1",
            "A local deviation makes advantages of order one from noise, a global one does not",
            "argued for in section 3 (small deviations make advantages explode); no numbers",
            "in groups with one reward but for noise of 0.001: spread of A within the group above 0.5 under GRPO "
            "(lower bound) and below 0.01 under REINFORCE++ with baseline (upper bound); refuted if either interval is "
            "on the other side.",
            ("policy",),
            _amplifies,
        ),
        Claim(
            "N2",
            "So noise harms training under the local one",
            "argued for in section 3; no numbers",
            "right answers after further training, without noise less with it: above 0 under GRPO, and more than under "
            "REINFORCE++ with baseline (both lower bounds); refuted if an upper bound is below 0.",
            ("policy", *ARMS),
            _harms,
        ),
    ],
    figure=figure,
    seeds=(0, 1, 2, 3, 4),
)
