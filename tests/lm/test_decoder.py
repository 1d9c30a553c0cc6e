"""The decoder against its equations in float64 NumPy, and its ways of running against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.lm.attention import Cache, segment_positions
from research.lm.config import DecoderConfig, Llama3Scaling
from research.lm.decoder import Decoder, head_kernel, unstack
from research.lm.layers import rope_frequencies

TINY = DecoderConfig(
    vocab_size=19,
    hidden_size=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_size=20,
    rope_theta=100.0,
    init_std=0.3,
)
KINDS = {
    "llama": dataclasses.replace(
        TINY, rope_scaling=Llama3Scaling(factor=4.0, original_max_position=32)
    ),
    "qwen2": dataclasses.replace(TINY, qkv_bias=True, tie_embeddings=True),
    "qwen3": dataclasses.replace(TINY, qk_norm=True),
}


def init(config, seed=0):
    params = Decoder(config).init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    noise = lambda x: x + 0.3 * np.random.default_rng(x.size).normal(size=x.shape)  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(noise(x), x.dtype), params)  # no scale 1, no bias 0


def tokens(B=2, T=9, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, TINY.vocab_size, size=(B, T)))


def apply(config, params, *args, **kwargs):
    return jax.jit(lambda p: Decoder(config).apply({"params": p}, *args, **kwargs))(params)


def oracle(params, config, row):
    """Logits [T, V] of one row of tokens, one position and one head at a time, in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    K, G = config.head_dim, config.group_size
    frequencies = config.rope_theta ** (-2.0 * np.arange(K // 2) / K)
    if s := config.rope_scaling:
        for j, f in enumerate(frequencies):
            wavelength = 2 * np.pi / f
            low, high = (
                s.original_max_position / s.low_freq_factor,
                s.original_max_position / s.high_freq_factor,
            )
            if wavelength > low:
                frequencies[j] = f / s.factor
            elif wavelength >= high:
                ratio = s.original_max_position / wavelength - s.low_freq_factor
                mix = ratio / (s.high_freq_factor - s.low_freq_factor)
                frequencies[j] = (1 - mix) * f / s.factor + mix * f

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * scale

    def turn(x, position):
        z = (x[: K // 2] + 1j * x[K // 2 :]) * np.exp(1j * position * frequencies)
        return np.concatenate([z.real, z.imag])

    x = p["embed"]["embedding"][row]
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda a: a[i], p["layers"])  # noqa: B023
        y = norm(x, layer["attn_norm"]["scale"])
        out = np.zeros_like(x)
        for n in range(config.num_kv_heads):
            heads = np.einsum("td,dhk->thk", y, layer["attn"]["qkv"]["kernel"][:, n])
            if config.qkv_bias:
                heads += layer["attn"]["qkv"]["bias"][n]
            q, k, v = heads[:, :G], heads[:, G], heads[:, G + 1]
            if config.qk_norm:
                q = norm(q, layer["attn"]["q_norm"]["scale"])
                k = norm(k, layer["attn"]["k_norm"]["scale"])
            k = np.stack([turn(k[t], t) for t in range(len(row))])
            for g in range(G):
                for t in range(len(row)):
                    scores = k[: t + 1] @ turn(q[t, g], t) / np.sqrt(K)
                    weights = np.exp(scores - scores.max())
                    head = weights / weights.sum() @ v[: t + 1]
                    out[t] += head @ layer["attn"]["o"]["kernel"][n, g]
        x = x + out
        y = norm(x, layer["mlp_norm"]["scale"])
        gate = y @ layer["mlp"]["gate"]["kernel"]
        up = y @ layer["mlp"]["up"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down"]["kernel"]
    x = norm(x, p["final_norm"]["scale"])
    return x @ (p["embed"]["embedding"].T if config.tie_embeddings else p["head"]["kernel"])


@pytest.mark.parametrize("kind", list(KINDS))
def test_logits_equal_the_equations(kind):
    config, batch = KINDS[kind], tokens()
    params = init(config)
    logits = apply(config, params, batch)
    assert logits.dtype == jnp.float32
    for row, got in zip(np.asarray(batch), logits, strict=True):
        np.testing.assert_allclose(got, oracle(params, config, row), atol=2e-4, rtol=2e-4)


def test_llama3_frequencies_have_the_published_values():
    # DeepSeek-R1-Distill-Llama (head size 128, theta 5e5, factor 8, 1, 4, 8192): frequencies up to
    # 28 stay, from 35 on they are divided by 8, between they are blended.
    plain = rope_frequencies(128, 5e5, None)
    scaled = rope_frequencies(128, 5e5, Llama3Scaling())
    np.testing.assert_array_equal(scaled[:29], plain[:29])
    np.testing.assert_allclose(scaled[35:], plain[35:] / 8, rtol=1e-6)
    np.testing.assert_allclose(scaled[[29, 34]], [0.00216657, 0.000178508], rtol=3e-6)


def test_parameters_have_the_documented_shapes():
    shapes = jax.tree.map(jnp.shape, init(dataclasses.replace(TINY, qkv_bias=True, qk_norm=True)))
    L, D, N, G, K, F, V = 2, 12, 2, 2, 6, 20, 19
    assert shapes == {
        "embed": {"embedding": (V, D)},
        "final_norm": {"scale": (D,)},
        "head": {"kernel": (D, V)},
        "layers": {
            "attn_norm": {"scale": (L, D)},
            "mlp_norm": {"scale": (L, D)},
            "attn": {
                "qkv": {"kernel": (L, D, N, G + 2, K), "bias": (L, N, G + 2, K)},
                "q_norm": {"scale": (L, K)},
                "k_norm": {"scale": (L, K)},
                "o": {"kernel": (L, N, G, K, D)},
            },
            "mlp": {
                "gate": {"kernel": (L, D, F)},
                "up": {"kernel": (L, D, F)},
                "down": {"kernel": (L, F, D)},
            },
        },
    }


def test_layers_start_different_from_each_other():
    params = Decoder(TINY).init(jax.random.key(0), tokens())["params"]
    kernel = params["layers"]["mlp"]["up"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])
    assert np.std(kernel) == pytest.approx(TINY.init_std, rel=0.2)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_every_way_to_run_the_stack_gives_the_same_gradients(scan_layers, remat):
    params, batch = init(TINY), tokens()
    config = dataclasses.replace(TINY, scan_layers=scan_layers, remat=remat)

    def gradients(config):
        loss = lambda p: jnp.square(Decoder(config).apply({"params": p}, batch)).mean()  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    for got, want in zip(
        jax.tree.leaves(gradients(config)), jax.tree.leaves(gradients(TINY)), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)


def test_packed_segments_do_not_see_each_other():
    params, batch = init(TINY), tokens(B=1)
    segment_ids = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]])
    packed = apply(TINY, params, batch, segment_ids=segment_ids)
    for start, stop in ((0, 3), (3, 7)):
        alone = apply(TINY, params, batch[:, start:stop])
        np.testing.assert_allclose(packed[:, start:stop], alone, atol=1e-5)
    np.testing.assert_array_equal(segment_positions(segment_ids)[0], [0, 1, 2, 0, 1, 2, 3, 0, 1])


def test_cached_decoding_equals_the_full_forward_as_the_ring_wraps():
    """A second sequence takes over a full ring: the first one's keys must be forgotten."""
    config, S = KINDS["qwen2"], 8
    params, batch = init(config), tokens(B=2, T=13)
    full = apply(config, params, batch)
    step = jax.jit(
        lambda p, t, pos, cache: Decoder(config).apply({"params": p}, t, pos, cache=cache)
    )
    layers = unstack(params, config)
    logits, cache = step(layers, batch[:1, :2], jnp.arange(2)[None], Cache.empty(config, 1, S))
    np.testing.assert_allclose(logits, full[:1, :2], atol=1e-5)
    for t in range(2, 8):
        logits, cache = step(layers, batch[:1, t : t + 1], jnp.full((1, 1), t), cache)
        np.testing.assert_allclose(logits[:, 0], full[:1, t], atol=1e-5)
    cache = cache.replace(positions=jnp.full_like(cache.positions, -1))  # forget: slots 0..7 stale
    for t in range(8):
        logits, cache = step(layers, batch[1:, t : t + 1], jnp.full((1, 1), t), cache)
        np.testing.assert_allclose(logits[:, 0], full[1:, t], atol=1e-5)
    assert cache.index == 16
    windowed, _ = step(layers, batch[1:, 8:9], jnp.full((1, 1), 8), cache)
    assert not np.allclose(windowed[:, 0], full[1:, 8], atol=1e-4)  # the ring forgot token 0


def test_padding_is_never_attended_to():
    params, batch = init(TINY), tokens(B=1, T=5)
    padded = jnp.concatenate([jnp.full((1, 3), 7), batch], axis=1)
    positions = jnp.array([[-1, -1, -1, 0, 1, 2, 3, 4]])
    logits, _ = apply(TINY, params, padded, positions, cache=Cache.empty(TINY, 1, 8))
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[:, 3:], apply(TINY, params, batch), atol=1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_hidden_states_times_the_head_are_the_logits(kind):
    config, batch = KINDS[kind], tokens()
    params = init(config)
    hidden = apply(config, params, batch, return_hidden=True)
    logits = apply(config, params, batch)
    np.testing.assert_allclose(hidden @ head_kernel(params, config), logits, atol=1e-4)


def test_bfloat16_computes_in_bfloat16_and_returns_float32_logits():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    params = init(config)
    assert apply(config, params, tokens(), return_hidden=True).dtype == jnp.bfloat16
    logits = apply(config, params, tokens())
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, apply(TINY, params, tokens()), atol=0.5, rtol=0.1)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_kv_heads=3), "multiple of num_kv_heads"),
        (dict(head_dim=5), "head_dim must be even"),
        (dict(num_layers=0), "num_layers must be at least 1"),
        (dict(remat="some"), "remat"),
        (dict(kernels="triton"), "kernels must be 'auto'"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_wrong_calls_are_refused():
    params = init(TINY)
    short = dataclasses.replace(TINY, max_position=4)
    with pytest.raises(ValueError, match="max_position is 4"):
        apply(short, params, tokens())
    with pytest.raises(ValueError, match="cache needs positions"):
        apply(TINY, params, tokens(), cache=Cache.empty(TINY, 2, 16))
