"""moe_mlp and its routing against the equations in float64 NumPy, one pair at a time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.moe_dispatch import blocks, moe_mlp, ragged, route, routing


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def oracle_keep(experts, E, capacity):
    """First choices in token order, then second ones; an expert takes `capacity`."""
    taken, kept = np.zeros(E, int), np.zeros(experts.shape, bool)
    for k in range(experts.shape[1]):
        for n in range(len(experts)):
            e = experts[n, k]
            if e < E and (capacity is None or taken[e] < capacity):
                kept[n, k] = True
                taken[e] += 1
    return kept


def oracle(x, gate, up, down, experts, weights, capacity, d_y):
    """(y, kept) and the gradients of sum(y * d_y), pair by pair, in float64."""
    kept = oracle_keep(experts, len(gate), capacity)
    y = np.zeros(x.shape)
    d_x, d_gate, d_up, d_down, d_w = (np.zeros(z.shape) for z in (x, gate, up, down, weights))
    for n, k in zip(*np.nonzero(kept), strict=True):
        e, w = experts[n, k], weights[n, k]
        g, u = x[n] @ gate[e], x[n] @ up[e]
        s = sigmoid(g)
        a = g * s * u
        y[n] += w * (a @ down[e])
        d_w[n, k] = d_y[n] @ (a @ down[e])
        d_a = w * (down[e] @ d_y[n])
        d_g, d_u = d_a * u * (s + g * s * (1 - s)), d_a * g * s
        d_x[n] += gate[e] @ d_g + up[e] @ d_u
        d_gate[e] += np.outer(x[n], d_g)
        d_up[e] += np.outer(x[n], d_u)
        d_down[e] += np.outer(w * a, d_y[n])
    return y, kept, (d_x, d_gate, d_up, d_down, d_w)


def example(seed, N, D, F, E, K, skew=0.0, padding=0.0):
    """Random operands; `skew` prefers low experts, `padding` is the share of tokens nowhere."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(N, E)) - skew * np.arange(E)
    experts = np.argsort(-logits, axis=1, kind="stable")[:, :K].astype(np.int32)
    experts[rng.random(N) < padding] = E
    weights = rng.dirichlet(np.ones(K), size=N)
    matrices = [rng.normal(size=s) / np.sqrt(s[1]) for s in ((E, D, F), (E, D, F), (E, F, D))]
    return [rng.normal(size=(N, D)), *matrices, experts, weights, rng.normal(size=(N, D))]


IMPLEMENTATIONS = ("reference", "xla", "xla by ragged_dot")


@pytest.fixture
def implementation(request, monkeypatch):
    if request.param == "xla by ragged_dot":  # as on accelerators
        choose = lambda *operands, default, **_: default(*operands)  # noqa: E731
        monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    return request.param.split()[0]


def value_and_gradients(implementation, capacity):
    def loss(x, gate, up, down, weights, experts, d_y):
        y, kept = moe_mlp(
            x, gate, up, down, experts, weights, capacity=capacity, implementation=implementation
        )
        return jnp.sum(y.astype(jnp.float32) * d_y), (y, kept)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))


def check(function, operands, capacity, tolerance=1e-5, dtype=jnp.float32):
    x, gate, up, down, experts, weights, d_y = operands
    x, gate, up, down = (np.asarray(jnp.asarray(z, dtype), np.float64) for z in operands[:4])
    y, kept, gradients = oracle(x, gate, up, down, experts, weights, capacity, d_y)
    narrow = [jnp.asarray(z, dtype) for z in (x, gate, up, down)]
    got_gradients, (got_y, got_kept) = function(
        *narrow, jnp.asarray(weights, jnp.float32), experts, jnp.asarray(d_y, jnp.float32)
    )
    np.testing.assert_array_equal(got_kept, kept)
    assert got_y.dtype == dtype
    for got, want in zip((got_y, *got_gradients), (y, *gradients), strict=True):
        scale = max(np.abs(want).max(), 1e-3)
        np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=tolerance * scale, rtol=0)
    return got_gradients


SHAPES = [  # N, D, F, E, K, capacity: every choice of block sizes, and the edges
    (1, 6, 5, 4, 2, None),
    (2, 6, 5, 3, 3, 1),
    (9, 4, 6, 1, 1, 7),
    (37, 8, 12, 6, 2, None),
    (61, 8, 6, 3, 2, 31),
    (300, 6, 8, 4, 2, None),
    (290, 6, 8, 2, 1, 140),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_equal_the_equations(implementation, shape):
    *sizes, capacity = shape
    function = value_and_gradients(implementation, capacity)
    for seed, (skew, padding) in enumerate([(0, 0), (0.3, 0.2), (0, 1), (2, 0), (9, 0.5)]):
        check(function, example(seed, *sizes, skew, padding), capacity)


def test_the_shapes_of_that_test_meet_every_block_size():
    met = {blocks.block_sizes(N * K, E) for N, _, _, E, K, _ in SHAPES}
    every = {blocks.block_sizes(pairs, 16) for pairs in range(1, 10_000)}
    assert met == every
    assert all(big % small == 0 for sizes in every for big, small in zip(sizes, sizes[1:], strict=False))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
def test_bfloat16_operands_accumulate_in_float32(implementation):
    operands = example(0, 64, 256, 96, 4, 2)
    check(value_and_gradients(implementation, None), operands, None, 0.012, jnp.bfloat16)


def test_an_expert_without_tokens_has_no_gradient_and_does_no_work():
    operands = example(0, 40, 6, 8, 4, 2)
    operands[4] = np.where(operands[4] == 2, 3, operands[4])
    operands[4][operands[4][:, 0] == operands[4][:, 1], 1] = 0
    assert not (operands[4] == 2).any()
    gradients = check(value_and_gradients("xla", None), operands, None)
    assert all(jnp.all(g[2] == 0) for g in gradients[1:4])
    for weights in operands[1:4]:
        weights[2] = np.nan  # would show if it were multiplied with anything
    gradients, (y, _) = value_and_gradients("xla", None)(*operands[:4], *np.array(operands, object)[[5, 4, 6]])
    assert jnp.all(jnp.isfinite(y)) and all(jnp.all(jnp.isfinite(g)) for g in gradients)
