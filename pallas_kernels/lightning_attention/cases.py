"""MiniMax-Text-01's lightning layer: 64 heads of 128, bfloat16; or 8, one device's of eight.

The work of a forward pass is q, k, v, o through HBM once, of a backward pass what two sweeps move:
ten arrays, 2560 bytes a token and head. Chunks of 64 count the operations.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import chips, tilings
from pallas_kernels import lightning_attention as op
from pallas_kernels.case import GPUS, TPUS, Case, Numeric, Schedule, worst_error
from pallas_kernels.lightning_attention import pallas, tpu

K, C = 128, 64
SEGMENTS = 8  # of a packed row


def _array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def _slopes(heads):
    """Of the layer halfway down: 0.44 for the first of 64 heads, 2e-3 for the last."""
    return jnp.asarray(2.0 ** (-8 * np.arange(1, heads + 1) / heads) / 2, jnp.float32)


# Arrays are [B, T, H K], as projections give and take them: a TPU lays [B, T, H, K] out otherwise.
def _forward(q, k, v, slopes_H, segment_ids=None, implementation="pallas"):
    q, k, v = (x.reshape(*x.shape[:2], -1, K) for x in (q, k, v))
    o, final = op.lightning_attention(
        *(q, k, v, slopes_H), segment_ids=segment_ids, implementation=implementation
    )
    return o.reshape(*o.shape[:2], -1), final


def _backward(q, k, v, slopes_H, d_o, segment_ids=None, implementation="pallas"):
    def f(q, k, v):
        return _forward(q, k, v, slopes_H, segment_ids, implementation)[0]

    return jax.vjp(f, q, k, v)[1](d_o)


def _state(k, v, slopes_H):
    """The state alone, as context parallelism asks for it."""
    kernel = pallas.kernels(chips.current(), "state", "final_state")
    k, v = (x.reshape(*x.shape[:2], -1, K) for x in (k, v))
    return kernel(k, v, slopes_H, None, None, None)


def _build(function, B, T, H, dtype, packed, chip):
    token = _array(B, T, H * K, dtype=dtype)
    arguments = [token] * (2 if function is _state else 3) + [_array(H, dtype=jnp.float32)]
    if function is _backward:
        arguments.append(token)
    if packed:
        arguments.append(_array(B, T, dtype=jnp.int32))
    return function, tuple(arguments)


def _sample(function, B, T, H, dtype, packed, key, chip):
    """Normal values; segments whose lengths are no multiples of a chunk."""
    _, arguments = _build(function, B, T, H, dtype, packed, chip)
    values = []
    for own, x in zip(jax.random.split(key, len(arguments)), arguments, strict=True):
        if x.ndim == 1:
            values.append(_slopes(H))
        elif x.dtype == jnp.int32:
            segments = np.int32(np.arange(T) * SEGMENTS // (T + 1))
            values.append(jnp.asarray(np.tile(segments, (B, 1))))
        else:
            values.append(jax.random.normal(own, x.shape, x.dtype))
    return tuple(values)


def _schedule(function, B, T, H, dtype, packed, chip):
    """Tables and the initial state in a row's first step; with segments, three bodies: the plain, the
    masked, and that for padding.
    """
    size = jnp.dtype(dtype).itemsize
    per_stream, state = B * T * H * K * size, B * H * K * K * 4
    tiling = tilings.TILINGS[chip]["lightning_forward"]
    step = tiling["chunk"] * tpu._shape(B, H, T // tiling["chunk"], tiling)[1]
    regions = [step / T]
    if packed:
        broken = (SEGMENTS - 1) * step / T
        regions += [1 - broken, broken, 0]
    if function is _forward:
        return {"lightning_forward": Schedule(regions, bytes=4 * per_stream + state)}
    if function is _state:
        return {"lightning_state": Schedule(regions, bytes=2 * per_stream + state)}
    return {
        "transpose_jvp_lightning_dq__": Schedule(regions, bytes=4 * per_stream + state),
        "transpose_jvp_lightning_dkdv__": Schedule(regions, bytes=6 * per_stream + state),
    }


def _rivals(function, chip):
    return {} if function is _state else {"xla": functools.partial(function, implementation="xla")}


def _candidates(function, chip):
    kernel = {_forward: "lightning_forward", _state: "lightning_state"}
    kernel = kernel.get(function, "lightning_backward")
    now = tilings.TILINGS[chip][kernel]
    if chip in GPUS:
        return {kernel: [now | dict(stages=n, splits=m) for n in (2, 3) for m in (1, 2)]}
    return {kernel: [now | {"heads": n} for n in (8, 16, 32)]}


def _case(
    function, name, B, T, gate, measured, H=64, dtype=jnp.bfloat16, packed=False, targets=None
):
    what = (function, B, T, H, dtype, packed)
    flops, streams = {
        _forward: (4 * C * K + 4 * K * K, 4),
        _backward: (12 * C * K + 10 * K * K, 10),
        _state: (2 * K * K, 2),
    }[function]
    return Case(
        "lightning_attention",
        name,
        targets or TPUS + GPUS,
        build=functools.partial(_build, *what),
        flops=B * T * H * flops,
        bytes=B * H * K * (streams * T * jnp.dtype(dtype).itemsize + 4 * K),
        gate=dict(zip(TPUS, gate, strict=True)) if gate else {},
        schedule=functools.partial(_schedule, *what),
        measured={"h200": measured} if measured else {},
        sample=functools.partial(_sample, *what),
        candidates=functools.partial(_candidates, function),
        rivals=functools.partial(_rivals, function),
    )


_FORWARD, _BACKWARD = (0.85, 0.85, 0.70), (0.75, 0.75, 0.70)
CASES = [
    _case(_forward, "forward 8k", 1, 8192, _FORWARD, 0.55),
    _case(_forward, "forward 8k, 4 rows", 4, 8192, _FORWARD, 0.70),
    _case(_forward, "forward 128k", 1, 131072, _FORWARD, 0.55),
    _case(_forward, "forward 1M, 8 heads", 1, 1 << 20, _FORWARD, 0.55, H=8),
    _case(_forward, "forward 8k, 8 segments", 1, 8192, _FORWARD, 0.55, packed=True),
    _case(_forward, "forward 8k float32", 1, 8192, None, None, dtype=jnp.float32, targets=TPUS),
    _case(_backward, "backward 8k", 1, 8192, _BACKWARD, 0.55),
    _case(_backward, "backward 8k, 8 heads", 1, 8192, _BACKWARD, None, H=8),
    _case(_backward, "backward 128k", 1, 131072, _BACKWARD, 0.55),
    _case(_backward, "backward 8k, 8 segments", 1, 8192, _BACKWARD, 0.55, packed=True),
    _case(_state, "state alone 8k", 1, 8192, None, None),
]


def _definition(q, k, v, slopes_H, initial, segments, lengths, d_o, d_final):
    """(o, final state), gradients to q, k, v, initial: the pairs' weights written out, in float64."""
    q, k, v, initial, d_o, d_final = (np.float64(x) for x in (q, k, v, initial, d_o, d_final))
    o, final = np.zeros_like(v), np.zeros_like(initial)
    dq, dk, dv, d_initial = (np.zeros_like(x) for x in (q, k, v, initial))
    t = np.arange(q.shape[1])
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        s, n, ids = np.float64(slopes_H[h]), lengths[b], segments[b]
        real, last = t < n, ids[max(n - 1, 0)]
        pairs = (t[:, None] >= t) & (ids[:, None] == ids) & real[:, None]
        pairs = pairs * np.exp(-s * np.maximum(t[:, None] - t, 0))
        entry = (np.exp(-s * (t + 1)) * (ids == ids[0]) * real)[:, None]
        leave = (np.exp(-s * np.maximum(n - 1 - t, 0)) * (ids == last) * real)[:, None]
        carry = np.exp(-s * n) * (last == ids[0])
        Q, X, V, dO = (x[b, :, h] for x in (q, k, v, d_o))
        S, G = initial[b, h], d_final[b, h]
        scores, pulled = (Q @ X.T) * pairs, (dO @ V.T) * pairs
        o[b, :, h] = scores @ V + entry * (Q @ S)
        final[b, h] = (leave * X).T @ V + carry * S
        dq[b, :, h] = pulled @ X + entry * (dO @ S.T)
        dk[b, :, h] = pulled.T @ Q + leave * (V @ G.T)
        dv[b, :, h] = scores.T @ dO + leave * (X @ G)
        d_initial[b, h] = carry * G + (entry * Q).T @ dO
    return o, final, dq, dk, dv, d_initial


def _error(dtype, num_splits=0, T=200):
    """Four heads with slopes from 0.92 to 5e-5, packed rows, true lengths, both states."""
    rng = np.random.default_rng(0)
    B, slopes = 2, np.float32([0.92, 0.05, 4e-3, 5e-5])
    q, k, v, d_o = (jnp.asarray(rng.normal(size=(B, T, 4, K)), dtype) for _ in range(4))
    initial, d_final = jnp.asarray(rng.normal(size=(2, B, 4, K, K)), jnp.float32)
    segments = np.sort(rng.integers(0, 4, (B, T)), axis=1).astype(np.int32)
    segments[1, : T - 20] = 0
    lengths = np.int32([T, T - 9])

    @jax.jit
    def both(q, k, v, initial, d_o, d_final):
        def f(q, k, v, initial):
            return op.lightning_attention(
                *(q, k, v, jnp.asarray(slopes)),
                initial_state=initial,
                segment_ids=jnp.asarray(segments),
                lengths=jnp.asarray(lengths),
                num_splits=num_splits,
                implementation="pallas",
            )

        outputs, pull = jax.vjp(f, q, k, v, initial)
        return *outputs, *pull((d_o, d_final))

    got = both(q, k, v, initial, d_o, d_final)
    want = _definition(q, k, v, slopes, initial, segments, lengths, d_o, d_final)
    return worst_error(got, want)


# Rounding the results to bfloat16 is up to 3.9e-3 of that.
_LIMIT = 6e-3
NUMERICS = [
    Numeric("lightning_attention", name, targets, functools.partial(_error, dtype, splits), limit)
    for name, targets, dtype, splits, limit in (
        ("values and gradients", ("v5p", "h200"), jnp.bfloat16, 1, _LIMIT),
        ("values and gradients in splits", ("v5p", "h200"), jnp.bfloat16, 2, _LIMIT),
        ("values and gradients, float32", ("v5p",), jnp.float32, 1, 1e-5),
    )
]
