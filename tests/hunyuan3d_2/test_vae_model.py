"""The shape VAE's network: against the equations written out in NumPy, the sheet's counts, invariants."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import half_precision, largest_array
from scipy.special import erf

from research.hunyuan3d_2.vae import attention, checkpoint
from research.hunyuan3d_2.vae import model as vae_model
from research.hunyuan3d_2.vae.config import PRESETS
from research.hunyuan3d_2.vae.fourier import fourier_features
from research.hunyuan3d_2.vae.loss import field_target, kl_divergence, vae_loss
from research.hunyuan3d_2.vae.model import ShapeVAE

TINY = dataclasses.replace(
    PRESETS["tiny"], num_tokens=12, uniform_points=64, sharp_points=32, decoder_layers=1
)
TURBO = dataclasses.replace(
    TINY, heads=4, field_downsample=2, field_mlp_ratio=1, field_ln_post=False
)


def random_params(config, scale=1.0, seed=0):
    """Parameters none of which is at its initial 0 or 1, and clouds, points and noise."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        x = rng.standard_normal(leaf.shape)
        if path[-1].key == "kernel":
            return (scale * x / np.sqrt(leaf.shape[0])).astype(np.float32)
        return ((path[-1].key == "scale") + 0.3 * scale * x).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, checkpoint.shapes(config))
    clouds = [rng.standard_normal((2, n, 7)).astype(np.float32) for n in (70, 40)]
    points = rng.uniform(-1, 1, (2, 9, 3)).astype(np.float32)
    noise = rng.standard_normal((2, config.num_tokens, config.latent_dim)).astype(np.float32)
    return params, clouds, points, noise


class Numpy:
    """The equations in float64, on tensors under their released names (out x in, head-major)."""

    def __init__(self, config, params):
        self.c = config
        self.w = {name: x.astype(np.float64) for name, x in checkpoint.to_tensors(params).items()}

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def norm(self, name, x, eps=1e-6):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def mlp(self, name, x):
        x = self.linear(f"{name}.c_fc", x)
        return self.linear(f"{name}.c_proj", x * 0.5 * (1 + erf(x / np.sqrt(2))))

    def attend(self, name, q, k, v):
        """q, k, v: a list of [tokens, channels] for each head."""
        out = []
        for qh, kh, vh in zip(q, k, v, strict=True):
            if f"{name}.attention.q_norm.weight" in self.w:
                qh = self.norm(f"{name}.attention.q_norm", qh)
                kh = self.norm(f"{name}.attention.k_norm", kh)
            s = qh @ kh.T / np.sqrt(qh.shape[1])
            p = np.exp(s - s.max(1, keepdims=True))
            out.append(p / p.sum(1, keepdims=True) @ vh)
        return self.linear(f"{name}.c_proj", np.concatenate(out, 1))

    def heads(self, x, parts, count):
        """Rows are [head][part][channel]: part -> head -> [tokens, channels]."""
        size = x.shape[1] // (parts * count)
        at = lambda h, i: (h * parts + i) * size  # noqa: E731
        return [[x[:, at(h, i) : at(h, i) + size] for h in range(count)] for i in range(parts)]

    def block(self, name, x):
        qkv = self.linear(f"{name}.attn.c_qkv", self.norm(f"{name}.ln_1", x))
        x = x + self.attend(f"{name}.attn", *self.heads(qkv, 3, self.c.heads))
        return x + self.mlp(f"{name}.mlp", self.norm(f"{name}.ln_2", x))

    def cross(self, name, x, data, heads):
        q = self.linear(f"{name}.attn.c_q", self.norm(f"{name}.ln_1", x))
        kv = self.linear(f"{name}.attn.c_kv", self.norm(f"{name}.ln_2", data))
        x = x + self.attend(f"{name}.attn", *self.heads(q, 1, heads), *self.heads(kv, 2, heads))
        return x + self.mlp(f"{name}.mlp", self.norm(f"{name}.ln_3", x))

    def fourier(self, x):
        waves = [[f(x[:, d] * 2**k) for d in range(3) for k in range(self.c.num_freqs)]
                 for f in (np.sin, np.cos)]  # fmt: skip
        return np.stack([*x.T, *waves[0], *waves[1]], axis=1)

    def encode(self, clouds, counts):
        queries = []
        for cloud, count in zip(clouds, counts, strict=True):
            near = cloud[: self.c.downsample_ratio * count]
            chosen = [0]
            while len(chosen) < count:
                gaps = ((near[:, None, :3] - near[None, chosen, :3]) ** 2).sum(-1).min(1)
                chosen.append(int(gaps.argmax()))
            queries.append(near[chosen])

        def embed(rows):
            rows = rows.astype(np.float64)
            features = np.concatenate([self.fourier(rows[:, :3]), rows[:, 3:]], 1)
            return self.linear("encoder.input_proj", features)

        x = embed(np.concatenate(queries))
        x = self.cross("encoder.cross_attn", x, embed(np.concatenate(clouds)), self.c.heads)
        for i in range(self.c.encoder_layers):
            x = self.block(f"encoder.self_attn.resblocks.{i}", x)
        moments = self.linear("pre_kl", self.norm("encoder.ln_post", x, 1e-5))
        return np.split(moments, 2, axis=1)

    def field(self, z, points):
        x = self.linear("post_kl", z)
        for i in range(self.c.decoder_layers):
            x = self.block(f"transformer.resblocks.{i}", x)
        if self.c.field_downsample > 1:
            x = self.linear("geo_decoder.latents_proj", x)
        q = self.linear("geo_decoder.query_proj", self.fourier(points.astype(np.float64)))
        q = self.cross(
            "geo_decoder.cross_attn_decoder", q, x, self.c.heads // self.c.field_downsample
        )
        if self.c.field_ln_post:
            q = self.norm("geo_decoder.ln_post", q, 1e-5)
        return self.linear("geo_decoder.output_proj", q)[:, 0]


@jax.jit
def forward(params, clouds, points, noise):
    return ShapeVAE(TINY).apply({"params": params}, *clouds, points, noise)


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_it_computes_the_equations(scale):
    """With small weights the last norms divide by little more than their epsilons."""
    params, clouds, points, noise = random_params(TINY, scale)
    field, mean, logvar = forward(params, clouds, points, noise)
    by_hand = Numpy(TINY, params)
    for b in range(2):
        wanted_mean, wanted_logvar = by_hand.encode([cloud[b] for cloud in clouds], (8, 4))
        z = wanted_mean + np.exp(wanted_logvar / 2) * noise[b]
        for got, wanted in (
            (mean[b], wanted_mean), (logvar[b], wanted_logvar), (field[b], by_hand.field(z, points[b])),
        ):  # fmt: skip
            np.testing.assert_allclose(
                got, wanted, atol=3e-5 * max(1, np.abs(wanted).max()) * scale
            )


def test_the_turbo_decoder_computes_the_equations():
    params, _, points, noise = random_params(TURBO)
    model = ShapeVAE(TURBO)

    @jax.jit
    def field(z):
        tokens = model.apply({"params": params}, z, method="decode")
        return model.apply({"params": params}, tokens, points, method="query")

    by_hand = Numpy(TURBO, params)
    wanted = np.stack([by_hand.field(z, p) for z, p in zip(noise, points, strict=True)])
    np.testing.assert_allclose(field(noise), wanted, atol=3e-5)
    # The latents are a set: tokens have no order.
    np.testing.assert_allclose(field(noise[:, ::-1]), wanted, atol=3e-5)


def test_positions_in_frequencies_without_pi():
    x = np.asarray([[0.3, -0.7]], np.float32)
    wanted = [0.3, -0.7]
    wanted += [np.sin(0.3), np.sin(0.6), np.sin(1.2), np.sin(-0.7), np.sin(-1.4), np.sin(-2.8)]
    wanted += [np.cos(0.3), np.cos(0.6), np.cos(1.2), np.cos(-0.7), np.cos(-1.4), np.cos(-2.8)]
    np.testing.assert_allclose(fourier_features(x, 3)[0], wanted, atol=1e-6)
    assert PRESETS["v2-0"].point_dim == 51 == fourier_features(jnp.zeros(3), 8).shape[0]


@pytest.mark.parametrize(
    ("name", "decoder", "whole"), [("v2-0", 214.2, 327.7), ("v2-0-turbo", 203.7, None)]
)
def test_released_sizes(name, decoder, whole):
    config = PRESETS[name]
    assert round(checkpoint.count_parameters(config, encoder=False) / 1e6, 1) == decoder
    if whole:
        shapes = checkpoint.shapes(config)
        assert round(checkpoint.count_parameters(config) / 1e6, 1) == whole
        assert round(sum(x.size for x in jax.tree.leaves(shapes["encoder"])) / 1e6, 1) == 113.4


def test_queries_are_spread_over_each_cloud_and_their_number_varies():
    rng = np.random.default_rng(0)
    uniform, sharp = (rng.standard_normal((2, n, 7)).astype(np.float32) for n in (64, 32))
    for total, counts in ((12, (8, 4)), (6, (4, 2)), (4, (3, 1))):
        assert TINY.query_counts(total) == counts
        chosen = np.asarray(vae_model.select_queries(TINY, uniform, sharp, total))
        assert chosen.shape == (2, total, 7)
        for b in range(2):
            for rows, cloud, count in ((chosen[b, : counts[0]], uniform[b], counts[0]),
                                       (chosen[b, counts[0] :], sharp[b], counts[1])):  # fmt: skip
                where = [int(np.flatnonzero((cloud == row).all(1))[0]) for row in rows]
                assert where[0] == 0 and len(set(where)) == count
                assert max(where) < TINY.downsample_ratio * count
    with pytest.raises(ValueError, match="32 uniform points.*has 31"):
        vae_model.select_queries(TINY, uniform[:, :31], sharp, 12)
    only_uniform = dataclasses.replace(TINY, sharp_points=0)
    chosen = vae_model.select_queries(only_uniform, uniform, sharp[:, :0], 12)
    assert chosen.shape == (2, 12, 7)
    with pytest.raises(ValueError, match="13 tokens.*at most 12"):
        ShapeVAE(TINY).apply({"params": {}}, uniform, sharp, 13, method="encode")


def test_log_variances_are_bounded_and_learned_queries_need_no_sampling():
    config = dataclasses.replace(TINY, queries="learned", encoder_layers=0)
    params, (uniform, sharp), *_ = random_params(config)
    bias = np.concatenate([np.zeros(8), np.repeat([500.0, -500.0], 4)]).astype(np.float32)
    params["pre_kl"]["bias"] = bias
    encode = jax.jit(
        lambda u, s: ShapeVAE(config).apply({"params": params}, u, s, 5, method="encode")
    )
    mean, logvar = encode(uniform, sharp)
    assert mean.shape == (2, 5, 8)
    np.testing.assert_array_equal(logvar, np.broadcast_to(np.repeat([20.0, -30.0], 4), (2, 5, 8)))
    again, _ = encode(uniform[:, ::-1], sharp[:, ::-1])  # points are a set
    np.testing.assert_allclose(again, mean, atol=1e-5)


def test_blocks_of_attention_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, t, 2, 4)).astype(np.float32) for t in (21, 13, 13))
    keep = rng.random((2, 13)) < 0.7
    scores = np.einsum("bthk,bshk->bhts", q, k, dtype=np.float64) / 2
    p = np.exp(np.where(keep[:, None, None], scores, -np.inf))
    wanted = np.einsum("bhts,bshk->bthk", p / p.sum(-1, keepdims=True), v)

    def loss(q, k, v):
        return jnp.sum(jnp.sin(attention.attention(q, k, v, keep)))

    monkeypatch.setitem(attention.SCORES, "cpu", 2**30)
    whole = jax.grad(loss, (0, 1, 2))(q, k, v)
    monkeypatch.setitem(attention.SCORES, "cpu", 1)  # blocks of 8 queries, and padding
    np.testing.assert_allclose(attention.attention(q, k, v, keep), wanted, atol=1e-6)
    for a, b in zip(jax.grad(loss, (0, 1, 2))(q, k, v), whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_memory_of_attention_is_bounded(monkeypatch):
    q, k = jnp.zeros((2, 500, 4, 8)), jnp.zeros((2, 300, 4, 8))
    scores = 2 * 500 * 4 * 300 * 4
    monkeypatch.setitem(attention.SCORES, "cpu", 2 * scores)
    assert largest_array(attention.attention, q, k, k) == scores
    monkeypatch.setitem(attention.SCORES, "cpu", scores // 7)
    assert largest_array(attention.attention, q, k, k) < scores // 6


def test_what_half_precision_would_spoil_is_float32():
    """§8.7: norms and softmax."""
    config = dataclasses.replace(TINY, dtype="bfloat16")
    params, clouds, points, noise = random_params(config)
    variables = {"params": params}
    assert half_precision(ShapeVAE(config).apply, variables, *clouds, points, noise) == set()


def test_the_loss():
    assert kl_divergence(jnp.zeros(()), jnp.zeros(())) == 0
    # KL(N(1, 2) || N(0, 1)) by the textbook
    assert kl_divergence(jnp.ones(()), jnp.log(2.0)) == pytest.approx(0.5 * (1 + 2 - 1 - np.log(2)))
    distance = np.asarray([[-1.0, -0.02, 0.0, 0.04, 0.2]], np.float32)
    np.testing.assert_allclose(field_target(distance, 0.05), [[-1, -0.4, 0, 0.8, 1]], atol=1e-6)
    loss, reconstruction, kl = vae_loss(
        np.zeros((1, 5), np.float32), distance, np.ones((1, 3, 2), np.float32),
        np.zeros((1, 3, 2), np.float32), kl_coef=0.1, truncation=0.05,
    )  # fmt: skip
    assert reconstruction == pytest.approx((1 + 0.16 + 0.64 + 1) / 5)
    assert kl == pytest.approx(0.5)
    assert loss == pytest.approx(0.56 + 0.05)
