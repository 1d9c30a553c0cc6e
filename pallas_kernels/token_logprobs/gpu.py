"""Hopper kernels: forward, and the gradient of the logits; on the matmul of `pallas_kernels.hopper`.

Each tile of 128x256 logits stays in registers. Forward reduces its rows to (maximum, sum of
exponentials, sum of exponentials times logits, label's logit): a few numbers for 256 columns, which
XLA combines. Backward computes the tile again and stores its gradient in bfloat16 for a part of the
vocabulary at a time; the two matmuls with it are XLA's, that is cuBLAS's, which nothing could be
fused into: d_hidden sums over all tiles of a row and d_head over all of a column, so a kernel
that kept the tile to itself would have to compute it twice, a fourth matmul where there are three.
What that costs is the traffic of one [N, V] bfloat16 array, written once and read twice.

N is a multiple of 128, D of 64 and V of 128, at least 256 (columns that do not exist are zeros). The
last tile of columns ends at V and may overlap with the one before: those columns count there.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import hopper, versions

ROWS, COLUMNS, STEP = 128, 256, 64  # of a tile, and of D at a time
NOTHING = -1e30
F32 = jnp.float32


def forward(hidden_ND, head_DV, labels_N, *, scale, columns, tiling, interpret):
    """lse, the label's logit (0 where it is no column) and entropy, float32 `[N]`; logits * scale.

    columns: how many of V's exist.
    """
    N, V = len(hidden_ND), head_DV.shape[1]
    tiles = -(-V // COLUMNS)

    def finish(refs, where, multiplier, values, _):
        labels_ref, *outputs = refs[2:]
        row, column, number = where
        rows = pl.ds(row + multiplier * 64, 64)
        begin = number * COLUMNS  # columns before it belong to the tile before
        z = values[0] * scale
        index = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1) + column
        counts = (index >= begin) & (index < columns)
        is_label = counts & (index == _across(_rows(labels_ref, rows, interpret), z))
        own = jnp.sum(jnp.where(is_label, z, 0.0), axis=1)
        z = jnp.where(counts, z, NOTHING)
        top = jnp.max(z, axis=1)
        z = z - _across(top, z)
        exp = jnp.exp(z)
        total = jnp.sum(exp, axis=1)
        mean = jnp.sum(exp * z, axis=1)
        for ref, x in zip(outputs, (top, total, mean, own), strict=True):
            ref[number, rows] = x

    out = versions.shape_like((tiles, N), F32, hidden_ND, head_DV)
    parts = _tiles(
        hidden_ND,
        head_DV,
        (labels_N,),
        finish,
        [out] * 4,
        "token_logprobs_forward",
        tiling,
        interpret,
    )
    top_CN, sum_CN, mean_CN, own_CN = parts
    top_N = jnp.max(top_CN, axis=0)
    share_CN = jnp.exp(top_CN - top_N)
    sum_N = jnp.sum(share_CN * sum_CN, axis=0)
    mean_N = jnp.sum(share_CN * (mean_CN + (top_CN - top_N) * sum_CN), axis=0) / sum_N
    log_N = jnp.log(sum_N)
    return top_N + log_N, jnp.sum(own_CN, axis=0), log_N - mean_N


def backward(hidden_ND, head_DV, labels_N, rows, *, scale, tiling, interpret):
    """d_hidden float32 `[N, D]` and d_head `[D, V]` in head's type.

    By parts of the vocabulary, not of the tokens: a column's sum over tokens is then done in one
    matmul, and what accumulates in memory is [N, D] and not [D, V].
    """
    N, V = len(hidden_ND), head_DV.shape[1]
    most = max(tiling["part_bytes"] // (2 * N) // COLUMNS, 1) * COLUMNS
    width = min(-(-V // -(-V // most) // COLUMNS) * COLUMNS, V)

    def part(begin, width, carry):
        d_hidden_ND, d_head_DV = carry
        head_DC = jax.lax.dynamic_slice_in_dim(head_DV, begin, width, axis=1)
        dz_NC = d_logits(
            hidden_ND, head_DC, labels_N - begin, rows, scale=scale, tiling=tiling,
            interpret=interpret,
        )  # fmt: skip
        d_hidden_ND += jnp.matmul(dz_NC, head_DC.T, preferred_element_type=F32)
        d_head_DC = jnp.matmul(hidden_ND.T, dz_NC, preferred_element_type=F32)
        d_head_DC = d_head_DC.astype(head_DV.dtype)
        return d_hidden_ND, jax.lax.dynamic_update_slice_in_dim(d_head_DV, d_head_DC, begin, 1)

    carry = jnp.zeros_like(hidden_ND, F32), jnp.zeros_like(head_DV)
    number, rest = divmod(V, width)
    if 0 < rest < COLUMNS:  # too few for a tile
        number, rest = number - 1, rest + width
    carry = jax.lax.fori_loop(0, number, lambda i, x: part(i * width, width, x), carry)
    return part(number * width, rest, carry) if rest else carry


def d_logits(hidden_ND, head_DV, labels_N, rows, *, scale, tiling, interpret):
    """The gradient of hidden @ head, bfloat16 `[N, V]`; equation in `vocabulary`."""

    def finish(refs, where, multiplier, values, staging):
        labels_ref, *row_refs, out_ref = refs[2:]
        row, column, _ = where
        part = pl.ds(row + multiplier * 64, 64)
        z = values[0] * scale
        lse, label, mass, slope = (_across(_rows(ref, part, interpret), z) for ref in row_refs)
        index = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1) + column
        logp = z - lse
        dz = jnp.exp(logp) * (mass - slope * logp)
        dz = scale * (
            dz + jnp.where(index == _across(_rows(labels_ref, part, interpret), z), label, 0.0)
        )
        hopper.put(staging, multiplier, [(dz, out_ref.at[part, pl.ds(column, COLUMNS)])])

    out = versions.shape_like((len(hidden_ND), head_DV.shape[1]), jnp.bfloat16, hidden_ND, head_DV)
    return _tiles(
        hidden_ND, head_DV, (labels_N, *rows), finish, [out], "token_logprobs_d_logits", tiling,
        interpret,
    )[0]  # fmt: skip


def _tiles(hidden_ND, head_DV, rows, finish, out_type, name, tiling, interpret):
    """Every tile of logits to `finish`, in bands of `band` tiles of rows: down, then on by columns.

    So 132 blocks work on a patch of about band x (132 / band) tiles, which share what they load
    through the L2 cache.
    """
    (N, D), V = hidden_ND.shape, head_DV.shape[1]
    down, across, band = N // ROWS, -(-V // COLUMNS), min(tiling["band"], N // ROWS)

    def tile(refs, number, member):
        whole = band * across
        first = jax.lax.div(number, whole) * band
        height = jnp.minimum(band, down - first)
        rest = jax.lax.rem(number, whole)
        row, column = first + jax.lax.rem(rest, height), jax.lax.div(rest, height)
        begin = jnp.minimum(column * COLUMNS, V - COLUMNS)
        return hopper.Tile(jnp.int32(D // STEP), (row * ROWS, pl.multiple_of(begin, 64), column))

    def load(refs, where, k):
        row, column, _ = where
        inner = pl.ds(k * STEP, STEP)
        return refs[0].at[pl.ds(row, ROWS), inner], refs[1].at[inner, pl.ds(column, COLUMNS)]

    def multiply(_, multiplier, slots, sums):
        hidden, head = slots
        hopper.wgmma(sums[0], hidden.at[pl.ds(multiplier * 64, 64)], head)

    return hopper.persistent(
        hidden_ND, head_DV, *rows,
        name=name,
        out_type=out_type,
        slots=[(ROWS, STEP), (STEP, COLUMNS)],
        sums=[(64, COLUMNS)],
        tiles=lambda refs: jnp.int32(down * across),
        tile=tile, load=load, multiply=multiply, finish=finish,
        stages=tiling["stages"], blocks=tiling["blocks"], interpret=interpret,
    )  # fmt: skip


def _rows(ref, part, interpret):
    """A row's numbers, from global memory."""
    if interpret:
        return ref[part]
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.load(ref.at[part], optimized=False)


def _across(x_R, like):
    return jax.lax.broadcast_in_dim(x_R, like.shape, (0,))
