"""Grouped matmuls for Hopper, on the persistent core of `pallas_kernels.hopper`. bfloat16.

Groups start at multiples of 64 rows: the rows of one multiplier, and of one step of `tgmm`. So no
multiplier sees two experts, nothing is masked, and every store is a whole one. Tiles of 128 rows
start where their group does; where only the first half of one belongs to the group, the second
multiplier does nothing and the tile takes half the time. Computed in vain are at most 63 rows per
expert, as with any tiling by wgmma, whose least height is 64.

Rows between the end of a group's pairs and its next multiple of 64 are computed like the others (they
should be zeros: `tgmm` sums them too); rows after the last group are not written.

Tiles are taken in bands of `band` row tiles of one expert: down a band's rows, then on to the next
columns. So 132 blocks work on a patch of about band x (132 / band) tiles, and what they share comes
from memory once and else from the L2 cache. A group of 512 rows is one band of 4, whose weights are
read once; with all rows in one expert a patch of 8 x 16 tiles reads 5 KiB per 4.2 MFLOP from memory.

An inner loop of `gmm` has 96 steps or more, but one of `tgmm` only as many as an expert has 64 rows:
8 of them, 8192 cycles, for 64 KiB to store. So `tgmm` gives shared memory from its ring to the stores.

Shape suffixes as in `routing`; M, N: widths, multiples of 128.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import hopper
from pallas_kernels.moe_dispatch import routing
from pallas_kernels.tilings import TILINGS

MULTIPLE = 64  # rows at which groups start
ROWS = 128  # of a tile
STEP = 64  # elements of the contraction at a time


def refusal(num_pairs: int, gate_EDF: jax.Array) -> str | None:
    """Why these kernels cannot serve such a layer; None if they can."""
    return _refusal(gate_EDF)


def multiple(num_pairs: int, num_experts: int, dtype) -> int:
    """Rows at which groups start."""
    return MULTIPLE


def tilings(chip: str, num_pairs: int, num_experts: int) -> dict[str, dict[str, int]]:
    """The chip's tilings, the same for any number of pairs.

    A few rows per expert are bound by reading the weights, which a tile of 128 rows that are mostly
    not there does as fast as a lower one.
    """
    return {name: TILINGS[chip][f"moe_dispatch.{name}"] for name in ("gmm", "gmm_swiglu", "tgmm")}


def gmm(
    x_RM, w_EMN, counts_E, *, multiple, transposed=False, out_dtype, tiling, interpret=False
):  # fmt: skip
    """x_r @ w_e for each row r of expert e, `[R, N]`; or x_r @ w_e^T for w `[E, N, M]`.

    tiling: block_columns (256 or 128, of each matrix), band; stages, places, blocks and cluster as in
    `hopper.persistent`.
    """
    name = "moe_gmm_transposed" if transposed else "moe_gmm"
    return _grouped(
        x_RM, (w_EMN,), counts_E, lambda value: [value], [out_dtype], name, multiple, transposed,
        tiling, interpret,
    )[0]  # fmt: skip


def gmm_swiglu(x_RD, gate_EDF, up_EDF, counts_E, *, multiple, keep, tiling, interpret=False):
    """hidden_RF = silu(x gate_e) * (x up_e) and, if `keep`, (x gate_e, x up_e), else ().

    A multiplier sums both for the same rows and columns, so hidden comes from its registers.
    """

    def combine(gate, up):
        hidden = gate * jax.nn.sigmoid(gate) * up
        return [hidden, gate, up] if keep else [hidden]

    dtypes = [x_RD.dtype] * (3 if keep else 1)
    hidden_RF, *kept = _grouped(
        x_RD, (gate_EDF, up_EDF), counts_E, combine, dtypes, "moe_swiglu", multiple, False, tiling,
        interpret,
    )  # fmt: skip
    return hidden_RF, tuple(kept)


def tgmm(x_RM, y_RN, counts_E, *, multiple, out_dtype, tiling, interpret=False):
    """sum_r x_r^T y_r over the rows of each expert, `[E, M, N]`; zero for an expert without rows."""
    _check(multiple, x_RM, y_RN)
    (_, M), (_, N), E = x_RM.shape, y_RN.shape, counts_E.size
    columns = _columns(tiling["block_columns"], N)
    groups_2E = jnp.stack([routing.group_starts(counts_E, multiple), _extents(counts_E, multiple)])
    cluster = tiling["cluster"] if N // columns % 2 == 0 else 1
    across, each = N // columns // cluster, (M // ROWS) * (N // columns // cluster)

    def tile(refs, number, member):
        expert, rest = jax.lax.div(number, each), jax.lax.rem(number, each)
        row, column = jax.lax.div(rest, across), jax.lax.rem(rest, across) * cluster + member
        begin, extent = refs[2][0, expert], refs[2][1, expert]
        where = expert, begin, row * ROWS, column * columns
        return hopper.Tile(jax.lax.div(extent, STEP), where)

    def load(refs, where, k):
        _, begin, row, column = where
        step = pl.ds(pl.multiple_of(begin + k * STEP, STEP), STEP)
        return refs[0].at[step, pl.ds(row, ROWS)], refs[1].at[step, pl.ds(column, columns)]

    def multiply(_, multiplier, slots, sums):
        x, y = slots
        hopper.wgmma(sums[0], x.at[:, pl.ds(multiplier * 64, 64)].transpose((1, 0)), y)

    def finish(refs, where, multiplier, values, staging):
        expert, _, row, column = where
        part = pl.ds(row + multiplier * 64, 64), pl.ds(column, columns)
        hopper.put(staging, multiplier, [(values[0], refs[3].at[(expert, *part)])])

    return hopper.persistent(
        x_RM, y_RN, groups_2E,
        name="moe_tgmm",
        out_type=[jax.ShapeDtypeStruct((E, M, N), jnp.dtype(out_dtype))],
        slots=[(STEP, ROWS), (STEP, columns)],
        sums=[(64, columns)],
        tiles=lambda refs: jnp.int32(E * each),
        tile=tile, load=load, multiply=multiply, finish=finish, shared=[0],
        stages=tiling["stages"], places=tiling["places"], cluster=cluster, interpret=interpret,
        blocks=min(tiling["blocks"], E * each * cluster),
    )[0]  # fmt: skip


def _grouped(
    x_RM, weights, counts_E, combine, dtypes, name, multiple, transposed, tiling, interpret
):  # fmt: skip
    """The outputs [R, N] that `combine` makes of the products with each of the weights."""
    _check(multiple, x_RM, *weights)
    (R, M), N = x_RM.shape, weights[0].shape[1 if transposed else 2]
    columns = _columns(tiling["block_columns"], N)
    cluster = tiling["cluster"] if N // columns % 2 == 0 else 1
    across = N // columns // cluster
    num_weights = len(weights)

    def split(refs):
        return refs[0], refs[1 : 1 + num_weights], refs[1 + num_weights], refs[2 + num_weights :]

    def tile(refs, number, member):
        table = split(refs)[2]
        any_row = 1 + jax.lax.div(number, across)  # of the band: see _row_tiles
        first, height = table[any_row, 0], table[any_row, 1]
        number -= (first - 1) * across
        this, column = first + jax.lax.rem(number, height), jax.lax.div(number, height)
        expert, row, left = table[this, 2], table[this, 3], table[this, 4]
        where = expert, pl.multiple_of(row, 64), (column * cluster + member) * columns
        return hopper.Tile(jnp.int32(M // STEP), where, lambda multiplier: multiplier * 64 < left)

    def load(refs, where, k):
        (x, weights, *_), (expert, row, column) = split(refs), where
        inner, outer = pl.ds(k * STEP, STEP), pl.ds(column, columns)
        part = (expert, outer, inner) if transposed else (expert, inner, outer)
        return x.at[pl.ds(row, ROWS), inner], *(w.at[part] for w in weights)

    def multiply(_, multiplier, slots, sums):
        x, *weights = slots
        for w, total in zip(weights, sums, strict=True):
            w = w.transpose((1, 0)) if transposed else w
            hopper.wgmma(total, x.at[pl.ds(multiplier * 64, 64)], w)

    def finish(refs, where, multiplier, values, staging):
        _, row, column = where
        part = pl.ds(row + multiplier * 64, 64), pl.ds(column, columns)
        outputs = split(refs)[3]
        pairs = [(y, out.at[part]) for y, out in zip(combine(*values), outputs, strict=True)]
        hopper.put(staging, multiplier, pairs)

    table = _row_tiles(counts_E, multiple, R, tiling["band"])
    return hopper.persistent(
        x_RM, *weights, table,
        name=name,
        out_type=[jax.ShapeDtypeStruct((R, N), jnp.dtype(dtype)) for dtype in dtypes],
        slots=[(ROWS, STEP)] + num_weights * [(columns, STEP) if transposed else (STEP, columns)],
        sums=num_weights * [(64, columns)],
        tiles=lambda refs: split(refs)[2][0, 0] * across,
        tile=tile, load=load, multiply=multiply, finish=finish, shared=[0],
        stages=tiling["stages"], places=tiling["places"], cluster=cluster, interpret=interpret,
        blocks=min(tiling["blocks"], (len(table) - 1) * across * cluster),
    )  # fmt: skip


def _row_tiles(counts_E, multiple, num_rows, band):
    """int32 [1 + most tiles, 5]: how many row tiles there are; then for each: its band's first one
    and how many those are, its expert, first row, and rows from there to the group's end.

    Tile numbers count bands of (row tiles) x (columns), so number // columns is some row tile of
    the band, whichever, and what a row of the table says of its band is enough to find the rest.
    """
    starts_E, extents_E = routing.group_starts(counts_E, multiple), _extents(counts_E, multiple)
    tiles_E = -(-extents_E // ROWS)
    ends_E = jnp.cumsum(tiles_E)
    T = jnp.arange(num_rows // ROWS + counts_E.size, dtype=jnp.int32)
    expert_T = jnp.sum(ends_E <= T[:, None], axis=1, dtype=jnp.int32)
    of = lambda x_E: x_E.at[expert_T].get(mode="fill", fill_value=0)  # noqa: E731
    inner_T = T - of(ends_E - tiles_E)
    first_T = T - inner_T % band
    height_T = jnp.minimum(band, of(ends_E) - first_T)
    columns = 1 + first_T, height_T, expert_T, of(starts_E) + inner_T * ROWS
    table = jnp.stack([*columns, of(extents_E) - inner_T * ROWS], axis=1)
    head = jnp.zeros((1, table.shape[1]), jnp.int32).at[0, 0].set(ends_E[-1])
    return jnp.concatenate([head, table.astype(jnp.int32)])


def _extents(counts_E, multiple):
    return routing.round_up(counts_E, multiple).astype(jnp.int32)


def _columns(most: int, width: int) -> int:
    """The largest number of columns of a tile that divides the width."""
    return 256 if most >= 256 and width % 256 == 0 else 128


def _check(multiple, *operands):
    if multiple % MULTIPLE:
        raise ValueError(f"groups must start at multiples of {MULTIPLE} rows, not {multiple}")
    if len(operands[0]) % MULTIPLE:
        raise ValueError(f"need a multiple of {MULTIPLE} rows, got {len(operands[0])}")
    for x in operands:
        if reason := _refusal(x):
            raise ValueError(reason)


def _refusal(x) -> str | None:
    if x.dtype != jnp.bfloat16:
        return f"its GPU kernels take bfloat16, not {x.dtype.name}"
    if any(width % 128 for width in x.shape[1:]):
        return f"its GPU kernels take widths that are multiples of 128, not {x.shape[1:]}"
    return None
