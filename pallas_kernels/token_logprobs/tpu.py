"""TPU kernels: forward, and backward by tiles of logits that are computed once more.

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
from pallas_kernels.manual_axes import same_axes

LANES = 128
PART = 256  # rows that one matmul takes: the program stays some thousand instructions long
NOTHING = -1e30  # a logit whose exponential is 0; finite, so that none minus another is NaN
F32 = jnp.float32


def forward(hidden_ND, head_DV, labels_N, *, scale, columns, tiling, vmem, interpret):
    """lse, the label's logit (0 where it is no column) and entropy, float32 `[N]`; logits * scale."""
    (N, D), V, R, C = hidden_ND.shape, head_DV.shape[1], tiling["rows"], tiling["columns"]
    row = pl.BlockSpec((1, R), lambda t, v: (0, t))
    kernel = functools.partial(_forward, scale=scale, columns=columns, width=V)
    out = versions.shape_like((1, N), F32, hidden_ND, head_DV)
    outputs = pl.pallas_call(
        kernel,
        grid=(N // R, pl.cdiv(V, C)),
        in_specs=[
            pl.BlockSpec((R, D), lambda t, v: (t, 0)),
            pl.BlockSpec((D, C), lambda t, v: (0, v)),
            row,
        ],
        out_specs=[row] * 3,
        out_shape=[out] * 3,
        scratch_shapes=[pltpu.VMEM((R, LANES), F32)] * 4 + [pltpu.VMEM((R, LANES), jnp.int32)],
        compiler_params=_params(vmem),
        cost_estimate=_cost(1, N, D, V, hidden_ND, N // R, 1),
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


def backward(hidden_ND, head_DV, labels_N, rows, *, scale, tiling, vmem, interpret):
    """d_hidden float32 `[N, D]` and d_head `[D, V]` in head's type.

    By parts of the vocabulary whose gradient of the logits [N, part] takes at most `part_bytes`. One
    kernel computes it, tile by tile, and with it the part's d_head; the other one reads it.
    """
    N, V, C = len(hidden_ND), head_DV.shape[1], tiling["columns"]
    every = pl.cdiv(V, C)
    parts = pl.cdiv(every, max(tiling["part_bytes"] // (hidden_ND.dtype.itemsize * N * C), 1))
    tiles = pl.cdiv(every, parts)
    fixed = dict(tiles=tiles, tiling=tiling, vmem=vmem, interpret=interpret)

    def part(i, carry):
        d_hidden_ND, d_head_DV = carry
        first = jnp.int32(i * tiles)[None]
        dz_NP, d_head_DV = _run_d_head(
            hidden_ND, head_DV, labels_N, rows, d_head_DV, first, scale=scale, **fixed
        )
        return d_hidden_ND + _run_d_hidden(dz_NP, head_DV, first, **fixed), d_head_DV

    # JAX's interpreter wants whole tiles of what a kernel updates in place.
    wide = every * C if interpret else V
    zeros = jnp.zeros_like(hidden_ND, F32), jnp.zeros_like(head_DV, shape=(len(head_DV), wide))
    carry = tuple(same_axes(*zeros, hidden_ND, head_DV)[:2])
    d_hidden_ND, d_head_DV = jax.lax.fori_loop(0, pl.cdiv(every, tiles), part, carry)
    return d_hidden_ND, d_head_DV[:, :V]


def _run_d_head(
    hidden_ND, head_DV, labels_N, rows, d_head_DV, first, *, scale, tiles, tiling, vmem, interpret
):  # fmt: skip
    """The gradient of a part's logits, `[N, tiles * C]` in hidden's type, and d_head with the part's."""
    (N, D), V, R, C = hidden_ND.shape, head_DV.shape[1], tiling["rows"], tiling["columns"]
    row = pl.BlockSpec((1, R), lambda v, t, first: (0, t))
    # The last part may have fewer tiles: then it computes its last one again, for nobody.
    column = lambda v, first: jnp.minimum(first[0] + v, pl.cdiv(V, C) - 1)  # noqa: E731
    tile = pl.BlockSpec((D, C), lambda v, t, first: (0, column(v, first)))
    return pl.pallas_call(
        functools.partial(_d_head, scale=scale, column=column),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles, N // R),
            in_specs=[
                pl.BlockSpec((R, D), lambda v, t, first: (t, 0)),
                # The same rows as columns: transposing them once is cheaper than in every tile.
                pl.BlockSpec((D, R), lambda v, t, first: (0, t)),
                tile,
                *[row] * 5,
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[pl.BlockSpec((R, C), lambda v, t, first: (t, v)), tile],
            scratch_shapes=[pltpu.VMEM((D, C), F32)],
        ),
        out_shape=[
            versions.shape_like((N, tiles * C), hidden_ND.dtype, hidden_ND, head_DV),
            versions.shape_like(d_head_DV.shape, head_DV.dtype, hidden_ND, head_DV),
        ],
        input_output_aliases={9: 1},
        compiler_params=_params(vmem),
        cost_estimate=_cost(2, N, D, tiles * C, hidden_ND, 1, 2 * tiles),
        interpret=interpret,
        name="token_logprobs_d_head",
    )(
        first, hidden_ND, hidden_ND.T, head_DV, labels_N[None], *(x[None] for x in rows), d_head_DV
    )  # fmt: skip


def _d_head(first, hidden_ref, columns_ref, head_ref, label_ref, *refs, scale, column):
    row_refs, (dz_ref, out_ref, sum_ref) = refs[:4], refs[5:]
    v, t = pl.program_id(0), pl.program_id(1)

    @pl.when(t == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    # A tile's columns that lie beyond V hold anything; theirs alone are spoilt, and not used.
    C = head_ref.shape[1]
    z_RC = _logits(hidden_ref[...], head_ref, C, scale, None)
    column_RL = _label_columns(label_ref) - column(v, first) * C
    dz_RC = _d_logits(z_RC, column_RL, [_to_lanes(ref[...]) for ref in row_refs], scale)
    dz_RC = dz_RC.astype(hidden_ref.dtype)
    dz_ref[...] = dz_RC
    sum_ref[...] += _dot(columns_ref[...], dz_RC, 1, 0)

    @pl.when(t == pl.num_programs(1) - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _run_d_hidden(dz_NP, head_DV, first, *, tiles, tiling, vmem, interpret):
    """dz head^T, float32 `[N, D]`, of a part's columns."""
    (D, V), N, C, R = head_DV.shape, len(dz_NP), tiling["columns"], tiling["hidden_rows"]
    last = pl.cdiv(V, C) - 1
    return pl.pallas_call(
        functools.partial(_d_hidden, width=V),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(N // R, tiles),
            in_specs=[
                pl.BlockSpec((R, C), lambda t, v, first: (t, v)),
                pl.BlockSpec((D, C), lambda t, v, first: (0, jnp.minimum(first[0] + v, last))),
            ],
            out_specs=pl.BlockSpec((R, D), lambda t, v, first: (t, 0)),
        ),
        out_shape=versions.shape_like((N, D), F32, dz_NP, head_DV),
        compiler_params=_params(vmem),
        cost_estimate=_cost(1, N, D, tiles * C, dz_NP, N // R, 1),
        interpret=interpret,
        name="token_logprobs_d_hidden",
    )(first, dz_NP, head_DV)


def _d_hidden(first, dz_ref, head_ref, out_ref, *, width):
    v = pl.program_id(1)

    @pl.when(v == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    def step(r, size, _):
        out_ref[r] += _dot(dz_ref[r, :size], head_ref[:, :size], 1, 1)

    _by_tile(first[0] + v, head_ref.shape[1], width, width, len(dz_ref), step)


def _by_tile(v, size, width, columns, rows, step):
    """step(rows, columns of the tile, how many exist or None for all) for a tile's rows by parts.

    The last tile has steps of its own, of its own width. Tiles beyond have none.
    """
    part = next(n for n in (PART, LANES) if rows % n == 0)

    def whole(size, exist):
        @pl.loop(0, rows // part)
        def _(i):
            step(pl.ds(pl.multiple_of(i * part, part), part), size, exist)

    last = pl.cdiv(width, size) - 1
    rest = width - last * size
    if rest == size and columns == width:
        pl.when(v <= last)(lambda: whole(size, None))
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


def _params(vmem):
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem
    )


def _cost(matmuls, N, D, V, like, over_rows, over_columns):
    """`over_rows` times the head is read, `over_columns` times the rows."""
    size = like.dtype.itemsize
    return pl.CostEstimate(
        flops=2 * matmuls * N * D * V,
        transcendentals=N * V,
        bytes_accessed=size * D * (over_rows * V + over_columns * N),
    )


def vmem_bytes(name, D, size, *, rows, columns, hidden_rows=0, **_):
    """What blocks and scratch take: blocks of operands and results are there twice."""
    tile, lanes = 4 * rows * columns, 4 * LANES * rows
    if name == "forward":
        return 2 * size * D * (rows + columns) + 6 * lanes + tile
    d_head = 4 * size * D * (rows + columns) + 4 * D * columns + 4 * lanes + 2 * tile
    d_hidden = 2 * D * (size * columns + 4 * hidden_rows) + 2 * size * hidden_rows * columns
    return max(d_head, d_hidden)
