"""The policy objectives, as a weighted sum over tokens.

Every reduction of the field is a choice of per-token weights fixed on the host from the lengths of the *global*
minibatch (`token_weights`). The loss itself is then a plain sum, so its gradient is the same however the minibatch is
packed, split into micro-batches or spread over devices. Reduction, ratio, objective and KL are independent switches;
`algorithms.ALGORITHMS` says how each published algorithm sets them.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from research.core.metrics import Max, Mean
from research.rl import kl

Aggregation = Literal["grpo", "token", "drgrpo", "sum"]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Switches of the objective. None: as the algorithm has it; GRPO's where there is none (DeepSeek-R1 v1 eq. 1-3).

    aggregation: `grpo` mean over a response's tokens, then over responses (DeepSeekMath's per-token form);
      `token` mean over all tokens (DAPO); `drgrpo` sum over tokens / (responses x length limit);
      `sum` sum over a response's tokens, then mean over responses (the log-probability of the sequence).
    ratio: p / p_old of each `token`; of the `sequence`, their product, as the R1 paper writes it; or its geometric mean
      over the response's tokens, `geometric` (GSPO, arXiv 2507.18071, eq. 7).
    objective: `clip` min(rho A, clip(rho) A), PPO's; `weight` sg(clip(rho)) A log p, in which a clipped token keeps its
      gradient (CISPO, MiniMax-M1, arXiv 2506.13585, eq. 4).
    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; inf: not. R1's stage 1 uses 10 for both:
      then only tokens with positive advantage and ratio > 11 are clipped, and the ratio's own bound is +-20 in
      logarithm.
    dual_clip: bound on ratio * |A| for negative advantages (None: no bound; 3 is common and contradicts clip 10).
    drop_above: tokens with a negative advantage and a ratio above it are left out (MiniMax-01 section 5.4.2).
    kl_coef, kl_estimator, kl_in: penalty on KL(policy || reference) inside the `loss` or the `reward`, never both.
    kl_limit: clamp of the KL estimate.
    importance_cap: C of the truncated importance weight min(p_old / p_sampler, C) that corrects for a sampler whose
      probabilities differ from the trainer's (None: off).
    """

    aggregation: Aggregation | None = None
    ratio: Literal["token", "sequence", "geometric"] | None = None
    objective: Literal["clip", "weight"] | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None
    drop_above: float | None = None
    kl_coef: float | None = None
    kl_estimator: kl.Estimator | None = None
    kl_in: Literal["loss", "reward"] | None = None
    kl_limit: float | None = None
    importance_cap: float | None = None

    def over(self, base: "LossConfig") -> "LossConfig":
        """These switches, and those of `base` where they are None."""
        mine = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return dataclasses.replace(base, **mine)


GRPO = LossConfig(
    aggregation="grpo",
    ratio="token",
    objective="clip",
    clip_low=0.2,
    clip_high=0.2,
    kl_coef=0.001,
    kl_estimator="k3",
    kl_in="loss",
)


def token_weights(
    lengths: np.ndarray,
    aggregation: Aggregation,
    *,
    num_sequences: int,
    num_tokens: int,
    length_limit: int,
) -> np.ndarray:
    """Weight of each token of response i, so that sum_i lengths_i * weight_i * x_i is the aggregated mean of x.

    Args:
      lengths: [N] int, loss tokens of this process's responses.
      num_sequences, num_tokens: totals over the global minibatch. Empty and masked responses count in the first.
      length_limit: Lmax, the constant of `drgrpo`.

    Returns: [N] float32; zero for an empty response.
    """
    lengths = np.asarray(lengths, np.float64)
    if aggregation == "grpo":
        weights = 1.0 / (num_sequences * np.maximum(lengths, 1))
    elif aggregation == "token":
        weights = np.full_like(lengths, 1.0 / max(num_tokens, 1))
    elif aggregation == "drgrpo":
        weights = np.full_like(lengths, 1.0 / (num_sequences * length_limit))
    elif aggregation == "sum":
        weights = np.full_like(lengths, 1.0 / num_sequences)
    else:
        raise ValueError(f"unknown aggregation {aggregation!r}; use grpo, token, drgrpo or sum")
    return np.where(lengths > 0, weights, 0.0).astype(np.float32)


def policy_loss(
    config: LossConfig,
    *,
    logprobs: Array,
    old_logprobs: Array | None,
    ref_logprobs: Array | None,
    sampler_logprobs: Array | None,
    advantages: Array,
    weights: Array,
    segment_ids: Array,
) -> tuple[Array, dict[str, Mean | Max]]:
    """-J on packed rows (REINFORCE++ eq. 1; DeepSeek-R1 v1 eq. 1).

        J = sum_t w_t ( min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t) - kl_coef KL_t ),   rho = p / p_old

    and with `objective='weight'`, sg(clip(rho_t, ...)) A_t log p_t in place of the minimum.

    Args:
      logprobs, old_logprobs, ref_logprobs, sampler_logprobs: [R, T] float log-probabilities of the tokens under the
        policy, the policy at the rollout, the reference and the sampler. `old_logprobs=None` says the policy is the one
        that sampled (one update per rollout): the ratio is then 1 with the gradient of log p. `ref_logprobs=None`
        leaves out the KL term, `sampler_logprobs=None` the mismatch metrics.
      advantages, weights: [R, T] float; weights are zero outside the responses (`token_weights`).
      segment_ids: [R, T] int32, the packed sequences of a row; used by the ratios of whole responses.

    Returns:
      The scalar loss (a sum) and accumulators: kl, clip_frac, clip_frac_low, clip_frac_high, ratio_max, mismatch/*.
    """
    config = config.over(GRPO)
    mask = weights > 0
    reference = jax.lax.stop_gradient(logprobs) if old_logprobs is None else old_logprobs
    log_ratio = jnp.where(mask, logprobs - reference, 0.0)
    if config.ratio != "token":
        log_ratio = _sum_per_segment(log_ratio, segment_ids)
    if config.ratio == "geometric":
        lengths = _sum_per_segment(mask.astype(log_ratio.dtype), segment_ids)
        log_ratio = log_ratio / jnp.maximum(lengths, 1.0)
    log_ratio = jnp.clip(log_ratio, -kl.MAX_LOG_RATIO, kl.MAX_LOG_RATIO)
    ratio = jnp.exp(log_ratio)

    too_high = ratio > 1.0 + config.clip_high
    too_low = ratio < 1.0 - config.clip_low
    clipped_ratio = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    if config.objective == "weight":
        objective = jax.lax.stop_gradient(clipped_ratio) * advantages * logprobs
    else:
        objective = jnp.minimum(ratio * advantages, clipped_ratio * advantages)
        too_high, too_low = too_high & (advantages > 0), too_low & (advantages < 0)
    if config.dual_clip is not None:
        bounded = jnp.maximum(objective, config.dual_clip * advantages)
        objective = jnp.where(advantages < 0, bounded, objective)
    if config.importance_cap is not None:
        if sampler_logprobs is None:
            raise ValueError("importance_cap needs the sampler's log-probabilities")
        correction = jnp.exp(jnp.clip(reference - sampler_logprobs, -20.0, 20.0))
        objective *= jax.lax.stop_gradient(jnp.minimum(correction, config.importance_cap))

    count = mask.sum()
    metrics: dict[str, Mean | Max] = {
        "clip_frac": Mean(((too_high | too_low) & mask).sum(), count),
        "clip_frac_high": Mean((too_high & mask).sum(), count),
        "clip_frac_low": Mean((too_low & mask).sum(), count),
        "ratio_max": Max(jnp.where(mask, ratio, 0.0).max()),
    }
    if config.drop_above is not None:
        dropped = (advantages < 0) & (ratio > config.drop_above)
        objective = jnp.where(dropped, 0.0, objective)
        metrics["dropped_frac"] = Mean((dropped & mask).sum(), count)
    if ref_logprobs is not None:
        policy, ref = jnp.where(mask, logprobs, 0.0), jnp.where(mask, ref_logprobs, 0.0)
        if config.ratio == "sequence":
            policy, ref = (_sum_per_segment(x, segment_ids) for x in (policy, ref))
        kl_T = kl.estimate(policy, ref, config.kl_estimator, limit=config.kl_limit)
        objective = objective - config.kl_coef * kl_T
        metrics["kl"] = Mean(jnp.where(mask, kl_T, 0.0).sum(), count)
    if sampler_logprobs is not None:
        metrics |= _mismatch(reference, sampler_logprobs, mask)
    loss = -jnp.sum(jnp.where(mask, weights * objective, 0.0))
    return loss, jax.lax.stop_gradient(metrics)


def _mismatch(
    trainer_logprobs: Array, sampler_logprobs: Array, mask: Array
) -> dict[str, Mean | Max]:
    """How far the sampler's log-probabilities are from the trainer's, on the sampled tokens."""
    gap = jnp.where(mask, trainer_logprobs - sampler_logprobs, 0.0)
    count = mask.sum()
    off = jnp.abs(gap) > np.log(1.1)
    return {
        "mismatch/abs": Mean(jnp.abs(gap).sum(), count),
        "mismatch/max": Max(jnp.abs(gap).max()),
        "mismatch/kl": Mean(jnp.where(mask, jnp.expm1(gap) - gap, 0.0).sum(), count),
        "mismatch/ratio": Mean(jnp.where(mask, jnp.exp(gap), 0.0).sum(), count),
        "mismatch/frac>1.1": Mean((off & mask).sum(), count),
    }


def _sum_per_segment(values_RT: Array, segment_ids_RT: Array) -> Array:
    """Each token's entry becomes the sum over its own packed sequence."""
    row_length = values_RT.shape[-1]

    def one_row(values, segments):
        return jax.ops.segment_sum(values, segments, num_segments=row_length + 1)[segments]

    return jax.vmap(one_row)(values_RT, segment_ids_RT)
