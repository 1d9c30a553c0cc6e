"""Drawing one token: against NumPy's cumulative sums, sorts and expected counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.lm.sampling import Policy, Sampling, draw, invert_cdf, keep, uniform


def chi_square(counts, probabilities):
    """Pearson's statistic in standard deviations of its distribution (df = bins - 1)."""
    expected = counts.sum() * probabilities
    bins = expected > 0
    assert not counts[~bins].any()
    statistic = ((counts[bins] - expected[bins]) ** 2 / expected[bins]).sum()
    freedom = bins.sum() - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("V", [1, 7, 256, 257, 1000, 40000])
def test_the_inverse_cdf_is_that_of_numpy(V):
    rng = np.random.default_rng(V)
    weights = rng.gamma(0.5, size=(64, V)) * (rng.random((64, V)) < 0.7)
    weights[:, V // 2] += 0.1
    uniform = rng.random(64) * (1 - 1e-4)
    uniform[:2] = 0
    weights = weights.astype(np.float32).astype(np.float64)
    cumulative = weights.cumsum(1)
    target = (uniform * cumulative[:, -1]).astype(np.float32)
    got, rest = map(np.asarray, jax.jit(invert_cdf)(weights.astype(np.float32), target))
    assert (np.take_along_axis(weights, got[:, None], 1) > 0).all()
    before = np.take_along_axis(cumulative - weights, got[:, None], 1)[:, 0]
    after = np.take_along_axis(cumulative, got[:, None], 1)[:, 0]
    slack = 3e-6 * cumulative[:, -1]  # of float32 sums
    assert (before - slack <= target).all() and (target < after + slack).all()
    np.testing.assert_allclose(rest, target - before, atol=slack.max())
    exact = (cumulative <= target[:, None]).sum(1)
    assert (got == exact).mean() > 0.9  # nearly always the same token, not a neighbour


def test_a_target_that_rounds_to_the_total_still_gives_a_token_of_positive_weight():
    weights = jnp.asarray([[0.0, 1.0, 0.0, 3.0, 0.0]])
    index, _ = invert_cdf(weights, jnp.asarray([4.0]))
    assert index[0] == 3
    index, _ = invert_cdf(weights, jnp.asarray([0.0]))
    assert index[0] == 1


def test_uniform_numbers_are_the_bits_of_threefry():
    keys = jax.vmap(jax.random.key)(jnp.arange(5))
    data = jax.vmap(jax.random.key_data)(keys) + jnp.uint32(0xABCDEF01)  # both words in play
    count = jnp.asarray([0, 1, 2, 1000, 2**31 - 1])
    keys = jax.random.wrap_key_data(data, impl="threefry2x32")
    bits = jax.vmap(lambda k, t: jax.random.key_data(jax.random.fold_in(k, t))[0])(keys, count)
    want = (np.asarray(bits) >> 8).astype(np.float64) / 2**24
    np.testing.assert_array_equal(uniform(data, count), want)
    many = np.asarray(uniform(jnp.tile(data[:1], (20000, 1)), jnp.arange(20000)))
    assert abs(chi_square(np.histogram(many, 50, (0, 1))[0], np.full(50, 1 / 50))) < 5


def kept_by_numpy(logits, sampling):
    """The definition, one row at a time: suppress, then the k best, the nucleus, min-p."""
    out = np.zeros(logits.shape, bool)
    for row, kept in zip(logits, out, strict=True):
        alive = [v for v in range(len(row)) if v not in sampling.suppress_ids]
        alive.sort(key=lambda v: -row[v])  # noqa: B023
        if sampling.top_k:
            alive = alive[: sampling.top_k]
        p = softmax(row[alive])
        nucleus = [v for i, v in enumerate(alive) if p[:i].sum() < sampling.top_p]
        kept[[v for v in nucleus if p[alive.index(v)] >= sampling.min_p * p[0]]] = True
    return out


@pytest.mark.parametrize(
    "settings",
    [
        dict(top_k=3),
        dict(top_k=1),
        dict(top_k=500),
        dict(top_p=0.8),
        dict(top_p=1e-6),
        dict(min_p=0.2),
        dict(min_p=1.0),
        dict(suppress_ids=(0, 5)),
        dict(top_k=6, top_p=0.7, min_p=0.1, suppress_ids=(2,)),
    ],
)
def test_truncation_keeps_what_the_definition_keeps(settings):
    logits = np.random.default_rng(0).normal(size=(50, 11)).astype(np.float32) * 2
    sampling = Sampling(1, **settings)
    got = keep(jnp.asarray(logits), Policy.of(sampling, 11))
    np.testing.assert_array_equal(got, kept_by_numpy(logits.astype(np.float64), sampling))


@pytest.mark.parametrize(
    "settings", [{}, dict(temperature=0.5), dict(top_p=0.9, temperature=2.0), dict(suppress_ids=(1,))]
)
def test_draws_have_the_right_distribution_and_log_probabilities(settings):
    rows, V = 20000, 6
    logits = np.random.default_rng(1).normal(size=V).astype(np.float32)
    sampling = Sampling(1, **settings)
    policy = Policy.of(sampling, V)
    uniform = jax.random.uniform(jax.random.key(0), (rows,))
    token, logprob, truncated = map(
        np.asarray, jax.jit(draw)(jnp.tile(logits, (rows, 1)), uniform, policy)
    )
    full = softmax(logits.astype(np.float64) / sampling.temperature)
    scaled = logits[None].astype(np.float64) / sampling.temperature
    kept = full * kept_by_numpy(scaled, sampling)[0]
    kept /= kept.sum()
    assert abs(chi_square(np.bincount(token, minlength=V), kept)) < 5
    np.testing.assert_allclose(logprob, np.log(full)[token], atol=2e-6)
    np.testing.assert_allclose(truncated, np.log(kept[token]), atol=2e-6)


def test_greedy_takes_the_best_token_that_is_not_suppressed():
    logits = jnp.asarray([[1.0, 3.0, 2.0], [5.0, 3.0, 4.0]])
    policy = Policy.of(Sampling(1, temperature=0.0, suppress_ids=(1,)), 3)
    token, logprob, truncated = draw(logits, jnp.zeros(2), policy)
    np.testing.assert_array_equal(token, [2, 0])
    np.testing.assert_allclose(logprob, np.log(softmax(np.asarray(logits)))[[0, 1], [2, 0]], atol=1e-6)
    np.testing.assert_array_equal(truncated, [0, 0])


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(temperature=-1.0), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(top_k=-1), "top_k"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.5), "top_p"),
        (dict(min_p=-0.1), "min_p"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"max_new_tokens": 1, **settings})


def test_ids_outside_the_vocabulary_and_an_empty_support_are_refused():
    with pytest.raises(ValueError, match="stop_ids.*vocabulary"):
        Policy.of(Sampling(1, stop_ids=(9,)), 9)
    with pytest.raises(ValueError, match="leaves no token"):
        Policy.of(Sampling(1, suppress_ids=(0, 1)), 2)
