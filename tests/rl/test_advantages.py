"""Every estimator against values obtained by executing public trainers, and the properties that all of them share.

The fixture is two groups of four, rewards 1 0 0 1 | 0 0 0 1 and lengths 5 3 2 4 | 1 5 3 2. The values are the
advantages of first tokens, from OpenRLHF 0.11 (`compute_advantages_and_returns`) and verl's `core_algos` on it.
"""

import dataclasses
import threading

import numpy as np
import pytest

from research.rl import advantages, kl
from research.rl.advantages import AdvantageConfig, estimate
from research.rl.algorithms import ALGORITHMS
from research.rl.whitening import Whitening

REWARDS = np.array([1.0, 0, 0, 1, 0, 0, 0, 1])
LENGTHS = np.array([5, 3, 2, 4, 1, 5, 3, 2])
MASK = np.arange(5) < LENGTHS[:, None]
GROUP = np.repeat([0, 1], 4)
GREEDY = np.repeat([1.0, 0.0], 4)
VALUES = 0.1 * np.cos(np.arange(40)).reshape(8, 5)
I, T = np.meshgrid(np.arange(8), np.arange(5), indexing="ij")
OLD, REF = -(0.1 * (I + 1) + 0.05 * T), -(0.2 + 0.03 * ((I * T) % 4))
PENALTY = 0.1 * kl.in_reward(OLD, REF)

VERL = AdvantageConfig(whiten=Whitening(ddof=1, eps_mode="variance"))
OPENRLHF = AdvantageConfig(
    epsilon=1e-9
)  # of a group's deviation; whitening is by default OpenRLHF's


def run(name, rewards=REWARDS, mask=MASK, group=GROUP, **more):
    more = {"greedy": GREEDY, "values": VALUES} | more
    return estimate(name, rewards, mask, group, **more)


def signed(pattern, high, low):
    return np.where(np.array(pattern) > 0, high, low)


FIRST = {  # (estimator, settings): advantages of the first tokens
    ("reinforce_pp", "openrlhf"): signed(REWARDS, 1.128152, -0.886405),
    ("reinforce_pp", "verl"): signed(REWARDS, 1.105359, -0.868496),
    ("reinforce_pp_baseline", "openrlhf"): [
        *(0.993884, -1.214747, -1.214747, 0.993884, -0.662589, -0.662589, -0.662589, 1.546041)
    ],
    ("reinforce_pp_baseline", "verl"): [
        *(0.973803, -1.190204, -1.190204, 0.973803, -0.649202, -0.649202, -0.649202, 1.514805)
    ],
    ("grpo", "openrlhf"): [0.866025, -0.866025, -0.866025, 0.866025, -0.5, -0.5, -0.5, 1.5],
    ("rloo", "openrlhf"): [2 / 3, -2 / 3, -2 / 3, 2 / 3, -1 / 3, -1 / 3, -1 / 3, 1],
    ("dr_grpo", "openrlhf"): [0.5, -0.5, -0.5, 0.5, -0.25, -0.25, -0.25, 0.75],
    ("remax", "openrlhf"): [0, -1, -1, 0, 0, 0, 0, 1],
}


@pytest.mark.parametrize("case", FIRST, ids="-".join)
def test_first_tokens_equal_public_trainers(case):
    name, settings = case
    result = run(name, config={"openrlhf": OPENRLHF, "verl": VERL}[settings])
    np.testing.assert_allclose(result.advantages[:, 0], FIRST[case], atol=1e-6)


@pytest.mark.parametrize(
    ("config", "row", "values"),
    [
        (OPENRLHF, 0, [1.029614, 1.050399, 1.060792, 1.060792, 1.050399]),
        (OPENRLHF, 5, [-0.566687, -0.649827, -0.737125, -0.828580, -0.924192]),
        (VERL, 0, [1.008812, 1.029177, 1.039359, 1.039359, 1.029177]),
    ],
)
def test_kl_in_the_reward_equals_public_trainers(config, row, values):
    """Log-probabilities -(.1 (i+1) + .05 t), reference -(.2 + .03 (i t mod 4)), beta .1, k1."""
    result = run("reinforce_pp", kl=PENALTY, config=config)
    np.testing.assert_allclose(result.advantages[row], values, atol=1e-6)


def test_grpo_of_the_r1_fixture():
    """Rewards 2 1 0 1: +-1.2247434 with ddof 1 and 1e-6 (verl), sqrt(2) with ddof 0."""
    mask, group = np.ones((4, 1), bool), np.zeros(4, int)
    result = estimate("grpo", np.array([2.0, 1, 0, 1]), mask, group)
    np.testing.assert_allclose(result.advantages[:, 0], [1.2247434, 0, -1.2247434, 0], atol=1e-7)
    plain = AdvantageConfig(ddof=0, epsilon=0.0)
    result = estimate("grpo", np.array([2.0, 1, 0, 1]), mask, group, config=plain)
    np.testing.assert_allclose(result.advantages[:, 0], [2**0.5, 0, -(2**0.5), 0], atol=1e-7)


def test_generalised_advantages_of_a_known_row():
    """Rewards 0 0 1, V .2 .4 .6, gamma 1, lambda .95 -> .751 .58 .4; OpenRLHF's and verl's GAE."""
    mask = np.ones((1, 3), bool)
    values = np.array([[0.2, 0.4, 0.6]])
    found, returns = advantages.gae(np.array([[0.0, 0, 1]]), values, mask, lam=0.95)
    np.testing.assert_allclose(found, [[0.751, 0.58, 0.4]], atol=1e-12)
    np.testing.assert_allclose(returns, found + values)


def test_the_others_by_hand():
    std = np.std(REWARDS, ddof=1)
    batch_std = run("batch_std").advantages[:, 0]
    dr = np.array(FIRST["dr_grpo", "openrlhf"])
    np.testing.assert_allclose(batch_std, dr / (std + 1e-4), atol=1e-6)  # TRL, scale_rewards=batch
    np.testing.assert_allclose(run("reinforce").advantages[:, 0], REWARDS - 3 / 8, atol=1e-7)
    np.testing.assert_allclose(
        run("reinforce", baseline=0.7).advantages[:, 0], REWARDS - 0.7, atol=1e-7
    )
    for name in ("dapo", "gspo", "cispo"):
        np.testing.assert_array_equal(run(name).advantages, run("grpo").advantages)
    balanced = run("minimax_grpo").advantages[:, 0].astype(float)
    grpo = run("grpo").advantages[:, 0].astype(float)
    positive = balanced > 0
    assert balanced[positive].sum() == pytest.approx(-balanced[~positive].sum(), abs=1e-6)
    assert np.abs(balanced).sum() == pytest.approx(np.abs(grpo).sum(), abs=1e-6)
    lopsided = advantages.balanced(np.array([3.0, 1.0, -1.0, 0.0]), np.ones(4, bool))
    np.testing.assert_allclose(lopsided, [1.875, 0.625, -2.5, 0])


def test_the_tables_name_the_same_algorithms():
    assert set(advantages.RULES) == set(ALGORITHMS)
    assert set(advantages.RULES) == set(advantages.Estimator.__args__)


def test_kl_of_a_sequence_lowers_its_reward_before_the_baseline():
    penalty = np.where(MASK, PENALTY, 0)
    for name in ("grpo", "rloo", "dr_grpo", "batch_std", "reinforce", "remax"):
        lowered = run(name, kl=PENALTY).advantages
        np.testing.assert_allclose(
            lowered, run(name, REWARDS - penalty.sum(1)).advantages, atol=1e-6
        )


# Properties.

NAMES = list(advantages.RULES)
WHITENED = [name for name, rule in advantages.RULES.items() if rule.scale == "whiten"]


def random_batch(seed=0, groups=6, size=4, longest=9):
    rng = np.random.default_rng(seed)
    count = groups * size
    lengths = rng.integers(1, longest + 1, count)
    mask = (np.arange(longest) < lengths[:, None]) & (rng.random((count, longest)) < 0.8)
    mask[np.arange(count), lengths - 1] = True
    return {
        "rewards": rng.normal(size=count),
        "mask": mask,
        "group": np.repeat(rng.permutation(groups), size),
        "kl": 0.1 * rng.normal(size=(count, longest)),
        "values": rng.normal(size=(count, longest)),
        "greedy": rng.normal(size=count),
    }


def of(name, batch, **more):
    return estimate(name, **(batch | more))


@pytest.mark.parametrize("name", NAMES)
def test_order_and_padding_change_nothing(name):
    batch = random_batch()
    base = of(name, batch)
    order = np.random.default_rng(1).permutation(len(batch["rewards"]))
    permuted = of(name, {key: value[order] for key, value in batch.items()})
    padded = of(
        name,
        {k: np.pad(v, ((0, 0), (0, 3))) if v.ndim == 2 else v for k, v in batch.items()},
    )
    empty = {k: np.concatenate([v, np.zeros_like(v[:1])]) for k, v in batch.items()}
    for field in ("advantages", "returns"):
        wanted = getattr(base, field)
        np.testing.assert_allclose(getattr(permuted, field), wanted[order], atol=1e-6)
        np.testing.assert_allclose(getattr(padded, field)[:, :9], wanted, atol=1e-6)
        assert not getattr(padded, field)[:, 9:].any()
        assert not wanted[~batch["mask"]].any()
    empty["group"][-1], empty["rewards"][-1] = 99, np.nan
    if not advantages.RULES[name].compares:  # there, a group of one is refused
        dropped = of(name, empty)
        np.testing.assert_allclose(dropped.advantages[:-1], base.advantages, atol=1e-6)
        assert dropped.statistics["rollout/dropped"] == 1 and not dropped.advantages[-1].any()


class Shards:
    """Processes as threads: `gather` of each waits for all."""

    def __init__(self, count):
        self.barrier, self.values = threading.Barrier(count, timeout=20), [None] * count

    def gather(self, index):
        def exchange(value):
            self.values[index] = value
            self.barrier.wait()
            everyone = list(self.values)
            self.barrier.wait()
            return everyone

        return exchange


def sharded(name, batch, cuts, config):
    """The estimate of each part of the rows, all parts together again."""
    edges = [0, *cuts, len(batch["rewards"])]
    shards, results = Shards(len(edges) - 1), [None] * (len(edges) - 1)

    def work(i):
        part = {key: value[edges[i] : edges[i + 1]] for key, value in batch.items()}
        results[i] = of(name, part, config=config, gather=shards.gather(i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weight", ["token", "sample"])
def test_one_two_and_eight_shards_agree(name, weight):
    """Groups are spread over shards, one shard has nothing but joins in, one holds a row alone."""
    config = AdvantageConfig(gamma=0.9, lam=0.8, whiten=Whitening(weight, ddof=1))
    batch = random_batch()
    batch["rewards"][5] = np.nan
    whole = of(name, batch, config=config)
    for cuts in ([11], [3, 3, 6, 7, 13, 19, 21]):
        parts = sharded(name, batch, cuts, config)
        for field in ("advantages", "returns"):
            joined = np.concatenate([getattr(part, field) for part in parts])
            np.testing.assert_allclose(joined, getattr(whole, field), atol=1e-6)
        for part in parts:
            assert part.statistics == pytest.approx(whole.statistics, abs=1e-9)


@pytest.mark.parametrize("name", WHITENED)
def test_whitened_tokens_have_mean_zero_and_variance_one(name):
    batch = random_batch()
    found = of(name, batch).advantages[batch["mask"]]
    assert found.mean() == pytest.approx(0, abs=1e-6) and found.var() == pytest.approx(1, abs=1e-6)
    sampled = AdvantageConfig(whiten=Whitening("sample"))
    found = of(name, batch, config=sampled).advantages
    lengths = batch["mask"].sum(1)
    assert (found.sum(1) / lengths).mean() == pytest.approx(0, abs=1e-6)
    assert ((found**2).sum(1) / lengths).mean() == pytest.approx(1, abs=1e-6)
    verl = of(name, batch, config=VERL).advantages[batch["mask"]]
    assert verl.var(ddof=1) == pytest.approx(1, abs=1e-6)
    shifted = AdvantageConfig(whiten=Whitening(divide=False))
    plain = of(name, batch, config=shifted)
    std = plain.statistics["advantages/std"]
    np.testing.assert_allclose(
        plain.advantages, of(name, batch).advantages * std, rtol=1e-5, atol=1e-6
    )
    off = AdvantageConfig(whiten=Whitening(eps_mode="deviation", epsilon=10.0))
    assert 0 < of(name, batch, config=off).advantages[batch["mask"]].std() < 0.5


def test_equal_groups_and_the_mean_of_tokens():
    """Eq. 7 gives a group of equal rewards -mean / std where length goes with reward; without recentring, 0."""
    rewards, lengths = np.array([1.0, 0, 1, 1]), np.array([9, 1, 2, 2])
    mask, group = np.arange(9) < lengths[:, None], np.array([0, 0, 1, 1])
    shifted = estimate("reinforce_pp_baseline", rewards, mask, group)
    tokens = np.repeat([0.5, -0.5, 0, 0], lengths)
    expected = -tokens.mean() / tokens.std()
    assert abs(expected) > 0.5
    np.testing.assert_allclose(shifted.advantages[2:, :2], expected, atol=1e-6)
    plain = AdvantageConfig(whiten=Whitening(recenter=False))
    unshifted = estimate("reinforce_pp_baseline", rewards, mask, group, config=plain)
    assert not unshifted.advantages[2:].any()
    np.testing.assert_allclose(unshifted.advantages[0], 0.5 / tokens.std(), atol=1e-6)


@pytest.mark.parametrize("name", ["reinforce_pp_baseline", "grpo", "batch_std"])
def test_a_scale_and_a_shift_of_the_reward_change_nothing(name):
    batch = random_batch() | {"kl": None}
    other = batch | {"rewards": 3.0 * batch["rewards"] - 5.0}
    exact = AdvantageConfig(epsilon=0.0)
    a, b = (of(name, one, config=exact).advantages for one in (batch, other))
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_generalised_advantages_without_a_critic_are_the_return():
    batch = random_batch() | {"values": np.zeros((24, 9))}
    ppo, plain = of("ppo", batch), of("reinforce_pp", batch)
    np.testing.assert_allclose(ppo.advantages, plain.advantages, atol=1e-6)
    np.testing.assert_allclose(ppo.returns, plain.returns, atol=1e-6)


def test_lambda_one_gives_the_return_whatever_the_values():
    batch = random_batch()
    for gamma in (1.0, 0.7):
        config = AdvantageConfig(gamma=gamma)
        np.testing.assert_allclose(
            of("ppo", batch, config=config).returns,
            of("reinforce_pp", batch, config=config).returns,
            atol=1e-6,
        )


def test_discounted_returns_by_hand():
    mask = np.array([[1, 1, 0, 0, 1]], bool)
    rewards = np.array([[1.0, 10, 1000, 1000, 100]])
    found = advantages.returns_to_go(rewards, mask, gamma=0.5)
    np.testing.assert_allclose(found, [[1 + 5 + 25, 10 + 50, 0, 0, 100]])
    found = advantages.returns_to_go(rewards, mask)
    np.testing.assert_allclose(found, [[111, 110, 0, 0, 100]])


# Edges.


def test_the_return_passes_through_what_a_tool_said():
    """verl's published bug gave 0 0 1 1 1 here: calls before an observation were not paid."""
    mask = np.array([[1, 1, 0, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0]], bool)
    rewards, group = np.array([1.0, 0.0]), np.array([0, 1])
    result = estimate("reinforce_pp", rewards, mask, group)
    np.testing.assert_array_equal(result.returns[0], [1, 1, 0, 0, 1, 1, 0])
    assert (result.advantages[0] > 0).tolist() == mask[0].tolist()
    # Neither KL nor a value that stands at an observation counts.
    at_tool = np.where(mask, 0.0, 7.0)
    same = estimate("reinforce_pp", rewards, mask, group, kl=at_tool)
    np.testing.assert_array_equal(same.advantages, result.advantages)
    for gamma, lam in ((1.0, 1.0), (0.9, 0.5)):
        config = AdvantageConfig(gamma=gamma, lam=lam)
        without = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
        dense = estimate("ppo", rewards, without, group, values=0.1 * without, config=config)
        spread = estimate("ppo", rewards, mask, group, values=0.1 + at_tool, config=config)
        np.testing.assert_allclose(spread.advantages[0][mask[0]], dense.advantages[0], atol=1e-6)


def test_the_reward_is_at_the_last_token_of_the_mask():
    mask = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]], bool)
    found = advantages.at_last(np.array([2.0, 3.0, 5.0]), mask)
    np.testing.assert_array_equal(found, [[0, 2, 0, 0], [0, 0, 0, 3], [0, 0, 0, 0]])


@pytest.mark.parametrize("name", [n for n, rule in advantages.RULES.items() if rule.compares])
def test_groups_of_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} compares .* 1 of 2 groups"):
        estimate(name, np.ones(3), np.ones((3, 2), bool), np.array([0, 0, 1]))
    both = np.array([[1, 1], [1, 1], [1, 0]], bool)
    if name == "grpo":  # a group that exists elsewhere is whole
        results = sharded(
            name,
            {"rewards": np.array([1.0, 0, 1]), "mask": both, "group": np.zeros(3, int)},
            [1, 2],
            AdvantageConfig(),
        )
        assert results[0].advantages[0, 0] == results[2].advantages[0, 0] > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, None])
@pytest.mark.parametrize("name", NAMES)
def test_rewards_that_are_no_number_are_dropped_with_their_response(name, bad):
    batch = random_batch()
    keep = np.ones(24, bool)
    keep[[2, 7]] = False
    rewards = batch["rewards"].astype(object)
    rewards[~keep] = bad
    result = of(name, batch | {"rewards": rewards})
    without = of(name, {key: value[keep] for key, value in batch.items()})
    np.testing.assert_allclose(result.advantages[keep], without.advantages, atol=1e-6)
    assert not result.advantages[~keep].any() and np.isfinite(result.returns).all()
    assert result.statistics["rollout/dropped"] == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_group_left_with_one_response_gives_it_nothing(name):
    batch = random_batch() | {"kl": None}
    first = batch["group"] == batch["group"][0]
    batch["rewards"][np.flatnonzero(first)[1:]] = np.nan
    result = of(name, batch)
    assert result.statistics["rollout/lone"] == 1 and np.isfinite(result.advantages).all()
    if advantages.RULES[name].compares and name != "reinforce_pp_baseline":
        assert not result.advantages[first].any()
    if name == "reinforce_pp_baseline":
        plain = AdvantageConfig(whiten=Whitening(recenter=False))
        assert not of(name, batch, config=plain).advantages[first].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 0.3, 1e6])
def test_rewards_without_variance_give_zeros(name, value):
    result = run(
        name,
        np.full(8, value) + (1e-9 if value == 0.3 else 0.0) * np.arange(8),
        greedy=np.full(8, value),
        values=None if name != "ppo" else np.zeros((8, 5)),
        config=AdvantageConfig(whiten=Whitening(epsilon=0.0)),
    )
    np.testing.assert_allclose(result.advantages, 0.0, atol=1e-7)
    assert result.statistics["rollout/zero_std"] == 1.0
    assert np.isfinite(list(result.statistics.values())).all()


def test_noise_is_signal_to_a_group_and_nothing_to_the_batch():
    """Rewards 0 or 1 with 1e-3 of noise: local deviations make O(1) of it, global ones 1e-3."""
    rng = np.random.default_rng(0)
    right = np.repeat([0.0, 1.0, 0.0, 1.0], 8)
    rewards = right + 1e-3 * rng.standard_normal(32)
    mixed = np.concatenate([rewards, rng.integers(0, 2, 32)])
    mask, group = np.ones((64, 1), bool), np.repeat(np.arange(8), 8)
    for name, size in (("grpo", 1.0), ("reinforce_pp_baseline", 1e-2), ("batch_std", 1e-2)):
        found = np.abs(estimate(name, mixed, mask, group).advantages[:32])
        assert 0.1 * size < found.mean() < size


def test_nothing_to_whiten_is_refused_and_empty_responses_are_not():
    for mask in (np.zeros((2, 3), bool), np.array([[1, 0], [0, 0]], bool)):
        with pytest.raises(ValueError, match="nothing to whiten"):
            estimate("reinforce_pp", np.array([1.0, 0]), mask, np.array([0, 1]))
    mask = MASK.copy()
    mask[2] = False
    for name in NAMES:
        result = run(name, mask=mask)
        assert np.isfinite(result.advantages).all() and not result.advantages[2].any()
    nothing = estimate("grpo", np.zeros(4), np.zeros((4, 0), bool), np.zeros(4, int))
    assert nothing.advantages.shape == (4, 0)
    masked = estimate("grpo", np.array([1.0, 0]), np.zeros((2, 3), bool), np.zeros(2, int))
    assert not masked.advantages.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "gppo"}, "unknown estimator 'gppo'; there are ppo, grpo"),
        ({"name": "ppo", "values": None}, r"ppo needs a critic's values \(values=\)"),
        ({"name": "remax", "greedy": None}, r"remax needs rewards of greedy responses"),
        ({"mask": np.ones((7, 5), bool)}, r"rewards \(8,\) and mask \(7, 5\)"),
        ({"kl": np.zeros((8, 4))}, r"kl has shape \(8, 4\), not \(8, 5\)"),
        ({"group": np.zeros(7)}, r"group has shape \(7,\), not \(8,\)"),
        ({"greedy": np.zeros((8, 5))}, r"greedy has shape \(8, 5\), not \(8,\)"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        run(**({"name": "grpo"} | change))
    with pytest.raises(ValueError, match="gamma=1.5"):
        AdvantageConfig(gamma=1.5)


def test_clipped_rewards():
    config = AdvantageConfig(reward_clip=10.0)
    wild = np.where(REWARDS > 0, 1e4, -1e4)
    np.testing.assert_allclose(
        run("dr_grpo", wild, config=config).advantages,
        20 * run("dr_grpo").advantages,
        atol=1e-5,
    )


def test_length_shaping():
    """DAPO's published numbers: up to 16,384 free, -1 at 20,480."""
    lengths = np.array([1, 16_384, 18_432, 20_480, 30_000])
    found = advantages.overlong_penalty(lengths, 20_480, 4_096)
    np.testing.assert_allclose(found, [0, 0, -0.5, -1, -1])
    assert not advantages.overlong_penalty(lengths, 20_480, 0).any()


def test_the_moving_average_has_no_bias_of_its_start():
    state = np.zeros(2, np.float32)
    assert advantages.average_of(state) is None
    means, weights = [3.0, 1.0, 2.0], [0.25 * 0.25, 0.25, 1]
    for mean in means:
        state = np.float32(advantages.moving_average(state, mean, 0.25))
    assert advantages.average_of(state) == pytest.approx(np.average(means, weights=weights))


def test_an_estimate_leaves_its_arguments_alone():
    batch = random_batch()
    batch["rewards"][3] = np.nan
    before = {key: value.copy() for key, value in batch.items()}
    for name in NAMES:
        of(name, batch)
    for key, value in before.items():
        np.testing.assert_array_equal(batch[key], value)
    assert dataclasses.is_dataclass(AdvantageConfig)
