"""Rollouts sampled one step behind: by whom, beside what, learned from how, and resumed exactly."""

import dataclasses
import functools
import threading

import jax
import numpy as np
import pytest
import test_rl_trainer as base

from research.core import loop, metrics
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.rl import trainer as rl
from research.rl.ahead import Ahead
from research.rl.losses import LossConfig

STALE = dataclasses.replace(base.CONFIG.rollout, staleness=1)
LOSS = LossConfig("token", clip_low=0.02, clip_high=0.05, kl_coef=0.1)


class FakeActor(base.FakeActor):
    """As the base's; keeps the parameters that were to sample."""

    def __init__(self, actor):
        super().__init__(actor)
        self.tools, self.sampled_by = None, []

    def __call__(self, params, *args, **options):
        self.sampled_by.append(jax.device_get(params))
        return super().__call__(params, *args, **options)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("fake")
    return base.run_of(
        base.build(workdir, rollout=STALE, loss=LOSS, reference_every=0, save_samples_every=0)
    )


@pytest.fixture
def run(built):
    """With an actor and a thread of its own."""
    run = base.variant(built)
    run.actor, run.ahead = FakeActor(built.actor), Ahead()
    yield run
    run.ahead.drop()


def same(x, y):
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (x, y)), strict=True))


def test_each_rollout_is_sampled_by_the_policy_before_the_last_update(run):
    state, policies, staleness = run.init(), [], []
    for step in range(4):
        policies.append(jax.device_get(state.params))
        batch, host = run.collect(state, step)
        staleness.append(host["rollout/staleness"])
        state, _ = run.step(state, batch)
    run.ahead.wait()
    assert len(run.actor.sampled_by) == 5  # the fifth is on its way
    expected = [policies[0], *policies]
    for sampled_by, policy in zip(run.actor.sampled_by, expected, strict=True):
        assert same(sampled_by, policy)
    assert not any(same(a, b) for a, b in zip(policies, policies[1:], strict=False))
    assert staleness == [0, 1, 1, 1]


def test_ratios_are_to_the_policy_that_sampled(run):
    """Each update is that of the plain objective with old log-probabilities of the parameters one update before."""
    grad = jax.jit(
        jax.grad(functools.partial(base.objective, run.config), argnums=6), static_argnums=5
    )
    state, policies = run.init(), []
    for step in range(3):
        policies.append(jax.device_get(state.params))
        batch, _ = run.collect(state, step)
        run.ahead.wait()
        episodes = run.actor.given[step]
        rows = np.array(base.members(batch["minibatches"][0], episodes))
        tokens, inside = base.unpacked(episodes)
        score = functools.partial(base.plain_logprobs, tokens=tokens, temperature=1.0)
        old, ref = score(policies[max(step - 1, 0)]), score(policies[0])
        advantages = base.group_advantages(episodes, run.config)
        grads = grad(
            tokens[rows], inside[rows], advantages[rows], old[rows], ref[rows], 6, policies[-1]
        )
        state, device = run.step(state, batch)
        figures = metrics.to_floats(device)
        change = jax.tree.map(lambda x, y: np.asarray(x) - y, state.params, policies[-1])
        wanted = jax.tree.map(lambda g: -run.config.optim.lr * np.asarray(g), grads)
        largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted))
        jax.tree.map(
            lambda x, y, atol=2e-5 * largest: np.testing.assert_allclose(
                x, y, rtol=1e-4, atol=atol + 1e-7
            ),
            change,
            wanted,
        )
        if step == 0:
            assert figures["ratio_max"] == pytest.approx(1, abs=1e-6) and figures["clip_frac"] == 0
        else:
            assert figures["ratio_max"] > 1.01 and figures["clip_frac"] > 0


def test_sampling_goes_on_while_the_policy_learns(run):
    """The second rollout is not done before the first update is."""
    updated, sampling, update, give = threading.Event(), threading.Event(), run.update, run.actor

    def slow(*args, **options):
        if len(give.given) == 1:
            sampling.set()
            assert updated.wait(60)
        return give(*args, **options)

    def learns(state, minibatch):
        assert sampling.wait(60)
        result = update(state, minibatch)
        updated.set()
        return result

    slow.rewarder, slow.tools = give.rewarder, None
    run.actor, run.update = slow, learns
    state = run.init()
    batch, _ = run.collect(state, 0)
    state, _ = run.step(state, batch)
    run.collect(state, 1)
    assert len(give.given) >= 2


def test_what_was_sampled_for_another_state_is_not_used(run):
    state = run.init()
    batch, _ = run.collect(state, 0)
    run.ahead.wait()
    other = jax.tree.map(lambda x: x + 0.5, batch["behaviour_params"])
    state, _ = run.step(state, batch | {"behaviour_params": other})
    count = len(run.actor.given)
    run.collect(state, 1)
    run.ahead.wait()
    assert same(run.actor.sampled_by[count], other)


def test_an_error_of_the_sampler_ends_the_run_with_its_reason(run):
    give = run.actor

    def failing(*args, **options):
        if give.given:
            raise RuntimeError("no more paper")
        return give(*args, **options)

    failing.rewarder, failing.tools = give.rewarder, None
    run.actor = failing
    state = run.init()
    batch, _ = run.collect(state, 0)
    state, _ = run.step(state, batch)
    with pytest.raises(RuntimeError, match="no more paper"):
        run.collect(state, 1)


def test_one_call_ahead():
    ahead, calls, thing, other = Ahead(), [], [], []

    def called(first, number):
        calls.append((threading.current_thread() is threading.main_thread(), number))
        return first, number

    ahead.start(called, thing, 1)
    assert ahead.result(called, thing, 1)[0] is thing
    assert ahead.result(called, thing, 1) == (thing, 1)  # taken already: called again
    ahead.start(called, thing, 2)
    assert ahead.result(called, other, 2)[0] is other  # equal, but not that object
    ahead.start(called, thing, 3)
    assert ahead.result(called, thing, 4) == (thing, 4)
    ahead.start(called, thing, 5)
    ahead.drop()
    assert ahead.result(called, thing, 5) == (thing, 5)
    assert calls == [
        (False, 1),
        (True, 1),
        (False, 2),
        (True, 2),
        (False, 3),
        (True, 4),
        (False, 5),
        (True, 5),
    ]


# Whole runs, with the real sampler.


def exact_runs(workdir, **changes):
    """(undisturbed, stopped in the middle and gone on by another trainer), all that is reproduced of either."""
    settings = LoopConfig(steps=4, checkpoint_every=2, eval_every=2)
    config = {"rollout": STALE, "loop": settings, "save_samples_every": 0} | changes

    def train(trainer, name, steps):
        limits = dataclasses.replace(settings, steps=steps)
        fingerprint = dataclasses.replace(base.run_of(trainer).config, loop=limits)
        state = loop.run(trainer, limits, workdir / name, fingerprint_of=fingerprint)
        assert int(state.step) == steps

    trainer = base.build(workdir, **config)
    train(trainer, "whole", 4)
    train(trainer, "parts", 2)
    train(base.build(workdir, **config), "parts", 4)
    return base.exact(workdir / "whole"), base.exact(workdir / "parts")


def test_a_resumed_run_is_the_undisturbed_one(tmp_path):
    whole, parts = exact_runs(tmp_path, updates=2, reference_every=3)
    assert whole == parts
    lines, _ = whole
    assert [line["rollout/staleness"] for line in lines] == [0, 1, 1, 1]
    assert all(
        line["mismatch/max"] < 1e-4 for line in lines
    )  # the sampler's numbers are the old policy's


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["dapo", "ppo", "remax"])
def test_so_is_one_with_rounds_a_critic_or_greedy_responses(tmp_path, estimator):
    whole, parts = exact_runs(tmp_path, estimator=estimator)
    assert whole == parts


@pytest.mark.slow
def test_it_learns(tmp_path):
    """What the synchronous trainer learns in as many rollouts: to answer with a digit and nothing else."""
    trainer = base.build(
        tmp_path,
        rollout=dataclasses.replace(STALE, prompts=16, group_size=8),
        loss=LossConfig("token", kl_coef=0.0),
        optim=OptimConfig("adam", lr=0.01),
        micro_rows=4,
        eval=rl.EvalConfig(problems=0),
        loop=LoopConfig(steps=60),
        save_samples_every=0,
    )
    loop.run(trainer, LoopConfig(steps=60), tmp_path)
    unread = [line["status/unparsed"] for line in metrics.read(tmp_path / "metrics.jsonl")]
    assert np.mean(unread[:5]) > 0.5 and np.mean(unread[-10:]) < 0.1


def test_the_synchronous_trainer_holds_no_other_policy(tmp_path):
    run = base.run_of(base.build(tmp_path))
    state = run.init()
    assert base.CONFIG.rollout.staleness == 0 and "behaviour_params" not in state.extra
    assert not run.config.off_policy
    with pytest.raises(ValueError, match="staleness=2: it must be 0 or 1"):
        dataclasses.replace(STALE, staleness=2)
