"""Whole runs of the RL trainer with a tiny model: what they log, that they resume exactly, that they learn."""

import copy
import dataclasses
import json

import jax
import numpy as np
import pytest
from test_rl_trainer import CONFIG, build, exact, run_of

from research.core import checkpoint, loop, metrics
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.rewards import Rewarder, Status
from research.rl import trainer as rl
from research.rl.losses import LossConfig

LOGGED = """
    reward/mean reward/accuracy reward/format status/right status/wrong status/unparsed
    rollout/pass@1 rollout/cons@4 rollout/length rollout/length/correct rollout/length/wrong
    rollout/truncated rollout/format rollout/zero_std rollout/reflection/words
    rollout/reflection/wait rollout/difficulty/2 rollout/difficulty/3 rollout/limit
    entropy kl clip_frac clip_frac_low clip_frac_high ratio_max loss grad_norm lr updates tokens
    mismatch/abs mismatch/max mismatch/kl mismatch/ratio compiles
    time/step time/collect time/sample time/sampled_tokens_per_second
""".split()
STEPS = LoopConfig(steps=6, checkpoint_every=3, eval_every=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps: (its trainer, workdir)."""
    workdir = tmp_path_factory.mktemp("whole")
    rollout = dataclasses.replace(CONFIG.rollout, prompts=8)
    trainer = build(
        workdir, rollout=rollout, updates=2, reference_every=3, save_samples_every=4, loop=STEPS
    )
    loop.run(trainer, STEPS, workdir, fingerprint_of=run_of(trainer).config)
    return trainer, workdir


def test_everything_is_logged(whole):
    _, workdir = whole
    lines = metrics.read(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 7))
    seen = set().union(*lines)
    assert set(LOGGED) <= seen
    always = set(LOGGED) - {"rollout/length/correct"}  # there may be no right answer
    for line in lines:
        assert all(line[name] is not None for name in always)
        assert line["mismatch/max"] < 1e-4 and line["loss"] is not None
    evaluated = [line for line in lines if "eval/pass@1" in line]
    assert [line["step"] for line in evaluated] == [3, 6]
    assert {"eval/cons@4", "eval/length", "eval/truncated", "eval/reflection/wait"} <= set(
        evaluated[0]
    )
    assert any(line["rollout/pass@1"] > 0 for line in lines)
    assert {line["updates"] for line in lines} == {2, 4, 6, 8, 10, 12}


def test_nothing_is_compiled_after_the_first_steps(whole):
    _, workdir = whole
    compiles = [line["compiles"] for line in metrics.read(workdir / "metrics.jsonl")]
    # Step 2 renews the reference for the first time, step 3 is followed by an evaluation.
    assert compiles[3:] == compiles[3:4] * 3
    assert compiles[0] > 0


def test_samples_are_written(whole):
    _, workdir = whole
    assert [p.name for p in sorted((workdir / "samples").iterdir())] == [
        "rollout_000001.jsonl",
        "rollout_000005.jsonl",
    ]
    text = (workdir / "samples/rollout_000005.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 16 and {row["status"] for row in rows} <= set(Status)
    assert rows[0]["id"] == "arithmetic/train/32"  # the first of the fifth rollout


def test_a_resumed_run_is_the_undisturbed_one(whole, tmp_path):
    trainer, undisturbed = whole
    config = run_of(trainer).config
    for steps in (3, 6):
        short = dataclasses.replace(STEPS, steps=steps)
        state = loop.run(
            trainer, short, tmp_path, fingerprint_of=dataclasses.replace(config, loop=short)
        )
    assert int(state.step) == 6
    assert exact(tmp_path) == exact(undisturbed)


def test_another_configuration_is_refused(whole):
    trainer, workdir = whole
    other = dataclasses.replace(run_of(trainer).config, reference_every=5)
    with pytest.raises(checkpoint.ConfigMismatch, match="reference_every: 3 != 5"):
        loop.run(trainer, STEPS, workdir, fingerprint_of=other)


def test_the_random_control_knows_nothing_of_the_completions(whole):
    run = copy.copy(run_of(whole[0]))
    run.actor = copy.copy(run.actor)
    config = dataclasses.replace(run.config.reward, random=0.5)
    run.actor.rewarder = Rewarder(config, run.task)
    give, given = run.actor, []

    def recorded(*args, **kwargs):
        given.append(give(*args, **kwargs))
        return given[-1]

    run.actor = recorded
    state = run.init()
    other = state.replace(params=jax.tree.map(lambda x: -x, state.params))
    for each, step in ((state, 0), (other, 0), (state, 1)):
        run.collect(each, step)
    coins = [[r.total for r in episodes.rewards] for episodes in given]
    assert coins[0] == coins[1] != coins[2]
    assert given[0].texts != given[1].texts
    assert set(coins[0]) == {0.0, 1.0}
    assert any(r.parts["accuracy"] != r.total for r in given[0].rewards)


def learning(trainer, workdir):
    """pass@1 and the share of unreadable answers, before and after 60 rollouts of 16 x 8 responses."""
    loop.run(trainer, LoopConfig(steps=60), workdir)
    lines = metrics.read(workdir / "metrics.jsonl")
    return [
        (
            np.mean([x["rollout/pass@1"] for x in part]),
            np.mean([x["status/unparsed"] for x in part]),
        )
        for part in (lines[:5], lines[-10:])
    ]


def test_learning_raises_the_reward_and_a_coin_does_not(tmp_path):
    """The base seldom gives a digit and nothing else; that is what it can learn in seconds."""
    trainer = build(
        tmp_path,
        mesh="data=1",
        rollout=dataclasses.replace(CONFIG.rollout, prompts=16, group_size=8),
        loss=LossConfig("token", kl_coef=0.0),
        optim=OptimConfig("adam", lr=0.01),
        micro_rows=8,
        eval=rl.EvalConfig(problems=0),
        loop=LoopConfig(steps=60),
        save_samples_every=0,
    )
    (before, unread), (after, unread_after) = learning(trainer, tmp_path / "zero")
    assert unread > 0.5 and unread_after < 0.1
    assert after > before + 0.05
    run = run_of(trainer)  # with its compiled programs, and other rewards
    run.actor.rewarder = Rewarder(dataclasses.replace(CONFIG.reward, random=0.5), run.task)
    (_, unread), (_, unread_after) = learning(trainer, tmp_path / "control")
    assert unread_after > 0.3
