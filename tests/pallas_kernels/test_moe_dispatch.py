"""moe_mlp and its routing against the equations in float64 NumPy, one pair at a time."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.moe_dispatch import blocks, moe_mlp, route, routing


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
        np.testing.assert_allclose(
            np.asarray(got, np.float64), want, atol=tolerance * scale, rtol=0
        )
    return got_gradients


SHAPES = [  # N, D, F, E, K, capacity: every choice of block sizes, and the edges
    (1, 6, 5, 4, 2, None),
    (2, 6, 5, 3, 3, 1),
    (9, 4, 6, 1, 1, 7),
    (37, 8, 12, 6, 2, None),
    (61, 8, 6, 3, 2, 31),
    (20, 4, 4, 1, 1, None),
    (65, 6, 8, 1, 1, None),
    (150, 6, 8, 4, 2, 70),
    (530, 6, 4, 2, 2, None),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, indirect=True)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_equal_the_equations(implementation, shape):
    *sizes, capacity = shape
    function = value_and_gradients(implementation, capacity)
    for seed, (skew, padding) in enumerate([(0, 0), (0.3, 0.2), (0, 1), (2, 0), (9, 0.5)]):
        check(function, example(seed, *sizes, skew, padding), capacity)


def test_block_sizes_nest_and_the_shapes_of_that_test_meet_all_of_them():
    met = {blocks.block_sizes(N * K, E) for N, _, _, E, K, _ in SHAPES}
    every = {blocks.block_sizes(pairs, E) for pairs in range(1, 2000) for E in (1, 2, 5, 64)}
    assert met == every
    assert all(a % b == 0 for sizes in every for a, b in zip(sizes, sizes[1:], strict=False))


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
    x, gate, up, down, experts, weights, d_y = operands
    for matrices in (gate, up, down):
        matrices[2] = np.nan  # would show if it were multiplied with anything
    gradients, (y, _) = value_and_gradients("xla", None)(x, gate, up, down, weights, experts, d_y)
    assert all(jnp.all(jnp.isfinite(z)) for z in (y, *gradients))


@pytest.mark.parametrize("implementation", ["xla", "xla by ragged_dot"], indirect=True)
def test_padding_is_neither_read_nor_given_a_gradient(implementation):
    x, gate, up, down, experts, weights, d_y = example(0, 40, 6, 8, 4, 2)
    padding = np.r_[3:9, 30:40]  # the last token too, where an index beyond the end would land
    experts[padding], x[padding], d_y[padding] = 4, np.nan, np.nan
    function = value_and_gradients(implementation, None)
    gradients, (y, kept) = function(x, gate, up, down, weights, experts, d_y)
    assert jnp.all(y[padding] == 0) and jnp.all(gradients[0][padding] == 0)
    assert not kept[padding].any() and all(jnp.all(jnp.isfinite(z)) for z in gradients)


def test_capacity_takes_first_choices_before_second_ones():
    experts = np.array([[1, 0], [0, 1], [3, 0], [0, 2], [0, 1]])  # 3: nowhere, takes no place
    x, gate, up, down, _, weights, _ = example(0, 5, 4, 4, 3, 2)
    for implementation in ("reference", "xla"):
        _, kept = moe_mlp(
            *map(jnp.asarray, (x, gate, up, down, experts, weights)),
            capacity=2,
            implementation=implementation,
        )
        # Token by token, expert 0 would take the second choice of token 0 and drop token 3's.
        np.testing.assert_array_equal(kept, [[1, 0], [1, 1], [0, 0], [1, 1], [0, 0]])


def test_what_capacity_leaves_of_a_token_is_not_normalised_again():
    x, gate, up, down, _, _, _ = example(0, 3, 4, 4, 2, 2)
    x, gate, up, down = (jnp.asarray(z, jnp.float32) for z in (x, gate, up, down))
    experts = jnp.array([[0, 1], [1, 0], [0, 1]])
    weights = jnp.array([[0.9, 0.1], [0.5, 0.5], [0.7, 0.3]])
    y, kept = moe_mlp(x, gate, up, down, experts, weights, capacity=1)
    np.testing.assert_array_equal(kept, [[1, 0], [1, 0], [0, 0]])
    full, _ = moe_mlp(x, gate, up, down, experts[:, :1], jnp.ones((3, 1)))
    np.testing.assert_allclose(y, full * np.array([[0.9], [0.5], [0.0]]), rtol=1e-5)


def route_oracle(logits, top_k):
    experts = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    softmax = lambda z: np.exp(z) / np.exp(z).sum(1, keepdims=True)  # noqa: E731
    return experts, softmax(np.take_along_axis(logits, experts, 1)), softmax(logits)


@pytest.mark.parametrize("N, E, top_k", [(1, 1, 1), (50, 7, 2), (50, 5, 5), (30, 32, 8)])
def test_routing_equals_the_equations(N, E, top_k):
    rng = np.random.default_rng(N + E)
    logits = np.asarray(rng.normal(size=(N, E)), np.float32).astype(np.float64)
    experts, weights, probs = route_oracle(logits, top_k)
    a, b = rng.normal(size=(N, top_k)), rng.normal(size=(N, E))

    def loss(logits):
        routing = route(logits, top_k)
        return jnp.sum(routing.weights_NK * a) + jnp.sum(routing.probs_NE * b), routing

    gradient, routing = jax.grad(loss, has_aux=True)(jnp.asarray(logits, jnp.float32))
    for got, want in zip(routing, (experts, weights, probs), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
    d_logits = probs * (b - (probs * b).sum(1, keepdims=True))
    d_chosen = weights * (a - (weights * a).sum(1, keepdims=True))
    np.put_along_axis(d_logits, experts, np.take_along_axis(d_logits, experts, 1) + d_chosen, 1)
    np.testing.assert_allclose(gradient, d_logits, atol=1e-6)


def test_equal_logits_go_to_the_lower_experts_and_bfloat16_ones_are_widened():
    logits = np.zeros((4, 9))
    logits[1, [8, 3, 5]] = 1
    logits[2, 7:] = -np.inf
    logits[3, [0, 4]] = [2, 3]
    routing = jax.jit(lambda x: route(x, 3))(jnp.asarray(logits, jnp.bfloat16))
    np.testing.assert_array_equal(routing.experts_NK, [[0, 1, 2], [3, 5, 8], [0, 1, 2], [4, 0, 1]])
    assert routing.weights_NK.dtype == routing.probs_NE.dtype == jnp.float32
    np.testing.assert_allclose(routing.weights_NK, route_oracle(logits, 3)[1], rtol=1e-6)


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from primitives(inner)


@pytest.mark.parametrize("implementation", ["xla", "xla by ragged_dot"], indirect=True)
def test_no_scatter_adds(implementation):
    x, gate, up, down, experts, weights, d_y = example(0, 40, 6, 8, 4, 2)
    trace = jax.make_jaxpr(value_and_gradients(implementation, 30))
    names = set(primitives(trace(x, gate, up, down, weights, experts, d_y).jaxpr))
    assert "sort" in names and "scatter-add" not in names


def temporary_memory(function, N, D, F, E):
    shapes = [(N, D), (E, D, F), (E, D, F), (E, F, D), (N, 2), (N, 2), (N, D)]
    operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    operands[5] = jax.ShapeDtypeStruct((N, 2), jnp.int32)
    return function.lower(*operands).compile().memory_analysis().temp_size_in_bytes


def test_a_decoded_token_copies_one_expert_at_a_time():
    D, F, E = 64, 128, 32
    forward = jax.jit(lambda x, g, u, d, w, e, _: moe_mlp(x, g, u, d, e, w))
    assert temporary_memory(forward, 1, D, F, E) < 1.1 * 4 * 3 * D * F


def test_training_holds_rows_for_the_chosen_experts_only():
    N, D, F, E = 512, 16, 64, 32
    rows = 2 * N + 32 * E
    held = 4 * rows * (3 * D + 4 * F) + 4 * 2 * E * 3 * D * F
    assert temporary_memory(value_and_gradients("xla", None), N, D, F, E) < held < 4 * N * E * F


def operands_for_sharding(N=24):
    x, gate, up, down, experts, weights, d_y = example(0, N, 6, 8, 4, 2, 0.3, 0.1)
    f32 = [jnp.asarray(z, jnp.float32) for z in (x, gate, up, down, weights, d_y)]
    return f32[:4], f32[4], jnp.asarray(experts), f32[5]


def loss(matrices, x, weights, experts, d_y):
    y, _ = moe_mlp(x, *matrices, experts, weights)
    return jnp.sum(y * d_y)


@pytest.mark.parametrize("own", [True, False])
def test_tokens_sharded_over_devices_give_the_same_gradients(own):
    """With check_vma, whether or not the weights were cast to each device's own."""
    (x, *matrices), weights, experts, d_y = operands_for_sharding()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.checkpoint
    def micro_batch(matrices, rows):
        return loss(matrices, *rows)

    def gradients(matrices, *rows):
        rows = jax.tree.map(lambda z: z.reshape(2, len(z) // 2, -1), rows)
        total = lambda m: jax.lax.scan(  # noqa: E731
            lambda c, row: (c + micro_batch(m, row), None),
            jax.lax.pcast(jnp.float32(0), "data", to="varying"), rows)[0]  # fmt: skip
        if own:
            matrices = jax.lax.pcast(matrices, "data", to="varying")
        grads = jax.grad(total)(matrices)
        return jax.lax.psum(grads, "data") if own else grads

    specs = jax.P(), *[jax.P("data")] * 4
    sharded = jax.jit(jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=jax.P()))
    wanted = jax.jit(jax.grad(loss))(matrices, x, weights, experts, d_y)
    for got, want in zip(sharded(matrices, x, weights, experts, d_y), wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_rows_sharded_by_the_compiler_and_donated_give_the_same():
    (x, *matrices), weights, experts, d_y = operands_for_sharding()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    wanted = jax.jit(jax.value_and_grad(loss, argnums=1))(matrices, x, weights, experts, d_y)
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    split = jax.device_put((x, weights, experts, d_y), rows)
    step = jax.jit(jax.value_and_grad(loss, argnums=1), donate_argnums=1)
    for got, want in zip(step(matrices, *split), wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_vmap_equals_a_loop():
    (x, *matrices), weights, experts, d_y = operands_for_sharding()
    rows = [z.reshape(3, 8, -1) for z in (x, weights, experts, d_y)]
    gradient = jax.grad(loss, argnums=(0, 1))
    got = jax.jit(jax.vmap(gradient, in_axes=(None, 0, 0, 0, 0)))(matrices, *rows)
    single = jax.jit(gradient)
    wanted = [single(matrices, *row) for row in zip(*rows, strict=True)]
    jax.tree.map(lambda g, *w: np.testing.assert_allclose(g, np.stack(w), atol=1e-5), got, *wanted)


@pytest.mark.parametrize("seed", range(20))
def test_the_global_router_keeps_what_all_groups_together_can_serve(seed):
    rng = np.random.default_rng(seed)
    G, E, C = rng.integers(1, 9), rng.integers(1, 6), rng.integers(1, 20)
    counts = rng.poisson(rng.uniform(0, 3 * C, size=E), size=(G, E))
    kept = np.asarray(routing.global_keep(jnp.asarray(counts), int(C)))
    assert kept.dtype == np.int32 and (0 <= kept).all() and (kept <= counts).all()
    global_drops = np.maximum(0, counts.sum(0) - G * C).sum()
    local_drops = np.maximum(0, counts - C).sum()
    assert (counts - kept).sum() == global_drops <= local_drops
    for e in range(E):  # one after another: groups in order, each place served once
        ranks = [int(first) + i for first, n in zip(routing.global_offsets(counts)[:, e], kept[:, e],
                                                    strict=True) for i in range(n)]  # fmt: skip
        assert ranks == list(range(min(counts[:, e].sum(), G * C)))
        slots = [tuple(int(z) for z in routing.global_slot(rank, int(C))) for rank in ranks]
        assert len(set(slots)) == len(slots)
        assert all(replica < G and slot < C for replica, slot in slots)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(up=np.zeros((3, 4, 5))), "gate and up"),
        (dict(gate=np.zeros((4, 5))), "gate and up"),
        (dict(x=np.zeros((7, 5))), "need x"),
        (dict(experts=np.zeros((6, 2), int)), "experts per row"),
        (dict(experts=np.zeros((7, 4), int)), "1 to 3 experts"),
        (dict(weights=np.zeros((7, 1))), "one weight per choice"),
        (dict(capacity=0), "capacity"),
        (dict(implementation="cuda"), "none of"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    good = dict(x=np.zeros((7, 4)), gate=np.zeros((3, 4, 6)), up=np.zeros((3, 4, 6)),
                down=np.zeros((3, 6, 4)), experts=np.zeros((7, 2), int), weights=np.zeros((7, 2)),
                capacity=None, implementation=None)  # fmt: skip
    *operands, capacity, implementation = (good | change).values()
    with pytest.raises(ValueError, match=message):
        moe_mlp(*operands, capacity=capacity, implementation=implementation)


def test_top_k_beyond_the_experts_is_refused():
    with pytest.raises(ValueError, match="top_k"):
        route(jnp.zeros((3, 4)), 5)
