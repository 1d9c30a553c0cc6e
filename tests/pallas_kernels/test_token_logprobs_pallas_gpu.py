"""token_logprobs' GPU kernels, in the interpreter, against the equations in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_token_logprobs import oracle, oracle_gradients

from pallas_kernels import chips
from pallas_kernels import token_logprobs as op
from pallas_kernels.tilings import TILINGS
from pallas_kernels.token_logprobs import pallas
from pallas_kernels.token_logprobs.vocabulary import Rows

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="GPU kernels are interpreted by JAX 0.11 or later"
)


@pytest.fixture(autouse=True)
def few_blocks(monkeypatch):
    """Backward in parts of 256 columns of 256 rows."""
    tiling = dict(stages=2, band=2, blocks=2, part_bytes=2 * 256 * 256)
    monkeypatch.setitem(TILINGS["h200"], "token_logprobs", tiling)


def example(N, V, D=128, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(N, D)), jnp.bfloat16)
    head = jnp.asarray(2 * rng.normal(size=(D, V)) / np.sqrt(D), jnp.bfloat16)
    labels = rng.integers(0, V, size=N)
    labels[-1], labels[0] = V - 1, 0
    return hidden, head, labels, rng.normal(size=(3, N))


def both(hidden, head, labels, cotangents, temperature):
    with chips.target("h200", interpret=True):
        call = functools.partial(
            op.token_logprobs, temperature=temperature, implementation="pallas"
        )
        scores, pull = jax.vjp(lambda h, w: call(h, w, labels), hidden, head)
        return scores, *pull(op.Scores(*cotangents))


def compare(function, hidden, head, labels, cotangents, temperature, limit=6e-3):
    scores, *gradients = jax.jit(function)(
        hidden, head, jnp.asarray(labels), tuple(jnp.asarray(x, jnp.float32) for x in cotangents)
    )
    exact = [np.asarray(x, np.float64) for x in (hidden, head)]
    for x, y in zip(scores, oracle(*exact, labels, temperature)[0], strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, atol=2e-5)
    wanted = oracle_gradients(*exact, labels, temperature, *cotangents)
    for x, y in zip(gradients, wanted, strict=True):
        assert x.dtype == jnp.bfloat16 and x.shape == y.shape
        assert np.abs(np.asarray(x, np.float64) - y).max() < limit * np.abs(y).max()


@pytest.mark.parametrize(
    "N, V",
    [
        (300, 896),  # bands of two tiles and of one; a last tile that overlaps; three parts
        (7, 600),  # columns that do not exist
        (1, 100),  # fewer than a tile's
    ],
)
def test_values_and_gradients_equal_the_equations(N, V):
    f = functools.partial(both, temperature=0.6)
    compare(f, *example(N, V), 0.6)


def test_a_label_in_every_column():
    V = 384
    hidden, head, _, _ = example(V, V)
    zero = np.zeros(V)
    labels = np.random.default_rng(0).permutation(V)
    compare(
        functools.partial(both, temperature=1.0), hidden, head, labels, (zero + 1, zero, zero), 1.0
    )


def test_labels_of_another_part_of_the_vocabulary():
    """They add nothing. (JAX's interpreter of GPU kernels cannot run on several devices.)"""
    hidden, head, labels, cotangents = example(64, 400)
    elsewhere = np.arange(64) % 2 == 0
    own = jnp.asarray(np.where(elsewhere, -1, labels))
    rows = Rows(*(jnp.asarray(x, jnp.float32) for x in (np.zeros(64) + 3, *cotangents)))

    @jax.jit
    def run(hidden, head, own, rows):
        target = chips.Target(chips.CHIPS["h200"], interpret=True)
        forward = pallas._gpu_forward(target, hidden, head, own, 1.0)
        return forward, pallas._gpu_backward(target, hidden, head, own, rows, 1.0)

    (lse, label, _), (d_hidden, d_head) = run(hidden, head, own, rows)
    h, w = (np.asarray(x, np.float64) for x in (hidden, head))
    z = h @ w
    np.testing.assert_allclose(lse, np.log(np.exp(z).sum(1)), atol=2e-5)
    want = np.where(elsewhere, 0, z[np.arange(64), labels])
    np.testing.assert_allclose(label, want, atol=2e-5)
    of_label, mass, slope = cotangents[:, :, None]
    onehot = np.eye(400)[labels] * ~elsewhere[:, None]
    dz = of_label * onehot + np.exp(z - 3) * (mass - slope * (z - 3))
    for x, y in ((d_hidden, dz @ w.T), (d_head, h.T @ dz)):
        assert np.abs(np.asarray(x, np.float64) - y).max() < 6e-3 * np.abs(y).max()


def test_what_the_kernels_cannot_do_is_refused_with_the_reason():
    hidden, head = jnp.zeros((2, 128)), jnp.zeros((128, 256))
    with chips.target("h200"), pytest.raises(ValueError, match="bfloat16, got float32"):
        op.token_logprobs(hidden, head, jnp.zeros(2, int), implementation="pallas")
