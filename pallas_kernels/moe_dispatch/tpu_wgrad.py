"""The weights' gradient for TPUs: for each expert x^T y over its rows, `[E, M, N]`.

The grid goes over experts, tiles of M, tiles of N and, innermost, parts of the expert's rows. With few
rows per expert there is mostly one part: then x is read once, y once for each tile of M, x is
transposed once for all tiles of N, and a tile of the result is one matmul that goes straight to the
output, in one branch for each number of blocks of 128 rows. Several parts add up in float32. An
expert without rows writes zeros.

Where groups begin at smaller multiples than 128, rows of others in the last block are zeroed. What is
contracted fills the depth of the matrix unit, 128 rows on v5p and 256 on v6e and tpu7x: a group's rows
rounded up to that are the work, whatever the tiling.

Shape suffixes as in `routing`; x `[R, M]`, y `[R, N]`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import versions
from pallas_kernels.moe_dispatch import routing

BLOCK = 128  # rows contracted at once, the lanes of x^T


def tgmm(x_RM, y_RN, counts_E, *, multiple, out_dtype, tiling, interpret=False):
    """sum_r x_r^T y_r over each expert's rows, `[E, M, N]`, accumulated in float32.

    Rows of a group's padding are summed too: they must be zeros in x and finite in y.

    tiling: rows of a part (a multiple of 128), rows_out and columns_out of a tile of the result,
      whole: whether experts mostly are one part; cores, vmem.
    """
    if len(x_RM) < BLOCK:
        x_RM, y_RN = (jnp.pad(x, ((0, BLOCK - len(x)), (0, 0))) for x in (x_RM, y_RN))
    (R, M), N, E = x_RM.shape, y_RN.shape[1], len(counts_E)
    width, out_width = x_RM.dtype.itemsize, jnp.dtype(out_dtype).itemsize
    rows, out_M, out_N, cores = fit(R, M, N, width, out_width, tiling)
    tiles = M // out_M // cores
    starts_E = routing.group_starts(counts_E, multiple).astype(jnp.int32)
    extents_E = routing.round_up(counts_E, multiple).astype(jnp.int32)
    parts = jnp.maximum(-(-jnp.max(extents_E) // rows), 1).astype(jnp.int32)

    def start(e, part, starts_E, extents_E):
        # Beyond an expert's last part the block stays, so that it is not read again.
        last = jnp.maximum(jax.lax.div(extents_E[e] - 1, rows), 0)
        return jnp.minimum(starts_E[e] + jnp.minimum(part, last) * rows, R - rows)

    def x_map(core, e, m, n, part, starts_E, extents_E):
        row = pl.multiple_of(start(e, part, starts_E, extents_E), multiple)
        return row, pl.multiple_of((core * tiles + m) * out_M, 128)

    def y_map(core, e, m, n, part, starts_E, extents_E):
        row = pl.multiple_of(start(e, part, starts_E, extents_E), multiple)
        return row, pl.multiple_of(n * out_N, 128)

    return pl.pallas_call(
        functools.partial(_kernel, start=start, multiple=multiple, whole=tiling["whole"]),
        out_shape=versions.shape_like((E, M, N), out_dtype, x_RM, y_RN, counts_E),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(cores, E, tiles, N // out_N, parts),
            in_specs=[
                pl.BlockSpec((pl.Element(rows), pl.Element(out_M)), x_map),
                pl.BlockSpec((pl.Element(rows), pl.Element(out_N)), y_map),
            ],
            out_specs=pl.BlockSpec(
                (None, out_M, out_N),
                lambda core, e, m, n, part, *_: (e, core * tiles + m, n),
            ),
            scratch_shapes=[
                pltpu.VMEM((out_M, out_N), jnp.float32),
                *([pltpu.VMEM((out_M, rows), x_RM.dtype)] if tiling["whole"] else []),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) + ("arbitrary",) * 4,
            vmem_limit_bytes=tiling["vmem"] - (2 << 20),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * R * M * N,
            bytes_accessed=x_RM.nbytes + y_RN.nbytes * tiles * cores + E * M * N * out_width,
            transcendentals=0,
        ),
        interpret=interpret,
        name=f"moe_tgmm_{M}x{N}",
    )(starts_E, extents_E, x_RM, y_RN)


def fit(R, M, N, width, out_width, tiling) -> tuple[int, int, int, int]:
    """rows, rows_out, columns_out, cores: those of the tiling, or fewer, as VMEM and shapes ask."""
    cores = tiling["cores"] if M % (tiling["cores"] * 128) == 0 else 1
    rows = min(tiling["rows"], R - R % BLOCK)
    out_M, out_N = divisor(M // cores, tiling["rows_out"]), divisor(N, tiling["columns_out"])
    left = tiling["vmem"] - (8 << 20)
    while out_M > 128 and left < (
        width * rows * (3 * out_M + 2 * out_N) + out_M * out_N * (8 + 2 * out_width)
    ):
        out_M = divisor(M // cores, out_M - 128)
    return rows, out_M, out_N, cores


def _kernel(starts_E, extents_E, x, y, out, total, *x_t, start, multiple, whole):
    """x [rows, M'], y [rows, N'], out and total [M', N'], x_t [M', rows] if whole: the own rows' x^T."""
    x_t = x_t[0] if whole else None
    e, n, part, parts = pl.program_id(1), pl.program_id(3), pl.program_id(4), pl.num_programs(4)
    rows = x.shape[0]
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    left = extents_E[e] - part * rows  # of the expert's rows, from this part on
    here = starts_E[e] + part * rows - start(e, part, starts_E, extents_E)
    blocks = jnp.clip(jax.lax.div(left + BLOCK - 1, BLOCK), 0, rows // BLOCK)
    # A last block that is not full may reach beyond x: then all blocks begin earlier.
    first = jnp.minimum(here, rows - blocks * BLOCK)

    def lines(block, size=BLOCK):
        return pl.ds(pl.multiple_of(first + block * BLOCK, min(multiple, BLOCK)), size)

    def own(values, block):
        """Values `[·, ·]` from the first row of `block` on, zeros in rows that are not the expert's."""
        if multiple % BLOCK == 0:
            return values
        row = first + block * BLOCK + jax.lax.broadcasted_iota(jnp.int32, (len(values), 1), 0)
        return jnp.where((row >= here) & (row < here + left), values, jnp.zeros_like(values))

    def dot(x, y_UN, contracted):
        return jax.lax.dot_general(
            x, y_UN, (((contracted,), (0,)), ((), ())), preferred_element_type=jnp.float32,
            precision=precision,
        )  # fmt: skip

    @pl.when((part == 0) & (blocks == 0))
    def _():
        out[...] = jnp.zeros_like(out)

    if whole:

        @pl.when((n == 0) & (parts == 1))
        def _():
            for block in range(rows // BLOCK):

                @pl.when(block < blocks)
                def _(block=block):
                    x_t[:, block * BLOCK : (block + 1) * BLOCK] = own(x[lines(block), :], block).T

        for count in range(1, rows // BLOCK + 1):

            @pl.when((parts == 1) & (blocks == count))
            def _(count=count):
                y_UN = own(y[lines(0, count * BLOCK), :], 0)
                out[...] = dot(x_t[:, : count * BLOCK], y_UN, 1).astype(out.dtype)

    @pl.when((parts > 1 if whole else True) & (blocks > 0))
    def _():
        @pl.when(part == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        @pl.when(left >= rows)
        def _():
            total[...] += dot(x[...], y[...], 0)

        @pl.when(left < rows)
        def _():
            def body(block, _):
                x_UM, y_UN = (own(z[lines(block), :], block) for z in (x, y))
                total[...] += dot(x_UM, y_UN, 0)
                return _

            jax.lax.fori_loop(0, blocks, body, None)

        @pl.when(left <= rows)
        def _():
            out[...] = total[...].astype(out.dtype)


def divisor(width: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that divides width, itself a multiple of 128."""
    return max(c for c in range(128, max(most, 128) + 1, 128) if width % c == 0)
