"""Grouped-query attention and the key-value cache it decodes from."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

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
    def __call__(self, x_BTD, cos, sin, bias_BTS, cache=None, slot=None):
        """`cache` (k, v) is written at `slot` and attended to; returns (y_BTD, new (k, v))."""
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
        if cache is None:
            y_BTNGK = attention(q_BTNGK, k_BTNK, v_BTNK, bias_BTS)
        else:
            k_MKT = k_BTNK.transpose(0, 2, 3, 1).reshape(B * N, K, T)
            v_MTK = v_BTNK.swapaxes(1, 2).reshape(B * N, T, K)
            k_MKS = jax.lax.dynamic_update_slice(cache[0], k_MKT, (0, 0, slot))
            v_MSK = jax.lax.dynamic_update_slice(cache[1], v_MTK, (0, slot, 0))
            cache = (k_MKS, v_MSK)
            y_BTNGK = _from_rows(_attend(_to_rows(q_BTNGK), *cache, bias_BTS)[0], B, T)
        out_NGKD, _ = Kernel(c, (N, G, K, D), stds=(out_std,), name="o")()
        return dense(y_BTNGK.reshape(B, T, -1), out_NGKD.reshape(-1, D)), cache


@jax.custom_vjp
def attention(q_BTNGK, k_BTNK, v_BTNK, bias_BTS):
    """softmax(q k^T / sqrt(K) + bias) v, the softmax in float32; bias gets no gradient.

    The gradient is written out so that every product has a layout that XLA's CPU backend is fast
    at, and the softmax's needs sums over K only: rowsum(p dp) = rowsum(y dy) (Dao et al. 2022).
    """
    return _attention(q_BTNGK, k_BTNK, v_BTNK, bias_BTS)[0]


def _attention(q_BTNGK, k_BTNK, v_BTNK, bias_BTS):
    B, T, N, _, K = q_BTNGK.shape
    k_MKS = k_BTNK.transpose(0, 2, 3, 1).reshape(B * N, K, T)
    v_MSK = v_BTNK.swapaxes(1, 2).reshape(B * N, T, K)
    y_MRK, exp_MRS, sum_MR1 = _attend(_to_rows(q_BTNGK), k_MKS, v_MSK, bias_BTS)
    return _from_rows(y_MRK, B, T), (q_BTNGK, k_MKS, v_MSK, y_MRK, exp_MRS, sum_MR1)


def _attention_gradient(saved, dy_BTNGK):
    q_BTNGK, k_MKS, v_MSK, y_MRK, exp_MRS, sum_MR1 = saved
    B, T, N, _, K = q_BTNGK.shape
    scale = K**-0.5
    dy_MRK = _to_rows(dy_BTNGK) / sum_MR1
    dy_MKR = _to_columns(dy_BTNGK) / sum_MR1.swapaxes(1, 2)
    dv_MKS = _product(dy_MKR.astype(exp_MRS.dtype), exp_MRS)
    delta_MR1 = jnp.sum(dy_MRK * y_MRK, axis=-1, keepdims=True)
    dp_MRS = _product(dy_MRK.astype(v_MSK.dtype), v_MSK, transposed=True)
    ds_MRS = (exp_MRS * (dp_MRS - delta_MR1)).astype(v_MSK.dtype)
    dq_MRK = _product(ds_MRS, k_MKS, transposed=True) * scale
    dk_MKS = _product(_to_columns(q_BTNGK) * scale, ds_MRS)
    dk, dv = (x.reshape(B, N, K, T).transpose(0, 3, 1, 2) for x in (dk_MKS, dv_MKS))
    return *(d.astype(q_BTNGK.dtype) for d in (_from_rows(dq_MRK, B, T), dk, dv)), None


attention.defvjp(_attention, _attention_gradient)


def _attend(q_MRK, k_MKS, v_MSK, bias_BTS):
    """Output, and the softmax's exponentials and their sums; M = B N, R = G T with T fastest.

    One batch axis, as in the cache: with two, of which one is 1, XLA would copy the cache.
    """
    M, R, K = q_MRK.shape
    B, T, S = bias_BTS.shape
    if B == 1:  # the same for all rows
        scores = _product(q_MRK, k_MKS).reshape(M, R // T, T, S) * K**-0.5 + bias_BTS
    else:
        scores = _product(q_MRK, k_MKS).reshape(B, -1, T, S) * K**-0.5 + bias_BTS[:, None]
    scores = scores.reshape(M, R, S)
    exp_MRS = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    sum_MR1 = jnp.sum(exp_MRS, axis=-1, keepdims=True)
    exp_MRS = exp_MRS.astype(v_MSK.dtype)
    return (_product(exp_MRS, v_MSK) / sum_MR1).astype(v_MSK.dtype), exp_MRS, sum_MR1


def _product(a, b, transposed=False):
    """Batched a @ b, or a @ b^T, into float32."""
    dims = (((2,), (2 if transposed else 1,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _to_rows(x_BTNGK):
    B, T, N, G, K = x_BTNGK.shape
    return x_BTNGK.transpose(0, 2, 3, 1, 4).reshape(B * N, G * T, K)


def _to_columns(x_BTNGK):
    B, T, N, G, K = x_BTNGK.shape
    return x_BTNGK.transpose(0, 2, 4, 3, 1).reshape(B * N, K, G * T)


def _from_rows(x_MRK, B, T):
    M, R, K = x_MRK.shape
    return x_MRK.reshape(B, M // B, R // T, T, K).transpose(0, 3, 1, 2, 4)


def segment_positions(segment_ids_BT) -> jax.Array:
    """Position of every token inside its segment, int32 `[B, T]`, of contiguous segments."""
    time = jnp.broadcast_to(jnp.arange(segment_ids_BT.shape[1]), segment_ids_BT.shape)
    starts = jnp.diff(segment_ids_BT, axis=1, prepend=segment_ids_BT[:, :1] - 1) != 0
    return (time - jax.lax.cummax(jnp.where(starts, time, 0), axis=1)).astype(jnp.int32)


def causal_bias(length: int, segment_ids_BT=None) -> jax.Array:
    """0 for earlier tokens of the same segment and itself, else MASKED; float32 `[B or 1, T, T]`."""
    sees = jnp.tril(jnp.ones((1, length, length), bool))
    if segment_ids_BT is not None:
        sees &= segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return jnp.where(sees, 0.0, MASKED)


def cached_bias(positions_BT, seen_BS) -> jax.Array:
    """0 for the slots that hold a token not after one's own position, else MASKED."""
    sees = (seen_BS >= 0)[:, None] & (seen_BS[:, None] <= positions_BT[:, :, None])
    return jnp.where(sees, 0.0, MASKED)
