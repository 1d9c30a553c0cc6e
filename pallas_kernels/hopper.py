"""A persistent matmul for Hopper: one warpgroup loads by TMA, two multiply, tiles in any order.

Every block of threads works through tiles of its own. A ring of `stages` slots of shared memory runs
on from one tile to the next, so that the next tile is loaded while the last one is stored:

  loader:     wait until both multipliers left the slot; start its copies, which arrive at `full`.
  multiplier: wait for `full`; start the step's wgmmas; wait for those of the step before, and leave
              their slot.

All count the same steps, so a slot is step % stages for each. A multiplier owns half of the tile and
stores it without waiting for the other: they may be up to `stages` steps apart, and one multiplies
while the other stores.

Why tiles of 128x256 in steps of 64, split by rows: a step is 4.2 MFLOP, 1024 cycles of the tensor
cores, for which 48 KiB come through the L2 cache: 48 bytes per cycle and SM, where 128x128 needs 64.
With `cluster=2` two blocks take neighbouring columns of the same rows and each loads half of the rows
for both: 40 bytes. A wgmma of 64x256x16 reads 10 KiB of shared memory in its 128 cycles, 80 bytes of
the 128 that a cycle delivers; split by columns it would be 96. The sums take 128 registers a thread;
there are 168, and 232 after `set_max_registers`. (All by arithmetic, none measured.)

The interpreter runs every wgmma at once, so it cannot tell whether `wgmma_wait` is where it must be:
before a slot is left.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import versions
from pallas_kernels.manual_axes import same_axes

MULTIPLIERS = 2
LOADER_REGISTERS, MULTIPLIER_REGISTERS = 40, 232


class Tile(NamedTuple):
    """steps: int32, of the inner loop; where: what the kernel's functions want to know of it;
    active: which multiplier has work (function of its number); None: both."""

    steps: Any
    where: Any
    active: Callable[[Any], Any] | None = None


def persistent(
    *operands: jax.Array,
    name: str,
    out_type: Sequence[jax.ShapeDtypeStruct],
    slots: Sequence[tuple[int, int]],
    sums: Sequence[tuple[int, int]],
    tiles: Callable[[Sequence], Any],
    tile: Callable[[Sequence, Any, Any], Tile],
    load: Callable[[Sequence, Any, Any], Sequence],
    multiply: Callable[[Any, Any, Sequence, Sequence], None],
    finish: Callable[[Sequence, Any, Any, Sequence, Any], None],
    shared: Sequence[int] = (),
    stages: int,
    places: int = 2,
    blocks: int,
    cluster: int = 1,
    interpret: bool = False,
) -> Sequence[jax.Array]:
    """Runs the kernel that these functions make up. refs: its operands, then its outputs.

    Args:
      slots: shapes of what a step loads, bfloat16, rows of a multiple of 64 elements.
      sums: shapes of one multiplier's accumulators, float32.
      tiles: refs → how many tiles a cluster's blocks work through together, int32.
      tile: (refs, number, member) → Tile; member: which block of the cluster asks.
      load: (refs, where, step) → a slice of global memory for each slot.
      multiply: (where, multiplier, slots, sums): starts one wgmma for each sum.
      finish: (refs, where, multiplier, values of the sums, staging): stores, usually by `put`.
      shared: which slots the blocks of a cluster load together, a part of the rows each.
      stages: at least 2, since a slot is left one step later.
      places: of 8 KiB, that each multiplier stores through; it waits for one when all are in use.
      blocks: of threads, in all: the number of SMs.
    """
    if stages < 2:
        raise ValueError(f"need at least 2 stages, got {stages}")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    num_refs, clusters = len(operands) + len(out_type), blocks // cluster

    def body(*refs):
        refs, (ring, staging, full, empty) = refs[:num_refs], refs[num_refs:]
        role, first, member = (jax.lax.axis_index(x) for x in ("role", "cluster", "member"))

        def over_tiles(one_tile):
            """The number of steps after `step = one_tile(tile, step)` for each tile of this block."""
            number = jax.lax.div(tiles(refs) - first + (clusters - 1), clusters)
            each = lambda i, step: one_tile(tile(refs, first + i * clusters, member), step)  # noqa: E731
            return jax.lax.fori_loop(0, number, each, jnp.int32(0))

        def wait_empty(step):
            slot = jax.lax.rem(step, stages)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))

        def leave(step):
            plgpu.barrier_arrive(empty.at[jax.lax.rem(step, stages)])

        @pl.when(role == MULTIPLIERS)
        def _loader():
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

            def one_tile(t, begin):
                def one_step(k, carry):
                    step, slot = begin + k, jax.lax.rem(begin + k, stages)
                    wait_empty(step)
                    for i, source in enumerate(load(refs, t.where, k)):
                        together = "member" if cluster > 1 and i in shared else None
                        plgpu.copy_gmem_to_smem(
                            source, ring[i].at[slot], full.at[slot], collective_axes=together
                        )
                    return carry

                jax.lax.fori_loop(0, t.steps, one_step, None)
                return begin + t.steps

            end = over_tiles(one_tile)
            # A block must not end before the last arrival at its barriers, from another block.
            jax.lax.fori_loop(0, stages, lambda i, _: wait_empty(end + i), None)

        @pl.when(role < MULTIPLIERS)
        def _multiplier():
            plgpu.set_max_registers(MULTIPLIER_REGISTERS, action="increase")

            def one_tile(t, begin):
                def work(*totals):
                    def one_step(k, carry):
                        step, slot = begin + k, jax.lax.rem(begin + k, stages)
                        plgpu.barrier_wait(full.at[slot])
                        multiply(t.where, role, [x.at[slot] for x in ring], totals)
                        plgpu.wgmma_wait(len(totals))  # all but this step's are done
                        pl.when(k > 0)(lambda: leave(step - 1))
                        return carry

                    jax.lax.fori_loop(0, t.steps, one_step, None)
                    values = [x[...] for x in totals]  # when all are done
                    pl.when(t.steps > 0)(lambda: leave(begin + t.steps - 1))
                    finish(refs, t.where, role, values, staging)

                def skip():
                    def one_step(k, carry):
                        plgpu.barrier_wait(full.at[jax.lax.rem(begin + k, stages)])
                        leave(begin + k)
                        return carry

                    jax.lax.fori_loop(0, t.steps, one_step, None)

                run = functools.partial(pl.run_scoped, work, *[plgpu.ACC(x) for x in sums])
                if t.active is None:
                    run()
                else:
                    jax.lax.cond(t.active(role), run, skip)
                return begin + t.steps

            over_tiles(one_tile)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def smem(shape, dtype):
        row = 128 // jnp.dtype(dtype).itemsize  # the swizzle is of 128 bytes
        transforms = plgpu.TilingTransform((8, row)), plgpu.SwizzleTransform(128)
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    dtype = out_type[0].dtype
    empty = dict(num_arrivals=MULTIPLIERS, num_barriers=stages)
    outputs = plgpu.kernel(
        body,
        out_type=tuple(out_type),
        scratch_types=(
            [smem((stages, *shape), jnp.bfloat16) for shape in slots],
            smem((MULTIPLIERS, places, 64, 128 // dtype.itemsize), dtype),
            plgpu.Barrier(num_arrivals=len(slots), num_barriers=stages),
            plgpu.ClusterBarrier(collective_axes=("member",), **empty)
            if cluster > 1
            else plgpu.Barrier(**empty),
        ),
        grid=(clusters,),
        grid_names=("cluster",),
        cluster=(cluster,),
        cluster_names=("member",),
        num_threads=MULTIPLIERS + 1,
        thread_name="role",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=versions.gpu_interpreter(interpret),
    )(*operands)
    return same_axes(*outputs, *operands)[: len(outputs)]  # `plgpu.kernel` forgets them


def put(staging, multiplier, pairs):
    """Stores float32 values [64, n] in slices of global memory, 128 bytes of each row at a time."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (_, places, _, width), number = staging.shape, 0
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
    for value, destination in pairs:
        for column in range(0, value.shape[1], width):
            place = staging.at[multiplier, number % places]
            if number >= places:
                plgpu.wait_smem_to_gmem(places - 1, wait_read_only=True)
            place[...] = value[:, column : column + width].astype(staging.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(place, destination.at[:, pl.ds(column, width)])
            number += 1


def wgmma(total, a, b):
    """Starts total += a @ b, of slots of shared memory."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plgpu.wgmma(total, a, b)
