"""flash_attention against softmax attention and its gradients, written out in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention as op
from pallas_kernels.flash_attention import xla

F32 = jnp.float32


def example(B=2, T=37, N=2, G=3, K=8, segments=0, seed=0):
    rng = np.random.default_rng(seed)
    q = 2 * rng.normal(size=(B, T, N, G, K)).astype(np.float32)
    k, v = rng.normal(size=(2, B, T, N, K)).astype(np.float32)
    ids = np.sort(rng.integers(0, segments, (B, T)), axis=1).astype(np.int32) if segments else None
    return q, k, v, ids


def oracle(q, k, v, ids, dy):
    """y, and the gradients of sum(y dy) to q, k and v."""
    q, k, v, dy = (np.asarray(x, np.float64) for x in (q, k, v, dy))
    T, K = q.shape[1], q.shape[-1]
    ids = np.zeros(q.shape[:2]) if ids is None else ids
    sees = np.tril(np.ones((T, T), bool)) & (ids[:, :, None] == ids[:, None])
    scores = np.einsum("btngk,bsnk->bngts", q, k) / np.sqrt(K)
    scores = np.where(sees[:, None, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    y = np.einsum("bngts,bsnk->btngk", p, v)
    dp = np.einsum("btngk,bsnk->bngts", dy, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(K)
    dq = np.einsum("bngts,bsnk->btngk", ds, k)
    dk = np.einsum("bngts,btngk->bsnk", ds, q)
    dv = np.einsum("bngts,btngk->bsnk", p, dy)
    return y, dq, dk, dv


FORMS = {
    "reference": lambda *args: op.reference.flash_attention(*args),
    "dense": lambda q, k, v, ids: xla.dense(q, k, v, xla._bias(q.shape[1], ids)),
    "blocks of 8": lambda *args: xla.blocked(*args, 8),
    "blocks of 64": lambda *args: xla.blocked(*args, 64),
}


@functools.cache
def compiled(form):
    """(q, k, v, ids, dy) -> y and the gradients."""

    def both(q, k, v, ids, dy):
        y, pull = jax.vjp(lambda *qkv: FORMS[form](*qkv, ids), q, k, v)
        return y, *pull(dy)

    return jax.jit(both)


def compare(form, example, rtol=2e-6, dtype=F32):
    q, k, v, ids = example
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    dy = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), dtype)
    want = oracle(q, k, v, ids, dy)
    got = compiled(form)(q, k, v, ids, dy)
    errors = {}
    for name, x, y in zip(("y", "dq", "dk", "dv"), got, want, strict=True):
        assert x.dtype == dtype
        errors[name] = np.abs(np.asarray(x, np.float64) - y).max() / max(np.abs(y).max(), 1)
    assert np.max(list(errors.values())) < rtol, errors


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("segments", [0, 4])
def test_values_and_gradients_equal_the_equations(form, segments):
    compare(form, example(segments=segments))


@pytest.mark.parametrize("form", list(FORMS))
def test_one_token_sees_itself(form):
    q, k, v, _ = example(T=1)
    y = FORMS[form](*(jnp.asarray(x) for x in (q, k, v)), None)
    np.testing.assert_allclose(y, np.broadcast_to(v[:, :, :, None], q.shape), rtol=1e-6)
    compare(form, (q, k, v, None))


@pytest.mark.parametrize("form", ["dense", "blocks of 8"])
def test_a_segment_may_begin_anywhere(form):
    """At every position of a block, in rows of one batch that skip different blocks."""
    q, k, v, _ = example(B=23, T=24, N=1, G=1, K=4)
    compare(form, (q, k, v, np.int32(np.arange(24) >= np.arange(1, 24)[:, None])))


@pytest.mark.parametrize("form", ["dense", "blocks of 8"])
def test_other_segments_and_later_tokens_change_nothing(form):
    q, k, v, _ = example(T=40)
    ids = np.int32([[5] * 7 + [2] * 20 + [0] * 13] * 2)
    f = compiled(form)
    want = f(q, k, v, ids, jnp.ones_like(q))[0]
    k[:, :7], v[:, 27:], k[:, 26] = 9.0, -9.0, 9.0
    got = f(q, k, v, ids, jnp.ones_like(q))[0]
    np.testing.assert_array_equal(got[:, 7:26], want[:, 7:26])
    assert np.isfinite(got).all()


def test_blocks_before_every_rows_segment_are_not_computed():
    """Not a number in keys of another segment would spread from a block that is only masked."""
    q, k, v, _ = example(T=40)
    ids = np.int32(np.arange(40) >= 16)[None].repeat(2, axis=0)
    k[:, :16] = np.nan
    y = compiled("blocks of 8")(q, k, v, ids, jnp.ones_like(q))[0]
    assert np.isfinite(y[:, 16:]).all()


@pytest.mark.parametrize("form", ["dense", "blocks of 8"])
def test_large_scores_stay_finite(form):
    q, k, v, _ = example()
    compare(form, (200 * q, k, v, None), rtol=1e-4)


@pytest.mark.parametrize("form", ["dense", "blocks of 8"])
def test_bfloat16_operands_with_float32_softmax(form):
    compare(form, example(T=60, segments=2), rtol=1.5e-2, dtype=jnp.bfloat16)


def test_the_op_chooses_a_form_by_length(monkeypatch):
    calls = []
    blocked = xla.blocked
    monkeypatch.setattr(xla, "blocked", lambda *a: calls.append(a[4]) or blocked(*a))
    for T, blocks in ((xla.DENSE["cpu"], []), (xla.DENSE["cpu"] + 44, [104])):
        q, k, v, ids = example(B=1, T=T, N=1, G=1, K=4, segments=3)
        calls.clear()
        y = jax.jit(op.flash_attention)(q, k, v, segment_ids=ids)
        assert calls == blocks
        np.testing.assert_allclose(y, oracle(q, k, v, ids, q)[0], atol=2e-6)


def test_vmap_scan_and_remat():
    q, k, v, _ = example(T=20)

    def loss(q, k, v, form):
        def layer(x, _):
            mix = jax.checkpoint(lambda x: FORMS[form](x, k, v, None))
            return x + mix(x), None

        return (jax.lax.scan(layer, q, None, length=2)[0] ** 2).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=3)
    want = gradient(q, k, v, "reference")
    tolerance = 1e-5 * np.abs(want).max()
    np.testing.assert_allclose(gradient(q, k, v, "blocks of 8"), want, atol=tolerance)
    rows = jax.jit(jax.vmap(lambda *x: jax.grad(loss)(*x, "blocks of 8")))
    got = rows(*(x[:, None] for x in (q, k, v)))[:, 0]
    np.testing.assert_allclose(got, want, atol=tolerance)


def test_memory_grows_with_the_length_not_its_square():
    def temp(T):
        q = jax.ShapeDtypeStruct((1, T, 1, 1, 8), F32)
        k = jax.ShapeDtypeStruct((1, T, 1, 8), F32)
        loss = lambda q, k, v: op.flash_attention(q, k, v).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, k, k).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temp(8192) < 4.5 * temp(2048)


@pytest.mark.parametrize("check_vma", [True, False])
def test_rows_on_several_devices(check_vma):
    q, k, v, ids = example(B=8, T=20, segments=3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def gradient(q, k, v, ids):
        # one row of k and v for all devices: what it holds unvarying gets a summed gradient
        f = lambda q, k: jnp.sin(xla.blocked(*op.same_axes(q, k, v, ids), 8)).sum()  # noqa: E731
        dq, dk = jax.grad(f, argnums=(0, 1))(q, k)
        return dq, dk if check_vma else jax.lax.psum(dk, "data")

    rows, one = jax.P("data"), jax.P()
    specs = dict(in_specs=(rows, one, one, rows), out_specs=(rows, one))
    sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, check_vma=check_vma, **specs))
    got = sharded(q, k[:1], v[:1], ids)

    def whole(q, k):
        k, v_ = (jnp.broadcast_to(x, (8, *x.shape[1:])) for x in (k, v[:1]))
        return jnp.sin(op.flash_attention(q, k, v_, segment_ids=ids)).sum()

    for x, y in zip(got, jax.grad(whole, argnums=(0, 1))(q, k[:1]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q_BTNGK=jnp.zeros((2, 5, 2, 8))), "q must be"),
        (dict(q_BTNGK=jnp.zeros((2, 0, 2, 1, 8))), "not empty"),
        (dict(k_BTNK=jnp.zeros((2, 4, 2, 8))), "k must be"),
        (dict(v_BTNK=jnp.zeros((2, 5, 2, 8), jnp.bfloat16)), "v must be float32"),
        (dict(segment_ids=jnp.zeros((2, 4), jnp.int32)), "segment_ids"),
        (dict(segment_ids=jnp.zeros((2, 5))), "segment_ids must be integer"),
        (dict(implementation="cuda"), "none of"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    x = jnp.zeros((2, 5, 2, 8))
    good = dict(q_BTNGK=jnp.zeros((2, 5, 2, 3, 8)), k_BTNK=x, v_BTNK=x)
    with pytest.raises(ValueError, match=message):
        op.flash_attention(**{**good, **change})
