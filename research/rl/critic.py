"""PPO's critic: its settings and its loss. It is a second decoder, which starts from the policy's parameters."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from research.core.metrics import Mean
from research.core.optim import OptimConfig


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    """optim: of its own; 9e-6 is what the REINFORCE++ paper's PPO takes.
    clip: a value may move so far from that of the rollout before its loss is that of the bound (None: anywhere).
    pretrain: in the first so many rollouts the critic alone learns, and the policy stays what it is.
    """

    optim: OptimConfig = OptimConfig(lr=9e-6)
    clip: float | None = 0.5
    pretrain: int = 0

    def __post_init__(self):
        if self.pretrain < 0 or (self.clip is not None and not self.clip > 0):
            raise ValueError(
                f"critic: pretrain={self.pretrain}, clip={self.clip}: must be positive"
            )


def value_loss(
    *, values: Array, old_values: Array, returns: Array, weights: Array, clip: float | None
) -> tuple[Array, dict[str, Mean]]:
    """sum_t w_t max((V_t - R_t)^2, (clip(V_t, V_old +- clip) - R_t)^2) / 2 on packed rows.

    All [R, T] float; weights as `losses.token_weights` gives them, 0 outside the responses. Returns the scalar loss and
    accumulators: value/loss, value/error (mean |V - R|), value/clip_frac.
    """
    mask = weights > 0
    error = jnp.where(mask, values - returns, 0.0)
    squares = jnp.square(error)
    clipped = jnp.zeros_like(mask)
    if clip is not None:
        bounded = jnp.clip(values, old_values - clip, old_values + clip)
        other = jnp.where(mask, jnp.square(bounded - returns), 0.0)
        clipped = other > squares
        squares = jnp.maximum(squares, other)
    count = mask.sum()
    metrics = {
        "value/loss": Mean(0.5 * squares.sum(), count),
        "value/error": Mean(jnp.abs(error).sum(), count),
        "value/clip_frac": Mean(clipped.sum(), count),
    }
    return 0.5 * jnp.sum(weights * squares), jax.lax.stop_gradient(metrics)
