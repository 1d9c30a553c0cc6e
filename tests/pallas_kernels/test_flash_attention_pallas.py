"""flash_attention by JAX's kernels: splash in the interpreter, and what both refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_flash_attention import example, oracle

from pallas_kernels import chips
from pallas_kernels import flash_attention as op
from pallas_kernels.tilings import TILINGS


@pytest.fixture(autouse=True, params=[1 << 30, 0], ids=["one backward kernel", "two"])
def small_blocks(request, monkeypatch):
    tiling = dict(queries=128, keys=256, part=128, dq_bytes=request.param)
    monkeypatch.setitem(TILINGS["v5p"], "flash_attention", tiling)


def both(q, k, v, ids, dy):
    with chips.target("v5p", interpret=True):
        f = functools.partial(op.flash_attention, segment_ids=ids, implementation="pallas")
        y, pull = jax.vjp(f, q, k, v)
        return y, *pull(dy)


@pytest.mark.parametrize(
    "T, segments, dtype, limit",
    [(300, 5, jnp.float32, 2e-6), (256, 0, jnp.bfloat16, 1.5e-2), (1, 0, jnp.float32, 2e-6)],
)
def test_values_and_gradients_equal_the_equations(T, segments, dtype, limit):
    q, k, v, ids = example(B=2, T=T, N=2, G=2, K=128, segments=segments)
    q, k, v = (jnp.asarray(x, dtype) for x in (q / 4, k, v))
    dy = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), dtype)
    ids = None if ids is None else jnp.asarray(ids)
    got = jax.jit(both)(q, k, v, ids, dy)
    for x, y in zip(got, oracle(q, k, v, ids, dy), strict=True):
        assert x.dtype == dtype and x.shape == y.shape
        assert np.abs(np.asarray(x, np.float64) - y).max() < limit * max(np.abs(y).max(), 1)


def test_in_shard_map_scan_and_remat():
    """With check_vma=False: JAX's kernels do not know mapped axes, which is refused."""
    q, k, v, _ = example(B=2, T=128, N=1, G=1, K=128)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    f = functools.partial(op.flash_attention, implementation="pallas")

    def loss(attend, q, k, v):
        layer = jax.checkpoint(lambda x, _: (x + attend(x, k, v), None))
        return (jax.lax.scan(layer, q, None, length=2)[0] ** 2).sum()

    def gradient(q, k, v):
        with chips.target("v5p", interpret=True):
            return jax.grad(functools.partial(loss, f))(q, k, v)

    specs = dict(mesh=mesh, in_specs=(jax.P("data"),) * 3, out_specs=jax.P("data"))
    got = jax.jit(jax.shard_map(gradient, check_vma=False, **specs))(q, k, v)
    want = jax.grad(functools.partial(loss, lambda *x: op.reference.flash_attention(*x, None)))(
        q, k, v
    )
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    with pytest.raises(ValueError, match="check_vma=False"):
        jax.jit(jax.shard_map(gradient, **specs))(q, k, v)


@pytest.mark.parametrize(
    "chip, interpret, K, T, dtype, segments, message",
    [
        ("v5p", True, 64, 8, jnp.bfloat16, False, "multiples of 128, not 64"),
        ("v5p", True, 128, 8, jnp.float16, False, "not float16"),
        ("h200", True, 128, 8, jnp.bfloat16, False, "no interpreter"),
        ("h200", False, 128, 8, jnp.float32, False, "not float32"),
        ("h200", False, 192, 8, jnp.bfloat16, False, "not 192"),
        ("h200", False, 128, 1 << 17, jnp.bfloat16, True, "32768 MiB"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_with_the_reason(
    chip, interpret, K, T, dtype, segments, message
):
    q = jax.ShapeDtypeStruct((1, T, 1, 1, K), dtype)
    k = jax.ShapeDtypeStruct((1, T, 1, K), dtype)
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32) if segments else None
    call = functools.partial(op.flash_attention, implementation="pallas")
    with chips.target(chip, interpret), pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda q, k, v, ids: call(q, k, v, segment_ids=ids), q, k, k, ids)
