"""The GRPO objective against a float64 fixture whose values were obtained by executing public trainers.

Fixture: G=4 responses of 5, 3, 4, 2 tokens (T=5), rewards 2, 1, 0, 1; with row i and column t from 0,
old = -.5 - .1 i - .05 t, new = old + .3 cos(i + 2t), ref = old + .2 sin(2i + t). The zero-KL losses agree with verl's
`compute_policy_loss_vanilla` + `agg_loss` and OpenRLHF's `PolicyLoss` to 1e-8.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.rl import kl, losses

LENGTHS = np.array([5, 3, 4, 2])
I, T = np.meshgrid(np.arange(4), np.arange(5), indexing="ij")
OLD = -0.5 - 0.1 * I - 0.05 * T
NEW = OLD + 0.3 * np.cos(I + 2 * T)
REF = OLD + 0.2 * np.sin(2 * I + T)
MASK = LENGTHS[:, None] > T
# Two more digits than float32 keeps, for the 1e-8 golden values: (2 - 1) / (sqrt(2/3) + 1e-6).
EXACT = np.array([1, 0, -1, 0]) / (np.sqrt(2 / 3) + 1e-6)

GOLDEN = {  # (clip, aggregation, kl_coef): loss
    (0.2, "grpo", 0.0): -0.00411841,
    (0.2, "grpo", 0.001): -0.00409257,
    (0.2, "token", 0.0): -0.09327073,
    (0.2, "token", 0.001): -0.09324261,
    (0.2, "drgrpo", 0.0): -0.03264476,
    (0.2, "drgrpo", 0.001): -0.03263492,
    (10.0, "grpo", 0.0): -0.02149043,
    (10.0, "grpo", 0.001): -0.02146459,
    (10.0, "token", 0.0): -0.11808790,
    (10.0, "token", 0.001): -0.11805979,
    (10.0, "drgrpo", 0.0): -0.04133077,
    (10.0, "drgrpo", 0.001): -0.04132093,
}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def _weights(aggregation, lengths=LENGTHS):
    per_row = losses.token_weights(
        lengths,
        aggregation,
        num_sequences=len(lengths),
        num_tokens=int(lengths.sum()),
        length_limit=10,
    )
    # float32 weights limit the agreement to 1e-8 relative; the golden values have 8 decimals.
    exact = {
        "grpo": 1 / (4 * lengths),
        "token": np.full(4, 1 / lengths.sum()),
        "drgrpo": np.full(4, 1 / 40),
        "sum": np.full(4, 1 / 4),
    }[aggregation]
    np.testing.assert_allclose(per_row, exact, rtol=1e-6)
    return exact[:, None] * MASK


def _loss(new, clip=0.2, aggregation="grpo", kl_coef=0.0, old=OLD, **switches):
    config = losses.LossConfig(
        aggregation=aggregation, clip_low=clip, clip_high=clip, kl_coef=kl_coef, **switches
    )
    return losses.policy_loss(
        config,
        logprobs=jnp.asarray(new),
        old_logprobs=None if old is None else jnp.asarray(old),
        ref_logprobs=jnp.asarray(REF),
        sampler_logprobs=jnp.asarray(OLD),
        advantages=jnp.asarray(EXACT[:, None] * np.ones((4, 5))),
        weights=jnp.asarray(_weights(aggregation)),
        segment_ids=jnp.asarray(MASK.astype(np.int32)),
    )


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_loss_equals_public_trainers(case):
    clip, aggregation, kl_coef = case
    loss, _ = _loss(NEW, clip, aggregation, kl_coef)
    assert abs(float(loss) - GOLDEN[case]) < 6e-9


def test_clip_fraction_and_kl():
    _, metrics = _loss(NEW)
    assert float(metrics["clip_frac"].compute()) == pytest.approx(2 / 14)
    assert float(_loss(NEW, clip=10.0)[1]["clip_frac"].compute()) == 0.0
    k3 = kl.estimate(jnp.asarray(NEW), jnp.asarray(REF), "k3")
    per_row = np.sum(np.where(MASK, np.asarray(k3), 0), 1) / LENGTHS
    all_tokens = np.sum(np.where(MASK, np.asarray(k3), 0)) / 14
    assert all_tokens == pytest.approx(0.0281152, abs=1e-7)
    assert float(metrics["kl"].compute()) == pytest.approx(all_tokens)
    assert per_row.shape == (4,)


@pytest.mark.parametrize(
    ("clip", "first", "second"), [(0.2, 0.0, 0.07327708), (10.0, -0.08266153, 0.07327708)]
)
def test_gradients(clip, first, second):
    grad = jax.grad(lambda new: _loss(new, clip)[0])(jnp.asarray(NEW))
    assert float(grad[0, 0]) == pytest.approx(first, abs=1e-8)
    assert float(grad[2, 3]) == pytest.approx(second, abs=1e-8)
    assert float(grad[2, 4]) == 0.0


def test_dual_clip_bounds_the_ratio_of_negative_advantages():
    def one(dual_clip):
        loss, _ = losses.policy_loss(
            losses.LossConfig(clip_low=10.0, clip_high=10.0, dual_clip=dual_clip, kl_coef=0.0),
            logprobs=jnp.log(jnp.array([[5.0]])),
            old_logprobs=jnp.zeros((1, 1)),
            ref_logprobs=None,
            sampler_logprobs=None,
            advantages=-jnp.ones((1, 1)),
            weights=jnp.ones((1, 1)),
            segment_ids=jnp.ones((1, 1), jnp.int32),
        )
        return float(loss)

    assert one(3.0) == pytest.approx(3.0)
    assert one(None) == pytest.approx(5.0)


def test_on_policy_gradient_is_group_baselined_reinforce():
    """At ratio 1 the gradient with respect to log p is -w A, whether old log-probabilities are given or not."""
    expected = -_weights("grpo") * EXACT[:, None]
    for old in (None, NEW):
        grad = jax.grad(lambda new, old=old: _loss(new, old=old)[0])(jnp.asarray(NEW))
        np.testing.assert_allclose(grad, expected, atol=1e-12)


def test_reference_equal_to_policy_has_no_kl_and_no_kl_gradient():
    for estimator, slope in (("k1", 1.0), ("k2", 0.0), ("k3", 0.0)):
        value, grad = jax.value_and_grad(
            lambda new, e=estimator: kl.estimate(new, jnp.asarray(REF), e).sum()
        )(jnp.asarray(REF))
        assert float(value) == 0.0
        np.testing.assert_allclose(grad, slope * np.ones_like(REF), atol=1e-12)


def test_sequence_ratio_is_the_product_of_token_ratios():
    loss, _ = _loss(NEW, ratio="sequence")
    gap = np.where(MASK, NEW - OLD, 0).sum(1)
    ratio = np.exp(gap)
    objective = np.minimum(ratio * EXACT, np.clip(ratio, 0.8, 1.2) * EXACT)
    assert float(loss) == pytest.approx(-objective.mean(), abs=1e-12)


def test_truncated_importance_weight():
    """A sampler that gave every token 1/4 of the trainer's probability: weights exp(log 4) are capped at 2."""
    config = losses.LossConfig(kl_coef=0.0, importance_cap=2.0)
    arguments = dict(
        logprobs=jnp.asarray(OLD),
        old_logprobs=None,
        ref_logprobs=None,
        advantages=jnp.asarray(EXACT[:, None] * np.ones((4, 5))),
        weights=jnp.asarray(_weights("grpo")),
        segment_ids=jnp.asarray(MASK.astype(np.int32)),
    )
    loss, metrics = losses.policy_loss(
        config, sampler_logprobs=jnp.asarray(OLD - np.log(4)), **arguments
    )
    plain, _ = losses.policy_loss(
        losses.LossConfig(kl_coef=0.0), sampler_logprobs=jnp.asarray(OLD), **arguments
    )
    assert float(loss) == pytest.approx(2 * float(plain))
    assert float(metrics["mismatch/abs"].compute()) == pytest.approx(np.log(4))
    assert float(metrics["mismatch/frac>1.1"].compute()) == 1.0
    with pytest.raises(ValueError, match="sampler"):
        losses.policy_loss(config, sampler_logprobs=None, **arguments)


def test_huge_log_ratios_stay_finite():
    loss, _ = _loss(OLD + 500.0, clip=10.0, kl_coef=0.001)
    grad = jax.grad(lambda new: _loss(new, 10.0, kl_coef=0.001)[0])(jnp.asarray(OLD - 500.0))
    assert np.isfinite(float(loss)) and np.isfinite(grad).all()


def test_empty_responses_weigh_nothing_but_count():
    weights = losses.token_weights(
        np.array([0, 4]), "grpo", num_sequences=2, num_tokens=4, length_limit=8
    )
    np.testing.assert_allclose(weights, [0, 1 / 8])
