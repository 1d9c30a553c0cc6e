"""lightning_attention against its O(T^2) masked form and that form's gradients, float64 NumPy.

    o_i = sum_(j<=i) e^(-s(i-j)) (q_i.k_j) v_j + e^(-s(i+1)) q_i^T S      (i from 0; S the state before)
    S'  = sum_j e^(-s(n-1-j)) k_j v_j^T + e^(-s n) S                      (n tokens)

with a pair's weight zero across segments and for padding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import lightning_attention as op

F32 = jnp.float32
lightning_attention = jax.jit(op.lightning_attention, static_argnames=("block", "implementation"))
step = jax.jit(op.step)


def layer_slopes(heads, layer, layers=80):
    """The paper's slopes at the depth of `layer` of 80: 0.92 for the first head of layer 0."""
    factor = 1 - layer / (layers - 1) + 1e-5
    return np.float32(2.0 ** (-8 * np.arange(1, heads + 1) / heads) * factor)


def example(B=2, T=33, H=3, K=8, V=None, layer=0, seed=0, states=False):
    rng = np.random.default_rng(seed)
    V = V or K
    q, k = rng.normal(size=(2, B, T, H, K)).astype(np.float32) * K**-0.25
    v = rng.normal(size=(B, T, H, V)).astype(np.float32)
    # 64 heads' range of slopes, thinned
    slopes = layer_slopes(64, layer)[np.linspace(0, 63, H).astype(int)]
    initial = rng.normal(size=(B, H, K, V)).astype(np.float32) if states else None
    return q, k, v, slopes, initial


def weights(T, s, segments, length):
    """Weights of one row and head: token to token, state to token, token to state, state to state."""
    t = np.arange(T)
    real = t < length
    last = segments[max(length - 1, 0)]
    lag = np.maximum(t[:, None] - t, 0)
    seen = (t[:, None] >= t) & (segments[:, None] == segments) & real[:, None] & real
    within = np.where(seen, np.exp(-s * lag), 0)
    entry = np.exp(-s * (t + 1)) * (segments == segments[0]) * real
    leave = np.exp(-s * np.maximum(length - 1 - t, 0)) * (segments == last) * real
    return within, entry, leave, np.exp(-s * length) * (last == segments[0])


def oracle(q, k, v, slopes, initial=None, segments=None, lengths=None, d_o=None, d_final=None):
    """o, final state and, of sum(o d_o) + sum(final d_final), the gradients to q, k, v, initial."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, H, K = q.shape
    initial = np.zeros((B, H, K, v.shape[3])) if initial is None else np.float64(initial)
    segments = np.zeros((B, T), int) if segments is None else np.asarray(segments)
    lengths = np.full(B, T) if lengths is None else np.asarray(lengths)
    o, final = np.zeros_like(v), np.zeros_like(initial)
    grads = [np.zeros_like(x) for x in (q, k, v, initial)]
    for b, h in np.ndindex(B, H):
        M, entry, leave, carry = weights(T, np.float64(slopes[h]), segments[b], lengths[b])
        Q, K_, V, S = q[b, :, h], k[b, :, h], v[b, :, h], initial[b, h]
        P = (Q @ K_.T) * M
        o[b, :, h] = P @ V + entry[:, None] * (Q @ S)
        final[b, h] = (leave[:, None] * K_).T @ V + carry * S
        if d_o is not None:
            dO, G = np.float64(d_o[b, :, h]), np.float64(d_final[b, h])
            A = (dO @ V.T) * M
            grads[0][b, :, h] = A @ K_ + entry[:, None] * (dO @ S.T)
            grads[1][b, :, h] = A.T @ Q + leave[:, None] * (V @ G.T)
            grads[2][b, :, h] = P.T @ dO + leave[:, None] * (K_ @ G)
            grads[3][b, h] = carry * G + (entry[:, None] * Q).T @ dO
    return (o, final), grads


@functools.cache
def compiled(with_initial, with_segments, with_lengths, block, implementation):
    """(q, k, v, slopes, initial, segments, lengths, d_o, d_final) -> outputs, gradients."""

    def both(q, k, v, slopes, initial, segments, lengths, d_o, d_final):
        def f(q, k, v, initial):
            return lightning_attention(
                *(q, k, v, slopes),
                initial_state=initial if with_initial else None,
                segment_ids=segments if with_segments else None,
                lengths=lengths if with_lengths else None,
                block=block,
                implementation=implementation,
            )

        outputs, pull = jax.vjp(f, q, k, v, initial)
        return outputs, pull((d_o, d_final))

    return jax.jit(both)


def compare(
    inputs, segments=None, lengths=None, block=0, implementation=None, rtol=2e-6, dtype=F32
):
    """Largest error of outputs and gradients, each over its own largest value, below rtol."""
    q, k, v, slopes, initial = inputs
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    rng = np.random.default_rng(1)
    d_o = jnp.asarray(rng.normal(size=v.shape), dtype)
    state = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    d_final = jnp.asarray(rng.normal(size=state), F32)
    # numpy inputs are rounded as the op's are
    want, want_grads = oracle(q, k, v, slopes, initial, segments, lengths, d_o, d_final)
    present = [x is not None for x in (initial, segments, lengths)]
    f = compiled(*present, block, implementation)
    got, got_grads = f(q, k, v, slopes, initial, segments, lengths, d_o, d_final)
    names = ["o", "final state", "dq", "dk", "dv", "d initial"]
    errors = {}
    for name, x, y in zip(names, (*got, *got_grads), (*want, *want_grads), strict=True):
        if x is not None:
            error = np.abs(np.asarray(x, np.float64) - y).max() / max(np.abs(y).max(), 1e-6)
            errors[name] = error
    assert np.max(list(errors.values())) < rtol, errors
    assert got[0].dtype == dtype and got[1].dtype == F32
    return errors


@pytest.mark.parametrize(
    "block, T, K, V, layer, states, implementation",
    [
        (1, 5, 16, 16, 0, True, "xla"),
        (7, 33, 16, 24, 38, True, "xla"),
        (16, 64, 16, 16, 78, False, "xla"),
        (61, 150, 32, 16, 0, False, "xla"),
        (64, 64, 16, 16, 38, False, "xla"),
        (64, 1, 16, 16, 0, True, "xla"),
        (64, 100, 32, 32, 78, False, "xla"),
        (256, 600, 128, 128, 0, True, "xla"),
        (0, 130, 64, 64, 38, True, None),
        (0, 33, 16, 24, 38, True, "reference"),
        (0, 60, 32, 32, 78, False, "reference"),
    ],
)
def test_values_and_gradients_equal_the_masked_form(block, T, K, V, layer, states, implementation):
    inputs = example(T=T, K=K, V=V, layer=layer, states=states, seed=T)
    compare(inputs, block=block, implementation=implementation)


def test_absolute_error_at_full_head_size():
    """Values of scale 7 and more are within 4e-6, as a fused kernel's reach in float32."""
    q, k, v, slopes, _ = example(B=1, T=700, H=4, K=128, layer=38)
    (want, _), _ = oracle(q, k, v, slopes)
    assert 5 < np.abs(want).max() < 100
    for block in (32, 64, 256):
        got, _ = lightning_attention(q, k, v, slopes, block=block)
        assert np.abs(got - want).max() < 4e-6 * max(1, np.abs(want).max() / 7)


def test_heads_keep_their_own_slopes():
    q, k, v, slopes, _ = example(B=1, T=20, H=3)
    slopes = np.float32([0.9, 0.01, 0.3])  # neither sorted nor symmetric
    compare((q, k, v, slopes, None), block=8)
    (wrong, _), _ = oracle(q, k, v, slopes[::-1])
    got, _ = lightning_attention(q, k, v, slopes, block=8)
    assert np.abs(got - wrong).max() > 0.1


def test_a_head_of_no_decay_is_causal_linear_attention():
    q, k, v, _, _ = example(B=1, T=20, H=1)
    got, final = lightning_attention(q, k, v, jnp.zeros(1), block=8)
    kv = np.cumsum(k[0, :, 0, :, None] * v[0, :, 0, None], axis=0)
    np.testing.assert_allclose(got[0, :, 0], np.einsum("tk,tkv->tv", q[0, :, 0], kv), atol=1e-5)
    np.testing.assert_allclose(final[0, 0], kv[-1], atol=1e-5)


def test_segments_may_begin_at_any_position_of_a_block():
    block, T = 8, 24
    starts = np.arange(1, T)
    inputs = example(B=len(starts), T=T, H=1, K=4, layer=78, states=True)
    compare(inputs, np.int32(np.arange(T) >= starts[:, None]), block=block)


@pytest.mark.parametrize("block", [1, 7, 16, 64])
def test_segments_and_lengths_together(block):
    B, T = 6, 37
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 6, (B, T)), axis=1).astype(np.int32)
    segments[1] = 0  # padding's own segment after one
    segments[1, :30] = 1
    lengths = np.int32([T, 30, 0, 1, 16, 17])
    inputs = example(B=B, T=T, layer=78, states=True)
    compare(inputs, segments, lengths, block=block)
    if block == 16:
        compare((*inputs[:4], None), segments, lengths, block=block)
        compare(inputs, None, lengths, block=block)


def test_a_segment_is_what_it_is_alone():
    q, k, v, slopes, _ = example(B=1, T=30, layer=78)  # slopes so small that a leak shows
    segments = np.int32([[3] * 11 + [1] * 12 + [7] * 7])
    got, final = lightning_attention(q, k, v, slopes, segment_ids=segments, block=8)
    for a, b in ((0, 11), (11, 23), (23, 30)):
        alone, alone_final = lightning_attention(*(x[:, a:b] for x in (q, k, v)), slopes, block=8)
        np.testing.assert_allclose(got[:, a:b], alone, atol=2e-6)
    np.testing.assert_allclose(final, alone_final, atol=2e-6)
    leaking, _ = lightning_attention(q, k, v, slopes, block=8)
    assert np.abs(got - leaking).max() > 1


def test_padding_on_the_right_does_not_decay_the_state():
    q, k, v, slopes, initial = example(B=2, T=40, states=True)
    lengths = np.int32([13, 0])
    kwargs = dict(initial_state=initial, block=16)
    o, final = lightning_attention(q, k, v, slopes, lengths=lengths, **kwargs)
    alone = lightning_attention(*(x[:, :13] for x in (q, k, v)), slopes, **kwargs)
    np.testing.assert_allclose(final[0], alone[1][0], atol=1e-6)
    np.testing.assert_array_equal(final[1], initial[1])
    np.testing.assert_allclose(o[0, :13], alone[0][0], atol=1e-6)
    assert not o[0, 13:].any() and not o[1].any()
    zeroed = [np.where(np.arange(40)[:, None, None] < 13, x, 0) for x in (q, k, v)]
    decayed = lightning_attention(*zeroed, slopes, **kwargs)[1]
    assert np.abs(decayed[0] - final[0]).max() > 0.5  # what padding by zeros would have done


def test_padding_on_the_left_by_zero_values_is_harmless():
    q, k, v, slopes, _ = example(B=1, T=40)
    v[:, :9] = 0
    o, final = lightning_attention(q, k, v, slopes, block=16)
    alone, alone_final = lightning_attention(*(x[:, 9:] for x in (q, k, v)), slopes, block=16)
    np.testing.assert_allclose(o[:, 9:], alone, atol=5e-6)
    np.testing.assert_allclose(final, alone_final, atol=5e-6)


def test_a_sequence_in_parts_is_the_whole_in_values_and_gradients():
    q, k, v, slopes, initial = example(T=40, layer=38, states=True)
    segments = np.int32(np.arange(40) >= np.array([[30], [12]]))

    def loss(parts, q, k, v, initial):
        outputs, state, start = [], initial, 0
        for stop in parts:
            part = slice(start, stop)
            fresh = segments[:, start] != segments[:, max(start - 1, 0)]
            o, state = lightning_attention(
                *(x[:, part] for x in (q, k, v, segments)[:3]),
                slopes,
                initial_state=jnp.where(fresh[:, None, None, None], 0, state),
                segment_ids=segments[:, part],
                block=16,
            )
            outputs.append(o)
            start = stop
        o = jnp.concatenate(outputs, axis=1)
        return (jnp.sin(o) * np.arange(40)[:, None, None]).sum() + jnp.sin(state).sum()

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(1, 2, 3, 4)), static_argnums=0)
    whole, want = gradient((40,), q, k, v, initial)
    value, got = gradient((1, 17, 40), q, k, v, initial)
    np.testing.assert_allclose(value, whole, rtol=1e-5)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * np.abs(y).max())


def test_decoding_steps_equal_the_whole():
    q, k, v, slopes, initial = example(T=12, states=True)
    (want, want_final), _ = oracle(q, k, v, slopes, initial)
    state = jnp.asarray(initial)
    for t in range(12):
        o, state = step(q[:, t], k[:, t], v[:, t], slopes, state)
        np.testing.assert_allclose(o, want[:, t], atol=2e-6)
    np.testing.assert_allclose(state, want_final, atol=2e-6)
    with pytest.raises(ValueError, match="float32"):
        step(q[:, 0], k[:, 0], v[:, 0], slopes, state.astype(jnp.bfloat16))


def test_strong_decay_over_long_blocks_stays_finite():
    """Factored, e^(-s i) e^(s j), it would overflow: e^(0.92 * 199) > 1e79."""
    inputs = example(B=1, T=200, H=2, states=True)
    inputs = (*inputs[:3], np.float32([0.92, 0.917]), inputs[4])
    with np.errstate(over="ignore"):
        assert np.isinf(np.exp(np.float32(0.917 * 199)))
    errors = compare(inputs, block=200)
    assert np.isfinite(list(errors.values())).all()


def test_bfloat16_inputs_with_float32_state():
    for layer in (0, 78):
        inputs = example(T=100, K=32, layer=layer, states=True)
        compare(inputs, block=32, rtol=8e-3, dtype=jnp.bfloat16)


def test_the_state_between_blocks_is_not_bfloat16():
    """bfloat16 inputs, slope 5e-5: a state in bfloat16 stops adding up after some hundred tokens."""
    T, block = 16384, 8
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(1 + rng.random((1, T, 1, 2)), jnp.bfloat16) for _ in range(3))
    slopes = np.float32([5e-5])
    _, final = lightning_attention(q, k, v, slopes, block=block)
    decay = np.exp(-5e-5 * (T - 1 - np.arange(T)))
    want = np.einsum("t,tk,tv->kv", decay, *(np.float64(x[0, :, 0]) for x in (k, v)))
    np.testing.assert_allclose(final[0, 0], want, rtol=2e-3)

    def narrow(state, part):
        state = lightning_attention(*part, slopes, initial_state=state.astype(F32), block=block)[1]
        return state.astype(jnp.bfloat16), None

    parts = [x.reshape(-1, 1, block, 1, 2) for x in (q, k, v)]
    final, _ = jax.lax.scan(narrow, jnp.zeros((1, 1, 2, 2), jnp.bfloat16), parts)
    assert np.abs(np.float64(final[0, 0]) / want - 1).min() > 0.3  # what the bound above excludes


def test_scan_over_layers_with_remat_vmap_and_traced_slopes():
    q = example(B=4, T=20, H=2)[0]
    slopes = jnp.stack([layer_slopes(2, layer) for layer in (0, 38, 78)])

    def loss(q, implementation):
        def layer(x, slopes):
            def mix(x):
                return lightning_attention(
                    *(x, jnp.sin(x), x, slopes), block=8, implementation=implementation
                )

            o, final = jax.checkpoint(mix)(x)
            return jnp.tanh(o), jnp.tanh(final)

        x, finals = jax.lax.scan(layer, q, slopes)
        return (x**2).sum() + (finals**2).sum()

    want = jax.jit(jax.grad(loss), static_argnums=1)(q, "reference")
    got = jax.jit(jax.grad(loss), static_argnums=1)(q, "xla")
    tolerance = 5e-5 * np.abs(want).max()
    np.testing.assert_allclose(got, want, atol=tolerance)
    rows = jax.jit(jax.vmap(lambda q: jax.grad(loss)(q, "xla")))(q[:, None])[:, 0]
    np.testing.assert_allclose(rows, want, atol=tolerance)


def test_slopes_get_no_gradient():
    q, k, v, slopes, _ = example()

    def loss(slopes, implementation):
        return lightning_attention(q, k, v, slopes, implementation=implementation)[0].sum()

    for implementation in ("xla", "reference"):
        assert not jax.grad(loss)(jnp.asarray(slopes), implementation).any()


def test_donated_state():
    q, k, v, slopes, initial = example(states=True)
    want = lightning_attention(q, k, v, slopes, initial_state=initial)[1]

    def advance(state, q, k, v):
        return lightning_attention(q, k, v, slopes, initial_state=state)[1]

    state = jnp.asarray(initial)
    got = jax.jit(advance, donate_argnums=0)(state, q, k, v)
    assert state.is_deleted()
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_rows_on_several_devices(check_vma):
    q, k, v, slopes, initial = example(B=8, states=True)
    shared = jnp.asarray(initial[0])  # the same on all devices: its gradient is a sum over them
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(q, shared):
        state = jnp.broadcast_to(shared, (q.shape[0], *shared.shape))
        if check_vma and q.shape[0] == 1:
            state = shared[None]  # unvarying, beside tokens that vary
        o, final = lightning_attention(q, k[: len(q)], q, slopes, initial_state=state, block=16)
        return jnp.sin(o).sum() + jnp.sin(final).sum()

    k = np.broadcast_to(k[:1], k.shape)

    def gradient(q, shared):
        d_q, d_shared = jax.grad(loss, argnums=(0, 1))(q, shared)
        return d_q, d_shared if check_vma else jax.lax.psum(d_shared, "data")

    specs = dict(in_specs=(jax.P("data"), jax.P()), out_specs=(jax.P("data"), jax.P()))
    sharded = jax.shard_map(gradient, mesh=mesh, check_vma=check_vma, **specs)
    for x, y in zip(jax.jit(sharded)(q, shared), gradient_alone(loss, q, shared), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def gradient_alone(loss, *args):
    return jax.grad(loss, argnums=(0, 1))(*args)


def test_one_sequence_on_eight_devices_by_gathered_states():
    """LASP+: local state from zero, all-gather, the decayed sum of earlier ones, then the outputs."""
    q, k, v, slopes, _ = example(B=1, T=72, layer=38, states=True)
    devices = 8
    mesh = jax.make_mesh((devices,), ("cp",), axis_types=(jax.sharding.AxisType.Auto,))
    weight = np.random.default_rng(2).normal(size=v.shape).astype(np.float32)

    def local(q, k, v, weight):
        size, rank = q.shape[1], jax.lax.axis_index("cp")
        _, state = lightning_attention(q, k, v, slopes, block=4)
        states = jax.lax.all_gather(state, "cp")
        behind = rank - 1 - jnp.arange(devices)  # whole shards between shard j's end and ours
        decay = jnp.exp(-slopes * size * jnp.maximum(behind, 0)[:, None])
        decay = jnp.where(behind[:, None] >= 0, decay, 0)
        prefix = jnp.einsum("jh,jbhkv->bhkv", decay, states)
        o, final = lightning_attention(q, k, v, slopes, initial_state=prefix, block=4)
        loss = (jnp.sin(o) * weight).sum() + jnp.where(rank == devices - 1, jnp.sin(final).sum(), 0)
        return o, loss

    def sharded_loss(q, k, v):
        parts = jax.P(None, "cp")
        f = jax.shard_map(
            lambda *args: (lambda o, loss: (o, jax.lax.psum(loss, "cp")))(*local(*args)),
            mesh=mesh,
            in_specs=(parts,) * 4,
            out_specs=(parts, jax.P()),
        )
        return f(q, k, v, weight)[::-1]

    def whole_loss(q, k, v):
        o, final = lightning_attention(q, k, v, slopes, block=16)
        return (jnp.sin(o) * weight).sum() + jnp.sin(final).sum(), o

    def run(loss):
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (value, o), grads = run(sharded_loss)
    (want_value, want_o), want_grads = run(whole_loss)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    np.testing.assert_allclose(o, want_o, atol=5e-6)
    for x, y in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())


def test_no_buffer_grows_with_the_square_of_the_length():
    def temp(T):
        x = jax.ShapeDtypeStruct((1, T, 2, 8), F32)
        slopes = jax.ShapeDtypeStruct((2,), F32)

        def loss(q, k, v, slopes):
            return lightning_attention(q, k, v, slopes, block=32)[0].sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, slopes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temp(8192) < 4.5 * temp(2048)


def test_outputs_take_the_place_of_donated_queries():
    x = jax.ShapeDtypeStruct((1, 4096, 2, 8), F32)

    def mix(q, k, v):
        return op.lightning_attention(q, k, v, jnp.ones(2), block=32)[0]

    compiled = jax.jit(mix, donate_argnums=0).lower(x, x, x).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == 4 * x.size  # no second array for the outputs
    assert memory.temp_size_in_bytes < 4 * x.size / 4


@pytest.mark.slow
def test_a_million_tokens():
    """Final state and last outputs in float64, of slopes that remember 1 to 20,000 tokens and all."""
    T, block = 2**20 + 3, 64
    rng = np.random.default_rng(0)
    q, k, v = (rng.random((1, T, 4, 2), np.float32) for _ in range(3))
    slopes = np.float32([0.92, 5e-3, 5e-5, 0.0])
    o, final = lightning_attention(q, k, v, slopes, block=block)
    age = (T - 1 - np.arange(T))[:, None]
    decay = np.exp(-np.float64(slopes) * age)
    want = np.einsum("th,thk,thv->hkv", decay, *(np.float64(x[0]) for x in (k, v)))
    np.testing.assert_allclose(final[0], want, rtol=2e-4)
    np.testing.assert_allclose(o[0, -1], np.einsum("hk,hkv->hv", q[0, -1], want), rtol=2e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q_BTHK=jnp.zeros((2, 5, 8))), "q must be a float array with 4 axes"),
        (dict(q_BTHK=jnp.zeros((2, 5, 3, 8), jnp.int32)), "q must be a float array"),
        (dict(k_BTHK=jnp.zeros((2, 5, 1, 8))), "need q and k"),
        (dict(v_BTHV=jnp.zeros((2, 6, 3, 8))), "need q and k"),
        (dict(slopes_H=jnp.zeros(4)), "slopes"),
        (dict(initial_state=jnp.zeros((2, 3, 8, 7))), "initial_state"),
        (dict(segment_ids=jnp.zeros((2, 5))), "segment_ids must be integer"),
        (dict(lengths=jnp.zeros((2, 1), jnp.int32)), "lengths"),
        (dict(block=-1), "block"),
        (dict(implementation="cuda"), "none of"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    x = jnp.zeros((2, 5, 3, 8))
    good = dict(q_BTHK=x, k_BTHK=x, v_BTHV=x, slopes_H=jnp.zeros(3))
    with pytest.raises(ValueError, match=message):
        lightning_attention(**{**good, **change})
