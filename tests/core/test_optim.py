"""Optimizers and schedules against float64 equations in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core import optim
from research.core.optim import OptimConfig


def run(config, params, gradients, total=100, matrices=None):
    """Parameters after applying the given gradients in turn, and the rates used."""
    tx = optim.make(config, total, matrices)
    state = tx.init(params)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p))
    rates = []
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        rates.append(float(optax.tree.get(state, "learning_rate")))
    return params, rates


def clip64(grads, limit):
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    return {k: g * min(1.0, limit / norm) for k, g in grads.items()}


def test_adamw_equals_the_equations():
    """Loshchilov and Hutter 2019, algorithm 2, with the decay times the learning rate."""
    config = OptimConfig(
        lr=0.1, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.2, clip_norm=1.5, warmup_steps=3
    )
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(3, 4)), "scale": rng.normal(size=(2, 3))}
    gradients = [
        {k: rng.normal(size=p.shape) * size for k, p in params.items()}
        for size in (0.1, 3.0, 0.1, 1.0, 0.3)  # some are clipped, some are not
    ]
    p = {k: v.copy() for k, v in params.items()}
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(v) for k, v in params.items()}
    for t, grads in enumerate(gradients, 1):
        lr = 0.1 * min(1, t / 3)
        for k, g in clip64(grads, 1.5).items():
            m[k] = 0.8 * m[k] + 0.2 * g
            v[k] = 0.95 * v[k] + 0.05 * g**2
            step = (m[k] / (1 - 0.8**t)) / (np.sqrt(v[k] / (1 - 0.95**t)) + 1e-6)
            decay = 0.2 * p[k] if k == "kernel" else 0.0
            p[k] = p[k] - lr * (step + decay)
    to32 = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)  # noqa: E731
    got, rates = run(config, to32(params), [to32(g) for g in gradients])
    np.testing.assert_allclose(rates, 0.1 * np.minimum(1, np.arange(1, 6) / 3), rtol=1e-6)
    for k in p:
        np.testing.assert_allclose(got[k], p[k], rtol=3e-6, atol=3e-6)


def test_muon_equals_the_equations():
    """Jordan et al. 2024 with Nesterov momentum; its updates as large as Liu et al. 2025, section 2.2, make them."""
    config = OptimConfig("muon", lr=0.1, b1=0.8, eps=1e-6, weight_decay=0.2, clip_norm=0.0)
    rng = np.random.default_rng(0)
    params = {
        "a": {"kernel": rng.normal(size=(6, 4)), "bias": rng.normal(size=4)},
        "stack": {"kernel": rng.normal(size=(2, 3, 8))},
        "heads": {"kernel": rng.normal(size=(2, 3, 4, 5))},
    }
    gradients = [jax.tree.map(lambda p: rng.normal(size=p.shape), params) for _ in range(3)]

    def orthogonal(m):
        """Five steps of x <- a x + (b x x^T + c (x x^T)^2) x from x / |x|."""
        x = m / np.linalg.norm(m)
        wide = x.shape[0] <= x.shape[1]
        x = x if wide else x.T
        for _ in range(5):
            s = x @ x.T
            x = 3.4445 * x + (-4.775 * s + 2.0315 * s @ s) @ x
        return x if wide else x.T

    def muon(history):
        m = np.zeros_like(history[0])
        for t, g in enumerate(history, 1):
            m = 0.95 * m + 0.05 * g
            step = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
        parts = step if step.ndim == 3 else step[None]
        return np.stack([orthogonal(x) * 0.2 * max(x.shape) ** 0.5 for x in parts]).reshape(g.shape)

    def adam(history):
        m = v = 0.0
        for g in history:
            m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        t = len(history)
        return (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6)

    expected = {}
    for path in (("a", "kernel"), ("a", "bias"), ("stack", "kernel"), ("heads", "kernel")):
        p = params[path[0]][path[1]]
        rule = muon if path in (("a", "kernel"), ("stack", "kernel")) else adam
        for t in range(3):
            history = [g[path[0]][path[1]] for g in gradients[: t + 1]]
            p = p - 0.1 * (rule(history) + (0.2 * p if path[1] == "kernel" else 0.0))
        expected[path] = p
    to32 = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)  # noqa: E731
    got, rates = run(config, to32(params), [to32(g) for g in gradients], matrices=optim.kernels)
    np.testing.assert_allclose(rates, 0.1, rtol=1e-6)
    for path, p in expected.items():
        np.testing.assert_allclose(
            got[path[0]][path[1]], p, rtol=2e-4, atol=2e-4, err_msg=str(path)
        )


def test_muon_needs_to_know_the_matrices():
    with pytest.raises(ValueError, match="not there for this kind of model"):
        optim.make(OptimConfig("muon"), 10)


def test_sgd_is_the_clipped_gradient():
    params = {"w": jnp.asarray([[1.0, 2.0]])}
    grads = {"w": jnp.asarray([[3.0, 4.0]])}
    got, _ = run(OptimConfig("sgd", lr=0.5, clip_norm=1.0), params, [grads])
    np.testing.assert_allclose(got["w"], [[1.0 - 0.5 * 0.6, 2.0 - 0.5 * 0.8]], rtol=1e-6)
    got, _ = run(OptimConfig("sgd", lr=0.5, clip_norm=0.0), params, [grads])
    np.testing.assert_allclose(got["w"], [[1.0 - 1.5, 2.0 - 2.0]], rtol=1e-6)


def test_weight_decay_spares_norms_biases_and_vectors():
    params = {
        "layers": {
            "attn": {"qkv": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))}},
            "attn_norm": {"scale": jnp.ones((2, 3))},
        },
        "embed": {"embedding": jnp.ones((5, 3))},
        "slope": jnp.ones((3,)),
    }
    zero = jax.tree.map(jnp.zeros_like, params)
    config = OptimConfig(lr=0.1, weight_decay=0.5)
    got, _ = run(config, params, [zero])
    flat = {
        "/".join(k.key for k in path): float(leaf.ravel()[0])
        for path, leaf in jax.tree_util.tree_leaves_with_path(got)
    }
    shrunk = {name for name, value in flat.items() if value != 1.0}
    assert shrunk == {"layers/attn/qkv/kernel", "embed/embedding"}
    np.testing.assert_allclose(flat["embed/embedding"], 1 - 0.1 * 0.5, rtol=1e-6)


def test_bfloat16_parameters_keep_wide_moments():
    params = {"w": jnp.ones((2, 2), jnp.bfloat16)}
    tx = optim.make(OptimConfig(lr=0.1), 10)
    state = tx.init(params)
    grads = {"w": jnp.ones((2, 2), jnp.float32)}
    updates, after = tx.update(grads, state, params)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(state)]
    assert dtypes == [leaf.dtype for leaf in jax.tree.leaves(after)]
    assert jnp.bfloat16 not in dtypes
    assert optax.apply_updates(params, updates)["w"].dtype == jnp.bfloat16


def oracle(config, total, t):
    warm = min(1.0, (t + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    f = config.final_fraction
    if config.schedule == "constant":
        share = 1.0
    elif config.schedule == "cosine":
        x = max(0.0, (t - config.warmup_steps) / (total - config.warmup_steps))
        share = f + (1 - f) * (1 + np.cos(np.pi * min(x, 1.0))) / 2
    elif config.schedule == "wsd":
        left = total - t  # updates to go
        share = (
            1.0 if left >= config.decay_steps else f + (1 - f) * max(left, 0) / (config.decay_steps)
        )
    else:
        share = 1.0
        for boundary, factor in zip(config.boundaries, config.factors, strict=True):
            if t >= boundary and boundary == config.boundaries[-1] and config.decay_steps:
                x = min(1.0, (t - boundary) / config.decay_steps)
                share = np.exp((1 - x) * np.log(share) + x * np.log(factor))
            elif t >= boundary:
                share = factor
    return config.lr * warm * share


@pytest.mark.parametrize(
    "config",
    [
        OptimConfig(lr=3e-4, warmup_steps=0),
        OptimConfig(lr=3e-4, schedule="cosine", warmup_steps=5, final_fraction=0.1),
        OptimConfig(lr=3e-4, schedule="cosine", final_fraction=0.0),
        OptimConfig(lr=3e-4, schedule="wsd", warmup_steps=7, decay_steps=10, final_fraction=0.05),
        OptimConfig(
            lr=3e-4,
            schedule="piecewise",
            warmup_steps=3,
            boundaries=(10, 20, 21),
            factors=(0.5, 0.1, 0.02),
        ),
        OptimConfig(
            lr=2e-4,
            schedule="piecewise",
            warmup_steps=5,
            boundaries=(20, 30),
            factors=(0.65, 0.15),
            decay_steps=8,
        ),
        OptimConfig(
            lr=2e-4, schedule="piecewise", boundaries=(12,), factors=(0.1,), decay_steps=40
        ),
    ],
    ids=lambda c: f"{c.schedule}-{c.warmup_steps}-{c.decay_steps}",
)
def test_schedules_equal_their_formulas(config):
    total = 40
    rate = jax.jit(optim.schedule(config, total))
    got = [float(rate(t)) for t in range(total + 3)]  # a resumed run may go past its end
    np.testing.assert_allclose(
        got, [oracle(config, total, t) for t in range(total + 3)], rtol=1e-5, atol=1e-12
    )
    assert got[0] > 0


@pytest.mark.parametrize(
    "config, word",
    [
        (OptimConfig(schedule="wsd"), "decay_steps"),
        (OptimConfig(schedule="cosine", warmup_steps=50), "warmup_steps=50"),
        (OptimConfig(schedule="piecewise", boundaries=(3, 2), factors=(1.0, 1.0)), "increase"),
        (OptimConfig(schedule="piecewise", boundaries=(3,)), "factors"),
        (
            OptimConfig(schedule="piecewise", boundaries=(3,), factors=(0.0,), decay_steps=5),
            "positive factors",
        ),
        (OptimConfig("adam", weight_decay=0.1), "adamw"),
        (OptimConfig(lr=-1.0), "lr"),
    ],
)
def test_senseless_settings_are_refused(config, word):
    with pytest.raises(ValueError, match=word):
        optim.make(config, 50)


def test_an_exponential_decay_falls_by_equal_ratios_from_where_it_was():
    config = OptimConfig(
        lr=2e-4, schedule="piecewise", boundaries=(4, 8), factors=(0.65, 0.15), decay_steps=6
    )
    rate = optim.schedule(config, 8)  # its end is not the run's
    rates = np.asarray([float(rate(t)) for t in range(18)])
    np.testing.assert_allclose(rates[:4], 2e-4, rtol=1e-6)
    np.testing.assert_allclose(rates[4:9], 1.3e-4, rtol=1e-6)
    np.testing.assert_allclose(rates[9:15] / rates[8:14], (0.15 / 0.65) ** (1 / 6), rtol=1e-5)
    np.testing.assert_allclose(rates[14:], 3e-5, rtol=1e-5)
