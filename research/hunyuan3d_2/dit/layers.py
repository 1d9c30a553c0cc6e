"""Parts that both architectures of the diffusion transformer are made of.

Shape suffixes: B batch, L latents, T condition tokens, S all tokens of an attention, C latent channels, E condition
channels, D hidden size, H heads, K head size, X experts.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.hunyuan3d_2.dit.config import DiTConfig

EPS = 1e-6
_LOGITS_BYTES = 2**28  # what the attention logits of one chunk of queries may take


def sinusoids(values: jax.Array, size: int, max_period: float) -> jax.Array:
    """[cos(values ω), sin(values ω)] with ω_i = max_period^(-i / (size/2)): float32 [..., size]."""
    half = size // 2
    # Rounded to float32 where the released models' code does: an error of ω is a thousandfold in the angle.
    exponents = (
        np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half)
    )
    omega = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = values.astype(jnp.float32)[..., None] * omega
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def layer_norm(x: jax.Array) -> jax.Array:
    """x with mean 0 and variance 1 over the last axis, without scale and bias: float32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPS)


class RMSNorm(nn.Module):
    """scale · x / √(mean x² + ε) over the last axis, in float32; the result in x's type."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + EPS)
        return (wide * scale).astype(x.dtype)


def dense(config: DiTConfig, features: int, name: str | None = None, **kwargs) -> nn.Dense:
    """x W + b in the compute dtype; Xavier-uniform W and b = 0 at first."""
    settings = {"dtype": config.dtype, "kernel_init": nn.initializers.xavier_uniform(), **kwargs}
    return nn.Dense(features, name=name, **settings)


def zero_dense(config: DiTConfig, features: int, name: str | None = None) -> nn.Dense:
    """As `dense`, W = 0 at first: modulations and the last layer, so that blocks begin as the identity (adaLN-Zero,
    Peebles and Xie 2022, section 3.2)."""
    return dense(config, features, name, kernel_init=nn.initializers.zeros)


def attention(q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array) -> jax.Array:
    """softmax(q kᵀ / √K) v of every query over all keys: [B, T, H, K] in q's dtype; the softmax is float32.

    Where the logits of all queries would not fit into a modest memory, chunks of queries take turns.
    """
    if jax.default_backend() == "gpu" and q_BTHK.dtype != jnp.float32:
        return jax.nn.dot_product_attention(q_BTHK, k_BSHK, v_BSHK, implementation="cudnn")
    attend = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    B, T, H, K = q_BTHK.shape
    row_bytes = 4 * B * H * k_BSHK.shape[1]
    count = math.ceil(T * row_bytes / _LOGITS_BYTES)
    if count == 1:
        return attend(q_BTHK, k_BSHK, v_BSHK)
    chunk = math.ceil(T / count)
    padded = jnp.pad(q_BTHK, ((0, 0), (0, count * chunk - T), (0, 0), (0, 0)))
    chunks = jnp.moveaxis(padded.reshape(B, count, chunk, H, K), 1, 0)
    y = jax.lax.map(jax.checkpoint(lambda q: attend(q, k_BSHK, v_BSHK)), chunks)
    return jnp.moveaxis(y, 0, 1).reshape(B, count * chunk, H, K)[:, :T]


def rematerialised(block: type[nn.Module], config: DiTConfig) -> type[nn.Module]:
    """The block's class with what `config.remat` says about its backward pass."""
    if config.remat == "none":
        return block
    policy = (
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable if config.remat == "dots" else None
    )
    return nn.remat(block, policy=policy, prevent_cse=not config.scan_blocks)


def stack(block: type[nn.Module], config: DiTConfig, length: int, name: str) -> Callable:
    """`length` blocks in a row, (carry, vec) → (carry, None); their parameters lie on a leading axis."""
    stacked = nn.scan(
        rematerialised(block, config),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=length,
        unroll=1 if config.scan_blocks else True,
    )
    return stacked(config, name=name)


def with_positions(config: DiTConfig, x_BLD: jax.Array) -> jax.Array:
    """Latents with what `config.positions` adds to them: the sin-cos of their index."""
    if config.positions == "none":
        return x_BLD
    index_L = jnp.arange(x_BLD.shape[1], dtype=jnp.float32)
    return x_BLD + sinusoids(index_L, config.hidden_size, 10_000.0).astype(x_BLD.dtype)


def check_inputs(config: DiTConfig, x_BLC, t_B, cond_BTE, guidance_B) -> None:
    """Raises ValueError for inputs that do not fit the model or each other."""
    B = x_BLC.shape[0]
    if x_BLC.ndim != 3 or x_BLC.shape[2] != config.latent_dim:
        raise ValueError(f"latents must be [B, L, {config.latent_dim}], got {x_BLC.shape}")
    if cond_BTE.ndim != 3 or cond_BTE.shape[0] != B or cond_BTE.shape[2] != config.cond_dim:
        raise ValueError(
            f"condition tokens must be [{B}, T, {config.cond_dim}], got {cond_BTE.shape}; is it another image tower's?"
        )
    if t_B.shape != (B,):
        raise ValueError(f"times must be [{B}], got {t_B.shape}")
    if config.guidance_embed and (guidance_B is None or guidance_B.shape != (B,)):
        raise ValueError(
            f"this model takes the guidance scale as an input: guidance must be [{B}], got "
            f"{None if guidance_B is None else guidance_B.shape}"
        )
