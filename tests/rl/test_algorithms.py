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
from research.rl.losses import LossConfig
from research.rl.reward_model import RewardModelConfig

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


def right_and_others(episodes):
    """[P]: 0 < accuracy < 1, of the places' verdicts."""
    right = [reward.status == Status.RIGHT for reward in episodes.rewards]
    groups = [right[i : i + episodes.group_size] for i in range(0, len(right), episodes.group_size)]
    return [any(group) and not all(group) for group in groups]


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
        per_round = [right_and_others(e) for e in run.actor.given[-numbers[-1] :]]
        assert not any(teaches[0] for teaches in per_round)
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


def test_the_signal_is_the_verdict_or_a_reward_models_scores(tmp_path):
    """A reward model tells apart what a verifier calls alike, and calls alike what it tells apart."""
    scores = np.array(
        [[0.25, 0.5, 0.75, 1], [2, 2, 2, 2], [np.nan, 3, 3, np.nan], [12, 11, 12, 12]]
    )

    def judged(episodes):
        for i, reward in enumerate(episodes.rewards):
            status = Status.RIGHT if 4 <= i and i % 2 else Status.WRONG
            reward = dataclasses.replace(reward, total=float(scores.flat[i]), status=status)
            episodes.rewards[i] = reward
        return episodes

    def kept(**changes):
        config = {"estimator": "dapo", "rollout": rollout(rounds=1, overlong=0.0)} | changes
        run = by_model(fake(tmp_path, judged, **config))
        return run._teaches(run._round(None, 0, 6), 6).tolist(), run.actor.given[0]

    def by_model(run):
        run.config = dataclasses.replace(run.config, reward_model=RewardModelConfig(path="judge"))
        return run

    verified = fake(tmp_path, judged, estimator="dapo", rollout=rollout(rounds=1, overlong=1.0))
    assert verified._teaches(verified._round(None, 0, 6), 6).tolist() == [False, True, True, True]
    assert kept()[0] == [True, False, False, True]
    assert kept(advantage=AdvantageConfig(reward_clip=10.0))[0] == [True, False, False, False]
    # Punished for every token, those of unequal lengths differ too.
    found, episodes = kept(rollout=rollout(rounds=1, overlong=1.0))
    lengths = episodes.of_problem(episodes.lengths) / 6
    assert found == (np.nanmax(scores - lengths, 1) > np.nanmin(scores - lengths, 1)).tolist()
    assert found[1]
    run = by_model(fake(tmp_path, judged, estimator="dapo", rollout=rollout(rounds=2, overlong=0.0)))
    _, host = run.collect(run.init(), 0)
    assert (host["rollout/rounds"], host["rollout/kept"]) == (2, 4)
    assert host["rollout/zero_std"] == 0


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
        mesh="data=1",
        estimator=name,
        rollout=rollout(prompts=16, group_size=8, rounds=min(3, ALGORITHMS[name].rounds)),
        loss=NO_KL,
        optim=OptimConfig("adam", lr=0.01),
        micro_rows=8,
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
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(checkpoint.load_params(tmp_path)))


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
