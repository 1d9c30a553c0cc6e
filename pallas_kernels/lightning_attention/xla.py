"""Portable and fast: a loop over blocks of tokens that carries the float32 state.

With r = 1..m the index of a token in its block, S the state at the block's entry, and M the decays
e^(-s(i-j)) for i >= j, else 0, a block computes

    O  = ((Q K^T) * M) V + e^(-s r) (Q S)
    S' = e^(-s m) S + (e^(-s(m-r)) K)^T V

and, given dO and G = dL/dS', with A = (dO V^T) * M and P = (Q K^T) * M,

    dQ = A K + e^(-s r) (dO S^T)              dK = A^T Q + e^(-s(m-r)) (V G^T)
    dV = P^T dO + e^(-s(m-r)) (K G)           dL/dS = e^(-s m) G + (e^(-s r) Q)^T dO

The forward pass saves every block's entry state beside its inputs, so that the backward one is a
single sweep from the end in which dQ, dK and dV share A and P. Decays come from differences of
positions; they are never split into e^(-s i) e^(s j), which overflows within 100 tokens at s = 0.9.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class _Decays(NamedTuple):
    """How much passes, in a block of C tokens; 0 where nothing does. Leading axis 1: all rows."""

    within_BHCC: jax.Array  # from token j to token i
    entry_BHC1: jax.Array  # from the state before the block to token i
    exit_BHC1: jax.Array  # from token j to the state after the block
    carry_BH11: jax.Array  # from the state before to the state after


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def lightning_attention(q, k, v, slopes_H, initial_state, segment_ids, lengths, block):
    inputs = q, k, v, slopes_H, initial_state, segment_ids, lengths
    return _forward(*inputs, block, keep=False)[:2]


def _save(*inputs_and_block):
    *inputs, block = inputs_and_block
    inputs = [None if x is None else x.value for x in inputs]
    o, final_state, states = _forward(*inputs, block, keep=True)
    return (o, final_state), (*inputs, states)


def _forward(q, k, v, slopes_H, initial_state, segment_ids, lengths, block, keep):
    B, T, H, K = q.shape
    V = v.shape[-1]
    decays = _decays(slopes_H, T, block, segment_ids, lengths)

    def attend(carry, index, size):
        state_MKV, o_BTHV, states = carry
        start = index * block
        decay = decays(start, size)
        unread_q = o_BTHV if K == V else q
        q_MCK, k_MCK, v_MCV = (_rows(x, start, size) for x in (unread_q, k, v))
        p_MCC = _scale(decay.within_BHCC, _product(q_MCK, k_MCK, transposed=True)).astype(q.dtype)
        o_MCV = _product(p_MCC, v_MCV)
        exit_MKC = _scale(decay.exit_BHC1, k_MCK).astype(q.dtype).swapaxes(1, 2)
        new_MKV = _product(exit_MKC, v_MCV)
        if state_MKV is not None:
            seen_MCV = _product(q_MCK, state_MKV.astype(q.dtype))
            o_MCV += _scale(decay.entry_BHC1, seen_MCV)
            new_MKV += _scale(decay.carry_BH11, state_MKV)
            if keep:
                states = jax.lax.dynamic_update_index_in_dim(states, state_MKV, index, 0)
        return new_MKV, _write(o_BTHV, o_MCV, start), states

    count = -(-T // block)
    state_MKV = None if initial_state is None else initial_state.reshape(B * H, K, V)
    if initial_state is None and T // block > 1:
        state_MKV = jnp.full_like(q, 0, jnp.float32, (B * H, K, V))
    # Where shapes allow, o takes q's place block by block: a large array less if q is not kept.
    o_BTHV = q if K == V else jnp.full_like(q, 0, shape=(B, T, H, V))
    states = jnp.full_like(q, 0, jnp.float32, (count, B * H, K, V)) if keep else None
    state_MKV, o_BTHV, states = _walk(attend, (state_MKV, o_BTHV, states), T, block)
    return o_BTHV, state_MKV.reshape(B, H, K, V), states


def _backward(block, saved, cotangents):
    q, k, v, slopes_H, initial_state, segment_ids, lengths, states = saved
    d_o, d_final = cotangents
    B, T, H, K = q.shape
    V = v.shape[-1]
    decays = _decays(slopes_H, T, block, segment_ids, lengths)
    if isinstance(d_o, jax.custom_derivatives.SymbolicZero):
        d_o = jnp.zeros_like(v, shape=(B, T, H, V), dtype=q.dtype)

    def pull(carry, index, size):
        g_MKV, dq_BTHK, dk_BTHK, dv_BTHV = carry
        start = index * block
        decay = decays(start, size)
        q_MCK, k_MCK, v_MCV, do_MCV = (_rows(x, start, size) for x in (q, k, v, d_o))
        # Each product comes out in the layout that the next one reads: q alone is transposed.
        q_MKC = q_MCK.swapaxes(1, 2)
        within_BHCC = decay.within_BHCC
        a_MCC = _scale(within_BHCC, _product(do_MCV, v_MCV, transposed=True)).astype(q.dtype)
        p_MCC = _scale(within_BHCC.mT, _product(k_MCK, q_MCK, transposed=True)).astype(q.dtype)
        dq_MCK = _product(a_MCC, k_MCK)
        dk_MKC = _product(q_MKC, a_MCC)
        dv_MCV = _product(p_MCC, do_MCV)
        new_MKV = _product(q_MKC, _scale(decay.entry_BHC1, do_MCV).astype(q.dtype))
        if g_MKV is not None:
            g = g_MKV.astype(q.dtype)
            dk_MKC += _scale(decay.exit_BHC1.mT, _product(g, v_MCV, transposed=True))
            dv_MCV += _scale(decay.exit_BHC1, _product(k_MCK, g))
            new_MKV += _scale(decay.carry_BH11, g_MKV)
        if not (initial_state is None and count == 1):
            state = jax.lax.dynamic_index_in_dim(states, index, 0, keepdims=False).astype(q.dtype)
            dq_MCK += _scale(decay.entry_BHC1, _product(do_MCV, state, transposed=True))
        return (
            new_MKV,
            _write(dq_BTHK, dq_MCK, start),
            _write(dk_BTHK, dk_MKC.swapaxes(1, 2), start),
            _write(dv_BTHV, dv_MCV, start),
        )

    count = -(-T // block)
    if not isinstance(d_final, jax.custom_derivatives.SymbolicZero):
        g_MKV = d_final.reshape(B * H, K, V)
    elif T % block == 0 and count > 1:
        g_MKV = jnp.full_like(q, 0, jnp.float32, (B * H, K, V))
    else:
        g_MKV = None
    zeros = tuple(jnp.zeros_like(x) for x in (q, k, v))
    g_MKV, *gradients = _walk(pull, (g_MKV, *zeros), T, block, reverse=True)
    d_initial = None if initial_state is None else g_MKV.reshape(B, H, K, V)
    return *gradients, None, d_initial, None, None


lightning_attention.defvjp(_save, _backward, symbolic_zeros=True)


def _walk(step, carry, T, block, reverse=False):
    """carry = step(carry, index, size) over whole blocks and, at the end of time, a shorter one."""
    count, rest = divmod(T, block)
    if rest and reverse:
        carry = step(carry, count, rest)
    if count == 1:
        carry = step(carry, 0, block)
    else:
        order = (lambda i: count - 1 - i) if reverse else (lambda i: i)
        carry = jax.lax.fori_loop(0, count, lambda i, x: step(x, order(i), block), carry)
    if rest and not reverse:
        carry = step(carry, count, rest)
    return carry


def _decays(slopes_H, T, block, segment_ids, lengths):
    """A function (start, size) -> the _Decays of that block."""
    s_H11 = slopes_H.astype(jnp.float32)[:, None, None]

    def plain(size):
        r_C = jnp.arange(1, size + 1)
        lag_CC = r_C[:, None] - r_C
        within = jnp.exp(jnp.where(lag_CC >= 0, -s_H11 * lag_CC, -jnp.inf))
        entry, leave = (jnp.exp(-s_H11 * x[:, None]) for x in (r_C, size - r_C))
        return _Decays(*(x[None] for x in (within, entry, leave, jnp.exp(-s_H11 * size))))

    # the same for every block: computed once, outside the loop
    known = {size: plain(size) for size in {block, T % block} if 0 < size <= T}
    if segment_ids is None and lengths is None:
        return lambda start, size: known[size]

    # Column t: the state after t tokens. Padding neither counts as time nor has its own segment.
    B = (segment_ids if lengths is None else lengths).shape[0]
    time_BU = jnp.broadcast_to(jnp.arange(T + 1), (B, T + 1))
    if lengths is not None:
        time_BU = jnp.minimum(time_BU, lengths[:, None])
    if segment_ids is None:
        segment_BU = jnp.zeros_like(time_BU)
    else:
        segment_BU = jnp.take_along_axis(segment_ids, jnp.maximum(time_BU - 1, 0), axis=1)

    def masked(start, size):
        time_BU1, segment_BU1 = (
            jax.lax.dynamic_slice_in_dim(x, start, size + 1, axis=1)[:, None, :, None]
            for x in (time_BU, segment_BU)
        )
        before, after = slice(0, 1), slice(size, size + 1)
        time, segment = time_BU1[:, :, 1:], segment_BU1[:, :, 1:]
        real = time > time_BU1[:, :, :-1]

        def decay(time, allowed):
            return jnp.exp(jnp.where(allowed, -s_H11 * time, -jnp.inf))

        def since(x, y):
            return time_BU1[:, :, x] - time_BU1[:, :, y]

        # where each token's segment begins in this block: comparing pairs of ids is slower
        j_C = jnp.arange(size)
        same = segment == segment.mT
        begin = jnp.min(jnp.where(same, j_C[:, None], size), axis=2, keepdims=True).mT
        return _Decays(
            jnp.where(real & (j_C >= begin), known[size].within_BHCC, 0),
            decay(time - time_BU1[:, :, before], real & (segment == segment_BU1[:, :, before])),
            decay(time_BU1[:, :, after] - time, real & (segment == segment_BU1[:, :, after])),
            decay(since(after, before), segment_BU1[:, :, after] == segment_BU1[:, :, before]),
        )

    return masked


def _rows(x_BTHK, start, size):
    """The block's rows as [B H, C, K]: one batch axis, which XLA's CPU backend is fast at."""
    x_BCHK = jax.lax.dynamic_slice_in_dim(x_BTHK, start, size, axis=1)
    return x_BCHK.swapaxes(1, 2).reshape(-1, size, x_BTHK.shape[3])


def _write(buffer_BTHK, x_MCK, start):
    x_BHCK = x_MCK.reshape(buffer_BTHK.shape[0], -1, *x_MCK.shape[1:]).astype(buffer_BTHK.dtype)
    return jax.lax.dynamic_update_slice_in_dim(buffer_BTHK, x_BHCK.swapaxes(1, 2), start, axis=1)


def _scale(decay_BHCJ, x_MCJ):
    """x times its decays, in float32."""
    B, H = decay_BHCJ.shape[:2]
    return (decay_BHCJ * x_MCJ.reshape(-1, H, *x_MCJ.shape[1:])).reshape(x_MCJ.shape)


def _product(a, b, transposed=False):
    """Batched a @ b, or a @ b^T, into float32."""
    dims = (((2,), (2 if transposed else 1,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
