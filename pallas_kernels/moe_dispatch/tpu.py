"""Grouped matmuls for TPUs: an expert's rows stay in VMEM while its weights stream past them, once.

An item of work is up to `rows` rows of one expert; most experts are one item. For each item the grid
goes over tiles of columns, whose weights are whole in the contracted dimension: so each weight is
read once per item, each row of x once per item (twice where two cores share the columns), and no
accumulator is kept. Rows are multiplied in blocks, the last ones in smaller blocks that halve down to
`multiple` rows, so that what is computed in vain is the padding of groups alone. Results leave
through a ring of small buffers, since a group ends anywhere in an item.

Which rows belong to whom is computed on the device and prefetched as scalars; the number of items is
a dynamic bound of the grid. The weights' gradient is in `tpu_wgrad.py`.

Shape suffixes as in `routing`; M: contracted width, I items, U blocks of `multiple` rows of an item.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, versions
from pallas_kernels.moe_dispatch import routing, swiglu
from pallas_kernels.moe_dispatch.tpu_wgrad import divisor, tgmm
from pallas_kernels.tilings import TILINGS

__all__ = ["gmm", "gmm_swiglu", "multiple", "refusal", "tgmm", "tilings"]

RING = 8  # at least so many blocks of `multiple` rows may be on their way to HBM


def refusal(num_pairs: int, gate_EDF: jax.Array) -> str | None:
    """Why these kernels cannot serve such a layer; None if they can."""
    _, D, F = gate_EDF.shape
    if D % 128 or F % 128:
        return f"widths must be multiples of 128, not {D} and {F}"
    if max(D, F) * gate_EDF.dtype.itemsize > 1 << 16:
        return f"weights of {D} x {F} {gate_EDF.dtype} are too wide to be held whole in one width"
    return None


def multiple(num_pairs: int, num_experts: int, dtype) -> int:
    """Rows at which groups start: an eighth of the mean group, at most 128, at least a tile's rows.

    On average half of it is computed in vain for each expert, a sixteenth of the work.
    """
    eighth = num_pairs // (8 * num_experts)
    least = 32 // jnp.dtype(dtype).itemsize
    return max(least, min(128, 1 << max(eighth, 1).bit_length() - 1))


def tilings(chip: str, num_pairs: int, num_experts: int) -> dict[str, dict[str, int]]:
    """Of `gmm`, `gmm_swiglu` and `tgmm` on that chip, with its cores and its VMEM.

    Rows of an item: a quarter more than the mean group has, up to the table's.
    """
    rows = routing.round_up(max(5 * num_pairs // (4 * num_experts), 1), 128)
    machine = dict(cores=chips.CHIPS[chip].cores, vmem=chips.CHIPS[chip].vmem)
    found = {}
    for name in ("gmm", "gmm_swiglu", "tgmm"):
        table = TILINGS[chip][f"moe_dispatch.{name}"]
        found[name] = table | machine | dict(rows=min(table["rows"], rows))
    # Where experts have several parts anyway, a part fills the depth of the matrix unit.
    whole = rows <= found["tgmm"]["rows"]
    found["tgmm"] |= dict(whole=True) if whole else dict(whole=False, rows=512)
    return found


def gmm(x_RM, w_EMN, counts_E, *, multiple, transposed=False, out_dtype, tiling, interpret=False):
    """x_r @ w_e for each row r of expert e, `[R, N]`; or x_r @ w_e^T for w `[E, N, M]`.

    Products accumulate in float32. Rows of a group's padding are computed like the others; those
    after the last group are not written.

    tiling: rows of an item, rows of a block, columns (of a tile), cores, vmem: bytes of VMEM.
    """
    name = "moe_gmm_transposed" if transposed else "moe_gmm"
    (out_RN,) = _grouped(
        x_RM, (w_EMN,), counts_E, lambda y: (y,), (out_dtype,), multiple=multiple,
        transposed=transposed, tiling=tiling, interpret=interpret, name=name,
    )  # fmt: skip
    return out_RN


def gmm_swiglu(x_RD, gate_EDF, up_EDF, counts_E, *, multiple, keep, tiling, interpret=False):
    """silu(x gate) * (x up) in one pass over x: hidden_RF and, if `keep`, (x gate, x up), else ()."""

    def finish(gate_UF, up_UF):
        return (swiglu.hidden(gate_UF, up_UF),) + ((gate_UF, up_UF) if keep else ())

    hidden_RF, *kept = _grouped(
        x_RD, (gate_EDF, up_EDF), counts_E, finish, (x_RD.dtype,) * (3 if keep else 1),
        multiple=multiple, transposed=False, tiling=tiling, interpret=interpret, name="moe_swiglu",
    )  # fmt: skip
    return hidden_RF, tuple(kept)


def items(counts_E, rows, multiple, num_items):
    """Each item's expert, first row and number of blocks of `multiple` rows; how many items there are.

    int32 `[I]` each; at least one item, which may be empty. Items beyond the last repeat its expert.
    """
    extents_E = routing.round_up(counts_E, multiple)
    lasts_E = jnp.cumsum(-(-extents_E // rows))
    item_I = jnp.arange(num_items, dtype=jnp.int32)
    expert_I = jnp.sum(item_I[:, None] >= lasts_E, axis=1, dtype=jnp.int32)
    expert_I = jnp.minimum(expert_I, len(counts_E) - 1)
    part_I = item_I - jnp.append(0, lasts_E)[expert_I]
    blocks_I = jnp.clip(extents_E[expert_I] - part_I * rows, 0, rows) // multiple
    first_I = routing.group_starts(counts_E, multiple)[expert_I] + part_I * rows
    return (
        expert_I,
        first_I.astype(jnp.int32),
        blocks_I.astype(jnp.int32),
        jnp.maximum(lasts_E[-1], 1).astype(jnp.int32),
    )


def _grouped(
    x_RM, ws, counts_E, finish, dtypes, *, multiple, transposed, tiling, interpret, name
):  # fmt: skip
    """`finish` of the products with each of ws, as arrays `[R, N]` of those dtypes."""
    R, M = x_RM.shape
    E, N = len(counts_E), ws[0].shape[1 if transposed else 2]
    out_widths = [jnp.dtype(dtype).itemsize for dtype in dtypes]
    rows, columns, cores = fit(R, M, N, x_RM.dtype.itemsize, len(ws), out_widths, multiple, tiling)
    tiles = N // columns // cores
    expert_I, first_I, blocks_I, num_items = items(counts_E, rows, multiple, R // rows + E)

    def start(i, first_I):
        return pl.multiple_of(jnp.minimum(first_I[i], R - rows), multiple)

    def rows_map(core, i, n, expert_I, first_I, blocks_I):
        return start(i, first_I), 0

    def weights_map(core, i, n, expert_I, first_I, blocks_I):
        column = core * tiles + n
        return (expert_I[i], column, 0) if transposed else (expert_I[i], 0, column)

    blocks = sizes(multiple, rows, tiling["block"])
    slots = _slots(multiple, blocks)
    kernel = functools.partial(
        _kernel, start=start, finish=finish, multiple=multiple, sizes=blocks, num_slots=slots,
        transposed=transposed, num_outs=len(dtypes), num_ws=len(ws),
    )  # fmt: skip
    rings = [pltpu.VMEM((slots * multiple, columns), dtype) for dtype in dtypes]
    weights = pl.BlockSpec((None, *((columns, M) if transposed else (M, columns))), weights_map)
    cost = pl.CostEstimate(
        flops=2 * R * M * N * len(ws),
        bytes_accessed=x_RM.nbytes * cores + sum(w.nbytes for w in ws) + R * N * sum(out_widths),
        transcendentals=R * N * (len(ws) - 1),
    )
    return pl.pallas_call(
        kernel,
        out_shape=[versions.shape_like((R, N), dtype, x_RM, *ws, counts_E) for dtype in dtypes],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, num_items, tiles),
            in_specs=[pl.BlockSpec((pl.Element(rows), pl.Element(M)), rows_map)]
            + [weights] * len(ws),
            out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(dtypes),
            scratch_shapes=[
                *rings,
                pltpu.SemaphoreType.DMA((len(dtypes), slots)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tiling["vmem"] - (2 << 20),
        ),
        cost_estimate=cost,
        interpret=interpret,
        name=f"{name}_{M}x{N}",
    )(expert_I, first_I, blocks_I, x_RM, *ws)


def _kernel(
    expert_I, first_I, blocks_I, x, *refs, start, finish, multiple, sizes, num_slots, transposed,
    num_outs, num_ws,
):  # fmt: skip
    """One tile of columns of one item. x [rows, M]; weights [M, columns] or [columns, M]."""
    ws, refs = refs[:num_ws], refs[num_ws:]
    outs, rings, (arrivals, started) = refs[:num_outs], refs[num_outs:-2], refs[-2:]
    core, i, n = (pl.program_id(axis) for axis in range(3))
    num_items, tiles = pl.num_programs(1), pl.num_programs(2)
    columns = rings[0].shape[1]
    column = pl.multiple_of((core * tiles + n) * columns, 128)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None

    @pl.when((i == 0) & (n == 0))
    def _():
        started[0] = 0

    def departures(slot, row):
        """The copies of what lies in a slot to the rows of the results that begin at `row`."""
        for k, (ring, out) in enumerate(zip(rings, outs, strict=True)):
            source = ring.at[pl.ds(pl.multiple_of(slot * multiple, multiple), multiple), :]
            target = out.at[pl.ds(pl.multiple_of(row, multiple), multiple), pl.ds(column, columns)]
            yield pltpu.make_async_copy(source, target, arrivals.at[k, slot])

    def wait(slot, row=0):
        for copy in departures(slot, row):
            copy.wait()

    def block(size, unit):
        """Rows of `size`, from the item's `unit`-th block of `multiple` rows on."""
        row, parts = first_I[i] + unit * multiple, size // multiple
        slots = [jax.lax.rem(started[0] + part, num_slots) for part in range(parts)]
        for part, slot in enumerate(slots):
            pl.when(started[0] + part >= num_slots)(functools.partial(wait, slot))
        here = pl.multiple_of(row - start(i, first_I), multiple)
        x_UM = x[pl.ds(here, size), :]
        numbers = (((1,), (1 if transposed else 0,)), ((), ()))
        results = finish(
            *(
                jax.lax.dot_general(
                    x_UM, w[...], numbers, preferred_element_type=jnp.float32, precision=precision
                )
                for w in ws
            )
        )
        for ring, result in zip(rings, results, strict=True):
            for part, slot in enumerate(slots):
                lines = pl.ds(pl.multiple_of(slot * multiple, multiple), multiple)
                piece = result[part * multiple : (part + 1) * multiple]
                ring[lines, :] = piece.astype(ring.dtype)
        for part, slot in enumerate(slots):
            for copy in departures(slot, row + part * multiple):
                copy.start()
        started[0] += parts

    done = jnp.int32(0)
    for size in sizes:
        parts = size // multiple
        count = jax.lax.div(blocks_I[i] - done, parts)

        def body(j, _, size=size, parts=parts, done=done):
            block(size, done + j * parts)
            return _

        jax.lax.fori_loop(0, count, body, None)
        done += count * parts

    @pl.when((i == num_items - 1) & (n == tiles - 1))
    def _():
        for slot in range(num_slots):
            pl.when(started[0] > slot)(functools.partial(wait, slot))


def sizes(multiple: int, rows: int, block: int) -> tuple[int, ...]:
    """Rows of the blocks that an item's rows are multiplied in, largest first."""
    found = [multiple]
    while found[0] * 2 <= min(block, rows):
        found.insert(0, found[0] * 2)
    return tuple(found)


def fit(R, M, N, width, num_ws, out_widths, multiple, tiling) -> tuple[int, int, int]:
    """rows, columns, cores: those of the tiling, or fewer where there are fewer or VMEM is short.

    width, out_widths: bytes of an element of x and the weights, of each result.
    """
    cores = tiling["cores"] if N % (tiling["cores"] * 128) == 0 else 1
    rows = min(tiling["rows"], R)
    rows -= rows % multiple
    columns = divisor(N // cores, tiling["columns"])
    left = tiling["vmem"] - (8 << 20)

    def needed():
        slots = _slots(multiple, sizes(multiple, rows, tiling["block"]))
        ring = slots * multiple * columns * sum(out_widths)
        block = min(tiling["block"], rows) * columns * 4 * num_ws
        return 2 * width * M * (rows + num_ws * columns) + ring + block

    while needed() > left and columns > 128:
        columns = divisor(N // cores, columns - 128)
    while needed() > left and rows > multiple:
        rows = routing.round_up(rows // 2, multiple)
    return rows, columns, cores


def _slots(multiple, blocks):
    """Blocks of `multiple` rows in the ring: two of the largest blocks, which fill it at once."""
    return max(RING, 2 * blocks[0] // multiple)
