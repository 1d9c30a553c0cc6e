"""TPU kernels of lightning attention: one sequential sweep over chunks of tokens, states in VMEM.

With i, j = 0..C-1 the index of a token in its chunk, n of them real, and S the state at its entry,

    O  = [(Q K^T) * W | e Q] [V; S]       W_ij = e^(-s(i-j)), i >= j      e_i = e^(-s(i+1))
    S' = e^(-s n) S + (l K)^T V           l_j = e^(-s(n-1-j))

W, e and l of a whole chunk are tables in VMEM, made once per block of heads, in float32.
"""

import functools
import math
import operator
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import versions

LANES = 128  # and the only head dimension
F32 = jnp.float32


def forward(q, k, v, slopes_H, initial, positions_BT, lengths_B, *, tiling, interpret, rows=None):
    """o `[B, T, H, V]` in q's dtype and the final state, float32 `[B, H, K, V]`.

    T is a multiple of tiling["chunk"]; `pallas.py` says what positions are. With `rows`, B is 1 and
    positions and lengths None: two int32 `[T / chunk]`, the sequence of each chunk, ascending, and
    how many of its tokens are real. Each sequence starts from its own one of the initial states
    `[R, H, K, V]`, and the final states are those of all R, undefined for one that has no chunk.
    """
    return sweep(
        functools.partial(attend, ahead=tiling["ahead"]),
        "lightning_forward",
        {"q": q, "k": k, "v": v},
        *(slopes_H, initial, positions_BT, lengths_B),
        outputs=("o",),
        tables=("within", "entry", "leave"),
        flops=4 * tiling["chunk"] + 4 * LANES,
        rows=rows,
        tiling=tiling,
        interpret=interpret,
    )


def final_state(k, v, slopes_H, initial, positions_BT, lengths_B, *, tiling, interpret):
    """The final state alone, float32 `[B, H, K, V]`, from keys and values."""
    (state,) = sweep(
        _final_state,
        "lightning_state",
        {"k": k, "v": v},
        *(slopes_H, initial, positions_BT, lengths_B),
        outputs=(),
        tables=("leave",),
        flops=2 * LANES,
        tiling=tiling,
        interpret=interpret,
    )
    return state


def attend(r, decay, work, ahead):
    weights = {}
    for now in range(-ahead, len(work)):
        # An MXU runs its products in the order of the program: what a product waits for must have
        # been asked for some heads earlier.
        if now + ahead < len(work):
            rows, h = work[now + ahead]
            q, k = columns(rows, h, r.q, r.k)
            weights[now + ahead] = (dot(q, k, 1, 1) * decay.within(h)).astype(q.dtype)
        if now >= 0:
            rows, h = work[now]
            q, k, v = columns(rows, h, r.q, r.k, r.v)
            state = r.state[0, h].astype(q.dtype)
            seen = jnp.concatenate([weights.pop(now), (q * decay.entry(h)).astype(q.dtype)], axis=1)
            o = dot(seen, jnp.concatenate([v, state], axis=0), 1, 0)
            r.o[0, rows, lanes(h)] = o.astype(r.o.dtype)
            added = dot((k * decay.leave(h)).astype(k.dtype), v, 0, 0)
            r.state[0, h] = decay.carry(h) * r.state[0, h] + added


def _final_state(r, decay, work):
    for rows, h in work:
        k, v = columns(rows, h, r.k, r.v)
        added = dot((k * decay.leave(h)).astype(k.dtype), v, 0, 0)
        r.state[0, h] = decay.carry(h) * r.state[0, h] + added


def lanes(h):
    return slice(h * LANES, (h + 1) * LANES)


def columns(rows, h, *refs):
    """A chunk of head h of blocks `[1, tokens, heads * 128]`."""
    return [ref[0, rows, lanes(h)] for ref in refs]


def dot(a, b, a_axis, b_axis):
    """Contracts those axes into float32; float32 operands are multiplied as such."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == F32 else None
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=F32)


class Decay(NamedTuple):
    """What passes in this chunk, of head h: float32, 0 where nothing does."""

    within: object  # h -> [C, C], from token j to i; its transpose in a sweep backwards in time
    entry: object  # h -> [C, 128], from the state before the chunk to token i, alike in all lanes
    leave: object  # h -> [C, 128], from token j to the state after it
    carry: object  # h -> [1, 1], from the state before to the state after


def sweep(
    body,
    name,
    tokens,
    slopes_H,
    initial,
    positions_BT,
    lengths_B,
    *,
    outputs,
    tables,
    flops,
    tiling,
    interpret,
    rows=None,
    reverse=False,
):
    """body(refs, decay, work) at every step, in time or backwards; -> (*outputs, carried states).

    tokens: name -> `[B, T, H, 128]`; outputs: names of more such arrays. The refs have these names,
    a block `[1, tokens, heads * 128]` each, and `state`, `[1, heads, 128, 128]` float32, which starts
    as `initial` (None: zero) and stays in VMEM while a sequence passes. work: the (rows of a chunk,
    head) of the step in the order of time. tables: which decays the body asks for. flops: of the
    body per element of a token and head.

    The program has the body a second time, with masked decays, for steps with padding or a boundary
    inside; the others pay nothing for it. A step of padding alone is skipped.
    """
    x = next(iter(tokens.values()))
    B, T, H, _ = x.shape
    C = tiling["chunk"]
    count = T // C
    heads, unrolled = _shape(B, H, 1 if rows is not None else count, tiling)
    steps, size = count // unrolled, unrolled * C
    masked = not (positions_BT is None and lengths_B is None and rows is None)

    def time(c):
        return steps - 1 - c if reverse else c

    def block(*shape, at):
        return pl.BlockSpec(shape, lambda b, h, c, *scalars: at(b, h, time(c), scalars))

    token_block = block(1, size, heads * LANES, at=lambda b, h, c, _: (b, c, h))
    state_shape = (B if rows is None else len(initial), H, LANES, LANES)
    state_block = block(
        *(1, heads, LANES, LANES),
        at=lambda b, h, c, scalars: (b if rows is None else scalars[0][c], h, 0, 0),
    )
    scalars = {} if rows is None else {"rows": rows[0]}
    # [1, H]: a shape that vmap may add an axis to
    inputs = {"slopes": (slopes_H[None], pl.BlockSpec(memory_space=pltpu.SMEM))}
    for key, value in tokens.items():
        inputs[key] = (value.reshape(B, T, -1), token_block)
    if initial is not None:
        inputs["initial"] = (initial, state_block)
    if masked:
        counts, begins = breaks(positions_BT, lengths_B, B, T, C)
        counts = counts if rows is None else rows[1]
        scalars |= {"counts": counts.reshape(-1), "begins": begins.reshape(-1)}
    if positions_BT is not None and tables != ("leave",):
        position_block = block(1, unrolled, 1, C, at=lambda b, h, c, _: (b, c, 0, 0))
        inputs["positions"] = (positions_BT.reshape(B, count, 1, C), position_block)

    out = {
        key: (versions.shape_like((B, T, H * LANES), x.dtype, x), token_block) for key in outputs
    }
    out["state"] = (versions.shape_like(state_shape, F32, x), state_block)
    shapes = {"within": (heads, C, C), "entry": (heads, C, LANES), "leave": (heads, C, LANES)}
    scratch = {f"{key}_table": shapes[key] for key in tables}
    names = (*scalars, *inputs, *out, *scratch)

    def kernel(*refs):
        r = types.SimpleNamespace(**dict(zip(names, refs, strict=True)))
        b, block, c = pl.program_id(0), pl.program_id(1), time(pl.program_id(2))
        slopes = [r.slopes[0, block * heads + h] for h in range(heads)]
        first = pl.program_id(2) == 0
        pl.when(first)(lambda: _write_tables(r, slopes, C, reverse))
        if rows is not None:
            first |= r.rows[c] != r.rows[jnp.maximum(c - 1, 0)]

        @pl.when(first)
        def _():
            r.state[...] = r.initial[...] if initial is not None else jnp.zeros_like(r.state)

        plain = Decay(
            lambda h: r.within_table[h],
            lambda h: r.entry_table[h],
            lambda h: r.leave_table[h],
            lambda h: jnp.exp(jnp.full((1, 1), -C * slopes[h], F32)),
        )
        order = range(unrolled - 1, -1, -1) if reverse else range(unrolled)
        work = [(slice(m * C, (m + 1) * C), h) for m in order for h in range(heads)]
        if not masked:
            body(r, plain, work)
            return
        chunk = b * count + c * unrolled
        ns, begins = ([ref[chunk + m] for m in range(unrolled)] for ref in (r.counts, r.begins))
        whole = functools.reduce(operator.and_, [n == C for n in ns])
        whole = functools.reduce(operator.and_, [begin < 0 for begin in begins], whole)
        pl.when(whole)(lambda: body(r, plain, work))

        @pl.when(~whole & (ns[0] > 0))
        def _():
            for m in order:
                decay = _masked(r, m, plain, slopes, ns[m], begins[m], C, reverse)
                body(r, decay, [(slice(m * C, (m + 1) * C), h) for h in range(heads)])

        @pl.when(ns[0] == 0)
        def _():
            for key in outputs:
                getattr(r, key)[...] = jnp.zeros_like(getattr(r, key))

    moved = [value for value, _ in inputs.values()] + [value for value, _ in out.values()]
    blocks = sum(
        math.prod(spec.block_shape) * value.dtype.itemsize
        for value, spec in (*inputs.values(), *out.values())
        if spec.block_shape
    )
    results = pl.pallas_call(
        kernel,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(B, H // heads, steps),
            in_specs=[spec for _, spec in inputs.values()],
            out_specs=[spec for _, spec in out.values()],
            scratch_shapes=[pltpu.VMEM(shape, F32) for shape in scratch.values()],
        ),
        out_shape=[value for value, _ in out.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            # blocks are double-buffered; the rest is what the compiler spills
            vmem_limit_bytes=2 * blocks + 4 * sum(map(math.prod, scratch.values())) + (8 << 20),
        ),
        cost_estimate=pl.CostEstimate(
            flops=flops * LANES * B * T * H,
            bytes_accessed=sum(value.size * value.dtype.itemsize for value in moved),
            transcendentals=B * H // heads * sum(map(math.prod, scratch.values())),
        ),
        interpret=interpret,
    )(*scalars.values(), *(value for value, _ in inputs.values()))
    return *(value.reshape(x.shape) for value in results[:-1]), results[-1]


def breaks(positions_BT, lengths_B, B, T, C):
    """How many tokens of every chunk are real, and where in it its last segment begins, else -1.

    int32 `[B, T / C]` both; positions and lengths may be None.
    """
    count = T // C
    counts = jnp.full((B, count), C, jnp.int32)
    if lengths_B is not None:
        counts = jnp.clip(lengths_B.astype(jnp.int32)[:, None] - jnp.arange(count) * C, 0, C)
    if positions_BT is None:
        return counts, jnp.full_like(counts, -1)
    positions = positions_BT.reshape(B, count, C)
    last = jnp.maximum(counts - 1, 0)
    position = jnp.take_along_axis(positions, last[:, :, None], axis=2)[:, :, 0]
    return counts, jnp.where(counts > 0, jnp.maximum(last - position, -1), -1)


def _write_tables(r, slopes, C, reverse):
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    lag = (j - i if reverse else i - j).astype(F32)
    row = jax.lax.broadcasted_iota(jnp.int32, (C, LANES), 0).astype(F32)
    for h, s in enumerate(slopes):
        if hasattr(r, "within_table"):
            r.within_table[h] = jnp.where(lag >= 0, jnp.exp(-s * jnp.maximum(lag, 0)), 0)
        if hasattr(r, "entry_table"):
            r.entry_table[h] = jnp.exp(-s * (row + 1))
        r.leave_table[h] = jnp.exp(-s * (C - 1 - row))


def _masked(r, m, plain, slopes, n, begin, C, reverse):
    """The decays of a step's chunk m, of which n tokens are real and whose last segment begins at `begin`."""
    row = jax.lax.broadcasted_iota(jnp.int32, (C, LANES), 0)
    kept = (row >= begin) & (row < n)
    lag = jnp.maximum(n - 1 - row, 0).astype(F32)
    passes = jnp.where(begin < 0, 1.0, 0.0)
    i, j = (
        jax.lax.broadcasted_iota(jnp.int32, (C, C), axis)
        for axis in ((1, 0) if reverse else (0, 1))
    )
    seen, reached = i < n, row < n
    if hasattr(r, "positions"):
        position = r.positions[0, m]
        along_lanes = jnp.broadcast_to(position, (C, C))
        seen &= j >= i - (along_lanes if reverse else along_lanes.T)
        reached &= jnp.broadcast_to(position, (LANES, C)).T > row
    return Decay(
        lambda h: jnp.where(seen, plain.within(h), 0),
        lambda h: jnp.where(reached, plain.entry(h), 0),
        lambda h: jnp.where(kept, jnp.exp(-slopes[h] * lag), 0),
        lambda h: passes * jnp.exp(jnp.full((1, 1), -slopes[h] * n.astype(F32), F32)),
    )


def _shape(B, H, count, tiling):
    """Heads and chunks per step: up to tiling["heads"] of both together, a share for every core."""
    fitting = [n for n in range(1, min(H, tiling["heads"]) + 1) if H % n == 0]
    shared = [n for n in fitting if B * H // n % tiling["cores"] == 0]
    heads = max(shared or fitting)
    return heads, max(n for n in range(1, tiling["heads"] // heads + 1) if count % n == 0)
