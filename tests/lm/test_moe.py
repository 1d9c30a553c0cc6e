"""The MoE layer against its equations in float64 NumPy and transformers' sparse block of MiniMax."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.metrics import to_floats
from research.lm.config import DecoderConfig, MoEConfig
from research.lm.moe import MoE, RouterStats, aux_loss, metrics

CONFIG = DecoderConfig(
    vocab_size=7, hidden_size=12, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=6,
    mlp_size=10, moe=MoEConfig(num_experts=5, top_k=2),
)  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def initial(config, key):
    return MoE(config).init(key, jnp.zeros((1, 1, config.hidden_size)))["params"]


def make(seed=0, config=CONFIG, B=3, T=8):
    """(layer, its parameters, x), all large enough that no part is linear."""
    key_params, key_x = jax.random.split(jax.random.key(seed))
    params = initial(config, key_params)
    params = jax.tree.map(lambda p: p / config.init_std * 0.3, params)
    return MoE(config), params, jax.random.normal(key_x, (B, T, config.hidden_size))


@functools.partial(jax.jit, static_argnums=(0, 4))
def run(config, params, x, valid=None, factor=0.0, key=None):
    return MoE(config).apply({"params": params}, x, valid, factor, key)


def oracle(params, x_BTD, top_k, valid_BT, capacity):
    """y and statistics in float64, a token and a choice at a time."""
    p = {name: np.asarray(leaf["kernel"], np.float64) for name, leaf in params.items()}
    x = np.asarray(x_BTD, np.float64).reshape(-1, x_BTD.shape[-1])
    valid = np.ones(len(x), bool) if valid_BT is None else np.asarray(valid_BT).reshape(-1)
    logits = x @ p["router"]
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    experts = np.argsort(-probs, axis=1, kind="stable")[:, :top_k]
    y, load, taken, dropped = np.zeros(x.shape), *np.zeros((2, probs.shape[1])), 0
    for k in range(top_k):
        for n in np.flatnonzero(valid):
            e = experts[n, k]
            load[e] += 1
            if capacity is not None and taken[e] == capacity:
                dropped += 1
                continue
            taken[e] += 1
            g = x[n] @ p["gate"][e]
            out = (g / (1 + np.exp(-g)) * (x[n] @ p["up"][e])) @ p["down"][e]
            y[n] += probs[n, e] / probs[n, experts[n]].sum() * out
    entropy = -(probs * np.log(probs)).sum(1)
    stats = load, probs[valid].sum(0), dropped, entropy[valid].sum(), valid.sum()
    return y.reshape(x_BTD.shape), stats


@pytest.mark.parametrize("factor", [0.0, 0.8])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_output_and_statistics_equal_the_equations(factor, padded, top_k):
    config = dataclasses.replace(CONFIG, moe=MoEConfig(num_experts=5, top_k=top_k))
    _, params, x = make(config=config)
    valid = jnp.arange(8) < jnp.array([[8], [3], [0]]) if padded else None
    capacity = math.ceil(factor * top_k * 24 / 5) if factor else None
    for seed in range(5):
        x = jax.random.normal(jax.random.key(seed), x.shape)
        y, stats = run(config, params, x, valid, factor)
        want, wanted_stats = oracle(params, x, top_k, valid, capacity)
        np.testing.assert_allclose(y, want, atol=1e-5 * np.abs(want).max())
        got_stats = (stats.load_E, stats.probs_E, stats.dropped, stats.entropy, stats.tokens)
        for got, wanted in zip(got_stats, wanted_stats, strict=True):
            assert got.dtype == jnp.float32
            np.testing.assert_allclose(got, wanted, rtol=2e-6)


def test_gradients_equal_finite_differences_of_the_equations():
    layer, params, x = make(B=2, T=5)
    d_y = np.random.default_rng(0).normal(size=x.shape)
    c = np.random.default_rng(1).normal(size=5)

    def loss(params, x):
        y, stats = layer.apply({"params": params}, x, None, 0.9)
        return jnp.sum(y * d_y) + jnp.sum(c * stats.probs_E)

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    exact = jax.tree.map(lambda z: np.asarray(z, np.float64), (params, x))
    rng = np.random.default_rng(2)
    for i, grad in enumerate(jax.tree.leaves(grads)):
        leaves, structure = jax.tree.flatten(exact)
        direction = rng.normal(size=leaves[i].shape)
        sides = []
        for sign in (1, -1):
            moved = structure.unflatten(
                [z + sign * 1e-6 * direction if j == i else z for j, z in enumerate(leaves)]
            )
            y, stats = oracle(*moved, 2, None, 4)  # ceil(0.9 * 2 * 10 / 5)
            sides.append((y * d_y).sum() + (c * stats[1]).sum())
        want = (sides[0] - sides[1]) / 2e-6
        np.testing.assert_allclose((np.asarray(grad) * direction).sum(), want, rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing_and_comes_out_as_zero():
    _, params, x = make()
    valid = jnp.arange(8) < jnp.array([[8], [3], [0]])
    y, stats = run(CONFIG, params, x, valid, 1.0)
    noise = jnp.where(valid[:, :, None], x, 1e4)
    y_noise, stats_noise = run(CONFIG, params, noise, valid, 1.0)
    np.testing.assert_array_equal(y, y_noise)
    jax.tree.map(np.testing.assert_array_equal, stats, stats_noise)
    assert jnp.all(jnp.where(valid[:, :, None], 0, y) == 0) and stats.tokens == 11


def test_statistics_of_two_batches_add_up():
    _, params, x = make()
    (_, first), (_, second), (_, both) = (run(CONFIG, params, z) for z in (x[:1], x[1:], x))
    total = jax.tree.map(jnp.add, first, second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), total, both)


def test_the_router_is_float32_whatever_the_compute_type():
    """Logits that only differ beyond bfloat16's eight bits still choose the right expert."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16", moe=MoEConfig(num_experts=2, top_k=1))
    _, params, _ = make(config=config)
    params["router"]["kernel"] = jnp.zeros((12, 2)).at[0].set(jnp.array([1.0, 1.0 + 2**-12]))
    x = jnp.ones((1, 4, 12), jnp.bfloat16)
    y, stats = run(config, params, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(stats.load_E, [0, 4])


def test_jitter_moves_the_router_alone_and_only_with_a_key():
    config = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, jitter=0.2, top_k=5))
    _, params, x = make(config=config)
    apply = lambda config, key: run(config, params, x, None, 0.0, key)  # noqa: E731
    key = jax.random.key(1)
    plain = apply(config, None)
    jax.tree.map(np.testing.assert_array_equal, plain, apply(dataclasses.replace(
        config, moe=dataclasses.replace(config.moe, jitter=0.0)), key))  # fmt: skip
    _, stats = apply(config, key)
    scale = np.asarray(jax.random.uniform(key, (24, 12), minval=0.8, maxval=1.2), np.float64)
    assert scale.min() < 0.81 and scale.max() > 1.19
    _, wanted = oracle(params, np.asarray(x, np.float64) * scale.reshape(x.shape), 5, None, None)
    np.testing.assert_allclose(stats.probs_E, wanted[1], rtol=1e-5)
    # Experts that are all alike give what they give without jitter, however they are weighted.
    for name in ("gate", "up", "down"):
        kernel = params[name]["kernel"]
        params[name]["kernel"] = jnp.broadcast_to(kernel[:1], kernel.shape)
    np.testing.assert_allclose(apply(config, key)[0], apply(config, None)[0], atol=1e-5)


def test_initialisation():
    wide = dataclasses.replace(CONFIG, hidden_size=64, mlp_size=96, num_layers=5)
    for init, experts, router in (
        ("normal", 0.02, 0.02),
        ("deepnorm", 40**-0.25 * math.sqrt(2 / (64 + 96)), math.sqrt(2 / (64 + 5))),
    ):
        _, params, _ = make(config=dataclasses.replace(wide, init=init, init_std=0.02))
        stds = {name: np.std(leaf["kernel"]) * 0.02 / 0.3 for name, leaf in params.items()}
        shapes = {name: leaf["kernel"].shape for name, leaf in params.items()}
        assert shapes == {
            "router": (64, 5),
            "gate": (5, 64, 96),
            "up": (5, 64, 96),
            "down": (5, 96, 64),
        }
        for name in ("gate", "up", "down"):
            np.testing.assert_allclose(stds[name], experts, rtol=0.03)
            kernel = params[name]["kernel"]
            assert not np.allclose(kernel[0], kernel[1])  # each expert starts elsewhere
        np.testing.assert_allclose(stds["router"], router, rtol=0.15)


def stats_of(load, probs, tokens):
    zero = jnp.zeros(np.shape(tokens))
    arrays = (jnp.asarray(z, jnp.float32) for z in (load, probs))
    return RouterStats(*arrays, zero, zero, jnp.asarray(tokens, jnp.float32))


@pytest.mark.parametrize("form, balanced", [("paper", 2 / 32**2), ("switch", 2.0)])
def test_aux_loss_equals_its_equation(form, balanced):
    even = stats_of(np.full(32, 8.0), np.full(32, 4.0), 128)
    np.testing.assert_allclose(aux_loss(even, 2, form), balanced, rtol=1e-6)

    load, m = np.array([[8, 0, 4], [2, 9, 1]]), np.array([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]])
    stats = stats_of(load, 6 * m, [6, 6])
    want = (load / 6 * m).sum(1) * (1 / 3 if form == "paper" else 3)
    np.testing.assert_allclose(aux_loss(stats, 2, form), want, rtol=1e-6)
    assert aux_loss(stats_of(np.zeros(4), np.zeros(4), 0), 2, form) == 0

    gradient = jax.grad(lambda s: aux_loss(s, 2, form).sum())(stats)  # through m, not through f
    assert jnp.all(gradient.load_E == 0) and jnp.all(gradient.probs_E[load > 0] > 0)


def test_aux_loss_pulls_the_router_towards_balance():
    layer, params, x = make(B=4, T=32)
    kernel = params["router"]["kernel"].at[:, 0].add(1.0)
    x = x + 0.7

    def loss(kernel):
        stats = layer.apply({"params": params | {"router": {"kernel": kernel}}}, x)[1]
        return aux_loss(stats, 2, "switch"), stats

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (before, stats), _ = step(kernel)
    assert stats.load_E[0] > 0.9 * stats.tokens  # nearly all choose the first expert
    for _ in range(60):
        (after, stats), gradient = step(kernel)
        kernel -= 0.3 * gradient
    assert before > 2.6 and after < 2.15
    assert stats.load_E.max() / stats.load_E.mean() < 1.5


def test_metrics_say_what_happened():
    moe = MoEConfig(num_experts=4, top_k=2, aux_form="switch")
    stats = RouterStats(  # two layers, of which one starves half of its experts
        load_E=jnp.array([[10.0, 10, 0, 0], [5, 5, 5, 5]]),
        probs_E=jnp.array([[5.0, 5, 0, 0], [2.5, 2.5, 2.5, 2.5]]),
        dropped=jnp.array([4.0, 0.0]),
        entropy=jnp.array([10 * np.log(2), 10 * np.log(4)]),
        tokens=jnp.array([10.0, 10.0]),
    )
    got = metrics(stats, moe)
    values = to_floats(got)
    wanted = {
        "router/load/0": 15 / 40, "router/load/1": 15 / 40, "router/load/2": 5 / 40, "router/load/3": 5 / 40,
        "router/max_load": 1.5, "router/worst_load": 2.0, "router/dead": 0.25, "router/dropped": 0.1,
        "router/entropy": 1.5 * np.log(2), "router/aux": (4 + 2) / 2, "router/aux_pooled": 2.5,
    }  # fmt: skip
    assert values.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(values[name], value, rtol=1e-6, err_msg=name)

    # A batch with few tokens counts little; one with none changes nothing.
    more = metrics(jax.tree.map(lambda z: z[:1] / 5, stats), moe)
    none = metrics(jax.tree.map(jnp.zeros_like, stats), moe)
    merged = to_floats({name: got[name].merge(more[name]).merge(none[name]) for name in got})
    np.testing.assert_allclose(merged["router/max_load"], (10 * 2 + 10 + 2 * 2) / 22, rtol=1e-6)
    np.testing.assert_allclose(merged["router/load/0"], (15 + 2) / 44, rtol=1e-6)
    assert all(math.isfinite(value) for value in merged.values())


PARITY = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(torch|transformers)"),
    pytest.mark.filterwarnings("ignore::FutureWarning:(torch|transformers)"),
    pytest.mark.filterwarnings("ignore::UserWarning:(torch|transformers)"),
]


def parity(test):
    for mark in PARITY:
        test = mark(test)
    return test


@parity
@pytest.mark.parametrize(
    "E, top_k, D, F, T", [(4, 2, 32, 48, 33), (8, 3, 16, 40, 7), (3, 1, 24, 8, 1)]
)
def test_transformers_block_gives_the_same(E, top_k, D, F, T):
    torch = pytest.importorskip("torch")
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    config = dataclasses.replace(
        CONFIG, hidden_size=D, mlp_size=F, moe=MoEConfig(num_experts=E, top_k=top_k)
    )
    layer, params, x = make(config=config, B=2, T=T)
    theirs = minimax.MiniMaxConfig(
        hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=top_k
    )
    theirs._experts_implementation = "eager"
    block = minimax.MiniMaxSparseMoeBlock(theirs).float()
    tensor = lambda z: torch.tensor(np.asarray(z))  # noqa: E731
    kernels = {name: np.asarray(leaf["kernel"]) for name, leaf in params.items()}
    gate_up = np.concatenate([kernels["gate"], kernels["up"]], axis=2).transpose(0, 2, 1)
    with torch.no_grad():
        block.gate.weight.copy_(tensor(kernels["router"].T))
        block.experts.gate_up_proj.copy_(tensor(gate_up))
        block.experts.down_proj.copy_(tensor(kernels["down"].transpose(0, 2, 1)))
    d_y = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    x_torch = tensor(x).requires_grad_()
    y_torch = block(x_torch)
    (y_torch * tensor(d_y)).sum().backward()

    def loss(params, x):
        y = layer.apply({"params": params}, x)[0]
        return jnp.sum(y * d_y), y

    (grads, d_x), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    d_gate, d_up = np.split(block.experts.gate_up_proj.grad.numpy().transpose(0, 2, 1), 2, axis=2)
    pairs = [
        (y, y_torch.detach().numpy()),
        (d_x, x_torch.grad.numpy()),
        (grads["router"]["kernel"], block.gate.weight.grad.numpy().T),
        (grads["gate"]["kernel"], d_gate),
        (grads["up"]["kernel"], d_up),
        (grads["down"]["kernel"], block.experts.down_proj.grad.numpy().transpose(0, 2, 1)),
    ]
    for got, want in pairs:
        np.testing.assert_allclose(got, want, atol=2e-5 * max(np.abs(want).max(), 0.1), rtol=0)


@parity
def test_transformers_balancing_loss_is_the_switch_form_of_all_layers_pooled():
    torch = pytest.importorskip("torch")
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    layer, params, _ = make()
    valid = np.arange(8) < np.array([[8], [3], [6]])
    x_LBTD = jax.random.normal(jax.random.key(3), (4, 3, 8, 12))
    logits = tuple(
        torch.tensor(np.asarray(x.reshape(-1, 12) @ params["router"]["kernel"])) for x in x_LBTD
    )
    for mask in (None, valid):
        stats = jax.lax.map(lambda x, m=mask: layer.apply({"params": params}, x, m)[1], x_LBTD)
        pooled = jax.tree.map(lambda z: z.sum(0), stats)
        want = minimax.load_balancing_loss_func(
            logits, 5, 2, None if mask is None else torch.tensor(mask)
        )
        np.testing.assert_allclose(aux_loss(pooled, 2, "switch"), float(want), rtol=1e-6)
        assert aux_loss(stats, 2, "switch").shape == (4,)
