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


class Kernel(nn.Module):
    """A bare weight named `kernel` (and `bias`), in the compute dtype; callers write the einsum."""

    config: DecoderConfig
    shape: tuple[int, ...]
    bias_shape: tuple[int, ...] | None = None

    @nn.compact
    def __call__(self):
        c = self.config
        init = nn.initializers.normal(c.init_std)
        kernel = self.param("kernel", init, self.shape, c.param_dtype).astype(c.dtype)
        if self.bias_shape is None:
            return kernel
        bias = self.param("bias", nn.initializers.zeros, self.bias_shape, c.param_dtype)
        return kernel, bias.astype(c.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD):
        c = self.config
        gate_DF = Kernel(c, (c.hidden_size, c.mlp_size), name="gate")()
        up_DF = Kernel(c, (c.hidden_size, c.mlp_size), name="up")()
        down_FD = Kernel(c, (c.mlp_size, c.hidden_size), name="down")()
        return (jax.nn.silu(x_BTD @ gate_DF) * (x_BTD @ up_DF)) @ down_FD


def rope_frequencies(head_dim: int, theta: float, scaling: Llama3Scaling | None) -> np.ndarray:
    """Rotary frequencies in radians per token, float32 `[head_dim / 2]`, falling from 1.

    theta^(-2j/head_dim) (Su et al. 2021, eq. 15), stretched by `scaling` if given.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None:
        s = scaling
        turns = s.original_max_position * frequencies / (2 * np.pi)  # in the original context
        keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        frequencies = frequencies * (keep + (1 - keep) / s.factor)
    return frequencies.astype(np.float32)


def rope_angles(positions_BT, config: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position times frequency, float32 `[B, T, K/2]` each."""
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))  # once, not per layer


def rotate(x, cos, sin):
    """Turns the pairs (x[j], x[j + K/2]) of the last axis by the angles (half-split layout)."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
