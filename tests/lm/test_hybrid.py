"""Hybrids of lightning and softmax attention with experts: against the equations in float64, and themselves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.lm.attention import Cache
from research.lm.config import DecoderConfig, LightningConfig, MoEConfig, Residual
from research.lm.decoder import Decoder, unstack
from research.lm.layers import rope_angles
from research.lm.lightning import slopes
from research.lm.logprobs import token_logprobs
from research.lm.sampler import Sampler, Sampling

TINY = DecoderConfig(
    vocab_size=19,
    hidden_size=12,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_size=10,
    mixers=("lightning", "softmax"),
    moe=MoEConfig(num_experts=3, top_k=2),
    residual=Residual(True, (1.7, 0.9), (1.6, 1.1), (1.5, 0.8)),
    rotary_dim=4,
    rope_theta=100.0,
    norm_eps=1e-5,
    init_std=0.3,
)
KINDS = {
    "hybrid": TINY,
    "3:1": dataclasses.replace(
        TINY, mixers=("lightning",) * 3 + ("softmax",), residual=Residual.deepnorm(4)
    ),
    "softmax first": dataclasses.replace(TINY, num_layers=3, mixers=("softmax", "lightning", "lightning")),
    "lightning": dataclasses.replace(
        TINY, num_layers=2, mixers=("lightning",), moe=None, residual=Residual(), tie_embeddings=True
    ),
    "three heads, native": dataclasses.replace(
        TINY, num_heads=3, num_kv_heads=3, lightning=LightningConfig(slopes="native"), moe=None
    ),
}


@functools.cache
def init(config, seed=0):
    params = Decoder(config).init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    noise = lambda x: x + 0.3 * np.random.default_rng(x.size).normal(size=x.shape)  # noqa: E731
    return jax.tree.map(lambda x: jnp.asarray(noise(x), x.dtype), params)  # no scale 1


def tokens(B=2, T=9, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, TINY.vocab_size, size=(B, T)))


def apply(config, params, *args, **kwargs):
    return jax.jit(lambda p: Decoder(config).apply({"params": p}, *args, **kwargs))(params)


def oracle(params, config, row):
    """Logits [T, V] of one row of tokens in float64: MiniMax-01's equations, one layer and head at a time."""
    c, p = config, jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    H, G, K, R, T = c.num_heads, c.group_size, c.head_dim, c.rotary_dim, len(row)
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731

    def norm(x, scale, eps=c.norm_eps):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale

    def turn(x, t):
        angles = t * c.rope_theta ** (-2.0 * np.arange(R // 2) / R)
        z = (x[: R // 2] + 1j * x[R // 2 : R]) * np.exp(1j * angles)
        return np.concatenate([z.real, z.imag, x[R:]])

    def softmax(u, w):
        out = np.zeros_like(u)
        for h in range(H):
            qkv = np.einsum("td,dsk->stk", u, w["qkv"]["kernel"][:, h // G])
            q, k, v = qkv[h % G], qkv[G], qkv[G + 1]
            k = np.stack([turn(k[t], t) for t in range(T)])
            for t in range(T):
                e = np.exp(k[: t + 1] @ turn(q[t], t) / np.sqrt(K))
                out[t] += e / e.sum() @ v[: t + 1] @ w["o"]["kernel"][h // G, h % G]
        return out

    def lightning(u, w, decay):
        out = np.zeros((T, H, K))
        for h in range(H):
            q, k, v = (silu(u @ w["qkv"]["kernel"][:, h, i]) for i in range(3))
            state = np.zeros((K, K))
            for t in range(T):
                state = np.exp(-decay[h]) * state + np.outer(k[t], v[t])
                out[t, h] = q[t] @ state
        out = norm(out.reshape(T, -1), w["norm"]["scale"].ravel(), c.lightning.norm_eps)
        gate = sigmoid(u @ w["gate"]["kernel"].reshape(len(u[0]), -1))
        return (gate * out) @ w["o"]["kernel"].reshape(H * K, -1)

    def mlp(u, w):
        return silu(u @ w["gate"]["kernel"]) * (u @ w["up"]["kernel"]) @ w["down"]["kernel"]

    def experts(u, w):
        out = np.zeros_like(u)
        for t in range(T):
            logits = u[t] @ w["router"]["kernel"]
            best = np.argsort(-logits, kind="stable")[: c.moe.top_k]
            weights = np.exp(logits[best]) / np.exp(logits[best]).sum()  # eq. 1
            for e, weight in zip(best, weights, strict=True):
                one = {name: {"kernel": w[name]["kernel"][e]} for name in ("gate", "up", "down")}
                out[t] += weight * mlp(u[t], one)
        return out

    def decay(layer):
        if c.num_layers == 1:
            return 2.0 ** (-8 * np.arange(1, H + 1) / H)
        return 2.0 ** (-8 * np.arange(1, H + 1) / H) * (1 - layer / (c.num_layers - 1) + 1e-5)

    x, seen = p["embed"]["embedding"][row], {"softmax": 0, "lightning": 0}
    for i, mixer in enumerate(c.layer_mixers):
        name = {"softmax": "attn", "lightning": "lightning"}[mixer]
        own = jax.tree.map(lambda a: a[seen[mixer]], p["layers"][name])  # noqa: B023
        layer = jax.tree.map(
            lambda a: a[i],  # noqa: B023
            {k: v for k, v in p["layers"].items() if k not in ("attn", "lightning")},
        )
        seen[mixer] += 1
        u = norm(x, layer["attn_norm"]["scale"])
        y = softmax(u, own) if mixer == "softmax" else lightning(u, own, decay(i))
        alpha, beta = getattr(c.residual, mixer)
        x = alpha * (u if c.residual.post_norm else x) + beta * y
        u = norm(x, layer["mlp_norm"]["scale"])
        y = mlp(u, layer["mlp"]) if c.moe is None else experts(u, layer["moe"])
        alpha, beta = c.residual.mlp
        x = alpha * (u if c.residual.post_norm else x) + beta * y
    x = norm(x, p["final_norm"]["scale"])
    return x @ (p["embed"]["embedding"].T if c.tie_embeddings else p["head"]["kernel"])


@pytest.mark.parametrize(
    "kind, scan", [*((kind, False) for kind in KINDS), ("hybrid", True), ("softmax first", True)]
)
def test_logits_equal_the_equations(kind, scan):
    config, batch = dataclasses.replace(KINDS[kind], scan_layers=scan), tokens()
    params = init(config)
    logits = apply(config, params, batch)
    assert logits.dtype == jnp.float32
    for row, got in zip(np.asarray(batch), logits, strict=True):
        want = oracle(params, config, row)
        np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())


def test_gradients_agree_however_layers_are_run():
    params, batch = init(TINY), tokens()

    def gradient(**how):
        model = Decoder(dataclasses.replace(TINY, **how))
        loss = lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, batch)))  # noqa: E731
        return jax.tree.leaves(jax.jit(jax.grad(loss))(params))

    plain = gradient(scan_layers=False)
    scanned, unrolled = dict(scan_layers=True, remat="dots"), dict(scan_layers=False, remat="full")
    for how in (scanned, unrolled, dict(scan_layers=False, kernels="reference")):
        for x, y in zip(plain, gradient(**how), strict=True):
            np.testing.assert_allclose(x, y, atol=5e-5 * max(1.0, float(jnp.abs(x).max())))


def test_kernels_that_this_machine_cannot_run_are_refused():
    with pytest.raises(ValueError, match="no TPU or GPU"):
        apply(dataclasses.replace(TINY, kernels="pallas"), init(TINY), tokens())


@pytest.mark.parametrize("kind", list(KINDS))
def test_packed_segments_equal_rows_of_their_own(kind):
    """Lightning state, softmax mask, positions and the router's padding are reset together."""
    config, row = KINDS[kind], tokens(1, 13)
    params = init(config)
    segments = jnp.asarray([[1] * 4 + [2] * 1 + [3] * 6 + [0] * 2])
    packed = apply(config, params, row, segment_ids=segments)
    for start, stop in ((0, 4), (4, 5), (5, 11)):
        want = oracle(params, config, np.asarray(row)[0, start:stop])
        np.testing.assert_allclose(packed[0, start:stop], want, atol=2e-4 * np.abs(want).max())


def decode_all(config, params, batch, chunks, pad=0, S=32):
    """Logits of all tokens, through the cache in chunks of these lengths, `pad` places of padding before them."""
    step = jax.jit(lambda p, *a, cache: Decoder(config).apply({"params": p}, *a, cache=cache))
    cache = Cache.empty(config, len(batch), S)
    batch = jnp.pad(batch, ((0, 0), (pad, 0)), constant_values=3)
    positions = jnp.maximum(jnp.arange(batch.shape[1]) - pad, -1)
    out, at, layers = [], 0, unstack(params, config)
    for n in chunks:
        here = jnp.broadcast_to(positions[at : at + n], (len(batch), n))
        logits, cache = step(layers, batch[:, at : at + n], here, cache=cache)
        out.append(logits)
        at += n
    assert at == batch.shape[1]
    return jnp.concatenate(out, 1)[:, pad:]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("chunks, pad", [((1,) * 9, 0), ((4, 4, 1), 0), ((7, 7), 5)])
def test_cached_chunks_equal_the_full_forward(kind, chunks, pad):
    config, batch = KINDS[kind], tokens()
    params = init(config)
    got = decode_all(config, params, batch, chunks, pad)
    for row, logits in zip(np.asarray(batch), got, strict=True):
        want = oracle(params, config, row)
        np.testing.assert_allclose(logits, want, atol=2e-4 * np.abs(want).max())


def test_padding_with_a_trace_would_be_seen():
    """The padded tokens of the test above are no zeros to the model: unmasked values would change what follows."""
    config, row = KINDS["lightning"], np.asarray(tokens(1))[0]
    params = init(config)
    unmasked = oracle(params, config, np.concatenate([[3, 3, 3], row]))[3:]
    assert np.abs(unmasked - oracle(params, config, row)).max() > 1e-2


@pytest.mark.parametrize("kind, mesh_devices", [("hybrid", 2), ("3:1", 1)])
def test_sampled_logprobs_are_the_scores_whoever_sat_in_the_slot_before(kind, mesh_devices):
    config = dataclasses.replace(KINDS[kind], max_position=64)
    params, model = init(config), Decoder(config)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 19, size=n) for n in (3, 17, 9, 1, 12)]
    mesh = jax.make_mesh((mesh_devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,),
                         devices=jax.devices()[:mesh_devices])  # fmt: skip
    sampler = Sampler(model, slots=4, max_prompt=20, max_new_tokens=12, mesh=mesh, block=5)
    sampling = Sampling(12, stop_ids=(4,))
    out = sampler(params, prompts, jax.random.key(1), sampling, num_samples=3)
    score = jax.jit(lambda row: token_logprobs(model, params, row).logprobs_BT)
    assert len(set(out.lengths)) > 3  # slots were refilled at many moments
    for i, sequence in enumerate(out.sequences):
        prompt = prompts[i // 3]
        row = np.zeros((1, 32), np.int32)
        row[0, : len(prompt) + len(sequence)] = [*prompt, *sequence]
        want = score(row)[0, len(prompt) : len(prompt) + len(sequence)]
        np.testing.assert_allclose(out.logprobs[i, : len(sequence)], want, atol=1e-4)


def test_long_prompts_go_through_in_chunks(monkeypatch):
    from research.lm import slots

    config = dataclasses.replace(KINDS["hybrid"], max_position=64)
    params, prompt = init(config), np.asarray(tokens(1, 27))[0]

    def greedy():
        sampler = Sampler(config, slots=1, max_prompt=29, max_new_tokens=6)
        return sampler(params, [prompt, prompt[:7]], jax.random.key(0), Sampling(6, temperature=0.0))

    whole = greedy()
    monkeypatch.setattr(slots, "PREFILL_WHOLE", 16)
    monkeypatch.setattr(slots, "PREFILL_CHUNK", 4)
    chunked = greedy()
    np.testing.assert_array_equal(chunked.tokens, whole.tokens)
    np.testing.assert_allclose(chunked.logprobs, whole.logprobs, atol=1e-4)


def test_router_statistics_are_collected_for_every_layer():
    config = KINDS["3:1"]  # four layers, three experts
    segments = jnp.asarray([[1] * 5 + [0] * 4, [1] * 9])
    params = init(config)
    for scan in (True, False):
        model = Decoder(dataclasses.replace(config, scan_layers=scan))
        score = jax.jit(lambda p: token_logprobs(model, p, tokens(), segment_ids=segments))  # noqa: B023
        stats = score(params).router
        np.testing.assert_array_equal(stats.tokens, np.full(4, 14.0))  # padding does not count
        assert stats.load_E.shape == (4, 3)
        np.testing.assert_array_equal(stats.load_E.sum(1), np.full(4, 28.0))
    dense = Decoder(KINDS["lightning"])
    shapes = jax.eval_shape(lambda p: token_logprobs(dense, p, tokens()), init(KINDS["lightning"]))
    assert shapes.router is None


def test_capacity_drops_in_training_but_not_with_a_cache():
    free = KINDS["hybrid"]
    tight = dataclasses.replace(free, moe=dataclasses.replace(free.moe, capacity_factor=0.5))
    params, batch = init(free), tokens(2, 9)
    whole = apply(free, params, batch)
    assert np.abs(apply(tight, params, batch) - whole).max() > 1e-3
    np.testing.assert_allclose(decode_all(tight, params, batch, (9,)), whole, atol=2e-4)


def test_a_bfloat16_model_remembers_in_float32():
    config = dataclasses.replace(KINDS["hybrid"], dtype="bfloat16")
    cache = Cache.empty(config, 2, 16)
    positions = jnp.broadcast_to(jnp.arange(3), (2, 3))
    _, after = jax.eval_shape(
        lambda p: Decoder(config).apply({"params": p}, tokens(2, 3), positions, cache=cache), init(TINY)
    )
    for memory in (*cache.layers[::2], *after.layers[::2]):
        assert memory.dtype == jnp.float32
    for k, v in (*cache.layers[1::2], *after.layers[1::2]):
        assert k.dtype == v.dtype == jnp.bfloat16


def test_far_positions_turn_exactly():
    """In float32 a position beyond 2^24 is not even itself; its angle must still be right."""
    config = dataclasses.replace(TINY, head_dim=128, rotary_dim=64, rope_theta=1e7, max_position=2**25)
    far = np.array([[1_000_003, 2**24 + 1, 2**25 - 1]])
    cos, sin = rope_angles(jnp.asarray(far), config)
    angles = far[..., None] * 1e7 ** (-np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-6)
    rounded = np.float32(far)[..., None] * np.float32(1e7) ** (-np.arange(0, 64, 2, dtype=np.float32) / 64)
    assert np.abs(np.cos(rounded) - np.cos(angles)).max() > 0.1


def test_jitter_needs_its_random_stream():
    config = dataclasses.replace(TINY, moe=dataclasses.replace(TINY.moe, jitter=0.3))
    params, batch = init(TINY), tokens()
    plain = apply(TINY, params, batch)
    np.testing.assert_array_equal(apply(config, params, batch), plain)
    noisy = jax.jit(lambda key: Decoder(config).apply({"params": params}, batch, rngs={"router": key}))
    one, other = noisy(jax.random.key(0)), noisy(jax.random.key(1))
    assert np.abs(one - plain).max() > 1e-4 and np.abs(one - other).max() > 1e-4


def test_slopes_have_the_released_values():
    """MiniMax-Text-01: 64 heads, 80 layers. Largest and smallest slope of layers 0, 38, 70, 78 to three digits."""
    s = slopes(64, 80, "remote")
    for layer, high, low in ((0, 0.917, 3.91e-3), (38, 0.476, 2.03e-3), (70, 0.104, 4.45e-4), (78, 0.0116, 4.95e-5)):
        np.testing.assert_allclose(s[layer, [0, -1]], [high, low], rtol=6e-3)
    native = slopes(64, 80, "native")
    np.testing.assert_allclose(native[:79], s[:79], rtol=2e-5)
    assert abs(native[79, 0] / s[79, 0] - 1) > 1e-2
    # ALiBi for 12 heads: the slopes of 8 heads, then every second one of 16 (Press et al. 2022).
    twelve = slopes(12, 1, "remote")[0]
    np.testing.assert_allclose(twelve[:8], 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(twelve[8:], 2.0 ** -np.array([0.5, 1.5, 2.5, 3.5]))
    np.testing.assert_allclose(slopes(12, 1, "native")[0], 2.0 ** (-8 * np.arange(1, 13) / 12))


def test_deepnorm_initialisation_has_its_standard_deviations():
    config = DecoderConfig(
        vocab_size=50, hidden_size=96, num_layers=8, num_heads=8, num_kv_heads=2, head_dim=32, mlp_size=160,
        mixers=("lightning", "softmax"), moe=MoEConfig(num_experts=4), init="deepnorm",
    )  # fmt: skip
    layers = jax.jit(Decoder(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]["layers"]
    gain = (8 * 8) ** -0.25
    xavier = lambda a, b: (2 / (a + b)) ** 0.5  # noqa: E731
    lightning, attn, moe = layers["lightning"], layers["attn"], layers["moe"]
    expected = [
        (lightning["qkv"]["kernel"][..., :2, :], xavier(96, 256)),
        (lightning["qkv"]["kernel"][..., 2, :], gain * xavier(96, 256)),
        (lightning["gate"]["kernel"], xavier(96, 256)),
        (lightning["o"]["kernel"], gain * xavier(256, 96)),
        (attn["qkv"]["kernel"][..., :4, :], xavier(96, 256)),
        (attn["qkv"]["kernel"][..., 4, :], xavier(96, 64)),
        (attn["qkv"]["kernel"][..., 5, :], gain * xavier(96, 64)),
        (attn["o"]["kernel"], gain * xavier(256, 96)),
        (moe["router"]["kernel"], xavier(96, 4)),
        (moe["gate"]["kernel"], gain * xavier(96, 160)),
        (moe["down"]["kernel"], gain * xavier(160, 96)),
    ]
    for array, std in expected:
        assert abs(float(jnp.std(array)) / std - 1) < 0.1
    assert float(jnp.std(layers["lightning"]["qkv"]["kernel"].std(axis=(1, 2, 3, 4)))) < 0.01  # all layers alike


def test_layers_start_from_different_numbers():
    layers = Decoder(TINY).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]["layers"]
    for name, module in (("lightning", "qkv"), ("attn", "qkv"), ("moe", "gate")):
        a, b = layers[name][module]["kernel"][:2]
        assert float(jnp.abs(a - b).min()) > 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(mixers=("lightning", "softmax", "softmax")), "multiple of the 3 layers"),
        (dict(mixers=("linear",)), "pattern of 'softmax' and 'lightning'"),
        (dict(mixers=()), "pattern of 'softmax' and 'lightning'"),
        (dict(rotary_dim=3), "rotary_dim must be even"),
        (dict(rotary_dim=8), "must lie in 2..head_dim"),
        (dict(init="zeros"), "init must be"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **wrong)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(top_k=6, num_experts=5), "top_k=6 must lie between"),
        (dict(aux_form="none"), "aux_form must be"),
        (dict(capacity_factor=-1.0), "must not be negative"),
        (dict(jitter=1.0), r"lies in \[0, 1\)"),
    ],
)
def test_expert_settings_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**wrong)
