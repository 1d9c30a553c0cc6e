"""Two processes of one run: what they must agree on where they have not the same to learn from.

Scenarios feed each process responses of its own, with dynamic sampling and whitening over both; a single process that
is given the responses that the two end up with must make the same of them.
"""

import dataclasses
import json
import math
import pathlib

import jax
import numpy as np
import pytest
import test_rl_trainer as base

from research.core import checkpoint, loop, metrics
from research.core.loop import LoopConfig
from research.rewards import Status
from research.rl.losses import LossConfig
from research.rl.rollout import select

CAP = 3
# Process 0 always keeps the groups of its first round, process 1 those of its last.
SCENARIOS = (
    "late",  # all of process 0's groups have a signal at once, of process 1's none before the third round
    "never",  # … none at all: the cap ends it
    "nothing",  # … for not one reward of process 1 is a number
)
# PPO has all that there is: KL in the reward, a critic, whitening over both processes. With ReMax each process answers
# its own problems greedily.
ESTIMATORS = ["grpo", "ppo", "remax"]


class Actor(base.FakeActor):
    """Random responses for process `half`, or (None) for a single process those that both end up with."""

    def __init__(self, actor, scenario, half):
        super().__init__(actor)
        self.scenario, self.half, self.asked = scenario, half, []

    def __call__(self, params, problems, key, sampling, group_size, **options):
        self.asked.append([p.id for p in problems])
        number = len(self.asked) - 1
        if self.half is not None:
            return self._half(self.half, number, problems, sampling, group_size)
        chosen = ((0, 0), (1, CAP - 1))
        parts = [self._half(h, n, problems[:2], sampling, group_size) for h, n in chosen]
        return select(parts, [(part, p) for part in range(2) for p in range(2)])

    def _half(self, half, number, problems, sampling, group_size):
        key = jax.random.key(1 + 10 * half + number)
        episodes = super().__call__(None, problems, key, sampling, group_size, seed=0)
        mixed = half == 0 or (self.scenario == "late" and number == CAP - 1)
        for i, reward in enumerate(episodes.rewards):
            total = float(mixed and i % group_size > half)
            status = Status.RIGHT if total else Status.WRONG
            if self.scenario == "nothing" and half == 1:
                total = math.nan
            episodes.rewards[i] = dataclasses.replace(reward, total=total, status=status)
        return episodes


def run_scenarios(workdir, half):
    """Scenario → what became of one step of it; parameters are kept in the directory."""
    run = base.run_of(
        base.build(
            workdir,
            mesh="data=4",
            estimator="reinforce_pp_baseline",
            loss=LossConfig(kl_coef=0.0),
            rollout=dataclasses.replace(
                base.CONFIG.rollout, rounds=1 if half is None else CAP, overlong=0.0
            ),
            save_samples_every=0,
        )
    )
    results, actor = {}, run.actor
    for scenario in SCENARIOS:
        run.actor = Actor(actor, scenario, half)
        batch, host = run.collect(run.init(), 0)
        state, device = run.step(run.init(), batch)
        figures = {k: float(v) for k, v in (host | metrics.to_floats(device)).items()}
        figures = {k: v for k, v in figures.items() if not k.startswith("time/")}
        rounds = state.extra.get("rounds")
        results[scenario] = {
            "figures": figures,
            "asked": run.actor.asked,
            "rounds": None if rounds is None else int(rounds),
        }
        leaves = [np.asarray(x.addressable_data(0)) for x in jax.tree.leaves(state.params)]
        np.savez(pathlib.Path(workdir) / f"{scenario}-{half}.npz", *leaves)
    return results


def train_a_little(workdir, estimator):
    settings = LoopConfig(steps=4, checkpoint_every=2)
    # Short responses earn more: right ones are too seldom to teach anything.
    rollout = dataclasses.replace(base.CONFIG.rollout, overlong=1.0)
    changes = {"mesh": "data=4", "reference_every": 2, "loop": settings, "rollout": rollout}
    trainer = base.build(workdir, estimator=estimator, **changes)
    loop.run(trainer, settings, workdir, fingerprint_of=base.run_of(trainer).config)


def all_of_it(workdir):
    index = jax.process_index()
    results = run_scenarios(workdir, index)
    (pathlib.Path(workdir) / f"{index}.json").write_text(json.dumps(results))
    for estimator in ESTIMATORS:
        train_a_little(f"{workdir}/{estimator}", estimator)


@pytest.fixture(scope="module")
def two(tmp_path_factory, in_two_processes):
    """The directory that two processes wrote to."""
    workdir = tmp_path_factory.mktemp("two")
    in_two_processes(all_of_it, workdir)
    return workdir


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """(the directory of a single process, its results)."""
    workdir = tmp_path_factory.mktemp("one")
    return workdir, run_scenarios(workdir, None)


def same(a, b):
    assert set(a) == set(b)
    for name in a:
        assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6, nan_ok=True), name


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_processes_with_unlike_groups_learn_as_one(two, one, scenario):
    first, second = (json.loads((two / f"{i}.json").read_text())[scenario] for i in range(2))
    assert first["figures"] == pytest.approx(second["figures"], rel=0, abs=0, nan_ok=True)
    assert len(first["asked"]) == len(second["asked"]) == CAP
    assert first["rounds"] == second["rounds"] == CAP
    assert first["figures"]["rollout/kept"] == (4 if scenario == "late" else 2)
    # Round n of both is one stretch of the stream of problems, without a gap.
    for n, (mine, others) in enumerate(zip(first["asked"], second["asked"], strict=True)):
        assert mine + others == [f"arithmetic/train/{i}" for i in range(4 * n, 4 * n + 4)]
    own = ("rollout/zero_std", "rollout/dropped", "rollout/lone", "loss", "grad_norm", "entropy")
    alone = one[1][scenario]["figures"]
    compared = [k for k in alone if k in own or k.startswith(("advantages/", "mismatch/", "clip_"))]
    assert set(own) <= set(compared) and "advantages/std" in compared
    same({k: first["figures"][k] for k in compared}, {k: alone[k] for k in compared})
    assert alone["rollout/dropped"] == (8 if scenario == "nothing" else 0)
    assert alone["rollout/zero_std"] == (0 if scenario == "late" else 0.5)
    ends = [
        np.load(path / f"{scenario}-{half}.npz") for path, half in ((two, 0), (two, 1), (one[0], None))
    ]  # fmt: skip
    for name in ends[0].files:
        a, b, c = (end[name] for end in ends)
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, rtol=1e-4, atol=1e-6)
    start = jax.tree.leaves(base.init_params())
    moved = max(np.abs(ends[0][f"arr_{i}"] - np.asarray(x)).max() for i, x in enumerate(start))
    assert moved > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_two_processes_train_as_one(two, tmp_path, estimator):
    """With the real sampler."""
    train_a_little(tmp_path, estimator)
    (lines, _), (alone, _) = base.exact(two / estimator), base.exact(tmp_path)
    assert len(lines) == len(alone) == 4 and "eval/pass@1" in lines[-1]
    for a, b in zip(lines, alone, strict=True):
        same(a, b)
    assert any(line["advantages/abs"] > 1e-3 for line in lines)
    ours, theirs = (checkpoint.load_params(path) for path in (two / estimator, tmp_path))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), ours, theirs)
