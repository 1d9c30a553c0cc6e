"""KL estimators: values by public trainers, and exact expectations of their gradients against finite differences.

Policy and reference are categorical with logits [.5, -.2, .1, 1, -1] and [0, .3, -.4, .2, .6], so that every
expectation is a sum over five tokens. The numbers were worked out in float64 from the definitions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.rl import kl

LOGITS = np.array([0.5, -0.2, 0.1, 1.0, -1.0])
REF_LOGITS = np.array([0.0, 0.3, -0.4, 0.2, 0.6])


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum())


LOGP, LOGREF = log_softmax(LOGITS), log_softmax(REF_LOGITS)


def difference(function):
    """Gradient at LOGITS by central differences, good to 1e-9."""
    steps = 1e-5 * np.eye(5)
    return np.array([(function(LOGITS + s) - function(LOGITS - s)) / 2e-5 for s in steps])


def reverse(logits):
    logp = log_softmax(logits)
    return (np.exp(logp) * (logp - LOGREF)).sum()


def forward(logits):
    return (np.exp(LOGREF) * (LOGREF - log_softmax(logits))).sum()


def expected(estimator):
    """E[estimate] as a function of the policy, which is sampled from as well."""

    def value(logits):
        logp = log_softmax(logits)
        return (np.exp(logp) * kl.in_reward(logp, LOGREF, estimator)).sum()

    return value


def as_loss(estimator):
    """E over tokens of the gradient of the estimate: what a loss on samples descends."""

    def loss(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(np.exp(LOGP) * kl.estimate(logp, jnp.asarray(LOGREF), estimator))

    return np.asarray(jax.grad(loss)(jnp.asarray(LOGITS)))


def in_reward(estimator):
    """E[estimate * grad log p]: what the score function makes of a frozen penalty."""
    penalty = np.exp(LOGP) * kl.in_reward(LOGP, LOGREF, estimator)
    return np.asarray(
        jax.grad(lambda logits: jnp.sum(penalty * jax.nn.log_softmax(logits)))(jnp.asarray(LOGITS))
    )


def test_values_and_variances():
    p = np.exp(LOGP)
    assert reverse(LOGITS) == pytest.approx(0.289877, abs=1e-6)
    assert forward(LOGITS) == pytest.approx(0.386843, abs=1e-6)
    means = {e: expected(e)(LOGITS) for e in kl.IN_REWARD}
    assert means["k1"] == pytest.approx(0.289877, abs=1e-6)
    assert means["k2"] == pytest.approx(0.236895, abs=1e-6)
    assert means["k3"] == pytest.approx(0.289877, abs=1e-6)
    for estimator, variance in (("k1", 0.3898), ("k2", 0.0896), ("k3", 0.3567)):
        values = kl.in_reward(LOGP, LOGREF, estimator)
        assert (p * (values - means[estimator]) ** 2).sum() == pytest.approx(variance, abs=1e-4)


def test_golden_gradients():
    right = [0.028847, -0.108630, 0.019337, 0.170028, -0.109583]
    np.testing.assert_allclose(in_reward("k1"), right, atol=1e-6)
    np.testing.assert_allclose(as_loss("k2"), right, atol=1e-6)
    np.testing.assert_allclose(
        as_loss("k3"), [0.082685, -0.099658, 0.055426, 0.206796, -0.245249], atol=1e-6
    )


def test_the_table_of_gradients_against_finite_differences():
    reverse_kl, forward_kl = difference(reverse), difference(forward)
    close = dict(atol=1e-8)
    np.testing.assert_allclose(as_loss("k1"), 0.0, **close)
    np.testing.assert_allclose(as_loss("k2"), reverse_kl, **close)
    np.testing.assert_allclose(as_loss("k3"), forward_kl, **close)
    np.testing.assert_allclose(as_loss("k3+"), reverse_kl, **close)
    np.testing.assert_allclose(in_reward("k1"), reverse_kl, **close)
    np.testing.assert_allclose(in_reward("k2"), difference(expected("k2")) - reverse_kl, **close)
    np.testing.assert_allclose(in_reward("k3"), reverse_kl - forward_kl, **close)
    p, ref = np.exp(LOGP), np.exp(LOGREF)
    minimax = p * (p - ref) - p * (p * (p - ref)).sum()  # E[(p - ref) grad log p] in logits
    np.testing.assert_allclose(as_loss("minimax"), minimax, **close)


def test_the_policy_gradient_of_a_sum_has_both_halves():
    """d/dtheta E[k] = E[grad k] + E[k grad log p], for each estimator: the two columns add up."""
    for estimator in kl.IN_REWARD:
        np.testing.assert_allclose(
            as_loss(estimator) + in_reward(estimator), difference(expected(estimator)), atol=1e-8
        )


def test_values_and_clamps_of_public_trainers():
    """Log-ratios .3 -.7 2 -5: OpenRLHF's `compute_approx_kl` clamps all to +-10, verl's only k3."""
    log_ratio, zero = np.array([0.3, -0.7, 2.0, -5.0]), np.zeros(4)
    for estimator, limit, values in (
        ("k2", 10.0, [0.045, 0.245, 2.0, 10.0]),
        ("k2", None, [0.045, 0.245, 2.0, 12.5]),
        ("k3", 10.0, [0.040818, 0.313753, 1.135335, 10.0]),
        ("k1", 10.0, [0.3, -0.7, 2.0, -5.0]),
    ):
        found = kl.in_reward(log_ratio, zero, estimator, limit=limit)
        np.testing.assert_allclose(found, values, atol=1e-6)
        jitted = jax.jit(
            lambda x, e=estimator, limit=limit: kl.estimate(x, jnp.zeros(4), e, limit=limit)
        )
        np.testing.assert_allclose(jitted(jnp.asarray(log_ratio)), values, atol=1e-6)
    clamped = jax.grad(lambda x: kl.estimate(x, jnp.zeros(4), "k2", limit=10.0).sum())
    np.testing.assert_allclose(clamped(jnp.asarray(log_ratio)), [0.3, -0.7, 2.0, 0.0])


def test_k3_plus_has_the_value_of_k3():
    log_ratio = jnp.asarray([0.3, -0.7, 2.0])
    value, gradient = jax.value_and_grad(lambda x: kl.estimate(x, jnp.zeros(3), "k3+").sum())(
        log_ratio
    )
    assert float(value) == pytest.approx(0.040818 + 0.313753 + 1.135335, abs=1e-6)
    np.testing.assert_allclose(gradient, log_ratio)


def test_what_has_no_form_in_the_reward_is_refused():
    for estimator in ("k3+", "minimax"):
        with pytest.raises(ValueError, match="no form inside the reward"):
            kl.in_reward(LOGP, LOGREF, estimator)
    with pytest.raises(ValueError, match="unknown KL estimator 'k4'"):
        kl.estimate(jnp.zeros(1), jnp.zeros(1), "k4")
