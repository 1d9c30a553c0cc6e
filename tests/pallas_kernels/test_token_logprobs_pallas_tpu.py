"""token_logprobs' TPU kernels, in the interpreter, against the equations in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_token_logprobs import oracle, oracle_gradients

from pallas_kernels import chips
from pallas_kernels import token_logprobs as op
from pallas_kernels.tilings import TILINGS


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 256 columns; backward, of 300 float32 rows, in parts of two of them."""
    forward = dict(rows=256, columns=256)
    backward = dict(rows=128, columns=256, hidden_rows=256, part_bytes=1 << 20)
    monkeypatch.setitem(TILINGS["v5p"], "token_logprobs_forward", forward)
    monkeypatch.setitem(TILINGS["v5p"], "token_logprobs_backward", backward)


def example(N, V, dtype, D=128, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(N, D)), dtype)
    head = jnp.asarray(2 * rng.normal(size=(D, V)) / np.sqrt(D), dtype)
    labels = rng.integers(0, V, size=N)
    labels[-1], labels[0] = V - 1, 0
    return hidden, head, labels, rng.normal(size=(3, N))


@functools.cache
def compiled(temperature):
    def both(hidden, head, labels, cotangents):
        with chips.target("v5p", interpret=True):
            call = functools.partial(op.token_logprobs, implementation="pallas")
            scores, pull = jax.vjp(
                lambda h, w: call(h, w, labels, temperature=temperature), hidden, head
            )
            return scores, *pull(op.Scores(*cotangents))

    return jax.jit(both)


def compare(got, hidden, head, labels, temperature, cotangents, limit):
    scores, *gradients = got
    exact = [np.asarray(x, np.float64) for x in (hidden, head)]
    values, _ = oracle(*exact, labels, temperature)
    wanted = oracle_gradients(*exact, labels, temperature, *cotangents)
    # The logits of bfloat16 operands are exact to float32; their gradients pass through bfloat16.
    for x, y in zip(scores, values, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, atol=2e-5)
    for x, y in zip(gradients, wanted, strict=True):
        assert x.dtype == hidden.dtype and x.shape == y.shape
        error = np.abs(np.asarray(x, np.float64) - y).max()
        assert error < limit * np.abs(y).max()


@pytest.mark.parametrize(
    "N, V, dtype, limit",
    [
        (7, 640, jnp.float32, 2e-6),  # a last tile of half the columns
        (300, 600, jnp.float32, 2e-6),  # two tiles of rows, and columns that fill no lane tile
        (300, 768, jnp.float32, 2e-6),  # three whole tiles: the last part has one fewer
        (1, 100, jnp.float32, 2e-6),  # lanes without a column
        (300, 640, jnp.bfloat16, 6e-3),
    ],
)
def test_values_and_gradients_equal_the_equations(N, V, dtype, limit):
    hidden, head, labels, cotangents = example(N, V, dtype)
    got = compiled(0.6)(
        hidden, head, jnp.asarray(labels), tuple(jnp.asarray(x, jnp.float32) for x in cotangents)
    )
    compare(got, hidden, head, labels, 0.6, cotangents, limit)


def test_a_label_in_every_column():
    V = 640
    hidden, head, _, _ = example(V, V, jnp.float32)
    labels = np.random.default_rng(0).permutation(V)
    zero = np.zeros(V)
    cotangents = zero + 1, zero, zero
    got = compiled(1.0)(
        hidden, head, jnp.asarray(labels), tuple(jnp.asarray(x, jnp.float32) for x in cotangents)
    )
    compare(got, hidden, head, labels, 1.0, cotangents, 2e-6)


def test_one_logit_that_rules_and_lanes_far_below():
    hidden, head, labels, cotangents = example(3, 640, jnp.float32)
    hidden, head = hidden.at[:, 0].set(30.0), head.at[0].set(0.0).at[0, 300].set(50.0)
    labels[1] = 300
    got = compiled(1.0)(
        hidden, head, jnp.asarray(labels), tuple(jnp.asarray(x, jnp.float32) for x in cotangents)
    )
    exact = [np.asarray(x, np.float64) for x in (hidden, head)]
    for x, y in zip(got[0], oracle(*exact, labels, 1.0)[0], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)
    assert all(np.isfinite(x).all() for x in got[1:])


def test_a_vocabulary_on_several_devices():
    """With check_vma=False: JAX's interpreter of kernels does not know mapped axes."""
    hidden, head, labels, cotangents = example(8, 400, jnp.float32)
    labels[1:-1] = 199, 200, 201, 210, 255, 256  # of the second part: the first one is padded there
    mesh = jax.make_mesh((2, 2), ("data", "vocab"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def both(h, w, y, cotangents):
        with chips.target("v5p", interpret=True):
            f = functools.partial(op.token_logprobs, axis_name="vocab", implementation="pallas")
            scores, pull = jax.vjp(lambda h, w: f(h, w, y), h, w)
            d_h, d_w = pull(op.Scores(*cotangents))
        return scores, d_h, jax.lax.psum(d_w, "data")

    rows, columns = jax.P("data"), jax.P(None, "vocab")
    got = jax.jit(
        jax.shard_map(
            both,
            mesh=mesh,
            in_specs=(rows, columns, rows, (rows,) * 3),
            out_specs=(rows, rows, columns),
            check_vma=False,
        )
    )(hidden, head, jnp.asarray(labels), tuple(jnp.asarray(x, jnp.float32) for x in cotangents))
    compare(got, hidden, head, labels, 1.0, cotangents, 2e-6)


def test_scan_remat_and_vmap():
    hidden, head, labels, _ = example(4, 256, jnp.float32)

    def loss(h, w, y):
        def layer(x, _):
            f = jax.checkpoint(
                lambda x: op.token_logprobs(x, w, y, implementation="pallas").logprob
            )
            return x + f(x)[:, None], None

        with chips.target("v5p", interpret=True):
            return jax.lax.scan(layer, h, None, length=2)[0].sum()

    def plain(h, w, y):
        for _ in range(2):
            h = h + op.token_logprobs(h, w, y, implementation="reference").logprob[:, None]
        return h.sum()

    gradient = lambda f: jax.jit(jax.vmap(jax.grad(f, argnums=1), in_axes=(0, None, None)))  # noqa: E731
    batch = jnp.stack([hidden, 2 * hidden]), head, jnp.asarray(labels)
    got, want = gradient(loss)(*batch), gradient(plain)(*batch)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_what_the_kernels_cannot_do_is_refused_with_the_reason():
    def call(D=128, dtype=jnp.bfloat16, head_dtype=jnp.bfloat16):
        hidden, head = jnp.zeros((2, D), dtype), jnp.zeros((D, 256), head_dtype)
        with chips.target("v5p", interpret=True):
            op.token_logprobs(hidden, head, jnp.zeros(2, int), implementation="pallas")

    with pytest.raises(ValueError, match="no multiple of 128"):
        call(D=100)
    with pytest.raises(ValueError, match="must both be"):
        call(head_dtype=jnp.float32)
    with pytest.raises(ValueError, match="float16"):
        call(dtype=jnp.float16, head_dtype=jnp.float16)
    with pytest.raises(ValueError, match="do not fit"):
        call(D=128 * 512)
    with pytest.raises(ValueError, match="no TPU or GPU"):
        op.token_logprobs(
            jnp.zeros((2, 128)), jnp.zeros((128, 256)), jnp.zeros(2, int), implementation="pallas"
        )
