"""token_logprobs against the equations in float64 NumPy, and its memory against [N, V]."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import token_logprobs as op
from pallas_kernels.token_logprobs import token_logprobs, xla


def example(N=7, D=5, V=11, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    hidden = scale * rng.normal(size=(N, D))
    head = rng.normal(size=(D, V))
    labels = rng.integers(0, V, size=N)
    labels[-1] = V - 1
    return hidden, head, labels


def oracle(hidden, head, labels, temperature):
    """(logprobs, entropy, lse) and all log-probabilities, in float64."""
    z = hidden @ head / temperature
    top = z.max(1, keepdims=True)
    lse = top + np.log(np.exp(z - top).sum(1, keepdims=True))
    logp = z - lse
    entropy = -(np.exp(logp) * logp).sum(1)
    return (logp[np.arange(len(labels)), labels], entropy, lse[:, 0]), logp


def oracle_gradients(hidden, head, labels, temperature, a, b, c):
    """d(a . logprobs + b . entropy + c . lse) / d(hidden, head) by the chain rule, in float64."""
    (_, entropy, _), logp = oracle(hidden, head, labels, temperature)
    p = np.exp(logp)
    onehot = np.eye(head.shape[1])[labels]
    d_z = a[:, None] * (onehot - p) - b[:, None] * p * (logp + entropy[:, None]) + c[:, None] * p
    d_z /= temperature
    return d_z @ head.T, hidden.T @ d_z


def functions():
    def reference(h, w, y, t):
        return token_logprobs(h, w, y, temperature=t, implementation="reference")

    return {
        "reference": reference,
        "xla": lambda h, w, y, t: token_logprobs(h, w, y, temperature=t),
        "xla in chunks": lambda h, w, y, t: xla.token_logprobs(
            h, w, y, t, chunk=3
        ),  # 7 = 2 * 3 + 1
    }


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("name", list(functions()))
def test_values_and_gradients_equal_the_equations(name, temperature):
    hidden, head, labels = example()
    f32 = [jnp.asarray(x, jnp.float32) for x in (hidden, head)]
    cotangents = np.random.default_rng(1).normal(size=(3, len(labels)))

    def loss(h, w):
        scores = functions()[name](h, w, jnp.asarray(labels), temperature)
        return sum((x * y).sum() for x, y in zip(cotangents, scores, strict=True)), scores

    gradients, outputs = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*f32)
    for got, want in zip(outputs, oracle(hidden, head, labels, temperature)[0], strict=True):
        np.testing.assert_allclose(got, want, atol=2e-6, rtol=2e-6)
    wanted = oracle_gradients(hidden, head, labels, temperature, *cotangents)
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


def test_large_logits_neither_overflow_nor_lose_the_entropy():
    hidden, head, labels = example(scale=200.0)
    args = jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32), jnp.asarray(labels)
    logprobs, entropy, _ = token_logprobs(*args)
    exact = [np.asarray(x, np.float64) for x in args[:2]]
    (want_logprobs, want_entropy, _), _ = oracle(*exact, labels, 1.0)
    assert np.abs(want_logprobs).max() > 300
    np.testing.assert_allclose(logprobs, want_logprobs, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(entropy, want_entropy, atol=1e-3)


def test_bfloat16_operands_accumulate_in_float32():
    hidden, head, labels = example(N=16, D=64, V=40)
    hidden, head = (jnp.asarray(x / 4, jnp.bfloat16) for x in (hidden, head))
    logprobs, *_ = token_logprobs(hidden, head, jnp.asarray(labels))
    exact = [np.asarray(x, np.float64) for x in (hidden, head)]
    assert logprobs.dtype == jnp.float32
    np.testing.assert_allclose(logprobs, oracle(*exact, labels, 1.0)[0][0], atol=1e-5)


def test_no_buffer_holds_all_logits():
    N, D, V, chunk = 512, 8, 1000, 64
    shapes = (
        jax.ShapeDtypeStruct((N, D), jnp.float32),
        jax.ShapeDtypeStruct((D, V), jnp.float32),
        jax.ShapeDtypeStruct((N,), jnp.int32),
    )

    def peak_and_sizes(function):
        def loss(h, w, y):
            logprobs, entropy, _ = function(h, w, y)
            return (logprobs + 0.1 * entropy).sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
        sizes = [
            np.prod([int(n) for n in dims.split(",")])
            for dims in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())
        ]
        return compiled.memory_analysis().temp_size_in_bytes, max(sizes)

    temp, largest = peak_and_sizes(lambda h, w, y: xla.token_logprobs(h, w, y, 1.0, chunk=chunk))
    plain_temp, plain_largest = peak_and_sizes(
        lambda h, w, y: token_logprobs(h, w, y, implementation="reference")
    )
    assert plain_largest >= N * V and plain_temp >= 4 * N * V  # the probe sees what it looks for
    assert largest <= chunk * V
    assert temp < 4 * N * V / 2


def test_sharded_tokens_give_the_same_head_gradient():
    hidden, head, labels = example(N=8)
    args = jnp.asarray(head, jnp.float32), jnp.asarray(hidden, jnp.float32), jnp.asarray(labels)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def loss(w, h, y):
        logprobs, entropy, _ = xla.token_logprobs(h, w, y, 1.0, chunk=3)
        return (logprobs + entropy).sum()

    def gradient(w, h, y):
        w = jax.lax.pcast(w, "data", to="varying")
        return jax.lax.psum(jax.grad(loss)(w, h, y), "data")

    specs = jax.P(), jax.P("data"), jax.P("data")
    sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=jax.P()))
    np.testing.assert_allclose(sharded(*args), jax.grad(loss)(*args), atol=1e-5)


@functools.cache
def on_a_mesh(check_vma, temperature=0.7):
    """(hidden, head, labels, cotangents) -> scores and gradients: rows over 2, columns over 4."""
    mesh = jax.make_mesh((2, 4), ("data", "vocab"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def both(h, w, y, cotangents):
        # The gradient of a head that all rows share is summed over them: by the cast, or by hand.
        f = functools.partial(token_logprobs, temperature=temperature, axis_name="vocab")
        scores, pull = jax.vjp(lambda h, w: f(h, w, y), h, w)
        d_h, d_w = pull(op.Scores(*cotangents))
        return scores, d_h, d_w if check_vma else jax.lax.psum(d_w, "data")

    rows, columns = jax.P("data"), jax.P(None, "vocab")
    return jax.jit(
        jax.shard_map(
            both,
            mesh=mesh,
            in_specs=(rows, columns, rows, (rows,) * 3),
            out_specs=(rows, rows, columns),
            check_vma=check_vma,
        )
    )


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_vocabulary_on_several_devices(check_vma):
    """With labels first and last of each device's columns, and one whose logit rules the sum."""
    hidden, head, labels = example(N=8, V=12)
    labels[:] = 0, 2, 3, 5, 6, 8, 9, 11
    head[:, 7] *= 40
    cotangents = np.random.default_rng(1).normal(size=(3, 8))
    f32 = [jnp.asarray(x, jnp.float32) for x in (hidden, head)]
    scores, *gradients = on_a_mesh(check_vma)(
        *f32, jnp.asarray(labels), tuple(jnp.asarray(x, jnp.float32) for x in cotangents)
    )
    exact = [np.asarray(x, np.float64) for x in f32]
    for got, want in zip(scores, oracle(*exact, labels, 0.7)[0], strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=2e-6)
    wanted = oracle_gradients(*exact, labels, 0.7, *cotangents)
    for got, want in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6 * np.abs(want).max())


def test_hidden_states_typed_as_each_devices_own_get_each_devices_part():
    hidden, head, labels = example(N=4, V=8)
    mesh = jax.make_mesh((4,), ("vocab",), axis_types=(jax.sharding.AxisType.Auto,))

    def parts(h, w):
        h = jax.lax.pcast(h, "vocab", to="varying")
        loss = lambda h: token_logprobs(h, w, labels, axis_name="vocab").logprob.sum()  # noqa: E731
        return jax.grad(loss)(h)[None]

    f = jax.shard_map(
        parts, mesh=mesh, in_specs=(jax.P(), jax.P(None, "vocab")), out_specs=jax.P("vocab")
    )
    got = jax.jit(f)(*(jnp.asarray(x, jnp.float32) for x in (hidden, head)))
    zero = np.zeros(4)
    want = oracle_gradients(hidden, head, labels, 1.0, zero + 1, zero, zero)[0]
    assert got.shape == (4, 4, 5) and np.abs(got).max() > 0.1
    np.testing.assert_allclose(got.sum(0), want, atol=1e-5)


def test_no_rows():
    hidden, head = jnp.zeros((0, 5), jnp.bfloat16), jnp.ones((5, 11), jnp.bfloat16)
    loss = lambda h, w: sum(x.sum() for x in token_logprobs(h, w, jnp.zeros(0, int)))  # noqa: E731
    value, (d_hidden, d_head) = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)
    assert value == 0 and d_hidden.shape == (0, 5) and d_hidden.dtype == jnp.bfloat16
    assert d_head.shape == (5, 11) and not d_head.any()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(labels_N=jnp.zeros(3, jnp.int32)), "one label per row"),
        (dict(head_DV=jnp.zeros((4, 11))), "hidden"),
        (dict(temperature=0.0), "temperature must be positive"),
        (dict(implementation="cuda"), "none of"),
        (dict(implementation="reference", axis_name="x"), "whole vocabulary"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    good = dict(
        hidden_ND=jnp.zeros((7, 5)), head_DV=jnp.zeros((5, 11)), labels_N=jnp.zeros(7, jnp.int32)
    )
    with pytest.raises(ValueError, match=message):
        token_logprobs(**{**good, **change})
