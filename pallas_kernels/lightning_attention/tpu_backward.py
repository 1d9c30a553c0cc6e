"""TPU kernels of lightning attention's gradients: two sweeps, one forward in time and one back.

In the terms of tpu.py, with dS the gradient of the state at the chunk's exit:

    dQ = [(dO V^T) * W | e dO] [K; S^T]        S'^T = e^(-s n) S^T + (l V)^T K
    dK = [(V dO^T) * W^T | l V] [Q; dS^T]
    dV = [(K Q^T) * W^T | l K] [dO; dS]        dS' = e^(-s n) dS + (e Q)^T dO

The first line is the forward kernel given dO, V, K; it makes the states again, none is saved.
"""

import functools

import jax.numpy as jnp

from pallas_kernels.lightning_attention import tpu
from pallas_kernels.lightning_attention.tpu import LANES, columns, dot, lanes


def backward(
    q, k, v, slopes_H, initial, positions_BT, lengths_B, d_o, d_final, *, tiling, interpret
):
    """dq, dk, dv in q's dtype and the initial state's gradient, float32 `[B, H, K, V]`.

    d_final None is zero. d_o of padding may be anything finite.
    """
    chunk, ahead = tiling["chunk"], tiling["ahead"]
    rest = dict(tiling=tiling, interpret=interpret)
    dq, _ = tpu.sweep(
        functools.partial(tpu.attend, ahead=ahead),
        "lightning_dq",
        {"q": d_o, "k": v, "v": k},
        *(slopes_H, None if initial is None else initial.mT, positions_BT, lengths_B),
        outputs=("o",),
        tables=("within", "entry", "leave"),
        flops=4 * chunk + 4 * LANES,
        **rest,
    )
    dk, dv, d_initial = tpu.sweep(
        functools.partial(_pull, ahead=ahead),
        "lightning_dkdv",
        {"q": q, "k": k, "v": v, "d_o": d_o},
        *(slopes_H, d_final, positions_BT, lengths_B),
        outputs=("dk", "dv"),
        tables=("within", "entry", "leave"),
        flops=8 * chunk + 6 * LANES,
        reverse=True,
        **rest,
    )
    return dq, dk, dv, d_initial


def _pull(r, decay, work, ahead):
    weights = {}
    for now in range(-ahead, len(work)):
        if now + ahead < len(work):
            rows, h = work[now + ahead]
            q, k, v, d_o = columns(rows, h, r.q, r.k, r.v, r.d_o)
            within = decay.within(h)
            weights[now + ahead] = [
                (dot(x, y, 1, 1) * within).astype(q.dtype) for x, y in ((k, q), (v, d_o))
            ]
        if now >= 0:
            rows, h = work[now]
            q, k, v, d_o = columns(rows, h, r.q, r.k, r.v, r.d_o)
            state, leave = r.state[0, h].astype(q.dtype), decay.leave(h)
            of_dv, of_dk = weights.pop(now)
            of_dv = jnp.concatenate([of_dv, (k * leave).astype(k.dtype)], axis=1)
            of_dk = jnp.concatenate([of_dk, (v * leave).astype(v.dtype)], axis=1)
            dv = dot(of_dv, jnp.concatenate([d_o, state], axis=0), 1, 0)
            dk = dot(of_dk, jnp.concatenate([q, state.T], axis=0), 1, 0)
            r.dv[0, rows, lanes(h)] = dv.astype(r.dv.dtype)
            r.dk[0, rows, lanes(h)] = dk.astype(r.dk.dtype)
            added = dot((q * decay.entry(h)).astype(q.dtype), d_o, 0, 0)
            r.state[0, h] = decay.carry(h) * r.state[0, h] + added
