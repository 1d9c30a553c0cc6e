"""Softmax attention without order or causality, in memory that stays bounded.

y_t = sum_s p_ts v_s,   p_t = softmax over s of q_t . k_s / sqrt(K)
"""

import functools

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that no row can turn into NaN
# Bytes of scores at a time. On a CPU a block should stay in cache; elsewhere memory decides.
SCORES, DEFAULT_SCORES = {"cpu": 2**23}, 2**29


def attention(
    q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, keep_BS: jax.Array | None = None
) -> jax.Array:
    """y `[B, T, H, K]` in q's dtype; float32 or bfloat16, with gradients.

    Keys and values may have one row for all of q's (B = 1). `keep_BS`, bool, leaves tokens out; one of
    each row must remain. Scores, softmax and sums are float32. Queries are taken in blocks whose scores
    are computed again in the backward pass; bfloat16 on a GPU goes to cuDNN's kernel instead, except
    inside `shard_map`, which does not admit it.
    """
    (B, T, H, _), S = q_BTHK.shape, k_BSHK.shape[1]
    if len(k_BSHK) == 1 and B > 1:  # one set of keys: the rows' queries are one longer row
        y = attention(q_BTHK.reshape(1, B * T, H, -1), k_BSHK, v_BSHK, keep_BS)
        return y.reshape(q_BTHK.shape)
    platform = jax.default_backend()
    if platform == "gpu" and q_BTHK.dtype == jnp.bfloat16 and keep_BS is None:
        if not jax.typeof(q_BTHK).manual_axis_type.varying:
            return jax.nn.dot_product_attention(q_BTHK, k_BSHK, v_BSHK, implementation="cudnn")
    k_MKS = k_BSHK.transpose(0, 2, 3, 1).reshape(B * H, -1, S)
    v_MSK = v_BSHK.transpose(0, 2, 1, 3).reshape(B * H, S, -1)
    q_MTK = q_BTHK.transpose(0, 2, 1, 3).reshape(B * H, T, -1)
    bias_M1S = None
    if keep_BS is not None:
        bias_M1S = jnp.repeat(jnp.where(keep_BS, 0.0, MASKED), H, axis=0)[:, None]
    block = max(8, SCORES.get(platform, DEFAULT_SCORES) // (4 * B * H * S) // 8 * 8)
    if block >= T:
        y_MTK = _dense(q_MTK, k_MKS, v_MSK, bias_M1S)
    else:
        count = -(-T // block)
        block = -(-T // count // 8) * 8  # the least padding, in whole vectors
        q_MTK = jnp.pad(q_MTK, ((0, 0), (0, -T % block), (0, 0)))
        q_ICMK = q_MTK.reshape(B * H, -1, block, q_MTK.shape[-1]).swapaxes(0, 1)
        y_IMCK = jax.lax.map(
            jax.checkpoint(lambda q_MCK: _dense(q_MCK, k_MKS, v_MSK, bias_M1S)), q_ICMK
        )
        y_MTK = y_IMCK.swapaxes(0, 1).reshape(B * H, -1, y_IMCK.shape[-1])[:, :T]
    return y_MTK.reshape(B, H, T, -1).transpose(0, 2, 1, 3)


def _dense(q_MTK, k_MKS, v_MSK, bias_M1S):
    scores_MTS = _product(q_MTK, k_MKS) * q_MTK.shape[-1] ** -0.5
    if bias_M1S is not None:
        scores_MTS += bias_M1S
    exp_MTS = jnp.exp(
        scores_MTS - jax.lax.stop_gradient(jnp.max(scores_MTS, axis=-1, keepdims=True))
    )
    sum_MT1 = jnp.sum(exp_MTS, axis=-1, keepdims=True)
    return (_product(exp_MTS.astype(v_MSK.dtype), v_MSK) / sum_MT1).astype(q_MTK.dtype)


_product = functools.partial(
    jax.lax.dot_general,
    dimension_numbers=(((2,), (1,)), ((0,), (0,))),
    preferred_element_type=jnp.float32,
)
