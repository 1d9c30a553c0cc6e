"""TPU kernels: forward, and two passes backward that compute each tile of logits again.

A tile of logits is one matmul over all of D, which lies in VMEM whole. Forward keeps, for each row
and each of the 128 lanes, a running maximum, sum and entropy of the columns of that lane, so that
no step reduces over lanes; the last one does, once. Numbers that a row has one of pass as
lane vectors `[1, N]` and turn into columns in VMEM.

N and V are multiples of 128 (rows and columns that do not exist are zeros); `columns` is how many
of V's exist. Suffixes: R rows and C columns of a tile, L lanes.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import versions

LANES = 128
PART = 256  # rows that one matmul takes: the program stays some thousand instructions long
NOTHING = -1e30  # a logit whose exponential is 0; finite, so that none minus another is NaN
F32 = jnp.float32
# Bytes that a kernel takes: blocks of operands and results are there twice.
VMEM = {
    "forward": lambda R, C, D, size: 2 * size * D * (R + C) + 4 * R * (5 * LANES + C),
    "d_hidden": lambda R, C, D, size: 2 * D * (R * (size + 4) + C * size) + 4 * R * (5 * LANES + C),
    "d_head": lambda R, C, D, size: (
        4 * size * D * (R + C) + 4 * D * C + 4 * R * (5 * LANES + 2 * C)
    ),
}


def forward(hidden_ND, head_DV, labels_N, *, scale, columns, tiling, vmem, interpret):
    """lse, the label's logit (0 where it is no column) and entropy, float32 `[N]`; logits * scale."""
    N, D, V, R, C = _sizes(hidden_ND, head_DV, tiling)
    row = pl.BlockSpec((1, R), lambda t, v: (0, t))
    kernel = functools.partial(_forward, scale=scale, columns=columns, width=V)
    out = versions.shape_like((1, N), F32, hidden_ND, head_DV)
    outputs = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(N, R), pl.cdiv(V, C)),
        in_specs=[
            pl.BlockSpec((R, D), lambda t, v: (t, 0)),
            pl.BlockSpec((D, C), lambda t, v: (0, v)),
            row,
        ],
        out_specs=[row] * 3,
        out_shape=[out] * 3,
        scratch_shapes=[pltpu.VMEM((R, LANES), F32)] * 4 + [pltpu.VMEM((R, LANES), jnp.int32)],
        compiler_params=_params(vmem),
        cost_estimate=_cost(1, N, D, V, hidden_ND, head_DV, pl.cdiv(N, R)),
        interpret=interpret,
        name="token_logprobs_forward",
    )(hidden_ND, head_DV, labels_N[None])
    return tuple(x[0] for x in outputs)


def _forward(
    hidden_ref, head_ref, label_ref, lse_ref, logit_ref, entropy_ref,
    top_ref, sum_ref, mean_ref, own_ref, column_ref, *, scale, columns, width,
):  # fmt: skip
    v = pl.program_id(1)

    @pl.when(v == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, NOTHING)
        for ref in (sum_ref, mean_ref, own_ref):
            ref[...] = jnp.zeros_like(ref)
        column_ref[...] = _label_columns(label_ref)

    def step(r, size, exist):
        z_RC = _logits(hidden_ref[r], head_ref, size, scale, exist)
        tiles = [z_RC[:, i : i + LANES] for i in range(0, size, LANES)]
        old_RL, sum_RL, mean_RL, own_RL = (ref[r] for ref in (top_ref, sum_ref, mean_ref, own_ref))
        top_RL = functools.reduce(jnp.maximum, tiles, old_RL)
        shrink_RL = jnp.exp(old_RL - top_RL)
        mean_RL = shrink_RL * (mean_RL + (old_RL - top_RL) * sum_RL)
        sum_RL = shrink_RL * sum_RL
        column_RL = column_ref[r] - v * head_ref.shape[1]
        for i, z_RL in enumerate(tiles):
            exp_RL = jnp.exp(z_RL - top_RL)
            sum_RL += exp_RL
            mean_RL += exp_RL * (z_RL - top_RL)
            own_RL += jnp.where(column_RL == i * LANES, z_RL, 0.0)
        top_ref[r], sum_ref[r], mean_ref[r], own_ref[r] = top_RL, sum_RL, mean_RL, own_RL

    _by_tile(v, head_ref.shape[1], width, columns, hidden_ref.shape[0], step)

    @pl.when(v == pl.num_programs(1) - 1)
    def _():
        top_LR, sum_LR, mean_LR, own_LR = (
            ref[...].T for ref in (top_ref, sum_ref, mean_ref, own_ref)
        )
        top_1R = jnp.max(top_LR, axis=0, keepdims=True)
        share_LR = jnp.exp(top_LR - top_1R)
        sum_1R = jnp.sum(share_LR * sum_LR, axis=0, keepdims=True)
        mean_LR = share_LR * (mean_LR + (top_LR - top_1R) * sum_LR)
        mean_1R = jnp.sum(mean_LR, axis=0, keepdims=True) / sum_1R
        lse_ref[...] = top_1R + jnp.log(sum_1R)
        entropy_ref[...] = jnp.log(sum_1R) - mean_1R
        logit_ref[...] = jnp.sum(own_LR, axis=0, keepdims=True)


def d_hidden(hidden_ND, head_DV, labels_N, rows, *, scale, columns, tiling, vmem, interpret):
    """dz head^T, float32 `[N, D]`, summed over the vocabulary's tiles."""
    N, D, V, R, C = _sizes(hidden_ND, head_DV, tiling)
    row = pl.BlockSpec((1, R), lambda t, v: (0, t))
    return pl.pallas_call(
        functools.partial(_d_hidden, scale=scale, columns=columns, width=V),
        grid=(pl.cdiv(N, R), pl.cdiv(V, C)),
        in_specs=[
            pl.BlockSpec((R, D), lambda t, v: (t, 0)),
            pl.BlockSpec((D, C), lambda t, v: (0, v)),
            *[row] * 5,
        ],
        out_specs=pl.BlockSpec((R, D), lambda t, v: (t, 0)),
        out_shape=versions.shape_like((N, D), F32, hidden_ND, head_DV),
        scratch_shapes=[pltpu.VMEM((R, LANES), jnp.int32)] + [pltpu.VMEM((R, LANES), F32)] * 4,
        compiler_params=_params(vmem),
        cost_estimate=_cost(2, N, D, V, hidden_ND, head_DV, pl.cdiv(N, R)),
        interpret=interpret,
        name="token_logprobs_d_hidden",
    )(hidden_ND, head_DV, labels_N[None], *(x[None] for x in rows))


def _d_hidden(hidden_ref, head_ref, label_ref, *refs, scale, columns, width):
    row_refs, out_ref, column_ref, rows_refs = refs[:4], refs[4], refs[5], refs[6:]
    v = pl.program_id(1)

    @pl.when(v == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)
        column_ref[...] = _label_columns(label_ref)
        for ref, lanes_ref in zip(row_refs, rows_refs, strict=True):
            lanes_ref[...] = _to_lanes(ref[...])

    def step(r, size, exist):
        z_RC = _logits(hidden_ref[r], head_ref, size, scale, exist)
        column_RL = column_ref[r] - v * head_ref.shape[1]
        dz_RC = _d_logits(z_RC, column_RL, [ref[r] for ref in rows_refs], scale)
        out_ref[r] += _dot(dz_RC.astype(head_ref.dtype), head_ref[:, :size], 1, 1)

    _by_tile(v, head_ref.shape[1], width, columns, hidden_ref.shape[0], step)


def d_head(hidden_ND, head_DV, labels_N, rows, *, scale, columns, tiling, vmem, interpret):
    """hidden^T dz, `[D, V]` in head's type, summed over the rows' tiles in float32."""
    N, D, V, R, C = _sizes(hidden_ND, head_DV, tiling)
    row = pl.BlockSpec((1, R), lambda v, t: (0, t))
    tile = pl.BlockSpec((D, C), lambda v, t: (0, v))
    return pl.pallas_call(
        functools.partial(_d_head, scale=scale, columns=columns),
        grid=(pl.cdiv(V, C), pl.cdiv(N, R)),
        in_specs=[
            pl.BlockSpec((R, D), lambda v, t: (t, 0)),
            # The same rows as columns: transposing them once is cheaper than in every tile.
            pl.BlockSpec((D, R), lambda v, t: (0, t)),
            tile,
            *[row] * 5,
        ],
        out_specs=tile,
        out_shape=versions.shape_like((D, V), head_DV.dtype, hidden_ND, head_DV),
        scratch_shapes=[pltpu.VMEM((D, C), F32)],
        compiler_params=_params(vmem),
        cost_estimate=_cost(2, N, D, V, hidden_ND, head_DV, 1, pl.cdiv(V, C)),
        interpret=interpret,
        name="token_logprobs_d_head",
    )(hidden_ND, hidden_ND.T, head_DV, labels_N[None], *(x[None] for x in rows))


def _d_head(hidden_ref, columns_ref, head_ref, label_ref, *refs, scale, columns):
    row_refs, out_ref, sum_ref = refs[:4], refs[4], refs[5]
    v, t = pl.program_id(0), pl.program_id(1)

    @pl.when(t == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    # A tile's columns that lie beyond V hold anything; theirs alone are spoilt, and not written.
    C = head_ref.shape[1]
    z_RC = _logits(hidden_ref[...], head_ref, C, scale, None)
    column_RL = _label_columns(label_ref) - v * C
    dz_RC = _d_logits(z_RC, column_RL, [_to_lanes(ref[...]) for ref in row_refs], scale)
    sum_ref[...] += _dot(columns_ref[...], dz_RC.astype(hidden_ref.dtype), 1, 0)

    @pl.when(t == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _by_tile(v, size, width, columns, rows, step):
    """step(rows, columns of the tile, how many exist or None for all) for a tile's rows by parts.

    The last tile has steps of its own, of its own width.
    """
    part = next(n for n in (PART, LANES) if rows % n == 0)

    def whole(size, exist):
        @pl.loop(0, rows // part)
        def _(i):
            step(pl.ds(pl.multiple_of(i * part, part), part), size, exist)

    last = pl.cdiv(width, size) - 1
    rest = width - last * size
    if rest == size and columns == width:
        whole(size, None)
        return
    pl.when(v < last)(lambda: whole(size, None))
    pl.when(v == last)(lambda: whole(rest, None if columns == width else columns - last * size))


def _logits(hidden_RD, head_ref, size, scale, exist):
    z_RC = scale * _dot(hidden_RD, head_ref[:, :size], 1, 0)
    if exist is None:
        return z_RC
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, z_RC.shape, 1) < exist, z_RC, NOTHING)


def _d_logits(z_RC, column_RL, rows, scale):
    """The gradient of the tile's logits before the scale; equation in `vocabulary`."""
    lse_RL, label_RL, mass_RL, slope_RL = rows
    tiles = []
    for i in range(0, z_RC.shape[1], LANES):
        logp_RL = z_RC[:, i : i + LANES] - lse_RL
        dz_RL = jnp.exp(logp_RL) * (mass_RL - slope_RL * logp_RL)
        tiles.append(scale * (dz_RL + jnp.where(column_RL == i, label_RL, 0.0)))
    return jnp.concatenate(tiles, axis=1)


def _label_columns(label_ref):
    """A row's label minus the lane's number: 128 i in the lane that its column has in tile i."""
    label_RL = _to_lanes(label_ref[...].astype(F32)).astype(jnp.int32)  # exact below 2^24
    return label_RL - jax.lax.broadcasted_iota(jnp.int32, label_RL.shape, 1)


def _to_lanes(x_1R):
    """A row's number in all lanes of the row."""
    return jnp.broadcast_to(x_1R, (LANES, x_1R.shape[1])).T


def _dot(x, y, x_axis, y_axis):
    precision = jax.lax.Precision.HIGHEST if x.dtype == F32 else None
    return jax.lax.dot_general(
        x, y, (((x_axis,), (y_axis,)), ((), ())), precision, preferred_element_type=F32
    )


def _sizes(hidden_ND, head_DV, tiling):
    return *hidden_ND.shape, head_DV.shape[1], tiling["rows"], tiling["columns"]


def _params(vmem):
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem
    )


def _cost(matmuls, N, D, V, hidden_ND, head_DV, over_rows, over_columns=1):
    """`over_rows` times the head is read, `over_columns` times the hidden states."""
    bytes_accessed = head_DV.nbytes * over_rows + hidden_ND.nbytes * over_columns
    return pl.CostEstimate(
        flops=2 * matmuls * N * D * V, transcendentals=N * V, bytes_accessed=bytes_accessed
    )
