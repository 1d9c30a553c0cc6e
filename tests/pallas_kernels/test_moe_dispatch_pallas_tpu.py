"""The TPU kernels of MoE, interpreted, against float64 NumPy; and the layer made of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import chips
from pallas_kernels.moe_dispatch import moe_mlp, tpu
from tests.pallas_kernels.test_moe_dispatch import check, example, oracle_keep

TILING = dict(cores=1, vmem=64 << 20, rows=64, block=32, columns=128, rows_out=128, columns_out=128)
ROOMY = dict(rows=256, block=256)
M, N = 128, 256


def lay_out(counts, multiple, spare=0):
    """The mask of the groups' rows, their first rows, and how many rows there are."""
    counts = np.asarray(counts)
    extents = -(-counts // multiple) * multiple
    starts = np.cumsum(extents) - extents
    held = np.zeros(extents.sum() + spare * multiple, bool)
    own = np.zeros_like(held)
    for start, count, extent in zip(starts, counts, extents, strict=True):
        held[start : start + count] = True
        own[start : start + extent] = True
    return held, own, starts, extents


def rows_of(rng, held, own, width, dtype):
    """Normal rows, zeros in the padding of groups, and what memory may hold after the last one."""
    values = np.where(held[:, None], rng.normal(size=(len(held), width)), 0)
    values[~own] = np.nan
    return jnp.asarray(values, dtype)


def error(got, want):
    want = np.asarray(want, np.float64)
    return np.abs(np.asarray(got, np.float64) - want).max() / max(np.abs(want).max(), 1e-3)


GMM_CASES = [  # counts, multiple, rows after the last group in multiples, transposed, dtype
    ([20, 0, 70, 33, 1, 0], 16, 3, False, jnp.bfloat16),
    ([20, 0, 70, 33, 1, 0], 8, 3, True, jnp.float32),
    ([0, 0, 0], 16, 2, True, jnp.bfloat16),  # nobody
    ([0, 150, 0], 8, 0, False, jnp.float32),  # everybody at one expert, and several items of it
    ([16, 64, 128], 16, 0, True, jnp.bfloat16),  # full to the last row
    ([1], 16, 0, False, jnp.bfloat16),
    ([300], 8, 0, False, jnp.float32),  # blocks of more parts than the ring is deep
]
LIMITS = {jnp.float32: 1e-5, jnp.bfloat16: 4e-3}


@pytest.mark.parametrize("counts, multiple, spare, transposed, dtype", GMM_CASES)
def test_gmm_multiplies_each_row_with_its_experts_matrix(
    counts, multiple, spare, transposed, dtype
):
    rng = np.random.default_rng(0)
    held, own, starts, extents = lay_out(counts, multiple, spare)
    x = rows_of(rng, held, own, M, dtype)
    shape = (len(counts), N, M) if transposed else (len(counts), M, N)
    w = jnp.asarray(rng.normal(size=shape), dtype)
    if len(counts) > 1:
        w = w.at[np.flatnonzero(extents == 0)].set(np.nan)  # not read where nobody goes
    got = tpu.gmm(
        x, w, jnp.asarray(counts, jnp.int32), multiple=multiple, transposed=transposed,
        out_dtype=dtype, tiling=TILING | dict(cores=2) | (ROOMY if len(counts) == 1 else {}), interpret=True,
    )  # fmt: skip
    assert got.shape == (len(held), N) and got.dtype == dtype
    for e, (start, extent) in enumerate(zip(starts, extents, strict=True)):
        here = slice(start, start + extent)
        w_e = np.asarray(w[e], np.float64)
        want = np.asarray(x[here], np.float64) @ (w_e.T if transposed else w_e)
        assert extent == 0 or error(got[here], want) < LIMITS[dtype]


def test_swiglu_keeps_what_gate_and_up_gave():
    rng = np.random.default_rng(1)
    counts = [5, 0, 100, 17]
    held, own, starts, extents = lay_out(counts, 16)
    x = rows_of(rng, held, own, M, jnp.float32)
    gate, up = (jnp.asarray(rng.normal(size=(4, M, N)), jnp.float32) for _ in range(2))
    call = functools.partial(
        tpu.gmm_swiglu, x, gate, up, jnp.asarray(counts, jnp.int32), multiple=16, tiling=TILING,
        interpret=True,
    )  # fmt: skip
    hidden, (gated, upped) = call(keep=True)
    for e, (start, extent) in enumerate(zip(starts, extents, strict=True)):
        if extent:
            here = slice(start, start + extent)
            x_e = np.asarray(x[here], np.float64)
            g, u = (x_e @ np.asarray(w[e], np.float64) for w in (gate, up))
            assert error(gated[here], g) < 1e-5 and error(upped[here], u) < 1e-5
            assert error(hidden[here], g / (1 + np.exp(-g)) * u) < 1e-5
    alone, nothing = call(keep=False)
    assert nothing == ()
    np.testing.assert_array_equal(alone[own], hidden[own])


WGRAD_CASES = [  # counts, multiple, rows after the last group in multiples, rows of a part, whole, dtype
    ([20, 0, 140, 33, 1, 0], 16, 3, 256, True, jnp.bfloat16),
    ([0, 300, 0, 7], 8, 0, 128, True, jnp.float32),  # in parts though not expected
    ([130, 0, 256], 128, 0, 256, True, jnp.float32),
    ([200, 500, 600], 128, 1, 256, False, jnp.bfloat16),  # in parts, the last one full or not
    ([0, 250, 7], 16, 1, 128, False, jnp.bfloat16),
    ([3], 16, 0, 128, True, jnp.bfloat16),  # fewer rows than are contracted at once
]


@pytest.mark.parametrize("counts, multiple, spare, rows, whole, dtype", WGRAD_CASES)
def test_tgmm_sums_over_each_experts_rows(counts, multiple, spare, rows, whole, dtype):
    rng = np.random.default_rng(2)
    held, own, starts, extents = lay_out(counts, multiple, spare)
    x, y = (rows_of(rng, held, own, width, dtype) for width in (N, M))
    got = tpu.tgmm(
        x, y, jnp.asarray(counts, jnp.int32), multiple=multiple, out_dtype=dtype,
        tiling=TILING | dict(rows=rows, cores=2, whole=whole), interpret=True,
    )  # fmt: skip
    assert got.shape == (len(counts), N, M) and got.dtype == dtype
    for e, (start, extent) in enumerate(zip(starts, extents, strict=True)):
        x_e, y_e = (np.asarray(z[start : start + extent], np.float64) for z in (x, y))
        assert error(got[e], x_e.T @ y_e) < LIMITS[dtype]
        assert counts[e] or not got[e].any()


def test_items_cover_every_row_of_every_group_once():
    rng = np.random.default_rng(3)
    E, length = 5, 2048
    find = jax.jit(tpu.items, static_argnums=(1, 2, 3))
    for draw in range(40):
        multiple, rows = [(16, 16), (16, 48), (128, 512)][draw % 3]
        counts = rng.poisson(rng.choice([0, 3, 200]), size=E) * rng.integers(0, 2, size=E)
        _, own, starts, extents = lay_out(counts, multiple)
        found = find(jnp.asarray(counts), rows, multiple, length // rows + E)
        expert, first, blocks, number = (np.asarray(z) for z in found)
        covered = np.full(len(own), -1)
        for e, start, count in zip(expert[:number], first, blocks, strict=False):
            assert (
                count * multiple <= rows and (covered[start : start + count * multiple] < 0).all()
            )
            covered[start : start + count * multiple] = e
        for e in range(E):
            assert (covered[starts[e] : starts[e] + extents[e]] == e).all()
        assert (covered >= 0).sum() == extents.sum() and number <= len(expert)
        assert (blocks[number:] == 0).all()


@functools.cache
def value_and_gradients(capacity, implementation="pallas"):
    def loss(x, gate, up, down, weights, experts, d_y):
        y, kept = moe_mlp(
            x, gate, up, down, experts, weights, capacity=capacity, implementation=implementation
        )
        return jnp.sum(y.astype(jnp.float32) * d_y), (y, kept)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))


@pytest.fixture
def on_tpu():
    with chips.target("v6e", interpret=True):
        yield


ROUTINGS = [(0.3, 0.2), (0, 1), (9, 0.5), (3, 0)]  # preference for low experts, share of padding


@pytest.mark.parametrize("dtype, limit", [(jnp.float32, 2e-5), (jnp.bfloat16, 0.012)])
def test_the_layer_and_its_gradients_equal_the_equations(on_tpu, dtype, limit):
    """Uneven, nobody, one expert for all first choices; and an expert takes 30 pairs at most."""
    for seed, (skew, padding) in enumerate(ROUTINGS):
        operands = example(seed, 40, 128, 256, 4, 2, skew, padding)
        check(value_and_gradients(30), operands, 30, limit, dtype)
    assert not oracle_keep(operands[4], 4, 30).all()


def test_one_token(on_tpu):
    check(value_and_gradients(None), example(0, 1, 128, 128, 3, 2), None, 2e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
def test_no_tokens(on_tpu, implementation):
    """Nothing comes out, and the weights' gradients are zeros."""
    x, gate, up, down, experts, weights, d_y = example(0, 0, 128, 128, 3, 2)
    gradients, (y, kept) = value_and_gradients(None, implementation)(
        *(jnp.asarray(z, jnp.float32) for z in (x, gate, up, down, weights)), experts, d_y
    )
    assert y.shape == (0, 128) and kept.shape == (0, 2)
    assert gradients[1].shape == gate.shape
    assert all(not g.any() for g in gradients)


def test_padding_is_neither_read_nor_given_a_gradient(on_tpu):
    operands = example(0, 40, 128, 256, 4, 2)
    x, gate, up, down, experts, weights, d_y = (
        z if z.dtype == np.int32 else jnp.asarray(z, jnp.float32) for z in operands
    )
    padding = np.r_[3:9, 30:40]
    experts[padding] = 4
    x, d_y = x.at[padding].set(np.nan), d_y.at[padding].set(np.nan)
    function = value_and_gradients(30)
    gradients, (y, kept) = function(x, gate, up, down, weights, experts, d_y)
    assert jnp.all(y[padding] == 0) and jnp.all(gradients[0][padding] == 0)
    assert not kept[padding].any() and all(jnp.all(jnp.isfinite(z)) for z in gradients)


def small():
    x, gate, up, down, experts, weights, d_y = example(0, 24, 128, 128, 4, 2, 0.3, 0.1)
    x, gate, up, down, weights, d_y = (
        jnp.asarray(z, jnp.float32) for z in (x, gate, up, down, weights, d_y)
    )
    return (gate, up, down), x, weights, jnp.asarray(experts), d_y


def loss(matrices, x, weights, experts, d_y, implementation="pallas"):
    y, _ = moe_mlp(x, *matrices, experts, weights, implementation=implementation)
    return jnp.sum(y * d_y)


@functools.cache
def wanted():
    matrices, *rows = small()
    plain = functools.partial(loss, implementation="reference")
    return jax.jit(jax.grad(plain))(matrices, *rows)


def test_inside_shard_map_scan_and_remat(on_tpu):
    """With check_vma=False, since the interpreter's own loops do not pass that check."""
    matrices, *rows = small()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.checkpoint
    def micro_batch(matrices, rows):
        return loss(matrices, *rows)

    def gradients(matrices, *rows):
        rows = jax.tree.map(lambda z: z.reshape(2, len(z) // 2, -1), rows)

        def total(matrices):
            body = lambda c, r: (c + micro_batch(matrices, r), None)  # noqa: E731
            return jax.lax.scan(body, jnp.float32(0), rows)[0]

        return jax.lax.psum(jax.grad(total)(matrices), "data")

    specs = jax.P(), *[jax.P("data")] * 4
    sharded = jax.jit(
        jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=jax.P(), check_vma=False)
    )
    for got, want in zip(sharded(matrices, *rows), wanted(), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_vmap_equals_a_loop(on_tpu):
    matrices, *rows = small()
    rows = [z.reshape(2, 12, -1) for z in rows]
    gradient = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0, 0, 0, 0)))
    for got, want in zip(gradient(matrices, *rows), wanted(), strict=True):
        np.testing.assert_allclose(got.sum(0), want, atol=2e-5)


def refusal(dtype=jnp.float32, width=128):
    operands = [jnp.zeros(shape, dtype) for shape in ((4, width), (2, width, 128), (2, width, 128))]
    down = jnp.zeros((2, 128, width), jnp.float32)
    return (*operands, down, jnp.zeros((4, 1), jnp.int32), jnp.ones((4, 1)))


@pytest.mark.parametrize(
    "operands, reason",
    [
        (refusal(jnp.bfloat16), "all be bfloat16 or all float32"),
        (refusal(width=96), "multiples of 128, not 96 and 128"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_with_the_reason(on_tpu, operands, reason):
    with pytest.raises(ValueError, match=reason):
        moe_mlp(*operands, implementation="pallas")
    y, _ = moe_mlp(*operands)  # the choice falls on what can
    assert y.shape == operands[0].shape


def test_weights_too_wide_for_vmem_are_refused():
    for dtype, width in ((jnp.bfloat16, 32768), (jnp.float32, 16384)):
        wide = jax.ShapeDtypeStruct((2, 128, width), dtype)
        assert tpu.refusal(8, wide) is None
        wider = jax.ShapeDtypeStruct((2, 128, width + 128), dtype)
        assert "too wide" in tpu.refusal(8, wider)


def test_without_an_accelerator_pallas_is_refused():
    with pytest.raises(ValueError, match="no TPU or GPU"):
        moe_mlp(*refusal(), implementation="pallas")


def test_the_multiple_wastes_a_sixteenth_and_tilings_serve_every_chip():
    for pairs in (2, 128, 2048, 16384, 2**21):
        for dtype, least in ((jnp.bfloat16, 16), (jnp.float32, 8)):
            multiple = tpu.multiple(pairs, 32, dtype)
            assert multiple in (least, 16, 32, 64, 128)
            assert multiple == least or multiple * 8 * 32 <= pairs
        for chip in ("v5p", "v6e", "tpu7x"):
            tilings = tpu.tilings(chip, pairs, 32)
            assert set(tilings) == {"gmm", "gmm_swiglu", "tgmm"}
            assert all(t["rows"] % 128 == 0 and t["vmem"] >= 64 << 20 for t in tilings.values())
