"""The critic beside the policy: its updates by the definition, its head start, exact resumption."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_rl_trainer as base
from test_algorithms import STATEFUL, fake, in_parts_and_whole, rollout

from research.core import metrics
from research.core.optim import OptimConfig
from research.rl.advantages import AdvantageConfig
from research.rl.critic import CriticConfig, value_loss


def ppo(workdir, **changes):
    settings = {
        "estimator": "ppo",
        "critic": CriticConfig(OptimConfig("sgd", lr=0.02, clip_norm=0.0), clip=0.01),
        "advantage": AdvantageConfig(lam=0.8),
        "updates": 2,
    }
    return fake(workdir, **(settings | changes))


def critic_off_zero(state):
    """The state with a critic that has an opinion."""
    critic = state.extra["critic"]
    value = {"kernel": jnp.linspace(-0.3, 0.3, 16), "bias": jnp.float32(0.2)}
    params = jax.device_put(
        critic.params | {"value": value}, critic.params["value"]["bias"].sharding
    )
    return state.replace(extra=state.extra | {"critic": critic.replace(params=params)})


def plain_values(params, tokens):
    """One row for each response, no packing: V before every token, 0 at the first."""
    decoder = params["decoder"] | {"head": base.init_params()["head"]}
    hidden, _ = base.MODEL.apply(
        {"params": decoder}, tokens, return_hidden=True, mutable=["router"]
    )
    values = hidden @ params["value"]["kernel"] + params["value"]["bias"]
    return jnp.pad(values[:, :-1], ((0, 0), (1, 0)))


def test_the_critic_s_updates_by_the_definition(tmp_path):
    """GAE over the values of the rollout, then two steps of the clipped squared error, without packing."""
    run = ppo(tmp_path)
    before = critic_off_zero(run.init())
    start, policy = jax.device_get((before.extra["critic"].params, before.params))
    batch, host = run.collect(before, 0)
    (episodes,) = run.actor.given
    tokens, inside = base.unpacked(episodes)
    old = np.asarray(jax.jit(plain_values)(start, tokens))
    assert np.abs(old[inside]).max() > 0.1
    returns = np.zeros(inside.shape)
    for i, reward in enumerate(r.total for r in episodes.rewards):
        running, following = 0.0, 0.0
        for t in np.flatnonzero(inside[i])[::-1]:
            delta = reward + following - old[i, t]
            reward = 0.0  # at the last token alone
            running, following = delta + 0.8 * running, old[i, t]
            returns[i, t] = running + old[i, t]
    A = (returns - old)[inside]
    assert host["advantages/mean"] == pytest.approx(A.mean(), abs=1e-5)
    assert host["advantages/std"] == pytest.approx(A.std(), abs=1e-5)
    arrays = [jnp.asarray(x) for x in (tokens, inside, old, returns)]

    def objective(params, rows):
        tokens, inside, old, returns = (x[rows] for x in arrays)
        values = plain_values(params, tokens)
        worst = jnp.maximum(
            (values - returns) ** 2, (jnp.clip(values, old - 0.01, old + 0.01) - returns) ** 2
        )
        return 0.5 * jnp.where(inside, worst, 0).sum() / inside.sum()

    grad, expected = jax.jit(jax.grad(objective)), start
    for minibatch in batch["minibatches"]:
        grads = grad(expected, np.array(base.members(minibatch, episodes)))
        expected = jax.tree.map(lambda p, g: p - 0.02 * g, expected, grads)
    state, device = run.step(before, batch)
    change, wanted = (
        jax.tree.map(lambda x, y: np.asarray(x) - y, after, start)
        for after in (state.extra["critic"].params, expected)
    )
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted))
    assert largest > 1e-2
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * largest),
        change,
        wanted,
    )
    figures = metrics.to_floats(device)
    assert figures["value/clip_frac"] > 0 and figures["value/error"] > 0.1
    assert {"loss", "value/loss", "value/grad_norm", "value/lr"} <= set(figures)
    moved = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - y).max(), state.params, policy)
    assert max(jax.tree.leaves(moved)) > 1e-4


def test_the_critic_learns_before_the_policy_does(tmp_path):
    run = ppo(
        tmp_path,
        critic=CriticConfig(OptimConfig("adam", lr=0.02), clip=None, pretrain=8),
        updates=1,
    )
    state, errors = run.init(), []
    policy = jax.device_get(state.params)
    for step in range(9):
        batch, _ = run.collect(state, step)
        state, device = run.step(state, batch)
        errors.append(float(device["value/loss"].compute()))
        same = jax.tree.map(lambda x, y: np.array_equal(x, y), policy, jax.device_get(state.params))
        assert all(jax.tree.leaves(same)) == (step < 8)
        assert ("loss" in device) == (step >= 8)
    assert np.mean(errors[5:]) < 0.9 * errors[0]


def test_value_loss_by_hand():
    """Old 0, clip .5: a value of 1 for a return of 0 costs 1, for a return of 1 the bound's .25; half of both."""
    loss, figures = value_loss(
        values=jnp.array([[1.0, 1.0, 9.0]]),
        old_values=jnp.zeros((1, 3)),
        returns=jnp.array([[0.0, 1.0, 0.0]]),
        weights=jnp.array([[0.5, 0.5, 0.0]]),
        clip=0.5,
    )
    assert float(loss) == pytest.approx(0.5 * (0.5 * 1 + 0.5 * 0.25))
    assert float(figures["value/clip_frac"].compute()) == 0.5
    assert float(figures["value/error"].compute()) == 0.5
    for settings in ({"clip": 0.0}, {"pretrain": -1}):
        with pytest.raises(ValueError, match="must be positive"):
            CriticConfig(**settings)


def test_a_resumed_run_has_its_critic(tmp_path):
    settings = STATEFUL | {
        "estimator": "ppo",
        "rollout": rollout(),
        "critic": CriticConfig(OptimConfig("adam", lr=0.01)),
        "reward": dataclasses.replace(base.CONFIG.reward, random=0.5),
    }
    parts, whole = in_parts_and_whole(tmp_path, 3, **settings)
    a, b = (
        jax.device_get((x.extra["critic"].params, x.extra["critic"].opt_state))
        for x in (whole, parts)
    )
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert np.abs(a[0]["value"]["kernel"]).max() > 0
