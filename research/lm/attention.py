"""Grouped-query attention and the key-value cache it decodes from."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import flash_attention
from research.lm.config import DecoderConfig
from research.lm.layers import Kernel, RMSNorm, deepnorm_gain, dense, rotate, xavier

MASKED = -1e30  # finite: a row with nothing to attend to (padding) gets weights without NaN


# What a layer remembers. Softmax attention: k [B N, K, S] and v [B N, S, K]. Lightning attention:
# its state, float32 [B H, K, K] (keys, values).
Memory = tuple[jax.Array, jax.Array] | jax.Array


class Cache(flax.struct.PyTreeNode):
    """What the layers remember of the tokens so far; keys and values in a ring whose write head all rows share.

    Because every row writes at the same slot, a step is one `dynamic_update_slice` for the batch,
    whatever the ages of its rows: `positions` says which token of its row a slot holds.
    """

    layers: tuple[Memory, ...]
    positions: jax.Array  # [B, S] int32, -1 = empty
    index: jax.Array  # int32 scalar: tokens written so far; the next goes to slot index % S

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, length: int) -> "Cache":
        rows, K = batch * config.num_kv_heads, config.head_dim

        def memory(mixer):
            if mixer == "lightning":
                return jnp.zeros((batch * config.num_heads, K, K), jnp.float32)
            zeros = lambda *shape: jnp.zeros(shape, config.dtype)  # noqa: E731
            return zeros(rows, K, length), zeros(rows, length, K)

        return cls(
            layers=tuple(map(memory, config.layer_mixers)),
            positions=jnp.full((batch, length), -1, jnp.int32),
            index=jnp.zeros((), jnp.int32),
        )

    @property
    def slot(self) -> jax.Array:
        return self.index % self.positions.shape[1]


class Attention(nn.Module):
    """Softmax attention with rotary positions; q, k and v come from one matmul."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD, cos, sin, segment_ids=None, cache=None, slot=None, bias_BTS=None):
        """`cache` (k, v) is written at `slot`, and attended to where `bias_BTS` lets; returns (y_BTD, new (k, v)).

        Without a bias the tokens attend to each other alone, as without a cache.
        """
        c = self.config
        B, T, D = x_BTD.shape
        N, G, K = c.num_kv_heads, c.group_size, c.head_dim
        k_std, out_std = xavier(D, N * K), xavier(N * G * K, D, deepnorm_gain(c))
        stds = (*[xavier(D, N * G * K)] * G, k_std, k_std * deepnorm_gain(c))
        kernel, bias = Kernel(c, (D, N, G + 2, K), (N, G + 2, K), c.qkv_bias, stds, name="qkv")()
        x_BTNHK = dense(x_BTD, kernel.reshape(D, -1)).reshape(B, T, N, G + 2, K)
        if bias is not None:
            x_BTNHK += bias
        # split, not slices: its gradient is one concatenation
        qk_BTNHK, v_BTN1K = jnp.split(x_BTNHK, [G + 1], axis=3)
        if c.qk_norm:
            q, k = jnp.split(qk_BTNHK, [G], axis=3)
            q = RMSNorm(c.norm_eps, c.param_dtype, name="q_norm")(q)
            k = RMSNorm(c.norm_eps, c.param_dtype, name="k_norm")(k)
            qk_BTNHK = jnp.concatenate([q, k], axis=3)
        qk_BTNHK = rotate(qk_BTNHK, cos[:, :, None, None], sin[:, :, None, None])
        q_BTNGK, k_BTN1K = jnp.split(qk_BTNHK, [G], axis=3)
        k_BTNK, v_BTNK = k_BTN1K[:, :, :, 0], v_BTN1K[:, :, :, 0]
        if cache is not None:
            k_MKT = k_BTNK.transpose(0, 2, 3, 1).reshape(B * N, K, T)
            v_MTK = v_BTNK.swapaxes(1, 2).reshape(B * N, T, K)
            k_MKS = jax.lax.dynamic_update_slice(cache[0], k_MKT, (0, 0, slot))
            v_MSK = jax.lax.dynamic_update_slice(cache[1], v_MTK, (0, slot, 0))
            cache = (k_MKS, v_MSK)
        if bias_BTS is None:
            y_BTNGK = flash_attention(
                q_BTNGK, k_BTNK, v_BTNK, segment_ids=segment_ids, implementation=c.implementation
            )
        else:
            y_BTNGK = _from_rows(_attend(_to_rows(q_BTNGK), *cache, bias_BTS), B, T)
        out_NGKD, _ = Kernel(c, (N, G, K, D), stds=(out_std,), name="o")()
        return dense(y_BTNGK.reshape(B, T, -1), out_NGKD.reshape(-1, D)), cache


def _attend(q_MRK, k_MKS, v_MSK, bias_BTS):
    """softmax(q k^T / sqrt(K) + bias) v; M = B N, R = G T with T fastest.

    One batch axis, as in the cache: with two, of which one is 1, XLA would copy the cache.
    """
    M, R, K = q_MRK.shape
    B, T, S = bias_BTS.shape
    scores = _product(q_MRK, k_MKS).reshape(B, -1, T, S) * K**-0.5 + bias_BTS[:, None]
    scores = scores.reshape(M, R, S)
    exp_MRS = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    sum_MR1 = jnp.sum(exp_MRS, axis=-1, keepdims=True)
    return (_product(exp_MRS.astype(v_MSK.dtype), v_MSK) / sum_MR1).astype(v_MSK.dtype)


def _product(a, b):
    """Batched a @ b into float32."""
    return jax.lax.dot_general(a, b, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _to_rows(x_BTNGK):
    B, T, N, G, K = x_BTNGK.shape
    return x_BTNGK.transpose(0, 2, 3, 1, 4).reshape(B * N, G * T, K)


def _from_rows(x_MRK, B, T):
    M, R, K = x_MRK.shape
    return x_MRK.reshape(B, M // B, R // T, T, K).transpose(0, 3, 1, 2, 4)


def segment_positions(segment_ids_BT) -> jax.Array:
    """Position of every token inside its segment, int32 `[B, T]`, of contiguous segments."""
    time = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1]), segment_ids_BT.shape)
    starts = jnp.diff(segment_ids_BT, axis=1, prepend=segment_ids_BT[:, :1] - 1) != 0
    return (time - jax.lax.cummax(jnp.where(starts, time, 0), axis=1)).astype(jnp.int32)


def cached_bias(positions_BT, seen_BS) -> jax.Array:
    """0 for the slots that hold a token not after one's own position, else MASKED."""
    sees = (seen_BS >= 0)[:, None] & (seen_BS[:, None] <= positions_BT[:, :, None])
    return jnp.where(sees, 0.0, MASKED)
