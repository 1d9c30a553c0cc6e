"""The TPU kernels of lightning_attention, interpreted, against the recurrence in float64 NumPy.

    S_t = e^(-s) S_(t-1) + k_t v_t^T      o_t = q_t^T S_t      (S from zero where a segment begins)

and its adjoint, token by token. Chunks are of 16 tokens here, so that short sequences have many.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import chips, dispatch, tilings
from pallas_kernels import lightning_attention as op

CHUNK = 16
SLOPES = np.float32([0.92, 4e-3, 5e-5])


@pytest.fixture(autouse=True)
def small_chunks_on_a_v5p(monkeypatch):
    small = dict(chunk=CHUNK, heads=3, ahead=2, cores=1)
    for kernel in ("forward", "state", "backward"):
        monkeypatch.setitem(tilings.TILINGS["v5p"], f"lightning_{kernel}", small)
    with chips.target("v5p", interpret=True):
        yield


def example(B, T, H=3, dtype=jnp.float32, states=True, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v, d_o = (jnp.asarray(rng.normal(size=(B, T, H, 128)), dtype) for _ in range(4))
    shape = (2, B, H, 128, 128)
    initial, d_final = jnp.asarray(rng.normal(size=shape), jnp.float32) if states else (None, None)
    return (q, k, v, initial), (d_o, d_final)


def recurrence(inputs, cotangents, slopes=SLOPES, segments=None, lengths=None):
    """[o, final], [dq, dk, dv, d_initial] in float64."""
    q, k, v, initial = (None if x is None else np.float64(x) for x in inputs)
    B, T, H, K = q.shape
    d_o, d_final = (None if x is None else np.float64(x) for x in cotangents)
    decay = np.exp(-np.float64(slopes))[:, None, None]
    segments = np.zeros((B, T)) if segments is None else segments
    real = np.arange(T) < (np.full(B, T) if lengths is None else lengths)[:, None]
    same = np.diff(segments, axis=1, prepend=segments[:, :1]) == 0
    S = np.zeros((B, H, K, K)) if initial is None else initial.copy()
    G = np.zeros_like(S) if d_final is None else d_final.copy()
    o, (dq, dk, dv), states = np.zeros_like(q), np.zeros((3, *q.shape)), []
    for t in range(T):
        there = real[:, t, None, None, None]
        new = decay * S * same[:, t, None, None, None] + k[:, t, ..., None] * v[:, t, ..., None, :]
        S = np.where(there, new, S)
        states.append(S)
        o[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], S) * there[..., 0]
    for t in reversed(range(T)):
        there = real[:, t, None, None, None]
        after = G + there * q[:, t, ..., None] * d_o[:, t, ..., None, :]
        dq[:, t] = np.einsum("bhv,bhkv->bhk", d_o[:, t], states[t]) * there[..., 0]
        dk[:, t] = np.einsum("bhkv,bhv->bhk", after, v[:, t]) * there[..., 0]
        dv[:, t] = np.einsum("bhkv,bhk->bhv", after, k[:, t]) * there[..., 0]
        G = np.where(there, decay * after * same[:, t, None, None, None], G)
    return [o, S], [dq, dk, dv, G]


def attend(q, k, v, initial, slopes=SLOPES, **kwargs):
    return op.lightning_attention(
        *(q, k, v, jnp.asarray(slopes)), initial_state=initial, implementation="pallas", **kwargs
    )


@functools.partial(jax.jit, static_argnames="num_splits")
def both(inputs, cotangents, slopes, segments, lengths, num_splits=0):
    f = functools.partial(attend, slopes=slopes, segment_ids=segments, lengths=lengths)
    (o, final), pull = jax.vjp(functools.partial(f, num_splits=num_splits), *inputs)
    d_o, d_final = cotangents
    return (o, final), pull((d_o, jnp.zeros_like(final) if d_final is None else d_final))


NAMES = ("o", "final", "dq", "dk", "dv", "d initial")


def compare(example, segments=None, lengths=None, slopes=SLOPES, rtol=3e-6, num_splits=0):
    got = both(*example, slopes, segments, lengths, num_splits)
    close(got, recurrence(*example, slopes, segments, lengths), rtol)


def close(got, want, rtol=3e-6):
    """Largest error of each output and gradient over its own largest value."""
    errors = {}
    for name, x, y in zip(NAMES, (*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        if x is not None:
            errors[name] = np.abs(np.float64(x) - y).max() / np.abs(y).max()
    assert np.max(list(errors.values())) < rtol, errors


@pytest.mark.parametrize("T, states", [(1, True), (16, False), (41, True)])
def test_values_and_gradients(T, states):
    compare(example(2, T, states=states))


def test_a_boundary_at_every_position_of_a_chunk():
    T = 3 * CHUNK
    starts = np.arange(CHUNK - 1, 2 * CHUNK + 1)
    segments = np.int32(np.arange(T) >= starts[:, None])
    compare(example(len(starts), T, H=1), segments, slopes=SLOPES[1:2])


def test_segments_and_lengths():
    """Segments of one token, many in a chunk, over many chunks; lengths of zero, one, whole chunks."""
    T = 50
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 9, (7, T)), axis=1).astype(np.int32)
    segments[1] = np.arange(T)
    segments[2] = 3
    segments[3, :17], segments[3, 17:] = np.arange(17), 20
    lengths = np.int32([T, 30, 0, 1, 16, 17, 33])
    for given in ((segments, lengths), (segments, None), (None, lengths)):
        compare(example(7, T), *given)
    o, _ = attend(*example(7, T)[0], segment_ids=segments, lengths=lengths)
    assert not np.asarray(o)[np.arange(T) >= lengths[:, None]].any()


PACKED = np.sort(np.random.default_rng(1).integers(0, 7, (4, 96)), axis=1).astype(np.int32)
PACKED[0], PACKED[1, :50], PACKED[1, 50:] = 5, 1, 2  # one segment; two, the second over many spans
PACKED_LENGTHS = np.int32([96, 96, 37, 0])


def test_splits_of_the_sequence_are_the_whole():
    compare(example(4, 96), PACKED, PACKED_LENGTHS, num_splits=3)
    compare(example(1, 50, states=False), num_splits=2)


@pytest.mark.parametrize("implementation, check_vma", [("pallas", False), ("xla", True)])
def test_parts_of_the_sequence_on_several_devices(implementation, check_vma):
    """Values and gradients, segments that end with a device's part or go on, lengths of all parts."""
    devices = 3
    (q, k, v, initial), (d_o, d_final) = example(4, 96)
    mesh = jax.make_mesh((devices,), ("cp",), axis_types=(jax.sharding.AxisType.Auto,))
    part, each = jax.P(None, "cp"), jax.P("cp")

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(part, part, part, each, part, jax.P(), part, each),
        out_specs=(part, each, (part, part, part, each)),
        check_vma=check_vma,
    )
    def local(q, k, v, initial, segments, lengths, d_o, d_final):
        def f(q, k, v, initial):
            return op.lightning_attention(
                *(q, k, v, jnp.asarray(SLOPES)),
                initial_state=initial[0],
                segment_ids=segments,
                lengths=lengths,
                axis_name="cp",
                implementation=implementation,
            )

        (o, final), pull = jax.vjp(f, q, k, v, initial)
        return o, final[None], pull((d_o, d_final[0]))

    # what later devices are given as initial state is not read
    initials = jnp.stack([initial, initial + 1, initial + 2])
    d_finals = jnp.stack([jnp.zeros_like(d_final), jnp.zeros_like(d_final), d_final])
    for segments, lengths in ((PACKED, PACKED_LENGTHS), (np.zeros_like(PACKED), None)):
        full = np.int32([96] * 4) if lengths is None else lengths
        o, finals, grads = local(q, k, v, initials, segments, full, d_o, d_finals)
        d_initial = grads[3]
        assert not d_initial[1:].any()
        got = (o, finals[-1]), (*grads[:3], d_initial[0])
        want = recurrence((q, k, v, initial), (d_o, d_final), segments=segments, lengths=lengths)
        close(got, want)


@pytest.mark.parametrize("implementation", ["pallas", "xla"])
def test_packed_sequences_continue_their_own_states(implementation):
    """Lengths of whole chunks, of none, of one token; a gap at the end."""
    lengths, T = np.int32([0, 130, 1, 0, 256, 16, 0]), 6 * 128 + 128
    (q, k, v, _), _ = example(1, T, seed=3)
    states = np.float32(np.random.default_rng(4).normal(size=(len(lengths), 3, 128, 128)))
    f = jax.jit(functools.partial(op.prefill, implementation=implementation))
    o, got = f(q[0], k[0], v[0], jnp.asarray(SLOPES), states, lengths)
    start, gaps = 0, np.ones(T, bool)
    for r, n in enumerate(lengths):
        part = slice(start, start + n)
        inputs = (*(x[:, part] for x in (q, k, v)), states[r : r + 1])
        (want_o, want), _ = recurrence(inputs, (np.zeros_like(q[:, part]), None))
        np.testing.assert_allclose(got[r], want[0], atol=3e-6 * np.abs(want).max())
        if n:
            np.testing.assert_allclose(o[part], want_o[0], atol=3e-6 * np.abs(want_o).max())
        gaps[part] = False
        start += -(-n // 128) * 128
    assert not np.asarray(o)[gaps].any()
    with pytest.raises(ValueError, match="multiple of 128"):
        op.prefill(q[0, 1:], k[0, 1:], v[0, 1:], jnp.asarray(SLOPES), states, lengths)


def test_bfloat16_inputs_with_float32_state():
    """At the kernels' own chunk of 128, several to a step; rounding results alone is up to 3.9e-3."""
    tiling = dict(chunk=128, heads=6, ahead=3, cores=1)
    for kernel in ("forward", "state", "backward"):
        tilings.TILINGS["v5p"][f"lightning_{kernel}"] = tiling
    segments = np.int32([np.arange(512) >= 400])
    compare(example(1, 512, dtype=jnp.bfloat16), segments, rtol=6e-3)


def test_scan_over_layers_with_remat_and_traced_slopes_and_vmap():
    q = example(2, 20, H=1)[0][0] / 4
    slopes = jnp.asarray(SLOPES)[:, None]

    def loss(q, implementation):
        def layer(x, slopes):
            def mix(x):
                o, final = op.lightning_attention(
                    *(x, jnp.sin(x), x, slopes), implementation=implementation
                )
                return jnp.tanh(o), jnp.tanh(final)

            return jax.checkpoint(mix)(x)

        x, finals = jax.lax.scan(layer, q, slopes)
        return (x**2).sum() + (finals**2).sum()

    want = jax.jit(jax.grad(loss), static_argnums=1)(q, "reference")
    got = jax.jit(jax.grad(loss), static_argnums=1)(q, "pallas")
    tolerance = 5e-5 * np.abs(want).max()
    np.testing.assert_allclose(got, want, atol=tolerance)
    rows = jax.jit(jax.vmap(lambda q: jax.grad(loss)(q, "pallas")))(q[:, None])[:, 0]
    np.testing.assert_allclose(rows, want, atol=tolerance)


def test_vmap_of_segments_and_lengths():
    """Prefetched scalars, slopes and the initial state have an axis of their own too."""
    inputs, _ = example(2, 20, H=1)
    segments = np.int32([np.arange(20) >= 7, np.arange(20) >= 18])
    lengths = np.int32([20, 11])
    slopes = SLOPES[:2, None]

    def row(inputs, slopes, segments, lengths):
        inputs = [x[None] for x in inputs]
        return attend(*inputs, slopes, segment_ids=segments[None], lengths=lengths[None])

    got = jax.jit(jax.vmap(row))(inputs, slopes, segments, lengths)
    for b in range(2):
        part = [x[b : b + 1] for x in inputs]
        cotangents = np.zeros_like(part[0]), None
        want, _ = recurrence(part, cotangents, slopes[b], segments[b : b + 1], lengths[b : b + 1])
        for x, y in zip(got, want, strict=True):
            np.testing.assert_allclose(x[b], y, atol=3e-6 * np.abs(y).max())


def test_rows_on_several_devices_and_a_donated_state():
    inputs, _ = example(4, 20, H=1)
    slopes = SLOPES[1:2]
    segments = np.int32(np.arange(20) >= np.array([[3], [16], [19], [1]]))
    (want_o, want), _ = recurrence(inputs, (np.zeros_like(inputs[0]), None), slopes, segments)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    f = jax.shard_map(
        lambda *x: attend(*x[:4], slopes=slopes, segment_ids=x[4]),
        mesh=mesh,
        in_specs=jax.P("data"),
        out_specs=jax.P("data"),
        check_vma=False,
    )
    state = jnp.array(inputs[3])
    o, final = jax.jit(f, donate_argnums=3)(*inputs[:3], state, segments)
    np.testing.assert_allclose(o, want_o, atol=3e-6 * np.abs(want_o).max())
    np.testing.assert_allclose(final, want, atol=3e-6 * np.abs(want).max())


def test_what_the_kernels_refuse():
    (q, k, v, _), _ = example(1, 4)
    with pytest.raises(ValueError, match="head dimension 128 alone, not keys of 64"):
        attend(q[..., :64], k[..., :64], v, None)
    with chips.target("h200"):
        with pytest.raises(ValueError, match="bfloat16 alone"):
            op.lightning_attention(q, k, v, jnp.asarray(SLOPES), implementation="pallas")
        with pytest.raises(ValueError, match="on TPU alone"):
            args = jnp.zeros((1, 3, 128, 128)), jnp.zeros(1, jnp.int32)
            x = jnp.zeros((128, 3, 128), jnp.bfloat16)
            op.prefill(x, x, x, jnp.asarray(SLOPES), *args, implementation="pallas")


def test_without_an_accelerator_pallas_is_refused_and_none_is_xla():
    token = chips._target.set(None)
    try:
        (q, k, v, _), _ = example(1, 4)
        with pytest.raises(ValueError, match="no TPU or GPU that the Pallas kernels know"):
            attend(q, k, v, None)
        op.lightning_attention(q, k, v, jnp.asarray(SLOPES))
    finally:
        chips._target.reset(token)


def test_none_is_pallas_where_it_serves_and_says_once_where_not(caplog):
    dispatch._say.cache_clear()
    (q, k, v, _), _ = example(1, 4)
    want = attend(q, k, v, None)[0]
    np.testing.assert_array_equal(op.lightning_attention(q, k, v, jnp.asarray(SLOPES))[0], want)
    for _ in range(2):
        op.lightning_attention(*(x[..., :64] for x in (q, k, v)), jnp.asarray(SLOPES))
    assert len(caplog.records) == 1 and "head dimension 128 alone" in caplog.text
