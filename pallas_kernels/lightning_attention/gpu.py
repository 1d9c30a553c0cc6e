"""Lightning attention on Hopper GPUs: one Mosaic GPU kernel for outputs, states and gradients.

A sweep walks a head's chunks of C = 64 tokens with the state S in registers. With row x of a chunk,
its m tokens that are there, and g = e^(-slope), a chunk computes (in float32, from bfloat16 factors)

    O_x = sum_y D_xy (q_x . k_y) v_y + in_x  q_x S      D_xy = g^(x-y) where y <= x
    S  <- g^m S + sum_x out_x k_x^T v_x                 in_x = g^(x+1)   out_x = g^(m-1-x)

and in reverse, from the last chunk to the first, the same with D_xy = g^(y-x) where y >= x, in and
out exchanged. The gradients are such sweeps too (`gpu_backward`), so this kernel is all there is.

Packed sequences: `positions` says how far each token is from the beginning of its segment. Then y
reaches x only if y >= x - position_x (the later one's), in_x is kept iff position_x > x, out_x iff
x >= m - 1 - position_(m-1), and the old state iff position_(m-1) >= m; reverse exchanges as above.

Everything is transposed: O^T = S^T Q^T + V^T P^T, with P = D * (Q K^T), and S^T += V'^T K. So the
state multiplies from registers and never goes through shared memory. The warpgroups of a block:

    columns (1 or 2)   64 columns of v each: S^T [64, K] float32, O^T [64, C]
    scores             P [C, C] for the columns' warpgroups, a chunk or two ahead of them
    loader             starts the copies of q, k, v, positions, `stages` chunks ahead

Shared buffers and why none is overwritten while it is read (every barrier counts all 128 threads of
an arriving warpgroup, each after its own reads; a wgmma has read its operands once it is waited for):

    q, k, v, positions [stages]  full: their copies. free: the scores' and the columns' warpgroups,
                                 after they waited for their last wgmma on that slot, and after a
                                 fence between their ordinary loads of v and positions and the copy
                                 that overwrites them (that of `commit_smem`). The loader waits for
                                 free before it refills a slot, from its second use on.
    p [2]                        ready: the scores' warpgroup, after its stores and the fence to the
                                 asynchronous proxy. taken: the columns' warpgroups, after the wgmma
                                 that reads it. Its writer waits for taken from the second use on.
    o [2], own to a warpgroup    the copy out of the chunk before the last may still read the other
                                 half; `wait_smem_to_gmem(1)` before a store leaves only that one.

No barrier completes twice unseen (a wait knows a phase by its parity alone): the second completion
needs an arrival that follows the waiter's wait for the first.

Cycles of a chunk and head with two columns' warpgroups, counted from the compiled code: tensor cores
1536, shared memory about 1700 (216 KB at 128 bytes), a scheduler 1050 instructions; 64 KB through HBM
take 3400 when all multiprocessors ask for them. With `splits` of 2: 900, 1100 and 640.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import versions

CHUNK = 64
DIM = 128
CORES = 132  # streaming multiprocessors of an H100 or H200
_COLUMNS = 64  # of v, per warpgroup
_F32, _BF16 = jnp.float32, jnp.bfloat16


class Job(NamedTuple):
    """One sweep over all heads: o = sweep(q, k, v), all bfloat16 [B, T, H, 128].

    state: float32 [B, H, k's, v's axis], entering the first chunk swept, or None for zero;
    flipped says that its last two axes, and those of the state returned, are exchanged;
    final whether the state after the last chunk is wanted.
    """

    q: jax.Array | None
    k: jax.Array
    v: jax.Array
    state: jax.Array | None
    flipped: bool = False
    final: bool = True


def forward(q, k, v, slopes_H, initial, positions, lengths, *, tiling, interpret=False):
    """o [B, T, H, V] in bfloat16 and the final state, float32 [B, H, K, V].

    q, k, v: bfloat16 [B, T, H, 128], T a multiple of 64; initial: float32 [B, H, K, V] or None for
    zero; positions: int32 [B, T] or None; lengths: int32 [B] or None. tiling: stages, splits.
    """
    common = slopes_H, positions, lengths, tiling, interpret
    ((o, final),) = sweep([Job(q, k, v, initial)], *common, name="lightning_gpu_forward")
    return o, final


def final_state(k, v, slopes_H, initial, positions, lengths, *, tiling, interpret=False):
    """The final state alone, float32 [B, H, K, V]: reads k and v only."""
    common = slopes_H, positions, lengths, tiling, interpret
    ((_, final),) = sweep([Job(None, k, v, initial)], *common, name="lightning_gpu_state")
    return final


def sweep(jobs, slopes_H, positions, lengths, tiling, interpret, *, name, reverse=False):
    """[(o or None, final state or None)] of jobs that differ in their arrays only.

    Jobs run side by side, so that what they share is read from memory once. tiling: "stages", chunks
    in shared memory; "splits", blocks per head, 1 (two columns' warpgroups) or 2 (one in each); 0 or
    none takes 2 where the device has multiprocessors for them.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    outputs = jobs[0].q is not None
    flipped = [job.flipped for job in jobs]
    arrays = [job[:4] for job in jobs]
    B, T, H, _ = jobs[0].k.shape
    if T % CHUNK:
        raise ValueError(f"T must be a multiple of {CHUNK}, got {T}")
    chunks = T // CHUNK
    stages, splits = tiling["stages"], tiling.get("splits", 0)
    splits = splits or (2 if 2 * B * H * len(jobs) <= CORES else 1)
    columns = DIM // _COLUMNS // splits  # warpgroups
    wgmma_layout = plgpu.Layout.WGMMA
    by_column = wgmma_layout.reduce(0)  # of a vector that scales columns, one value per column
    operands = slopes_H, lengths, positions, arrays
    leaves, tree = jax.tree.flatten(operands)
    shapes = [
        (
            versions.shape_like((B, T, H, DIM), _BF16, *leaves) if outputs else None,
            versions.shape_like((B, H, DIM, DIM), _F32, *leaves) if job.final else None,
        )
        for job in jobs
    ]
    out_leaves, out_tree = jax.tree.flatten(shapes)

    # What the interpreter lacks: accumulators that are assigned, and operands in registers.
    def accumulate(function, *shapes):
        if interpret:
            return function(*map(_Accumulator, shapes))
        return pl.run_scoped(function, *(plgpu.ACC(shape, _F32) for shape in shapes))

    def multiply(acc, a, b):
        if interpret:
            acc.multiply(a, b)
        else:
            plgpu.wgmma(acc, a, b)

    def read(acc, in_flight=0):
        return acc[...] if interpret else plgpu.wgmma_accumulator_load(acc, wait_n=in_flight)

    def body(*refs, full, free, k_smem, v_smem, weights_smem, q_smem=None, o_smem=None, p_smem=None,
             ready=None, taken=None, positions_smem=None):  # fmt: skip
        slopes, lengths, positions, ins = jax.tree.unflatten(tree, refs[: len(leaves)])
        outs = jax.tree.unflatten(out_tree, refs[len(leaves) :])
        b, h = jax.lax.axis_index("b"), jax.lax.axis_index("h")
        job, split = jax.lax.axis_index("job"), jax.lax.axis_index("split")
        w = jax.lax.axis_index("wg")
        rate = slopes[h] * math.log2(math.e)
        length = jnp.int32(T) if lengths is None else lengths[b]
        steps = chunks if lengths is None else pl.cdiv(length, CHUNK)

        def chunk_of(i):
            return steps - 1 - i if reverse else i

        def present(i):
            """How many tokens of the i-th chunk are there."""
            return CHUNK if lengths is None else jnp.minimum(CHUNK, length - chunk_of(i) * CHUNK)

        def reuse(barrier, i):
            """Waits until the step that last used what step i is to overwrite has left it."""
            count = barrier.shape[0]
            pl.when(i >= count)(lambda: plgpu.barrier_wait(barrier.at[jax.lax.rem(i, count)]))

        def drain(barrier):
            """Waits for the last uses: a barrier is not left with arrivals to come."""
            pl.loop(0, barrier.shape[0])(lambda i: reuse(barrier, steps + i))

        def each_job(function):
            for n in range(len(jobs)):
                pl.when(job == n)(functools.partial(function, n))

        def load():
            plgpu.set_max_registers(24, action="decrease")

            @each_job
            def _(n):
                q, k, v, _ = ins[n]

                @pl.loop(0, steps)
                def _(i):
                    slot = jax.lax.rem(i, stages)
                    reuse(free, i)
                    rows = pl.ds(chunk_of(i) * CHUNK, CHUNK)

                    def copy(source, target):
                        plgpu.copy_gmem_to_smem(source, target, full.at[slot])

                    if outputs:
                        copy(q.at[b, rows, h], q_smem.at[slot])
                    copy(k.at[b, rows, h], k_smem.at[slot])
                    if positions is not None:
                        copy(positions.at[b, rows], positions_smem.at[slot])
                    for c in range(columns):
                        lanes = pl.ds((split * columns + c) * _COLUMNS, _COLUMNS)
                        copy(v.at[b, rows, h, lanes], v_smem.at[slot, c])

            drain(free)

        def score():
            if columns == 2:
                plgpu.set_max_registers(104, action="decrease")
            x = plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 0, layout=wgmma_layout)
            y = plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1, layout=wgmma_layout)
            earlier, later, axis = (x, y, 1) if reverse else (y, x, 0)
            ahead = (later - earlier).astype(_F32)
            decay = jnp.where(later >= earlier, jnp.exp2(-rate * ahead), 0.0)
            by_later = wgmma_layout.reduce(1 - axis)

            @pl.loop(0, steps)
            def _(i):
                slot, half = jax.lax.rem(i, stages), jax.lax.rem(i, 2)
                plgpu.barrier_wait(full.at[slot])

                def product(acc):
                    multiply(acc, q_smem.at[slot], k_smem.at[slot].transpose((1, 0)))
                    return read(acc)

                p = accumulate(product, (CHUNK, CHUNK)) * decay
                if positions is not None or lengths is not None:
                    later = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=by_later)
                    first = jnp.zeros_like(later)  # token that reaches the later one
                    if positions is not None:
                        position = positions_smem.at[slot]
                        first = later - plgpu.load(position, layout=by_later, optimized=False)
                    if lengths is not None:
                        first = jnp.where(later < present(i), first, CHUNK)
                    first = jax.lax.broadcast_in_dim(first, p.shape, [axis])
                    p = jnp.where(earlier >= first, p, 0.0)
                reuse(taken, i)
                p_smem[half] = p.astype(_BF16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(free.at[slot])
                plgpu.barrier_arrive(ready.at[half])

            drain(taken)

        def attend():
            plgpu.set_max_registers(192 if columns == 2 and outputs else 232, action="increase")
            lanes = pl.ds((split * columns + w) * _COLUMNS, _COLUMNS)

            def at(ref, n):
                """The state's part [64 of v, K] that is this warpgroup's, and its layout."""
                if flipped[n]:
                    return ref.at[b, h, lanes], wgmma_layout
                return ref.at[b, h, :, lanes].transpose((1, 0)), plgpu.Layout.WGMMA_TRANSPOSED

            def initial(n):
                def load(n=n):
                    if ins[n][3] is None:
                        state = jnp.zeros((_COLUMNS, DIM), _F32)
                    else:
                        ref, layout = at(ins[n][3], n)
                        state = plgpu.load(ref, layout=layout, optimized=False)
                    return plgpu.layout_cast(state, wgmma_layout)

                return load

            state = (
                initial(0)() if len(jobs) == 1
                else jax.lax.switch(job, [initial(n) for n in range(len(jobs))])
            )  # fmt: skip

            def vector(ref):
                return plgpu.load(ref, layout=by_column, optimized=False)

            def last_position(i):
                return positions_smem[jax.lax.rem(i, stages), present(i) - 1]

            def plain(i):
                """Whether the i-th chunk is full and goes on with the segment before it."""
                full = present(i) == CHUNK
                return full if positions is None else full & (last_position(i) >= CHUNK)

            def weigh(i, masked=True):
                """Puts in_x and out_x in shared memory: as constants they took 32 registers."""
                m = present(i) if masked else CHUNK
                x = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=by_column)
                x = jax.lax.optimization_barrier(x)  # else it is computed, and kept, at the start
                x = plgpu.layout_cast(x, by_column)
                begin = jnp.exp2(-rate * (x + 1).astype(_F32))
                end = jnp.exp2(-rate * jnp.maximum(m - 1 - x, 0).astype(_F32))
                if lengths is not None and masked:
                    begin, end = jnp.where(x < m, begin, 0.0), jnp.where(x < m, end, 0.0)
                if positions is not None and masked:
                    position = vector(positions_smem.at[jax.lax.rem(i, stages)])
                    begin = jnp.where(position > x, begin, 0.0)
                    end = jnp.where(x >= m - 1 - last_position(i), end, 0.0)
                plgpu.commit_smem()  # for its barrier: the last ones have been read
                weights_smem[w, 0], weights_smem[w, 1] = (end, begin) if reverse else (begin, end)
                plgpu.commit_smem()

            def kept(i):
                """How much of the state stays."""
                decay = jnp.exp2(-rate * jnp.float32(present(i)))
                if positions is not None:
                    decay = jnp.where(last_position(i) >= present(i), decay, 0.0)
                return decay

            def step(i, carry):
                state, was_plain = carry
                slot, half = jax.lax.rem(i, stages), jax.lax.rem(i, 2)
                plgpu.barrier_wait(full.at[slot])
                if lengths is not None or positions is not None:
                    is_plain = plain(i)
                    pl.when(~(is_plain & was_plain))(lambda: weigh(i))
                    was_plain = is_plain
                v_t = plgpu.load(v_smem.at[slot, w].transpose((1, 0)), layout=wgmma_layout)

                def spread(weights, shape):
                    return jax.lax.broadcast_in_dim(vector(weights), shape, [1])

                def products(s_acc, o_acc=None):
                    s_acc[...] = state * kept(i)
                    if outputs:
                        q_t = q_smem.at[slot].transpose((1, 0))
                        multiply(o_acc, state.astype(_BF16), q_t)
                    scaled = v_t.astype(_F32) * spread(weights_smem.at[w, 1], v_t.shape)
                    multiply(s_acc, scaled.astype(_BF16), k_smem.at[slot])
                    if outputs:
                        o_acc[...] = read(o_acc, 1) * spread(
                            weights_smem.at[w, 0], (_COLUMNS, CHUNK)
                        )
                        plgpu.barrier_wait(ready.at[half])
                        multiply(o_acc, v_t, p_smem.at[half].transpose((1, 0)))
                        return read(s_acc), read(o_acc)
                    return read(s_acc), None

                state, o_t = accumulate(products, (_COLUMNS, DIM), *[(_COLUMNS, CHUNK)] * outputs)
                if outputs:
                    plgpu.barrier_arrive(taken.at[half])
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    o_smem.at[half, w].transpose((1, 0))[...] = o_t.astype(_BF16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(free.at[slot])
                if outputs:
                    rows = pl.ds(chunk_of(i) * CHUNK, CHUNK)
                    each_job(
                        lambda n: plgpu.copy_smem_to_gmem(
                            o_smem.at[half, w], outs[n][0].at[b, rows, h, lanes]
                        )
                    )
                return state, was_plain

            weigh(0, masked=False)
            state, _ = jax.lax.fori_loop(0, steps, step, (state, jnp.bool_(True)))

            @each_job
            def _(n):
                if outs[n][1] is not None:
                    ref, layout = at(outs[n][1], n)
                    ref[...] = plgpu.layout_cast(state, layout)

            if outputs and lengths is not None:  # chunks that are padding altogether

                @pl.when(steps < chunks)
                def _():
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    o_smem.at[0, w][...] = jnp.zeros((CHUNK, _COLUMNS), _BF16)
                    plgpu.commit_smem()

                @pl.loop(steps, chunks)
                def _(c):
                    rows = pl.ds(c * CHUNK, CHUNK)
                    each_job(lambda n: plgpu.copy_smem_to_gmem(
                        o_smem.at[0, w], outs[n][0].at[b, rows, h, lanes]))  # fmt: skip

            if outputs:
                plgpu.wait_smem_to_gmem(0)

        pl.when(w < columns)(attend)
        if outputs:
            pl.when(w == columns)(score)
        pl.when(w == columns + outputs)(load)

    tiles = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def smem(*shape):
        return plgpu.SMEM(shape, _BF16, transforms=tiles)

    copies = 1 + columns + outputs + (positions is not None)
    scratch = {
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=columns + outputs, num_barriers=stages),
        "k_smem": smem(stages, CHUNK, DIM),
        "v_smem": smem(stages, columns, CHUNK, _COLUMNS),
        "weights_smem": plgpu.SMEM((columns, 2, CHUNK), _F32),
    }
    if outputs:
        scratch |= {
            "q_smem": smem(stages, CHUNK, DIM),
            "o_smem": smem(2, columns, CHUNK, _COLUMNS),
            "p_smem": smem(2, CHUNK, CHUNK),
            "ready": plgpu.Barrier(num_arrivals=1, num_barriers=2),
            "taken": plgpu.Barrier(num_arrivals=columns, num_barriers=2),
        }
    if positions is not None:
        scratch["positions_smem"] = plgpu.SMEM((stages, CHUNK), jnp.int32)
    outs = plgpu.kernel(
        body,
        out_type=out_leaves,
        scratch_types=scratch,
        grid=(B, H, len(jobs), splits),
        grid_names=("b", "h", "job", "split"),
        num_threads=columns + outputs + 1,
        thread_name="wg",
        kernel_name=name,
        interpret=versions.gpu_interpreter(interpret),
        # approximate: the hardware's exp2. No automatic barriers: the buffers' own are above.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*leaves)
    return jax.tree.unflatten(out_tree, outs)


class _Accumulator:
    """For the interpreter: registers that products are added to."""

    def __init__(self, shape):
        self.value = jnp.zeros(shape, _F32)

    def __getitem__(self, index):
        return self.value

    def __setitem__(self, index, value):
        self.value = value

    def multiply(self, a, b):
        a = a if isinstance(a, jax.Array) else a[...]
        self.value += jnp.dot(a, b[...], preferred_element_type=_F32)
