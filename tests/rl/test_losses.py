"""The GRPO objective against a float64 fixture whose values were obtained by executing public trainers.

Fixture: G=4 responses of 5, 3, 4, 2 tokens (T=5), rewards 2, 1, 0, 1; with row i and column t from 0,
old = -.5 - .1 i - .05 t, new = old + .3 cos(i + 2t), ref = old + .2 sin(2i + t). The zero-KL losses agree with verl's
`compute_policy_loss_vanilla` + `agg_loss` and OpenRLHF's `PolicyLoss` to 1e-8.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.rl import kl, losses
from research.rl.algorithms import ALGORITHMS, algorithm

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
    for estimator, slope in (("k1", 1.0), ("k2", 0.0), ("k3", 0.0), ("k3+", 0.0)):
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


# Ratios and objectives that are not GRPO's. In the fixture tokens of a response share one advantage.

GAP = np.where(MASK, NEW - OLD, 0.0)


def _gradient(**switches):
    return np.asarray(jax.grad(lambda new: _loss(new, **switches)[0])(jnp.asarray(NEW)))


def test_the_geometric_ratio_is_one_for_each_response():
    """GSPO eq. 5-7 by hand: s_i = exp(mean_t log ratio), clipped as a whole; gradient s_i A_i / |o_i| per token."""
    ratio = np.exp(GAP.sum(1) / LENGTHS)
    clip = 0.03
    objective = np.minimum(ratio * EXACT, np.clip(ratio, 1 - clip, 1 + clip) * EXACT)
    loss, metrics = _loss(NEW, clip, ratio="geometric")
    assert float(loss) == pytest.approx(-objective.mean(), abs=1e-12)
    cut = ((ratio > 1 + clip) & (EXACT > 0)) | ((ratio < 1 - clip) & (EXACT < 0))
    assert cut.any()
    assert float(metrics["clip_frac"].compute()) == pytest.approx(LENGTHS[cut].sum() / 14)
    slope = np.where(cut, 0.0, -ratio * EXACT / (4 * LENGTHS))[:, None] * MASK
    np.testing.assert_allclose(_gradient(clip=clip, ratio="geometric"), slope, atol=1e-12)


def test_geometric_ratios_do_not_depend_on_packing():
    """The four responses in one row, with other sequences' segments between, against one row for each."""
    config = losses.LossConfig(ratio="geometric", clip_low=0.03, clip_high=0.03, kl_coef=0.01)
    rows = {
        "logprobs": NEW, "old_logprobs": OLD, "ref_logprobs": REF, "sampler_logprobs": OLD,
        "advantages": EXACT[:, None] * np.ones((4, 5)), "weights": _weights("grpo"),
    }  # fmt: skip
    apart = {key: jnp.asarray(value) for key, value in rows.items()}
    together = {key: value.reshape(1, 20) for key, value in apart.items()}
    segments = jnp.asarray(np.where(MASK, I + 1, 0)).reshape(1, 20)
    one, figures = losses.policy_loss(config, **apart, segment_ids=jnp.asarray(MASK * 1))
    other, packed = losses.policy_loss(config, **together, segment_ids=segments)
    assert float(one) == pytest.approx(float(other), abs=1e-14)
    assert float(figures["kl"].compute()) == pytest.approx(float(packed["kl"].compute()))


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.1), (0.05, 4.0), (0.2, 0.2)])
def test_a_clipped_weight_keeps_its_gradient(low, high):
    """CISPO (MiniMax-M1 eq. 4): sg(clip(ratio)) A log p; every token's gradient is its clipped weight times A."""
    config = {"clip_low": low, "clip_high": high, "objective": "weight", "aggregation": "token"}
    config = losses.LossConfig(kl_coef=0.0, **config)
    arguments = {
        "old_logprobs": jnp.asarray(OLD), "ref_logprobs": None, "sampler_logprobs": None,
        "advantages": jnp.asarray(EXACT[:, None] * np.ones((4, 5))),
        "weights": jnp.asarray(_weights("token")), "segment_ids": jnp.asarray(MASK * 1),
    }  # fmt: skip
    (loss, metrics), grad = jax.value_and_grad(
        lambda new: losses.policy_loss(config, logprobs=new, **arguments), has_aux=True
    )(jnp.asarray(NEW))
    weight = np.clip(np.exp(GAP), 1 - low, 1 + high) * EXACT[:, None] * MASK / 14
    np.testing.assert_allclose(grad, -weight, atol=1e-12)
    assert float(loss) == pytest.approx(-(weight * NEW).sum(), abs=1e-12)
    outside = ((np.exp(GAP) > 1 + high) | (np.exp(GAP) < 1 - low)) & MASK
    assert float(metrics["clip_frac"].compute()) == pytest.approx(outside.sum() / 14)


def test_clip_higher_leaves_more_room_above():
    """DAPO clips to [.8, 1.28]: a token of positive advantage keeps its gradient up to 1.28, a negative one to .8."""
    ratios = np.array([[0.75, 0.9, 1.25, 1.35]])

    def moves(sign):
        grad = jax.grad(
            lambda new: losses.policy_loss(
                ALGORITHMS["dapo"].loss, logprobs=new, old_logprobs=jnp.zeros((1, 4)),
                ref_logprobs=None, sampler_logprobs=None, advantages=jnp.full((1, 4), sign),
                weights=jnp.ones((1, 4)), segment_ids=jnp.ones((1, 4), jnp.int32),
            )[0]
        )(jnp.log(jnp.asarray(ratios)))  # fmt: skip
        return (np.asarray(grad)[0] != 0).tolist()

    assert moves(1.0) == [True, True, True, False]
    assert moves(-1.0) == [False, True, True, True]


def test_minimax_drops_tokens_of_bad_responses_that_became_likely():
    """MiniMax-01 section 5.4.2: m_t = 1 - [A < 0 and r > r_max], in the objective, not in the denominator."""
    plain = _gradient(clip=10.0, aggregation="token")
    dropped = (np.exp(GAP) > 1.1) & (EXACT[:, None] < 0) & MASK
    assert 0 < dropped.sum() < (MASK & (EXACT[:, None] < 0)).sum()
    found = _gradient(clip=10.0, aggregation="token", drop_above=1.1)
    np.testing.assert_array_equal(found, np.where(dropped, 0.0, plain))
    _, metrics = _loss(NEW, 10.0, "token", drop_above=1.1)
    assert float(metrics["dropped_frac"].compute()) == pytest.approx(dropped.sum() / 14)


def test_without_a_clip_the_sum_is_the_importance_weighted_log_probability():
    """RLOO, ReMax, REINFORCE: mean over responses of sum_t ratio A; on-policy its gradient is A_i grad log p(o_i)."""
    endless = {"clip": np.inf, "aggregation": "sum"}
    expected = -np.exp(GAP) * EXACT[:, None] * MASK / 4
    np.testing.assert_allclose(_gradient(**endless), expected, atol=1e-12)
    loss, metrics = _loss(NEW, **endless)
    assert float(loss) == pytest.approx(expected.sum(), abs=1e-12)
    assert float(metrics["clip_frac"].compute()) == 0.0
    on_policy = jax.grad(lambda new: _loss(new, old=None, **endless)[0])(jnp.asarray(NEW))
    np.testing.assert_allclose(on_policy, -EXACT[:, None] * MASK / 4, atol=1e-12)


def test_the_penalty_is_clamped_where_it_is_told_to():
    far = jnp.asarray(REF + 30.0)
    bounded = float(_loss(far, 10.0, kl_coef=1.0, kl_estimator="k2", kl_limit=10.0)[0])
    free = float(_loss(far, 10.0, kl_coef=1.0, kl_estimator="k2")[0])
    assert free - bounded == pytest.approx(200.0 - 10.0, rel=1e-6)  # log-ratios end at 20


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_s_loss_pulls_up_what_was_good(name):
    """On-policy, before any KL, each one's gradient is -w A with its own weights: nothing is clipped at ratio 1."""
    config = dataclasses.replace(ALGORITHMS[name].loss, kl_coef=0.0)
    assert config.over(losses.GRPO) == config and None not in (config.clip_low, config.clip_high)
    weights = _weights(config.aggregation)
    for old in (None, NEW):
        grad = jax.grad(
            lambda new, old=old: losses.policy_loss(
                config, logprobs=new, old_logprobs=None if old is None else jnp.asarray(old),
                ref_logprobs=None, sampler_logprobs=None, segment_ids=jnp.asarray(MASK * 1),
                advantages=jnp.asarray(EXACT[:, None] * np.ones((4, 5))),
                weights=jnp.asarray(weights),
            )[0]
        )(jnp.asarray(NEW))  # fmt: skip
        np.testing.assert_allclose(grad, -weights * EXACT[:, None], atol=1e-12)


def test_switches_left_open_are_the_algorithm_s():
    usual = ALGORITHMS["dapo"].loss
    mine = losses.LossConfig(clip_high=0.5, kl_coef=0.0).over(usual)
    assert mine == dataclasses.replace(usual, clip_high=0.5)
    with pytest.raises(ValueError, match="unknown estimator 'dapoo'; there are ppo"):
        algorithm("dapoo")
    with pytest.raises(ValueError, match="unknown aggregation 'mean'"):
        losses.token_weights(LENGTHS, "mean", num_sequences=4, num_tokens=14, length_limit=9)
