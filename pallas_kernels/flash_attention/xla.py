"""Portable: dense for short sequences, and blocks of scores with a running softmax for long ones.

Both write the gradient out. With P the softmax, delta_i = dy_i . y_i, and E = dY V^T,

    dV = P^T dY     dS = P * (E - delta)     dQ = dS K / sqrt(K)     dK = dS^T Q / sqrt(K)

so that the softmax's own gradient needs sums over K only (Dao et al. 2022, FlashAttention). The
dense form keeps the scores' exponentials; the blocked one computes them again from q, k and each
row's log-sum-exp.
"""

import functools

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that no row can turn into NaN
# The longest sequence in the dense form, and then the most tokens in a block, of queries and of
# keys. Measured on CPU, where a block's scores should stay in cache; elsewhere memory decides.
DENSE, BLOCK = {"cpu": 256}, {"cpu": 128}
DEFAULT_DENSE, DEFAULT_BLOCK = 2048, 512


def flash_attention(q_BTNGK, k_BTNK, v_BTNK, segment_ids):
    T, platform = q_BTNGK.shape[1], jax.default_backend()
    if T <= DENSE.get(platform, DEFAULT_DENSE):
        return dense(q_BTNGK, k_BTNK, v_BTNK, _bias(T, segment_ids))
    count = -(-T // BLOCK.get(platform, DEFAULT_BLOCK))
    block = -(-T // count // 8) * 8  # the least padding, in whole vectors
    return blocked(q_BTNGK, k_BTNK, v_BTNK, segment_ids, block)


def _bias(T, segment_ids):
    """0 for earlier tokens of the same segment and itself, else MASKED; float32 `[B or 1, T, T]`."""
    sees = jnp.tril(jnp.ones((1, T, T), bool))
    if segment_ids is not None:
        sees &= segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.where(sees, 0.0, MASKED)


@jax.custom_vjp
def dense(q_BTNGK, k_BTNK, v_BTNK, bias_BTS):
    """softmax(q k^T / sqrt(K) + bias) v; every product in a layout XLA's CPU backend is fast at."""
    return _dense(q_BTNGK, k_BTNK, v_BTNK, bias_BTS)[0]


def _dense(q_BTNGK, k_BTNK, v_BTNK, bias_BTS):
    B, T, N, _, K = q_BTNGK.shape
    k_MKS = k_BTNK.transpose(0, 2, 3, 1).reshape(B * N, K, T)
    v_MSK = v_BTNK.swapaxes(1, 2).reshape(B * N, T, K)
    scores_MRS = _product(_to_rows(q_BTNGK), k_MKS)
    # the same for all rows of the batch, or one for each
    scores = scores_MRS.reshape(*((-1, T, T) if len(bias_BTS) == 1 else (B, -1, T, T)))
    scores = scores * K**-0.5 + (bias_BTS if len(bias_BTS) == 1 else bias_BTS[:, None])
    scores_MRS = scores.reshape(scores_MRS.shape)
    exp_MRS = jnp.exp(scores_MRS - jnp.max(scores_MRS, axis=-1, keepdims=True))
    sum_MR1 = jnp.sum(exp_MRS, axis=-1, keepdims=True)
    exp_MRS = exp_MRS.astype(v_MSK.dtype)
    y_MRK = (_product(exp_MRS, v_MSK) / sum_MR1).astype(v_MSK.dtype)
    return _from_rows(y_MRK, B, T), (q_BTNGK, k_MKS, v_MSK, y_MRK, exp_MRS, sum_MR1)


def _dense_gradient(saved, dy_BTNGK):
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


dense.defvjp(_dense, _dense_gradient)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def blocked(q_BTNGK, k_BTNK, v_BTNK, segment_ids, block):
    """The same in memory of O(T block): blocks above the diagonal, and of other segments, skipped."""
    return _blocked(q_BTNGK, k_BTNK, v_BTNK, segment_ids, block)[0]


def _blocked(q_BTNGK, k_BTNK, v_BTNK, segment_ids, block):
    K = q_BTNGK.shape[-1]
    q_IMRK = _query_blocks(q_BTNGK, block)
    k_JMSK, v_JMSK = (_query_blocks(x[:, :, :, None], block) for x in (k_BTNK, v_BTNK))
    first_I, masked = _masks(q_IMRK, segment_ids, block)

    def queries(i):
        q_MRK = q_IMRK[i]

        def keys(j, carry, diagonal=False):
            top_MR1, sum_MR1, y_MRK = carry
            scores_MRS = _product(q_MRK, k_JMSK[j], transposed=True) * K**-0.5
            scores_MRS = masked(scores_MRS, i, j, diagonal)
            new_MR1 = jnp.maximum(top_MR1, jnp.max(scores_MRS, axis=-1, keepdims=True))
            exp_MRS = jnp.exp(scores_MRS - new_MR1)
            shrink_MR1 = jnp.exp(top_MR1 - new_MR1)
            sum_MR1 = shrink_MR1 * sum_MR1 + jnp.sum(exp_MRS, axis=-1, keepdims=True)
            y_MRK = shrink_MR1 * y_MRK + _product(exp_MRS.astype(v_JMSK.dtype), v_JMSK[j])
            return new_MR1, sum_MR1, y_MRK

        start = tuple(
            jnp.full_like(q_MRK, x, jnp.float32, (*q_MRK.shape[:2], size))
            for x, size in ((MASKED, 1), (0, 1), (0, K))
        )
        # the diagonal first: it gives every row a finite maximum
        carry = jax.lax.fori_loop(first_I[i], i, keys, keys(i, start, diagonal=True))
        top_MR1, sum_MR1, y_MRK = carry
        return (y_MRK / sum_MR1).astype(q_MRK.dtype), top_MR1 + jnp.log(sum_MR1)

    y_IMRK, lse_IMR1 = jax.lax.map(queries, jnp.arange(len(q_IMRK)))
    y_BTNGK = _from_query_blocks(y_IMRK, q_BTNGK.shape, block)
    return y_BTNGK, (q_BTNGK, k_BTNK, v_BTNK, segment_ids, y_BTNGK, lse_IMR1)


def _blocked_gradient(block, saved, dy_BTNGK):
    q_BTNGK, k_BTNK, v_BTNK, segment_ids, y_BTNGK, lse_IMR1 = saved
    K = q_BTNGK.shape[-1]
    q_IMRK, dy_IMRK, y_IMRK = (_query_blocks(x, block) for x in (q_BTNGK, dy_BTNGK, y_BTNGK))
    k_JMSK, v_JMSK = (_query_blocks(x[:, :, :, None], block) for x in (k_BTNK, v_BTNK))
    first_I, masked = _masks(q_IMRK, segment_ids, block)
    delta_IMR1 = jnp.sum(dy_IMRK * y_IMRK, axis=-1, keepdims=True, dtype=jnp.float32)

    def queries(carry, xs):
        i, q_MRK, dy_MRK, delta_MR1, lse_MR1 = xs
        q_MKR, dy_MKR = (x.swapaxes(1, 2) for x in (q_MRK * K**-0.5, dy_MRK))

        def keys(j, carry, diagonal=False):
            dq_MRK, dk_JMKS, dv_JMKS = carry
            k_MSK, v_MSK = k_JMSK[j], v_JMSK[j]
            scores_MRS = _product(q_MRK, k_MSK, transposed=True) * K**-0.5
            p_MRS = jnp.exp(masked(scores_MRS, i, j, diagonal) - lse_MR1)
            dp_MRS = _product(dy_MRK, v_MSK, transposed=True)
            ds_MRS = (p_MRS * (dp_MRS - delta_MR1)).astype(q_MRK.dtype)
            dq_MRK += _product(ds_MRS, k_MSK)
            dk_JMKS = dk_JMKS.at[j].add(_product(q_MKR, ds_MRS))
            dv_JMKS = dv_JMKS.at[j].add(_product(dy_MKR, p_MRS.astype(q_MRK.dtype)))
            return dq_MRK, dk_JMKS, dv_JMKS

        carry = keys(i, (jnp.zeros_like(q_MRK, jnp.float32), *carry), diagonal=True)
        dq_MRK, *carry = jax.lax.fori_loop(first_I[i], i, keys, carry)
        return tuple(carry), (dq_MRK * K**-0.5).astype(q_MRK.dtype)

    J, M, S, _ = k_JMSK.shape
    zeros = (jnp.full_like(k_JMSK, 0, jnp.float32, (J, M, K, S)),) * 2
    xs = jnp.arange(len(q_IMRK)), q_IMRK, dy_IMRK, delta_IMR1, lse_IMR1
    gradients, dq_IMRK = jax.lax.scan(queries, zeros, xs)
    dk, dv = (
        _from_query_blocks(x.swapaxes(2, 3), (*k_BTNK.shape[:3], 1, K), block)[:, :, :, 0]
        for x in gradients
    )
    dq = _from_query_blocks(dq_IMRK, q_BTNGK.shape, block)
    return *(d.astype(q_BTNGK.dtype) for d in (dq, dk, dv)), None


blocked.defvjp(_blocked, _blocked_gradient)


def _masks(q_IMRK, segment_ids, block):
    """First block of keys for each block of queries, and scores -> scores with MASKED ones.

    Segments are contiguous, so a query sees the keys from its segment's start to itself.
    """
    I = len(q_IMRK)
    first_I = jnp.full_like(q_IMRK, 0, jnp.int32, (I,))
    if segment_ids is not None:
        B, T = segment_ids.shape
        begins_BT = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
        starts_BT = jax.lax.cummax(jnp.where(begins_BT, jnp.arange(T), 0), axis=1)
        first_I = jnp.min(starts_BT[:, ::block], axis=0) // block
        starts_BIC = jnp.pad(starts_BT, ((0, 0), (0, I * block - T))).reshape(B, I, block)

    def masked(scores_MRS, i, j, diagonal):
        if not diagonal and segment_ids is None:
            return scores_MRS
        keys_S = jnp.arange(block)
        sees = keys_S <= keys_S[:, None] if diagonal else True
        if segment_ids is not None:
            starts_BC = starts_BIC[:, i] - j * block
            sees &= keys_S >= starts_BC[:, None, :, None]
        scores = scores_MRS.reshape(1 if segment_ids is None else B, -1, block, block)
        return jnp.where(sees, scores, MASKED).reshape(scores_MRS.shape)

    return first_I, masked


def _query_blocks(x_BTNGK, block):
    """`[blocks, B N, G block, K]`, time fastest; zeros after the end."""
    B, T, N, G, K = x_BTNGK.shape
    x = jnp.pad(x_BTNGK, ((0, 0), (0, -T % block), (0, 0), (0, 0), (0, 0)))
    x_BICNGK = x.reshape(B, -1, block, N, G, K)
    return x_BICNGK.transpose(1, 0, 3, 4, 2, 5).reshape(-1, B * N, G * block, K)


def _from_query_blocks(x_IMRK, shape, block):
    B, T, N, G, K = shape
    x_BICNGK = x_IMRK.reshape(-1, B, N, G, block, K).transpose(1, 0, 4, 2, 3, 5)
    return x_BICNGK.reshape(B, -1, N, G, K)[:, :T]


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
