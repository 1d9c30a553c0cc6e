"""The RL trainer under every algorithm: what it makes of a rollout, and that it resumes exactly."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_rl_trainer as base

from research.core import checkpoint, loop, metrics
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.rewards import Status
from research.rl import advantages
from research.rl import trainer as rl
from research.rl.advantages import AdvantageConfig
from research.rl.algorithms import ALGORITHMS
from research.rl.critic import CriticConfig, value_loss
from research.rl.losses import LossConfig

NO_KL = LossConfig(kl_coef=0.0)


class FakeActor(base.FakeActor):
    """As the base's; `alter(episodes)` may change what is given, the numbers of samples are kept."""

    def __init__(self, actor, alter=lambda episodes: episodes):
        super().__init__(actor)
        self.alter, self.asked = alter, []

    def __call__(self, params, problems, key, sampling, group_size, **options):
        self.asked.append((group_size, sampling.temperature, [p.id for p in problems]))
        episodes = super().__call__(params, problems, key, sampling, group_size, **options)
        return self.alter(episodes)


def fake(workdir, alter=lambda episodes: episodes, **changes):
    changes = {"save_samples_every": 0, "loss": NO_KL} | changes
    run = base.run_of(base.build(workdir, **changes))
    run.actor = FakeActor(run.actor, alter)
    return run


def collected(run, step=0, state=None):
    """(batch, metrics, the advantage of each token [N, T] that the minibatches hold, episodes)."""
    first = len(run.actor.given)
    batch, host = run.collect(run.init() if state is None else state, step)
    episodes = run.actor.given[first]
    found = np.full((len(episodes.rewards), 6), np.nan)
    for minibatch in batch["minibatches"]:
        for row, segments in enumerate(minibatch["segment_ids"]):
            for segment in range(1, segments.max() + 1):
                cells = segments == segment
                part = {k: v[row, cells] for k, v in minibatch.items() if k != "num_micro"}
                (place,) = base.members(
                    {"tokens": part["tokens"][None], "segment_ids": np.ones((1, cells.sum()), int)},
                    episodes,
                )
                length = episodes.completions.lengths[place]
                found[place, :length] = part["advantages"][-length:]
    return batch, host, found, episodes


@pytest.mark.parametrize("name", ALGORITHMS)
def test_minibatches_hold_the_estimate_of_the_whole_rollout(name, tmp_path):
    run = fake(tmp_path, estimator=name, updates=2, rollout=rollout(rounds=1, overlong=0.0))
    _, host, found, episodes = collected(run)
    lengths, greedy = episodes.completions.lengths, None
    if name == "remax":
        (size, temperature, problems), second = run.actor.asked
        assert (size, temperature) == (4, 1.0) and second == (1, 0.0, problems)
        greedy = np.repeat([r.total for r in run.actor.given[1].rewards], 4)
    result = advantages.estimate(
        name,
        [r.total for r in episodes.rewards],
        np.arange(6) < lengths[:, None],
        np.repeat(range(4), 4),
        greedy=greedy,
        values=np.zeros((16, 6)),  # of a critic that has learned nothing
    )
    inside = np.arange(6) < lengths[:, None]
    np.testing.assert_allclose(found[inside], result.advantages[inside], atol=1e-6)
    assert np.abs(result.advantages).max() > 0.1
    assert {key: host[key] for key in result.statistics} == pytest.approx(result.statistics)
    assert (host.get("rollout/zero_std", 0) >= 0.25) and host["rollout/dropped"] == 0


def rollout(**changes):
    return dataclasses.replace(base.CONFIG.rollout, **changes)


# KL inside the reward.


@pytest.fixture(scope="module")
def penalised(tmp_path_factory):
    """REINFORCE++ with two updates to a rollout, compiled once."""
    return fake(
        tmp_path_factory.mktemp("penalised"),
        estimator="reinforce_pp",
        loss=LossConfig(kl_coef=0.3, clip_low=0.02, clip_high=0.05),
        rollout=rollout(temperature=0.7),
        updates=2,
    )


def test_kl_in_the_reward_by_the_definition(penalised):
    """REINFORCE++ eq. 1, 4 and 5 without packing: returns minus beta (log p_old - log p_ref), whitened, clipped."""
    run = penalised
    before = base.off_reference(run.init())
    batch, host = run.collect(before, 0)
    (episodes,) = run.actor.given[-1:]
    tokens, inside = base.unpacked(episodes)
    score = functools.partial(base.plain_logprobs, tokens=tokens, temperature=0.7)
    params = jax.device_get(before.params)
    old, ref = (np.asarray(score(p)) for p in (params, jax.device_get(before.extra["ref_params"])))
    k1 = np.where(inside, old - ref, 0)
    A = np.zeros(inside.shape)
    for i, reward in enumerate(r.total for r in episodes.rewards):
        A[i] = reward - 0.3 * np.cumsum(k1[i, ::-1])[::-1]
    A = np.where(inside, (A - A[inside].mean()) / A[inside].std(), 0)
    per_token = [jnp.asarray(x) for x in (tokens, inside, old, A)]
    assert host["kl"] == pytest.approx(k1.sum() / inside.sum(), abs=1e-6)

    def objective(params, rows):
        tokens, inside, old, A = (x[rows] for x in per_token)
        gap = base.plain_logprobs(params, tokens, 0.7) - old
        ratio = jnp.exp(jnp.where(inside, gap, 0))
        J = jnp.minimum(ratio * A, jnp.clip(ratio, 0.98, 1.05) * A)
        return -jnp.where(inside, J, 0).sum() / inside.sum()

    grad = jax.jit(jax.grad(objective))
    expected = params
    for minibatch in batch["minibatches"]:
        grads = grad(expected, np.array(base.members(minibatch, episodes)))
        expected = jax.tree.map(lambda p, g: p - 0.1 * g, expected, grads)
    state, device = run.step(before, batch)
    change = jax.tree.map(lambda x, y: np.asarray(x) - y, state.params, params)
    wanted = jax.tree.map(lambda x, y: np.asarray(x) - y, expected, params)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted))
    assert largest > 1e-3
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5 * largest),
        change,
        wanted,
    )
    assert "kl" not in device  # counted once
    assert metrics.to_floats(device)["clip_frac"] > 0


def test_the_reference_is_renewed_with_kl_in_the_reward_too(penalised):
    """The state before the second rollout is its own reference, so its KL is exactly 0."""
    run = base.variant(penalised, reference_every=1)
    state, seen = run.init(), []
    for step in range(2):
        batch, host = run.collect(state if step else base.off_reference(state), step)
        seen.append(host["kl"])
        state, _ = run.step(base.off_reference(run.init()) if not step else state, batch)
    assert abs(seen[0]) > 1e-3 and abs(seen[1]) < 1e-6


# Dynamic sampling, shaping, drops.


def test_groups_without_a_signal_are_replaced(tmp_path):
    """FakeActor's first group is always equal: two rounds at least, and the four kept have both kinds."""
    run = fake(tmp_path, estimator="dapo", rollout=rollout(overlong=0.0))
    state, numbers = run.init(), []
    assert run.config.rollout.rounds == 10
    for step in range(3):
        batch, host = run.collect(state, step)
        numbers.append(int(host["rollout/rounds"]))
        assert host["rollout/kept"] == 4 and host["rollout/zero_std"] == 0
        assert int(batch["extra"]["rounds"]) == sum(numbers)
        per_round = [e.mixed() for e in run.actor.given[-numbers[-1] :]]
        assert not any(mixed[0] for mixed in per_round)
        assert sum(map(sum, per_round[:-1])) < 4 <= sum(map(sum, per_round))
        responses = {len(m["tokens"]) for m in batch["minibatches"]}
        assert len(responses) == 1  # shapes do not follow the number of rounds
        state = state.replace(
            extra=state.extra | {k: jnp.asarray(v) for k, v in batch["extra"].items()}
        )
        last = run.actor.given[-numbers[-1] :]
        figures = [[r.status == Status.RIGHT for r in e.rewards] for e in last]
        # What is measured is all that was sampled, not what was picked from it.
        assert host["rollout/pass@1"] == pytest.approx(np.concatenate(figures).mean())
    assert min(numbers) >= 2
    drawn = [name for _, _, names in run.actor.asked for name in names]
    assert drawn == [f"arithmetic/train/{i}" for i in range(4 * sum(numbers))]


def test_rounds_are_capped_and_the_rest_is_filled(tmp_path):
    def all_wrong(episodes):
        for i, reward in enumerate(episodes.rewards):
            wrong = dataclasses.replace(reward, total=0.0, status=Status.WRONG)
            episodes.rewards[i] = wrong if i >= 4 or i % 2 else dataclasses.replace(
                wrong, total=1.0, status=Status.RIGHT
            )  # fmt: skip
        return episodes

    run = fake(tmp_path, all_wrong, estimator="dapo", rollout=rollout(rounds=3, overlong=0.0))
    batch, host = run.collect(run.init(), 0)
    assert (host["rollout/rounds"], host["rollout/kept"]) == (3, 3)
    assert host["rollout/zero_std"] == 0.25 and int(batch["extra"]["rounds"]) == 3
    (minibatch,) = batch["minibatches"]
    rounds = [one.completions.lengths for one in run.actor.given]
    lengths = sum(r[:4].sum() for r in rounds) + rounds[-1][4:8].sum()  # the first that was spare
    assert (minibatch["weights"] > 0).sum() == lengths


def test_long_responses_are_punished(tmp_path):
    """Limit 6, the last half of it: 4, 5 and 6 tokens lose 1/3, 2/3 and 1."""
    settings = {"rollout": rollout(overlong=0.5), "estimator": "dr_grpo"}
    run = fake(tmp_path, **settings)
    _, host, found, episodes = collected(run)
    lengths = episodes.completions.lengths
    totals = np.array([r.total for r in episodes.rewards]) - np.clip((lengths - 3) / 3, 0, 1)
    A = (totals.reshape(4, 4) - totals.reshape(4, 4).mean(1, keepdims=True)).ravel()
    np.testing.assert_allclose(found[:, 0], np.where(lengths > 0, A, 0), atol=1e-6)
    assert host["reward/used"] == pytest.approx(totals.mean())
    assert host["reward/mean"] == pytest.approx(np.mean([r.total for r in episodes.rewards]))


def test_a_reward_that_is_no_number_drops_its_response(tmp_path):
    def spoil(episodes):
        episodes.rewards[5] = dataclasses.replace(episodes.rewards[5], total=float("nan"))
        return episodes

    run = fake(tmp_path, spoil, loss=dataclasses.replace(NO_KL, aggregation="token"))
    batch, host, found, episodes = collected(run)
    lengths = episodes.completions.lengths
    (minibatch,) = batch["minibatches"]
    assert host["rollout/dropped"] == 1
    assert not found[5, : lengths[5]].any() and np.isfinite(found[6, 0])
    assert (minibatch["weights"] > 0).sum() == lengths.sum() - lengths[5]
    assert minibatch["weights"].sum() == pytest.approx(1.0)


# Whole runs.


def in_parts_and_whole(path, steps, **changes):
    """The last state of a run of so many steps that stops after two of them, and of one that does not.

    They share a trainer, for its compiled programs; the second runs between the parts of the first, so that whatever a
    trainer kept for itself would show.
    """
    trainer = base.build(path, loop=LoopConfig(steps=steps), **changes)

    def run(directory, steps):
        settings = LoopConfig(steps=steps, checkpoint_every=2)
        config = dataclasses.replace(base.run_of(trainer).config, loop=settings)
        return loop.run(trainer, settings, path / directory, fingerprint_of=config)

    run("parts", 2)
    whole = run("whole", steps)
    parts = run("parts", steps)
    assert base.exact(path / "parts") == base.exact(path / "whole")
    return parts, whole


STATEFUL = {
    "estimator": "reinforce",
    "rollout": rollout(rounds=3),
    "optim": OptimConfig("sgd", lr=0.01, clip_norm=0.0, schedule="constant"),
    "eval": rl.EvalConfig(problems=0),
    "save_samples_every": 0,
}


def test_a_resumed_run_has_its_moving_baseline_and_its_place_in_the_problems(tmp_path):
    parts, whole = in_parts_and_whole(tmp_path, 4, **STATEFUL)
    assert set(whole.extra) == {"baseline", "rounds", "ref_params"}
    for name in ("baseline", "rounds"):
        assert np.asarray(whole.extra[name]).tobytes() == np.asarray(parts.extra[name]).tobytes()
    lines = metrics.read(tmp_path / "whole" / "metrics.jsonl")
    state = np.zeros(2, np.float32)
    for line in lines:
        state = np.float32(advantages.moving_average(state, line["reward/used"], 0.9))
    np.testing.assert_allclose(whole.extra["baseline"], state, rtol=1e-6)
    assert int(whole.extra["rounds"]) == sum(line["rollout/rounds"] for line in lines) > 4
    assert all("kl" in line and line["mismatch/max"] < 1e-4 for line in lines)


def learning(workdir, name):
    """pass@1 of the first rollouts and of the last, of 40 of 16 x 8 responses.

    Without KL: in so small a batch a rollout without a right answer has no variance but the penalty's, and whitening
    makes a full-sized step back to the reference of it.
    """
    trainer = base.build(
        workdir,
        estimator=name,
        rollout=rollout(prompts=16, group_size=8, rounds=min(3, ALGORITHMS[name].rounds)),
        loss=NO_KL,
        optim=OptimConfig("adam", lr=0.01),
        micro_rows=4,
        updates=2,
        eval=rl.EvalConfig(problems=0),
        loop=LoopConfig(steps=40),
        save_samples_every=0,
    )
    loop.run(trainer, LoopConfig(steps=40), workdir)
    rates = [line["rollout/pass@1"] for line in metrics.read(workdir / "metrics.jsonl")]
    return np.mean(rates[:4]), np.mean(rates[-10:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_improves_on_its_start(tmp_path, name):
    before, after = learning(tmp_path, name)
    assert after > before + 0.03
    jax.tree.map(lambda x: np.isfinite(x).all(), checkpoint.load_params(tmp_path))


# The critic.


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


# Settings.


def test_a_flag_brings_its_algorithm_s_switches():
    config = dataclasses.replace(base.CONFIG, estimator="dapo").resolved()
    assert (config.loss.clip_low, config.loss.clip_high) == (0.2, 0.28)
    assert (config.loss.aggregation, config.loss.kl_coef) == ("token", 0.0)
    assert (config.rollout.rounds, config.rollout.overlong) == (10, 0.2)
    mine = dataclasses.replace(
        base.CONFIG, estimator="dapo", loss=LossConfig(clip_high=0.4), rollout=rollout(rounds=1)
    ).resolved()
    assert (mine.loss.clip_high, mine.loss.aggregation, mine.rollout.rounds) == (0.4, "token", 1)
    assert mine.resolved() == mine
    assert rl.Config().resolved().loss == LossConfig("grpo").over(ALGORITHMS["grpo"].loss)


def test_one_response_to_a_prompt_will_do_without_groups(tmp_path):
    run = fake(
        tmp_path, estimator="reinforce_pp", rollout=rollout(prompts=16, group_size=1), loss=NO_KL
    )
    _, host, found, episodes = collected(run)
    totals = np.array([r.total for r in episodes.rewards])
    high = found[:, 0][totals == totals.max()]
    assert (high > 0).all() and "rollout/zero_std" not in host


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimator": "pppo"}, "unknown estimator 'pppo'"),
        ({"estimator": "grp"}, "unknown estimator 'grp'"),
        ({"estimator": "rloo", "rollout": rollout(group_size=1)}, "group_size=1: advantages"),
        (
            {"estimator": "reinforce", "rollout": rollout(group_size=1, rounds=2)},
            "group_size=1: advantages",
        ),
        ({"loss": LossConfig(kl_in="reward", kl_estimator="k3+")}, "kl_estimator=k3.* use k1"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        base.build(tmp_path, **changes)
    with pytest.raises(ValueError, match="overlong=1.5"):
        rollout(overlong=1.5)
    with pytest.raises(ValueError, match="rounds=0"):
        rollout(rounds=0)
