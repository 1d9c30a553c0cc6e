"""The diffusion transformer: every released size, the equations in float64, and its symmetries."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dit_oracle import double_stream, random_params
from programs import half_precision, largest_array

from research.hunyuan3d_2.dit import cross, layers, model
from research.hunyuan3d_2.dit.config import PRESETS, DiTConfig

SMALL = DiTConfig(
    num_latents=7,
    latent_dim=6,
    cond_dim=10,
    hidden_size=32,
    num_heads=4,
    depth=2,
    single_depth=3,
    guidance_embed=True,
)
CROSS = DiTConfig(
    architecture="cross_attention", num_latents=7, latent_dim=6, cond_dim=10, hidden_size=32, num_heads=4,
    depth=5, single_depth=0, moe_depth=2, num_experts=4, qkv_bias=False,
)  # fmt: skip


@pytest.fixture(autouse=True)
def precise():
    with jax.default_matmul_precision("highest"):
        yield


def inputs(config, seed=0, B=2, L=7, T=5):
    rng = np.random.default_rng(seed)
    x, cond = rng.normal(size=(B, L, config.latent_dim)), rng.normal(size=(B, T, config.cond_dim))
    t, guidance = np.asarray([0.031, 0.087])[:B], np.asarray([0.05, 0.01])[:B]
    return [a.astype(np.float32) for a in (x, t, cond, guidance)]


def apply(config, params, *args):
    return np.asarray(jax.jit(model.build(config).apply)({"params": params}, *args))


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("v2-0", 1113.3), ("v2-0-fast", 1114.6), ("v2-0-turbo", 1114.6), ("v2-mini", 559.2), ("v2-mv", 1113.3),
     ("v2-1", 3050.8)],
)  # fmt: skip
def test_presets_have_the_released_numbers_of_parameters(preset, millions):
    assert round(model.num_params(PRESETS[preset]) / 1e6, 1) == millions


def test_the_baseline_is_of_equal_size():
    ours, baseline = (model.num_params(PRESETS[name]) for name in ("tiny", "tiny-cross"))
    assert abs(baseline / ours - 1) < 0.03


def test_the_network_is_the_equations():
    params, (x, t, cond, guidance) = random_params(SMALL), inputs(SMALL)
    got = apply(SMALL, params, x, t, cond, guidance)
    for b in range(2):
        want = double_stream(SMALL, params, x[b], t[b], cond[b], guidance[b])
        assert np.abs(want).max() > 0.5
        np.testing.assert_allclose(got[b], want, atol=3e-5)


def test_the_embedding_of_time_has_period_1000_and_a_thousandfold_time():
    t = np.asarray([0.0, 0.25, 1.0], np.float32)
    got = layers.sinusoids(1000 * t, 256, model.MAX_PERIOD)
    i = np.arange(128)
    angles = 1000.0 * t[:, None].astype(np.float64) * 1000.0 ** (-i / 128)
    np.testing.assert_allclose(got, np.concatenate([np.cos(angles), np.sin(angles)], 1), atol=2e-4)
    assert model.MAX_PERIOD == 1000 and model.TIME_SCALE == 1000 and model.TIME_SIZE == 256


@pytest.mark.parametrize("config", [SMALL, CROSS], ids=["double_stream", "cross_attention"])
def test_latents_and_conditions_are_sets(config):
    params, (x, t, cond, guidance) = random_params(config), inputs(config)
    run = jax.jit(model.build(config).apply)
    plain = np.asarray(run({"params": params}, x, t, cond, guidance))
    order, other = np.random.default_rng(1).permutation(7), np.random.default_rng(2).permutation(5)
    size = np.abs(plain).max()
    moved = np.asarray(run({"params": params}, x[:, order], t, cond, guidance))
    np.testing.assert_allclose(moved, plain[:, order], atol=2e-6 * size)
    np.testing.assert_allclose(
        run({"params": params}, x, t, cond[:, other], guidance), plain, atol=2e-6 * size
    )
    changed = np.asarray(run({"params": params}, x, t, cond[::-1], guidance))
    assert np.abs(changed - plain).max() > 1e-2 * size  # it does look at its condition


def test_positions_are_an_option_that_breaks_the_symmetry():
    config = dataclasses.replace(SMALL, positions="sincos", depth=1, single_depth=0)
    params, (x, t, cond, guidance) = random_params(config), inputs(config)
    run = jax.jit(model.build(config).apply)
    plain = np.asarray(run({"params": params}, x, t, cond, guidance))
    moved = np.asarray(run({"params": params}, x[:, ::-1], t, cond, guidance))
    assert np.abs(moved - plain[:, ::-1]).max() > 1e-2


def test_unrolled_and_looped_blocks_are_one_function():
    params, args = random_params(SMALL), inputs(SMALL)
    unrolled = apply(dataclasses.replace(SMALL, scan_blocks=False), params, *args)
    np.testing.assert_allclose(
        unrolled, apply(SMALL, params, *args), atol=2e-6 * np.abs(unrolled).max()
    )


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_what_is_computed_again_changes_no_gradient(remat):
    config = dataclasses.replace(SMALL, depth=1, single_depth=2)
    params, args = random_params(config), inputs(config)

    def gradients(config):
        def loss(params):
            return jnp.sum(jnp.square(model.build(config).apply({"params": params}, *args)))

        return jax.jit(jax.grad(loss))(params)

    plain, again = gradients(config), gradients(dataclasses.replace(config, remat=remat))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-4 * max(1.0, float(np.abs(a).max())))


def test_queries_in_chunks_attend_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, 4, 8)).astype(np.float32) for n in (37, 23, 23))
    whole = layers.attention(q, k, v)
    monkeypatch.setattr(layers, "_LOGITS_BYTES", 2 * 4 * 23 * 4 * 5)  # five queries
    np.testing.assert_allclose(layers.attention(q, k, v), whole, atol=1e-6)


def test_memory_of_attention_is_bounded(monkeypatch):
    q, k = jnp.zeros((2, 500, 4, 8)), jnp.zeros((2, 300, 4, 8))
    scores = 2 * 500 * 4 * 300 * 4
    assert largest_array(layers.attention, q, k, k) == scores
    monkeypatch.setattr(layers, "_LOGITS_BYTES", scores // 7)
    assert largest_array(layers.attention, q, k, k) < scores // 6


def test_what_half_precision_would_spoil_is_float32():
    """§8.7: embeddings of time and guidance, norms, softmax. Half precision cannot tell 750.0 from 750.1."""
    params, (x, _, cond, _) = random_params(SMALL), inputs(SMALL)
    t, guidance = jnp.full(2, 0.75), jnp.full(2, 5.0)

    def velocity(dtype):
        network = model.build(dataclasses.replace(SMALL, dtype=dtype))
        return lambda t, guidance: network.apply({"params": params}, x, t, cond, guidance)

    for dtype in ("float16", "bfloat16"):
        assert half_precision(velocity(dtype), t, guidance) == set()
    run = jax.jit(velocity("bfloat16"))
    plain = run(t, guidance)
    assert (run(t + 1e-4, guidance) != plain).any() and (run(t, guidance + 1e-4) != plain).any()


def test_half_precision_is_close_and_the_output_is_float32():
    params, args = random_params(SMALL), inputs(SMALL)
    exact = apply(SMALL, params, *args)
    half = apply(dataclasses.replace(SMALL, dtype="bfloat16"), params, *args)
    assert half.dtype == np.float32
    assert 1e-4 < np.abs(half - exact).max() < 0.1 * np.abs(exact).max()


def test_a_new_model_predicts_nothing_and_its_blocks_pass_their_input_on():
    config = dataclasses.replace(SMALL, depth=1, single_depth=1)
    args = inputs(config)
    params = jax.jit(model.build(config).init)(jax.random.key(0), *args)["params"]
    assert not np.any(apply(config, params, *args))
    # With a last layer that is not zero: what comes out is the latents' projection alone.
    params["final"]["linear"]["kernel"] = jnp.eye(32, 6)
    latent = args[0] @ np.asarray(params["latent_in"]["kernel"], np.float64)
    want = (latent - latent.mean(-1, keepdims=True)) / np.sqrt(latent.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(apply(config, params, *args), want[..., :6], atol=1e-5)


def test_the_experts_are_the_sum_over_the_chosen_ones():
    rng = np.random.default_rng(0)
    config = dataclasses.replace(CROSS, experts_per_token=2)
    params = random_params(config)["blocks_4"]["moe"]
    x = rng.normal(size=(2, 9, 32)).astype(np.float32)
    got = np.asarray(jax.jit(cross.MoE(config).apply)({"params": params}, x))

    erf = np.vectorize(math.erf)
    gelu = lambda y: 0.5 * y * (1 + erf(y / math.sqrt(2)))  # noqa: E731
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def mlp(up, up_bias, down, down_bias, y):
        return gelu(y @ up + up_bias) @ down + down_bias

    for b, s in np.ndindex(2, 9):
        y = x[b, s].astype(np.float64)
        logits = y @ p["gate"]["kernel"]
        probs = np.exp(logits) / np.exp(logits).sum()
        shared = p["shared"]
        want = mlp(
            shared["in"]["kernel"],
            shared["in"]["bias"],
            shared["out"]["kernel"],
            shared["out"]["bias"],
            y,
        )
        for e in np.argsort(probs)[-2:]:
            arrays = (p[name][e] for name in ("up_kernel", "up_bias", "down_kernel", "down_bias"))
            want = want + probs[e] * mlp(*arrays, y)
        np.testing.assert_allclose(got[b, s], want, atol=2e-5)


def test_wrong_inputs_are_refused():
    net, params, (x, t, cond, guidance) = model.build(SMALL), model.shapes(SMALL), inputs(SMALL)

    def run(*args):
        jax.eval_shape(lambda p: net.apply({"params": p}, *args), params)

    with pytest.raises(ValueError, match=r"latents must be \[B, L, 6\]"):
        run(x[..., :5], t, cond, guidance)
    with pytest.raises(ValueError, match="another image tower"):
        run(x, t, cond[..., :9], guidance)
    with pytest.raises(ValueError, match="guidance must be"):
        run(x, t, cond)
    with pytest.raises(ValueError, match=r"times must be \[2\]"):
        run(x, t[:1], cond, guidance)
    with pytest.raises(ValueError, match="even multiple"):
        dataclasses.replace(SMALL, hidden_size=30)
    with pytest.raises(ValueError, match="needs architecture"):
        dataclasses.replace(SMALL, moe_depth=1)
