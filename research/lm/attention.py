"""Grouped-query attention and the key-value cache it decodes from."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from research.lm.config import DecoderConfig
from research.lm.layers import Kernel, RMSNorm, rotate

MASKED = -1e30  # finite, so that a row with nothing to attend to (padding) stays free of NaN


class Cache(flax.struct.PyTreeNode):
    """Keys and values of the tokens so far, as a ring whose write head all rows share.

    Because every row writes at the same slot, a step is one `dynamic_update_slice` for the batch,
    whatever the ages of its rows: `positions` says which token of its row a slot holds.
    """

    layers: tuple[tuple[jax.Array, jax.Array], ...]  # per layer k [B, N, K, S] and v [B, N, S, K]
    positions: jax.Array  # [B, S] int32, -1 = empty
    index: jax.Array  # int32 scalar: tokens written so far; the next goes to slot index % S

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, length: int) -> "Cache":
        rows, K = (batch, config.num_kv_heads), config.head_dim
        return cls(
            layers=tuple(
                (
                    jnp.zeros((*rows, K, length), config.dtype),
                    jnp.zeros((*rows, length, K), config.dtype),
                )
                for _ in range(config.num_layers)
            ),
            positions=jnp.full((batch, length), -1, jnp.int32),
            index=jnp.zeros((), jnp.int32),
        )

    @property
    def slot(self) -> jax.Array:
        return self.index % self.positions.shape[1]


class Attention(nn.Module):
    """Causal softmax attention with rotary positions; q, k and v come from one fused matmul."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD, cos, sin, mask_BTS, cache=None, slot=None):
        """`cache` (k, v) is written at `slot` and attended to; returns (y_BTD, new (k, v))."""
        c = self.config
        N, G, K = c.num_kv_heads, c.group_size, c.head_dim
        fused = Kernel(
            c, (c.hidden_size, N, G + 2, K), (N, G + 2, K) if c.qkv_bias else None, name="qkv"
        )()
        if c.qkv_bias:
            kernel, bias = fused
            x_BTNHK = jnp.einsum("BTD,DNHK->BTNHK", x_BTD, kernel) + bias
        else:
            x_BTNHK = jnp.einsum("BTD,DNHK->BTNHK", x_BTD, fused)
        qk_BTNHK, v_BTNK = x_BTNHK[..., : G + 1, :], x_BTNHK[..., G + 1, :]
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, c.param_dtype, name="q_norm")(qk_BTNHK[..., :G, :])
            k = RMSNorm(c.norm_eps, c.param_dtype, name="k_norm")(qk_BTNHK[..., G:, :])
            qk_BTNHK = jnp.concatenate([q, k], axis=-2)
        qk_BTNHK = rotate(qk_BTNHK, cos[:, :, None, None], sin[:, :, None, None])
        q_BTNGK = qk_BTNHK[..., :G, :] * K**-0.5
        k_BNKS = qk_BTNHK[..., G, :].transpose(0, 2, 3, 1)
        v_BNSK = v_BTNK.swapaxes(1, 2)
        if cache is not None:
            k_BNKS = jax.lax.dynamic_update_slice(cache[0], k_BNKS, (0, 0, 0, slot))
            v_BNSK = jax.lax.dynamic_update_slice(cache[1], v_BNSK, (0, 0, slot, 0))
            cache = (k_BNKS, v_BNSK)
        y_BTNGK = attend(q_BTNGK, k_BNKS, v_BNSK, mask_BTS)
        out = Kernel(c, (N, G, K, c.hidden_size), name="o")()
        return jnp.einsum("BTNGK,NGKD->BTD", y_BTNGK, out), cache


def attend(q_BTNGK, k_BNKS, v_BNSK, mask_BTS):
    """softmax(q k^T where mask) v, the softmax in float32; q is already scaled."""
    B, T, N, G, K = q_BTNGK.shape
    q_BNRK = q_BTNGK.transpose(0, 2, 3, 1, 4).reshape(B, N, G * T, K)
    scores = jax.lax.dot_general(
        q_BNRK, k_BNKS, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
    ).reshape(B, N, G, T, -1)
    scores = jnp.where(mask_BTS[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BNSK.dtype).reshape(B, N, G * T, -1)
    out = jax.lax.dot_general(weights, v_BNSK, (((3,), (2,)), ((0, 1), (0, 1))))
    return out.reshape(B, N, G, T, K).transpose(0, 3, 1, 2, 4)


def segment_positions(segment_ids_BT) -> jax.Array:
    """Position of every token inside its segment, int32 `[B, T]`, of contiguous segments."""
    time = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1]), segment_ids_BT.shape)
    starts = jnp.diff(segment_ids_BT, axis=1, prepend=segment_ids_BT[:, :1] - 1) != 0
    return (time - jax.lax.cummax(jnp.where(starts, time, 0), axis=1)).astype(jnp.int32)


def causal_mask(segment_ids_BT=None, *, length=None) -> jax.Array:
    """Who sees whom: earlier tokens and itself, within its own segment. bool `[B or 1, T, T]`."""
    length = length or segment_ids_BT.shape[1]
    mask = jnp.tril(jnp.ones((1, length, length), bool))
    if segment_ids_BT is None:
        return mask
    return mask & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])
