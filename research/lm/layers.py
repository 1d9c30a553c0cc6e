"""What a decoder layer has besides attention: RMSNorm, rotary positions, SwiGLU.

Shape suffixes in `research.lm`: B batch, T query time, S key time, D hidden, N key-value heads,
G query heads per key-value head, K head size, F MLP size, V vocabulary, L layers.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.lm.config import DecoderConfig, Llama3Scaling


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, computed in float32 (Zhang and Sennrich 2019)."""

    eps: float
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


def xavier(fan_in: int, fan_out: int, gain: float = 1.0) -> float:
    """Standard deviation of a matrix under Xavier's initialisation (Glorot and Bengio 2010)."""
    return gain * (2 / (fan_in + fan_out)) ** 0.5


def deepnorm_gain(config: DecoderConfig) -> float:
    """Gain of value, output and MLP projections of a decoder of L layers (Wang et al. 2022, "DeepNet")."""
    return (8 * config.num_layers) ** -0.25


class Kernel(nn.Module):
    """A weight `kernel` and an optional `bias`, in the compute dtype; callers do the product.

    `stds`: under init='deepnorm' the standard deviation, or one for each slot of the last axis but one.
    """

    config: DecoderConfig
    shape: tuple[int, ...]
    bias_shape: tuple[int, ...] = ()
    use_bias: bool = False
    stds: tuple[float, ...] = ()

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | None]:
        c = self.config
        std = c.init_std if c.init == "normal" else np.asarray(self.stds, np.float32)[:, None]

        def init(key, shape, dtype):
            return jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)

        kernel = self.param("kernel", init, self.shape, c.param_dtype).astype(c.dtype)
        if not self.use_bias:
            return kernel, None
        bias = self.param("bias", nn.initializers.zeros, self.bias_shape, c.param_dtype)
        return kernel, bias.astype(c.dtype)


def dense(x, kernel):
    """x @ kernel over the last axis, as one matmul of two matrices.

    Of a batch of matrices XLA's CPU backend makes the weight's gradient by transposing copies.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD):
        c = self.config
        stds = (xavier(c.hidden_size, c.mlp_size, deepnorm_gain(c)),)
        gate_DF, _ = Kernel(c, (c.hidden_size, c.mlp_size), stds=stds, name="gate")()
        up_DF, _ = Kernel(c, (c.hidden_size, c.mlp_size), stds=stds, name="up")()
        down_FD, _ = Kernel(c, (c.mlp_size, c.hidden_size), stds=stds, name="down")()
        return dense(jax.nn.silu(dense(x_BTD, gate_DF)) * dense(x_BTD, up_DF), down_FD)


def rope_frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | None) -> np.ndarray:
    """Rotary frequencies in radians per token, float64 `[head_dim / 2]`, falling from 1.

    theta^(-2j/head_dim) (Su et al. 2021, eq. 15), stretched by `scaling` if given.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        s = scaling
        turns = s.original_max_position * frequencies / (2 * np.pi)  # in the original context
        keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        frequencies = frequencies * (keep + (1 - keep) / s.factor)
    return frequencies


def rope_angles(positions_BT, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position times frequency, float32 `[B, T, R/2]` each; below 0 counts as 0. R: dimensions turned.

    Summed from two small tables: cos(a + b) = cos a cos b - sin a sin b. Trigonometry would be
    fused into every layer and cost it more than its matmuls on CPUs, and the float32 product of a
    far position and a frequency is off by more than the table is.
    """
    frequencies = rope_frequencies(config.turned_dim, config.rope_theta, config.rope_scaling)

    def table(positions):
        angles = np.asarray(positions)[:, None] * frequencies
        return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)

    step = 256
    positions_BT = jnp.maximum(positions_BT, 0)
    cos_far, sin_far = (
        x[positions_BT // step] for x in table(range(0, config.max_position, step))
    )
    cos_near, sin_near = (x[positions_BT % step] for x in table(range(step)))
    return cos_far * cos_near - sin_far * sin_near, sin_far * cos_near + cos_far * sin_near


def rotate(x, cos, sin):
    """Turns the pairs (x[j], x[j + R/2]) of the first R entries of the last axis by the angles `[…, R/2]`."""
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate([*(y.astype(x.dtype) for y in turned), rest], axis=-1)
