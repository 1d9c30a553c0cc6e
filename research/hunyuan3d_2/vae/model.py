"""ShapeVAE: surface points -> a set of latent tokens -> a field, positive inside (section 3.1).

Modules and parameters are named as in the released checkpoints (see `checkpoint.py`), with the packed
projections head-major: `c_qkv` gives [head][q | k | v][channel], `c_kv` [head][k | v][channel].
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.hunyuan3d_2.geometry.fps import farthest_points
from research.hunyuan3d_2.vae.attention import attention
from research.hunyuan3d_2.vae.config import VAEConfig
from research.hunyuan3d_2.vae.fourier import fourier_features

EPS, POST_EPS = 1e-6, 1e-5  # of all norms, and of the two `ln_post`
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0
# How training starts is not published. Branches of the residual stream start small, and so does the posterior's noise:
# else there is nothing to be read in the latents before the noise is learned away.
_SMALL = nn.initializers.variance_scaling(0.1, "fan_in", "truncated_normal")
_START_LOGVAR = -5.0


class LayerNorm(nn.Module):
    """Over the last axis, in float32, in two passes; the result in `dtype`."""

    dtype: str
    eps: float = EPS

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x -= jnp.mean(x, axis=-1, keepdims=True)
        x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * scale + bias).astype(self.dtype)


class Mlp(nn.Module):
    width: int
    ratio: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.width * self.ratio, dtype=self.dtype, name="c_fc")(x)
        x = nn.gelu(x, approximate=False)
        return nn.Dense(self.width, kernel_init=_SMALL, dtype=self.dtype, name="c_proj")(x)


class SelfAttention(nn.Module):
    width: int
    heads: int
    dtype: str

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        B, T, D = x_BTD.shape
        qkv = nn.Dense(3 * D, use_bias=False, dtype=self.dtype, name="c_qkv")(x_BTD)
        q, k, v = jnp.split(qkv.reshape(B, T, self.heads, -1), 3, axis=-1)
        q, k = LayerNorm(self.dtype, name="q_norm")(q), LayerNorm(self.dtype, name="k_norm")(k)
        y = attention(q, k, v).reshape(B, T, D)
        return nn.Dense(D, kernel_init=_SMALL, dtype=self.dtype, name="c_proj")(y)


class SelfBlock(nn.Module):
    config: VAEConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dtype, width = self.config.dtype, self.config.width
        attend = SelfAttention(width, self.config.heads, dtype, name="attn")
        x_BTD += attend(LayerNorm(dtype, name="ln_1")(x_BTD))
        return x_BTD + Mlp(width, 4, dtype, name="mlp")(LayerNorm(dtype, name="ln_2")(x_BTD))


class Transformer(nn.Module):
    config: VAEConfig
    layers: int

    def setup(self):
        block = nn.remat(SelfBlock) if self.config.remat else SelfBlock
        self.resblocks = [block(self.config) for _ in range(self.layers)]

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        for block in self.resblocks:
            x_BTD = block(x_BTD)
        return x_BTD


class CrossAttention(nn.Module):
    width: int
    heads: int
    dtype: str
    normalized: bool  # queries and keys

    def setup(self):
        self.c_q = nn.Dense(self.width, use_bias=False, dtype=self.dtype)
        self.c_kv = nn.Dense(2 * self.width, use_bias=False, dtype=self.dtype)
        self.c_proj = nn.Dense(self.width, kernel_init=_SMALL, dtype=self.dtype)
        if self.normalized:
            self.q_norm, self.k_norm = LayerNorm(self.dtype), LayerNorm(self.dtype)

    def queries(self, x_BTD):
        q = self.c_q(x_BTD).reshape(*x_BTD.shape[:2], self.heads, -1)
        return self.q_norm(q) if self.normalized else q

    def keys_values(self, data_BSD):
        kv = self.c_kv(data_BSD).reshape(*data_BSD.shape[:2], self.heads, -1)
        k, v = jnp.split(kv, 2, axis=-1)
        return (self.k_norm(k) if self.normalized else k), v

    def __call__(self, x_BTD, k_BSHK, v_BSHK, keep_BS=None):
        y = attention(self.queries(x_BTD), k_BSHK, v_BSHK, keep_BS)
        return self.c_proj(y.reshape(x_BTD.shape))


class CrossBlock(nn.Module):
    """Queries read from data. The data's keys and values are computed apart, once for many queries."""

    width: int
    heads: int
    dtype: str
    mlp_ratio: int = 4
    normalized: bool = True

    def setup(self):
        self.attn = CrossAttention(self.width, self.heads, self.dtype, self.normalized)
        self.ln_1, self.ln_2, self.ln_3 = (LayerNorm(self.dtype) for _ in range(3))
        self.mlp = Mlp(self.width, self.mlp_ratio, self.dtype)

    def queries(self, x_BTD):
        return self.attn.queries(self.ln_1(x_BTD))

    def keys_values(self, data_BSD):
        return self.attn.keys_values(self.ln_2(data_BSD))

    def __call__(self, x_BTD, k_BSHK, v_BSHK, keep_BS=None):
        x_BTD += self.attn(self.ln_1(x_BTD), k_BSHK, v_BSHK, keep_BS)
        return x_BTD + self.mlp(self.ln_3(x_BTD))


class Encoder(nn.Module):
    config: VAEConfig

    def setup(self):
        config = self.config
        block = nn.remat(CrossBlock) if config.remat else CrossBlock
        self.input_proj = nn.Dense(config.width, dtype=config.dtype)
        if config.queries == "learned":
            shape = (config.num_tokens, config.width)
            self.query = self.param("query", nn.initializers.normal(0.02), shape)
        self.cross_attn = block(config.width, config.heads, config.dtype)
        self.self_attn = Transformer(config, config.encoder_layers)
        self.ln_post = LayerNorm(config.dtype, POST_EPS)

    def __call__(self, uniform_BM7, sharp_BN7, num_tokens):
        config = self.config
        surface_BS7 = jnp.concatenate([uniform_BM7, sharp_BN7], axis=1)
        if config.queries == "learned":
            x = self.query[:num_tokens].astype(config.dtype)
            x_BLD = jnp.broadcast_to(x, (len(surface_BS7), *x.shape))
        else:
            x_BLD = self._embed(select_queries(config, uniform_BM7, sharp_BN7, num_tokens))
        k, v = self.cross_attn.keys_values(self._embed(surface_BS7))
        return self.ln_post(self.self_attn(self.cross_attn(x_BLD, k, v)))

    def _embed(self, surface):
        features = [fourier_features(surface[..., :3], self.config.num_freqs), surface[..., 3:]]
        return self.input_proj(jnp.concatenate(features, axis=-1).astype(self.config.dtype))


def select_queries(config: VAEConfig, uniform_BM7, sharp_BN7, num_tokens: int) -> jax.Array:
    """The surface points that stand for the latent tokens, `[B, num_tokens, 7]`: each cloud's share.

    From the first downsample_ratio * n points of a cloud (a random subset, as its points are in random
    order), n are chosen by farthest point sampling, which starts at the first one. Raises ValueError for
    a cloud with fewer points.
    """
    chosen = []
    counts = config.query_counts(num_tokens)
    for name, cloud, count in zip(
        ("uniform", "sharp"), (uniform_BM7, sharp_BN7), counts, strict=True
    ):
        candidates = config.downsample_ratio * count
        if cloud.shape[1] < candidates:
            raise ValueError(
                f"{num_tokens} tokens need {candidates} {name} points ({count} queries x downsample_ratio="
                f"{config.downsample_ratio}), and the {name} cloud has {cloud.shape[1]}; give more "
                "points or ask for fewer tokens"
            )
        if count:
            cloud = cloud[:, :candidates]
            start_B = jnp.zeros(len(cloud), jnp.int32)
            indices_BK = farthest_points(cloud[..., :3], count, start_B)
            chosen.append(jnp.take_along_axis(cloud, indices_BK[..., None], axis=1))
    return jnp.concatenate(chosen, axis=1)


class FieldDecoder(nn.Module):
    """Reads the field at any point off the tokens: points do not see each other."""

    config: VAEConfig

    def setup(self):
        config = self.config
        block = nn.remat(CrossBlock) if config.remat else CrossBlock
        self.query_proj = nn.Dense(config.field_width, dtype=config.dtype)
        if config.field_downsample != 1:
            self.latents_proj = nn.Dense(config.field_width, dtype=config.dtype)
        self.cross_attn_decoder = block(
            config.field_width, config.field_heads, config.dtype,
            config.field_mlp_ratio, config.field_ln_post,
        )  # fmt: skip
        if config.field_ln_post:
            self.ln_post = LayerNorm(config.dtype, POST_EPS)
        self.output_proj = nn.Dense(1, dtype=config.dtype)

    def keys_values(self, tokens_BLD):
        if self.config.field_downsample != 1:
            tokens_BLD = self.latents_proj(tokens_BLD)
        return self.cross_attn_decoder.keys_values(tokens_BLD)

    def attention_queries(self, points_BQ3):
        return self.cross_attn_decoder.queries(self._embed(points_BQ3))

    def __call__(self, points_BQ3, k_BLHK, v_BLHK, keep_BL=None):
        x = self.cross_attn_decoder(self._embed(points_BQ3), k_BLHK, v_BLHK, keep_BL)
        x = self.ln_post(x) if self.config.field_ln_post else x
        return self.output_proj(x)[..., 0].astype(jnp.float32)

    def _embed(self, points_BQ3):
        features = fourier_features(points_BQ3, self.config.num_freqs)
        return self.query_proj(features.astype(self.config.dtype))


class ShapeVAE(nn.Module):
    """Use it by `model.apply({"params": params}, ..., method="encode")` and the like.

    A decoder alone, as most are released, has no parameters for `encode`, and needs none elsewhere.
    Any number of tokens up to the largest trained with is decoded; each compiles once.
    """

    config: VAEConfig

    def setup(self):
        config = self.config
        self.encoder = Encoder(config)
        self.pre_kl = nn.Dense(2 * config.latent_dim, bias_init=_posterior_bias, dtype=config.dtype)
        self.post_kl = nn.Dense(config.width, dtype=config.dtype)
        self.transformer = Transformer(config, config.decoder_layers)
        self.geo_decoder = FieldDecoder(config)

    def encode(
        self, uniform_BM7: jax.Array, sharp_BN7: jax.Array, num_tokens: int | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance of the posterior, float32 `[B, num_tokens, latent_dim]` each.

        Surface points are float32 (x, y, z, unit normal, sharp flag), in random order; N may be 0.
        `num_tokens` is the configuration's if left out. Raises ValueError for more than that, and for
        clouds too small for it.
        """
        num_tokens = num_tokens or self.config.num_tokens
        if num_tokens > self.config.num_tokens:
            raise ValueError(
                f"{num_tokens} tokens asked for; the model has at most {self.config.num_tokens}"
            )
        x_BLD = self.encoder(uniform_BM7, sharp_BN7, num_tokens)
        mean, logvar = jnp.split(self.pre_kl(x_BLD).astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, LOGVAR_MIN, LOGVAR_MAX)

    def decode(self, latents_BLd: jax.Array) -> jax.Array:
        """Latents of the posterior -> tokens `[B, L, width]` to query.

        What the diffusion model works on is scale_factor times as large: divide it first.
        """
        return self.transformer(self.post_kl(latents_BLd.astype(self.config.dtype)))

    def query(self, tokens_BLD: jax.Array, points_BQ3: jax.Array) -> jax.Array:
        """The field at points, float32 `[B, Q]`, positive inside."""
        return self.geo_decoder(points_BQ3, *self.geo_decoder.keys_values(tokens_BLD))

    def keys_values(self, tokens_BLD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What `query` reads of the tokens, `[B, L, H, K]` each: computed once for many points."""
        return self.geo_decoder.keys_values(tokens_BLD)

    def attention_queries(self, points_BQ3: jax.Array) -> jax.Array:
        """The vectors `[B, Q, H, K]` with which points look for tokens."""
        return self.geo_decoder.attention_queries(points_BQ3)

    def query_keys(self, points_BQ3, k_BLHK, v_BLHK, keep_BL=None) -> jax.Array:
        """`query` with given keys and values, of which some tokens may be left out."""
        return self.geo_decoder(points_BQ3, k_BLHK, v_BLHK, keep_BL)

    def __call__(self, uniform_BM7, sharp_BN7, points_BQ3, noise_BLd):
        """(field [B, Q], mean, logvar) with z = mean + exp(logvar / 2) noise; as many tokens as noise has."""
        mean, logvar = self.encode(uniform_BM7, sharp_BN7, noise_BLd.shape[1])
        tokens_BLD = self.decode(mean + jnp.exp(0.5 * logvar) * noise_BLd)
        return self.query(tokens_BLD, points_BQ3), mean, logvar


def _posterior_bias(key, shape, dtype=jnp.float32):
    del key
    return jnp.repeat(jnp.asarray([0.0, _START_LOGVAR], dtype), shape[0] // 2)


def init(config: VAEConfig, key: jax.Array):
    """Random parameters of the whole VAE (encoder and decoder), compiled."""
    model, zeros = ShapeVAE(config), jnp.zeros
    num_tokens = config.num_tokens if config.queries == "learned" else min(2, config.num_tokens)
    clouds = [
        zeros((1, max(1, config.downsample_ratio * n), 7)) for n in config.query_counts(num_tokens)
    ]
    noise = zeros((1, num_tokens, config.latent_dim))
    return jax.jit(model.init)(key, *clouds, zeros((1, 1, 3)), noise)["params"]
