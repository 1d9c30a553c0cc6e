"""Flow matching (section 3.2 of the paper, equation 2): a network learns the velocity from noise to data.

    x_t = (1 - t) x_0 + t x_1,   x_0 ~ N(0, I),   u = x_1 - x_0,   L = E |v(x_t, t, c) - u|²

t = 0 is noise, t = 1 is data. All that is random in a row comes from that row's own key, so a loss does not depend on
how rows are spread over devices.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """How a training example is made.

    time: the law of t: uniform in [0, 1], or the logistic function of a normal variable with `mean` and `std`.
    shift: s > 1 moves times towards data: t' = s t / (1 + (s - 1) t), the sampler's rule. (2.1's training code takes
      the square root of its `shift_scale` here.)
    cond_dropout: in this share of the rows the condition is zeros, so that guidance has its unconditional model.
    """

    time: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    cond_dropout: float = 0.1

    def __post_init__(self):
        if self.std <= 0 or self.shift <= 0:
            raise ValueError(f"std and shift must be positive, got {self.std} and {self.shift}")
        if not 0 <= self.cond_dropout < 1:
            raise ValueError(f"cond_dropout must be in [0, 1), got {self.cond_dropout}")


def shifted(t: Any, shift: float) -> Any:
    """s t / (1 + (s - 1) t): [0, 1] onto itself."""
    return shift * t / (1 + (shift - 1) * t)


def sample_time(key: jax.Array, config: FlowConfig) -> jax.Array:
    """A time in [0, 1], float32 []."""
    if config.time == "uniform":
        t = jax.random.uniform(key)
    else:
        t = jax.nn.sigmoid(config.mean + config.std * jax.random.normal(key))
    return shifted(t, config.shift)


def interpolate(x0: jax.Array, x1: jax.Array, t_B: jax.Array) -> jax.Array:
    """x_t of every row, with t = 0 at x0 (noise)."""
    t = t_B.reshape(t_B.shape + (1,) * (x1.ndim - 1))
    return (1 - t) * x0 + t * x1


def drop_condition(cond_BTE: jax.Array, dropped_B: jax.Array) -> jax.Array:
    """The condition with zeros, which is 'none', in the rows that are dropped (bool [B])."""
    return jnp.where(dropped_B[:, None, None], jnp.zeros_like(cond_BTE), cond_BTE)


def velocity_errors(
    model: nn.Module,
    params: Any,
    x0_BLC: jax.Array,
    x1_BLC: jax.Array,
    t_B: jax.Array,
    cond_BTE: jax.Array,
) -> jax.Array:
    """The mean of (v - u)² over latents and channels, of every row: float32 [B].

    A model that takes the guidance scale learns with 1: the velocity of the data themselves.
    """
    ones_B = jnp.ones_like(t_B) if model.config.guidance_embed else None
    v_BLC = model.apply({"params": params}, interpolate(x0_BLC, x1_BLC, t_B), t_B, cond_BTE, ones_B)
    return jnp.mean(jnp.square(v_BLC - (x1_BLC - x0_BLC)), axis=(1, 2))


def row_errors(
    model: nn.Module,
    params: Any,
    x1_BLC: jax.Array,
    cond_BTE: jax.Array,
    keys_B: jax.Array,
    config: FlowConfig,
) -> tuple[jax.Array, jax.Array]:
    """(the loss of every row, its time), both float32 [B], with noise, time and dropping from the rows' keys."""

    def draw(key, x1_LC):
        noise_key, time_key, drop_key = jax.random.split(key, 3)
        dropped = jax.random.bernoulli(drop_key, config.cond_dropout)
        return jax.random.normal(noise_key, x1_LC.shape), sample_time(time_key, config), dropped

    x0_BLC, t_B, dropped_B = jax.vmap(draw)(keys_B, x1_BLC)
    cond_BTE = drop_condition(cond_BTE, dropped_B)
    return velocity_errors(model, params, x0_BLC, x1_BLC, t_B, cond_BTE), t_B
