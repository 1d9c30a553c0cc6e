"""The bias of local normalisation: simulations through the library's estimators, against integrals and enumerations."""

import itertools

import numpy as np
import pytest

from research.reinforce_pp import bias


def normalised(z, n):
    """E[A | r = z], peers Gaussian, by quadrature over their mean (normal) and their sum of squares (chi-squared)."""
    peers = n - 1
    x, w = np.polynomial.hermite_e.hermegauss(160)
    mean, w = x / np.sqrt(peers), w / w.sum()
    if peers == 1:
        squares, v = np.zeros(1), np.ones(1)
    else:
        edges = np.linspace(0, peers + 14 * np.sqrt(2 * peers) + 60, 40_001)
        squares = (edges[1:] + edges[:-1]) / 2
        v = np.exp((peers - 1) / 2 * np.log(squares) - np.log(squares) - squares / 2)
        v /= v.sum()
    gap = z - mean[:, None]
    variance = (squares + peers / n * gap**2) / (n - 1)
    return float(w @ (peers / n * gap / np.sqrt(variance)) @ v)


@pytest.mark.parametrize("n, expected", [(4, 1.1855), (8, 1.5529), (16, 1.7733), (64, 1.9445)])
def test_a_fixed_reward_among_gaussian_ones(n, expected):
    assert normalised(2.0, n) == pytest.approx(expected, abs=6e-4)
    found = bias.of_fixed_reward(n, 2.0, 300_000 // n, np.random.default_rng(n))
    assert abs(found.mean - normalised(2.0, n)) < 4 * found.error < 0.02
    assert found.mean + 4 * found.error < 2.0


def test_two_rewards_of_which_one_is_fixed():
    """N = 2: A is ±1/sqrt(2), + with probability Phi(2)."""
    found = bias.of_fixed_reward(2, 2.0, 100_000, np.random.default_rng(0))
    assert abs(found.mean - (2 * 0.97724987 - 1) / np.sqrt(2)) < 4 * found.error < 0.01


@pytest.mark.parametrize("n, expected", [(4, 1.317), (8, 1.960), (16, 2.482), (64, 2.906)])
def test_a_right_answer(n, expected):
    assert bias.of_right_answer_exactly(n, 0.1) == pytest.approx(expected, abs=6e-4)
    found = bias.of_right_answer(n, 0.1, 200_000 // n, np.random.default_rng(n))
    assert abs(found.mean - bias.of_right_answer_exactly(n, 0.1)) < 4 * found.error < 0.06


def test_the_advantage_is_bounded():
    """|A| <= (N - 1) / sqrt(N), reached where one is right and all others wrong."""
    exact = [bias.of_right_answer_exactly(n, 1e-9) for n in (2, 8, 64)]
    assert exact == pytest.approx([(n - 1) / np.sqrt(n) for n in (2, 8, 64)], rel=1e-6)


RATES = np.array([0.05, 0.1, 0.25, 0.5])


@pytest.mark.parametrize(
    "n, expected",
    [(2, [0.7071] * 4), (4, [1.481, 1.464, 1.425, 1.4]), (8, [2.313, 2.177, 1.895, 1.736])],
)
def test_weights_of_prompts(n, expected):
    weights = bias.weight(n, RATES)
    np.testing.assert_allclose(weights, expected, atol=6e-4)
    np.testing.assert_allclose(bias.weight(n, 1 - RATES), weights, rtol=1e-12)
    rng = np.random.default_rng(n)
    for found, exact in zip(
        bias.sampled_weights("grpo", n, RATES, 8_000, rng), weights, strict=True
    ):
        assert abs(found.mean - exact) < 4 * found.error


def test_weights_by_listing_every_group():
    p, n = 0.3, 3
    total = 0.0
    for group in itertools.product((0.0, 1.0), repeat=n):
        r = np.array(group)
        deviation = r.std(ddof=1)
        advantage = (r - r.mean()) / deviation if deviation else 0 * r
        total += np.prod(np.where(r == 1, p, 1 - p)) * np.mean(advantage * (r - p))
    assert bias.weight(n, p) == pytest.approx(total / (p * (1 - p)), rel=1e-12)
    assert bias.weight(4096, RATES) == pytest.approx(bias.limit(RATES), rel=0.01)


def test_only_a_deviation_of_the_group_distorts():
    rng = np.random.default_rng(0)
    for found in bias.sampled_weights("dr_grpo", 4, RATES, 8_000, rng):
        assert abs(found.mean - 3 / 4) < 4 * found.error
    found = bias.sampled_weights("reinforce_pp_baseline", 8, RATES, 8_000, rng)
    # One scale for all prompts, that of the batch: E[group variance] over the mixture.
    scale = 7 / 8 / np.sqrt(7 / 8 * np.mean(RATES * (1 - RATES)))
    for one in found:
        assert abs(one.mean - scale) < 4 * one.error + 0.01
