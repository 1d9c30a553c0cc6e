"""The grouped matmuls for Hopper, interpreted on the CPU, against float64 NumPy group by group."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import chips
from pallas_kernels.moe_dispatch import gpu, moe_mlp

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="GPU kernels are interpreted by JAX 0.11 or later"
)

E, M, N, R = 4, 128, 256, 512
TILING = dict(block_columns=128, stages=2, places=2, band=2, blocks=2, cluster=1)
TILINGS = {
    "narrow": TILING,
    "wide": TILING | dict(block_columns=256, stages=3, blocks=3),
    "two blocks share rows": TILING | dict(cluster=2, blocks=4, places=4),
}
COUNTS = {
    "uneven": (70, 0, 1, 200),
    "one row each": (1, 1, 1, 1),
    "all in the first": (512, 0, 0, 0),
    "all in the last": (0, 0, 0, 449),
    "multiples": (64, 128, 192, 128),
    "more than a band": (5, 380, 0, 64),
    "none": (0, 0, 0, 0),
}
FEWER_COUNTS = ("uneven", "all in the last", "none")


def bf16(rng, *shape):
    """Of bfloat16 as a kernel reads it, and as float64."""
    x = jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
    return x, np.asarray(x, np.float64)


def grouped(rng, counts, width):
    """Rows that are zero behind a group's own, NaN behind the last group; and each group's."""
    extents = -(-np.array(counts) // 64) * 64
    starts = np.cumsum(extents) - extents
    rows = np.full((R, width), np.nan)
    rows[: extents.sum()] = 0
    for start, count in zip(starts, counts, strict=True):
        rows[start : start + count] = rng.normal(size=(count, width))
    x = jnp.asarray(rows, jnp.bfloat16)
    return (
        x,
        np.asarray(x, np.float64),
        [slice(s, s + n) for s, n in zip(starts, extents, strict=True)],
    )


def close(got, want, tolerance=4e-3):
    got = np.asarray(got, np.float64)
    assert np.abs(got - want).max(initial=0) <= tolerance * max(np.abs(want).max(initial=0), 1)


@functools.cache
def jitted(function, tiling, **kwargs):
    kwargs |= dict(multiple=64, tiling=TILINGS[tiling], interpret=True)
    return jax.jit(functools.partial(getattr(gpu, function), **kwargs))


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(
    "tiling, transposed, dtype",
    [
        ("narrow", False, jnp.bfloat16),
        ("wide", True, jnp.float32),
        ("two blocks share rows", False, jnp.bfloat16),
    ],
)
def test_each_row_is_multiplied_by_its_experts_matrix(counts, tiling, transposed, dtype):
    rng = np.random.default_rng(0)
    x, x64, groups = grouped(rng, COUNTS[counts], M)
    w, w64 = bf16(rng, *((E, N, M) if transposed else (E, M, N)))
    function = jitted("gmm", tiling, transposed=transposed, out_dtype=dtype)
    out = function(x, w, jnp.asarray(COUNTS[counts], jnp.int32))
    assert out.shape == (R, N) and out.dtype == dtype
    for e, rows in enumerate(groups):
        want = x64[rows] @ (w64[e].T if transposed else w64[e])
        close(out[rows], want, 4e-3 if dtype == jnp.bfloat16 else 1e-5)


@pytest.mark.parametrize("counts", FEWER_COUNTS)
@pytest.mark.parametrize(
    "tiling, keep",
    [("narrow", False), ("two blocks share rows", True)],
)
def test_swiglu_comes_from_one_kernel(counts, tiling, keep):
    rng = np.random.default_rng(1)
    x, x64, groups = grouped(rng, COUNTS[counts], M)
    x, x64 = x / 4, x64 / 4
    (gate, gate64), (up, up64) = bf16(rng, E, M, N), bf16(rng, E, M, N)
    function = jitted("gmm_swiglu", tiling, keep=keep)
    hidden, kept = function(x, gate, up, jnp.asarray(COUNTS[counts], jnp.int32))
    assert len(kept) == 2 * keep and hidden.shape == (R, N) and hidden.dtype == jnp.bfloat16
    for e, rows in enumerate(groups):
        g, u = x64[rows] @ gate64[e], x64[rows] @ up64[e]
        for got, want in zip((hidden, *kept), (g / (1 + np.exp(-g)) * u, g, u), strict=False):
            close(got[rows], want)


@pytest.mark.parametrize("counts", FEWER_COUNTS)
@pytest.mark.parametrize(
    "tiling, dtype",
    [("narrow", jnp.bfloat16), ("wide", jnp.float32), ("two blocks share rows", jnp.float32)],
)
def test_products_are_summed_over_each_experts_rows(counts, tiling, dtype):
    rng = np.random.default_rng(2)
    x, x64, groups = grouped(rng, COUNTS[counts], M)
    y, y64, _ = grouped(rng, COUNTS[counts], N)
    out = jitted("tgmm", tiling, out_dtype=dtype)(x, y, jnp.asarray(COUNTS[counts], jnp.int32))
    assert out.shape == (E, M, N) and out.dtype == dtype
    for e, rows in enumerate(groups):
        close(out[e], x64[rows].T @ y64[rows], 4e-3 if dtype == jnp.bfloat16 else 1e-5)


@pytest.mark.parametrize("band", (1, 2, 3, 8))
def test_tiles_cover_every_row_tile_of_every_column_once(band):
    columns = 3
    for counts in COUNTS.values():
        table = np.asarray(gpu._row_tiles(jnp.array(counts), 64, R, band))
        wanted, start = [], 0
        for e, count in enumerate(counts):
            extent = -(-count // 64) * 64
            for inner in range(0, extent, gpu.ROWS):
                wanted += [(e, start + inner, extent - inner, c) for c in range(columns)]
            start += extent
        got = []
        for number in range(table[0, 0] * columns):  # what a block does with a tile's number
            first, height = table[1 + number // columns, :2]
            inner = number - (first - 1) * columns
            got.append((*table[first + inner % height, 2:], inner // height))
        assert sorted(got) == sorted(wanted)
        for _, at in itertools.groupby(
            got, key=lambda tile: tile[0]
        ):  # a band's rows, then columns
            at = list(at)
            height = min(band, len({row for _, row, *_ in at}))
            assert {c for *_, c in at[:height]} == {0} and len(
                {r for _, r, *_ in at[:height]}
            ) == height


@pytest.mark.parametrize("tiling", ["narrow", "two blocks share rows"])
def test_no_data_race(tiling):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # the detector's only reader
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rng = np.random.default_rng(3)
    counts = jnp.array([70, 0, 1, 200], jnp.int32)
    (x, _, _), (y, _, _) = grouped(rng, (70, 0, 1, 200), M), grouped(rng, (70, 0, 1, 200), N)
    w, _ = bf16(rng, E, M, N)
    kwargs = dict(multiple=64, tiling=TILINGS[tiling])
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        jax.block_until_ready(gpu.gmm_swiglu(x, w, w, counts, keep=True, **kwargs))
        assert not gpu_callbacks.get_races().races_found
        jax.block_until_ready(gpu.tgmm(x, y, counts, out_dtype=jnp.float32, **kwargs))
        assert not gpu_callbacks.get_races().races_found


def test_what_the_kernels_cannot_do_is_refused_with_the_reason():
    x, w, counts = jnp.zeros((64, 128), jnp.bfloat16), jnp.zeros((1, 128, 128)), jnp.array([3])
    call = functools.partial(gpu.gmm, out_dtype=jnp.bfloat16, tiling=TILING)
    with pytest.raises(ValueError, match="bfloat16, not float32"):
        call(x, w, counts, multiple=64)
    with pytest.raises(ValueError, match="multiples of 128, not"):
        call(x[:, :100], w.astype(jnp.bfloat16), counts, multiple=64)
    with pytest.raises(ValueError, match="multiple of 64 rows, got 50"):
        call(x[:50], w.astype(jnp.bfloat16), counts, multiple=64)
    with pytest.raises(ValueError, match="multiples of 64 rows, not 32"):
        call(x, w.astype(jnp.bfloat16), counts, multiple=32)


def layer_oracle(x, gate, up, down, experts, weights, d_y):
    """y and the gradients of sum(y d_y), a pair at a time; expert E is nowhere."""
    y, grads = np.zeros_like(x), [np.zeros_like(z) for z in (x, gate, up, down, weights)]
    d_x, d_gate, d_up, d_down, d_weights = grads
    for n, k in zip(*np.nonzero(experts < len(gate)), strict=True):
        e, w = experts[n, k], weights[n, k]
        g, u = x[n] @ gate[e], x[n] @ up[e]
        s = 1 / (1 + np.exp(-g))
        hidden, d_hidden = g * s * u, w * (down[e] @ d_y[n])
        y[n] += w * (hidden @ down[e])
        d_weights[n, k] = d_y[n] @ (hidden @ down[e])
        d_g, d_u = d_hidden * u * (s + g * s * (1 - s)), d_hidden * g * s
        d_x[n] += gate[e] @ d_g + up[e] @ d_u
        d_gate[e] += np.outer(x[n], d_g)
        d_up[e] += np.outer(x[n], d_u)
        d_down[e] += np.outer(w * hidden, d_y[n])
    return y, *grads


def layer_operands(rng, tokens, width=128, inner=128, top_k=2):
    """(x, gate, up, down), weights, experts, d_y; and the first four as float64."""
    shapes = (tokens, width), (E, width, inner), (E, width, inner), (E, inner, width)
    pairs = [bf16(rng, *shape) for shape in shapes]
    own = [(x / 8).astype(x.dtype) for x, _ in pairs]  # exact
    weights = np.asarray(rng.dirichlet(np.ones(top_k), tokens), np.float32)
    experts = np.argsort(rng.random((tokens, E)), axis=1)[:, :top_k].astype(np.int32)
    d_y = np.asarray(rng.normal(size=(tokens, width)), np.float32)
    return own, weights, experts, d_y, [x64 / 8 for _, x64 in pairs]


def layer_loss(own, weights, experts, d_y, implementation="pallas"):
    y, _ = moe_mlp(*own, experts, weights, implementation=implementation)
    return jnp.sum(y.astype(jnp.float32) * d_y), y


@functools.cache
def layer_gradients(implementation="pallas"):
    loss = functools.partial(layer_loss, implementation=implementation)
    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("choice", ["any", "one expert for all", "nowhere"])
def test_the_layer_and_its_gradients_equal_the_equations(choice):
    own, weights, experts, d_y, own64 = layer_operands(np.random.default_rng(4), tokens=70)
    experts[:3] = E  # padding
    if choice == "one expert for all":
        experts[:] = [2, E]
    elif choice == "nowhere":
        experts[:] = E
    with chips.target("h200", interpret=True):
        grads, y = layer_gradients()(own, weights, experts, d_y)
    d_y64 = np.asarray(jnp.asarray(d_y, jnp.bfloat16), np.float64)  # as y's gradient is rounded
    want = layer_oracle(*own64, experts, weights.astype(np.float64), d_y64)
    for got, wanted in zip((y, *grads[0], grads[1]), want, strict=True):
        scale = max(np.abs(wanted).max(), 1e-6)
        assert np.abs(np.asarray(got, np.float64) - wanted).max() <= 8e-3 * scale


def test_the_layer_traces_inside_shard_map_scan_and_remat():
    """With check_vma. Only traced: the interpreter's callbacks are refused by remat and shard_map."""
    own, weights, experts, d_y, _ = layer_operands(np.random.default_rng(5), tokens=24)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def total(matrices, *rows):
        @jax.checkpoint
        def part(matrices, x, weights, experts, d_y):
            return layer_loss([x, *matrices], weights, experts, d_y)[0]

        parts = jax.tree.map(lambda z: z.reshape(2, len(z) // 2, -1), rows)
        start = jax.lax.pcast(jnp.float32(0), "data", to="varying")
        return jax.lax.scan(lambda c, row: (c + part(matrices, *row), None), start, parts)[0]

    specs = jax.P(), *[jax.P("data")] * 4
    sharded = jax.shard_map(jax.grad(total), mesh=mesh, in_specs=specs, out_specs=jax.P())
    with chips.target("h200"):
        got = jax.eval_shape(sharded, own[1:], own[0], weights, experts, d_y)
    for g, matrix in zip(got, own[1:], strict=True):
        assert g.shape == matrix.shape and g.dtype == matrix.dtype


def test_vmap_is_a_loop_over_the_batch():
    own, weights, experts, _, own64 = layer_operands(np.random.default_rng(6), tokens=6)
    call = lambda x, w, e: moe_mlp(x, *own[1:], e, w, implementation="pallas")[0]  # noqa: E731
    batch = [z.reshape(2, 3, -1) for z in (own[0], weights, experts)]
    with chips.target("h200", interpret=True):
        got = jax.jit(jax.vmap(call))(*batch)
    want, *_ = layer_oracle(*own64, experts, weights.astype(np.float64), np.zeros((6, 128)))
    close(got.reshape(6, -1), want)
