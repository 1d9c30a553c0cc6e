"""One sequence in spans that run at once: of a device with cores to spare, or of several devices.

A span's state without what came before it, L_p, and what it leaves of the state that enters it,
f_p = e^(-s n_p), or 0 where a segment begins inside, give all the entering states:

    E_0 = initial      E_(p+1) = f_p E_p + L_p

and each span is then a row of its own (LASP+, section 3.2.2). The gradient goes the same way back,
with D_p, what the span's outputs say of its entering state, and G the gradient of a leaving state:

    G_last = d_final   G_(p-1) = f_p G_p + D_p
"""

import jax
import jax.numpy as jnp

CONTINUES = 1 << 20


def over_devices(attend, q, k, v, slopes_H, initial, segment_ids, lengths, axis_name):
    """Any implementation's (o, final) of this device's part of sequences along a mesh axis."""
    positions = positions_of(segment_ids, axis_name)
    lengths = part_lengths(lengths, q.shape[1], axis_name)
    _, leave, f = decays(slopes_H, positions, lengths, q.shape[:2])
    entering = chain(f, weighted(leave, k, v), initial, 1, axis_name)
    if positions is not None:
        continues = positions[:, 0] >= CONTINUES
        if lengths is not None:
            continues |= lengths == 0
        entering = jnp.where(continues[:, None, None, None], entering, 0)
    return attend(q, k, v, slopes_H, entering, segment_ids, lengths)


def positions_of(segment_ids, axis_name=None):
    """int32 `[B, T]`: a token's position in its segment, from 2^20 on if it continues the state before.

    That is the row's first segment; of a device's part along `axis_name` only if the id is that of
    the token before, on the device before.
    """
    if segment_ids is None:
        return None
    first = segment_ids[:, :1]
    before = first
    if axis_name is not None:
        devices = jax.lax.axis_size(axis_name)
        shift = [(d, d + 1) for d in range(devices - 1)]
        before = jax.lax.ppermute(segment_ids[:, -1:], axis_name, shift)
        before = jnp.where(jax.lax.axis_index(axis_name) == 0, first, before)
    changes = segment_ids != jnp.concatenate([before, segment_ids[:, :-1]], axis=1)
    t = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    start = jax.lax.cummax(jnp.where(changes, t, -1), axis=1)
    return jnp.where(start < 0, t + CONTINUES, t - start)


def part_lengths(lengths_B, T, axis_name):
    """Real tokens in this device's T, of rows whose lengths count all devices' tokens."""
    if lengths_B is None or axis_name is None:
        return lengths_B
    return jnp.clip(lengths_B - jax.lax.axis_index(axis_name) * T, 0, T)


def rows(x, spans):
    """`[B, T, ...]` as `[B spans, T / spans, ...]`."""
    return None if x is None else x.reshape(x.shape[0] * spans, -1, *x.shape[2:])


def row_lengths(lengths_B, spans, T):
    """Real tokens of each of the rows' spans of T tokens, int32 `[B spans]`."""
    if lengths_B is None:
        return None
    starts = jnp.arange(spans) * T
    return jnp.clip(lengths_B[:, None] - starts, 0, T).astype(jnp.int32).reshape(-1)


def decays(slopes_H, positions_RT, lengths_R, shape):
    """What passes through rows of T tokens, float32: (entry `[R, T, H]`, leave `[R, T, H]`, f `[R, H]`).

    From the state before the row to a token, from a token to the state after the row, and from
    state to state. shape: (R, T).
    """
    R, T = shape
    t = jnp.arange(T)
    n_R1 = jnp.full((R, 1), T) if lengths_R is None else lengths_R[:, None]
    real_RT = t < n_R1
    reached_RT, kept_RT, passes_R1 = real_RT, real_RT, jnp.ones((R, 1), bool)
    if positions_RT is not None:
        last_R1 = jnp.take_along_axis(positions_RT, jnp.maximum(n_R1 - 1, 0), axis=1)
        reached_RT = real_RT & (positions_RT > t)
        kept_RT = real_RT & (t >= n_R1 - 1 - last_R1)
        passes_R1 = (last_R1 >= n_R1) | (n_R1 == 0)

    def decay(time, where):
        time, where = jnp.maximum(time, 0)[..., None], where[..., None]
        return jnp.where(where, jnp.exp(-slopes_H * time.astype(jnp.float32)), 0)

    return (
        decay(t[None] + 1, reached_RT),
        decay(n_R1 - 1 - t, kept_RT),
        decay(n_R1, passes_R1)[:, 0],
    )


def weighted(weights_RTH, x_RTHK, y_RTHV):
    """sum_t w_t x_t y_t^T, float32 `[R, H, K, V]`: a row's L from its leave, k, v; D from entry, q, d_o."""
    x = (weights_RTH[..., None] * x_RTHK).astype(x_RTHK.dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(
        "rthk,rthv->rhkv", x, y_RTHV, precision=precision, preferred_element_type=jnp.float32
    )


def chain(f_RH, added_RHKV, first, spans, axis_name=None, reverse=False):
    """The states that enter each span, `[R, H, K, V]` with R = B spans; backwards, those that leave.

    first: what enters the sequence (backwards: leaves each device's part of it), `[B, H, K, V]`, or
    None for zero. With `axis_name` the devices of that axis have consecutive parts of the sequence.
    """
    H, K, V = added_RHKV.shape[1:]
    f = f_RH.reshape(-1, spans, H, 1, 1)
    added = added_RHKV.reshape(-1, spans, H, K, V)
    order = range(spans - 1, -1, -1) if reverse else range(spans)

    def walk(state):
        states = {}
        for p in order:
            states[p] = state
            state = f[:, p] * state + added[:, p]
        return jnp.stack([states[p] for p in range(spans)], axis=1).reshape(added_RHKV.shape), state

    zero = jnp.zeros_like(added[:, 0])
    state = zero if first is None else first
    if axis_name is None:
        return walk(state)[0]
    rank, devices = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
    if not reverse:
        state = jnp.where(rank == 0, state, 0)
    # of every device: what it hands on if nothing comes in, and how much of what comes in
    totals = jax.lax.all_gather(walk(state)[1], axis_name)
    factors = jax.lax.all_gather(f.prod(axis=1), axis_name)
    d = jnp.arange(devices).reshape(-1, 1, 1, 1, 1)
    between = jnp.where(d < rank if not reverse else d > rank, factors, 1)
    if reverse:
        before = jnp.cumprod(between, axis=0)
        weights = jnp.concatenate([jnp.ones_like(before[:1]), before[:-1]])
    else:
        after = jnp.cumprod(between[::-1], axis=0)[::-1]
        weights = jnp.concatenate([after[1:], jnp.ones_like(after[:1])])
    there = d > rank if reverse else d < rank
    return walk(state + jnp.sum(jnp.where(there, weights * totals, 0), axis=0))[0]
