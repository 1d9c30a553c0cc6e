"""The double- and single-stream transformer of Hunyuan3D 2.0 (section 3.2, figure 4), a velocity field on latents.

A block list is one stack: its parameters have a leading axis of its length N, whatever `scan_blocks` says.

    latent_in/{kernel [C, D], bias}   cond_in/{kernel [E, D], bias}
    {time_in,guidance_in}/{in_layer/kernel [256, D], out_layer/kernel [D, D]}
    double_blocks/{latent,cond}/ mod/kernel [N, D, 6 D]   qkv/kernel [N, D, 3 D]   {query,key}_norm/scale [N, K]
                                 proj/kernel [N, D, D]    mlp_in/kernel [N, D, F]  mlp_out/kernel [N, F, D]
    single_blocks/ mod/kernel [N, D, 3 D]   linear1/kernel [N, D, 3 D + F]   linear2/kernel [N, D + F, D]
                   {query,key}_norm/scale [N, K]
    final/{mod/kernel [D, 2 D], linear/kernel [D, C]}

and a bias for every kernel. qkv and the first 3 D of linear1 are laid out [q|k|v][head][K].
"""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.hunyuan3d_2.dit.config import DiTConfig
from research.hunyuan3d_2.dit.cross import CrossAttentionDiT
from research.hunyuan3d_2.dit.layers import (
    RMSNorm,
    attention,
    check_inputs,
    dense,
    layer_norm,
    sinusoids,
    stack,
    with_positions,
    zero_dense,
)

TIME_SIZE = 256
TIME_SCALE = 1000.0  # times are in [0, 1]; their angles are those of steps of a thousand
MAX_PERIOD = (
    1000.0  # of the sinusoids; 10 000 elsewhere, but the released weights were trained with this
)


def build(config: DiTConfig) -> nn.Module:
    """The model: apply({'params': …}, x_BLC, t_B, cond_BTE, guidance_B=None) → velocity [B, L, C], float32."""
    return (DoubleStreamDiT if config.architecture == "double_stream" else CrossAttentionDiT)(
        config
    )


def shapes(config: DiTConfig) -> dict:
    """The parameters of a model as ShapeDtypeStructs; none of them is made."""
    x_BLC = jax.ShapeDtypeStruct((1, 2, config.latent_dim), jnp.float32)
    cond_BTE = jax.ShapeDtypeStruct((1, 2, config.cond_dim), jnp.float32)
    one_B = jax.ShapeDtypeStruct((1,), jnp.float32)
    return jax.eval_shape(build(config).init, jax.random.key(0), x_BLC, one_B, cond_BTE, one_B)[
        "params"
    ]


def num_params(config: DiTConfig) -> int:
    """How many parameters a model has."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(config)))


class DoubleStreamDiT(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        x_BLC: jax.Array,
        t_B: jax.Array,
        cond_BTE: jax.Array,
        guidance_B: jax.Array | None = None,
    ) -> jax.Array:
        """The velocity dx/dt.

        Args:
          x_BLC: latents at time t, an unordered set.
          t_B: in [0, 1]; 0 is noise, 1 is data.
          cond_BTE: image tokens, an unordered set; zeros are 'no condition'.
          guidance_B: the raw guidance scale, for models with `guidance_embed`; else it is ignored.

        Returns:
          v_BLC, float32.

        Raises:
          ValueError: shapes that do not fit the model, or a guidance scale that is missing.
        """
        c = self.config
        check_inputs(c, x_BLC, t_B, cond_BTE, guidance_B)
        vec_BD = Embedder(c, name="time_in")(t_B)
        if c.guidance_embed:
            vec_BD += Embedder(c, name="guidance_in")(guidance_B)
        latent_BLD = with_positions(c, dense(c, c.hidden_size, "latent_in")(x_BLC))
        cond_BTD = dense(c, c.hidden_size, "cond_in")(cond_BTE)

        streams = (latent_BLD, cond_BTD)
        streams, _ = stack(DoubleBlock, c, c.depth, "double_blocks")(streams, vec_BD)
        latent_BLD, cond_BTD = streams
        joint_BSD = jnp.concatenate([cond_BTD, latent_BLD], axis=1)
        if c.single_depth:
            joint_BSD, _ = stack(SingleBlock, c, c.single_depth, "single_blocks")(joint_BSD, vec_BD)
        return Final(c, name="final")(joint_BSD[:, cond_BTE.shape[1] :], vec_BD)


class Embedder(nn.Module):
    """A scalar's sinusoids through an MLP, in float32: [B] → [B, D]."""

    config: DiTConfig

    @nn.compact
    def __call__(self, values_B: jax.Array) -> jax.Array:
        c = self.config
        h_BD = sinusoids(TIME_SCALE * values_B, TIME_SIZE, MAX_PERIOD)
        h_BD = nn.silu(dense(c, c.hidden_size, "in_layer", dtype="float32")(h_BD))
        return dense(c, c.hidden_size, "out_layer", dtype="float32")(h_BD)


class Modulation(NamedTuple):
    """What the time does to a residual branch: its input becomes (1 + scale) norm(x) + shift, its output times gate."""

    shift: jax.Array
    scale: jax.Array
    gate: jax.Array

    def into(self, x_BLD: jax.Array) -> jax.Array:
        """The branch's input, in x's type."""
        return ((1 + self.scale) * layer_norm(x_BLD) + self.shift).astype(x_BLD.dtype)

    def add(self, x_BLD: jax.Array, y_BLD: jax.Array) -> jax.Array:
        return x_BLD + self.gate.astype(x_BLD.dtype) * y_BLD


def modulations(linear: nn.Dense, vec_BD: jax.Array) -> list[Modulation]:
    """Linear(SiLU(vec)) in chunks [B, 1, D], by threes."""
    out = linear(nn.silu(vec_BD)).astype(jnp.float32)[:, None]
    chunks = jnp.split(out, out.shape[-1] // vec_BD.shape[-1], axis=-1)
    return [Modulation(*chunks[i : i + 3]) for i in range(0, len(chunks), 3)]


def split_heads(qkv: jax.Array, num_heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B, T, 3 D], laid out [q|k|v][head][K], as q, k, v [B, T, H, K]."""
    B, T, width = qkv.shape
    q, k, v = jnp.moveaxis(qkv.reshape(B, T, 3, num_heads, width // (3 * num_heads)), 2, 0)
    return q, k, v


class Stream(nn.Module):
    """One of the two streams of a double block: what comes before the joint attention, and what after."""

    config: DiTConfig

    def setup(self):
        c = self.config
        self.mod = zero_dense(c, 6 * c.hidden_size)
        self.qkv = dense(c, 3 * c.hidden_size, use_bias=c.qkv_bias)
        self.query_norm, self.key_norm = RMSNorm(), RMSNorm()
        self.proj = dense(c, c.hidden_size)
        self.mlp_in = dense(c, c.mlp_size)
        self.mlp_out = dense(c, c.hidden_size)

    def before(self, x_BTD, vec_BD):
        """((q, k, v) [B, T, H, K], the two modulations)."""
        mods = modulations(self.mod, vec_BD)
        q, k, v = split_heads(self.qkv(mods[0].into(x_BTD)), self.config.num_heads)
        return (self.query_norm(q), self.key_norm(k), v), mods

    def after(self, x_BTD, attended_BTHK, mods):
        x_BTD = mods[0].add(x_BTD, self.proj(attended_BTHK.reshape(x_BTD.shape)))
        return mods[1].add(x_BTD, self.mlp_out(nn.gelu(self.mlp_in(mods[1].into(x_BTD)))))


class DoubleBlock(nn.Module):
    """Two streams with weights of their own that attend jointly, the condition's tokens first."""

    config: DiTConfig

    @nn.compact
    def __call__(self, streams, vec_BD):
        latent_BLD, cond_BTD = streams
        latent = Stream(self.config, name="latent")
        cond = Stream(self.config, name="cond")
        latent_qkv, latent_mods = latent.before(latent_BLD, vec_BD)
        cond_qkv, cond_mods = cond.before(cond_BTD, vec_BD)
        joint = (jnp.concatenate(pair, axis=1) for pair in zip(cond_qkv, latent_qkv, strict=True))
        attended = attention(*joint)
        T = cond_BTD.shape[1]
        latent_BLD = latent.after(latent_BLD, attended[:, T:], latent_mods)
        cond_BTD = cond.after(cond_BTD, attended[:, :T], cond_mods)
        return (latent_BLD, cond_BTD), None


class SingleBlock(nn.Module):
    """Attention and MLP side by side on all tokens (Dehghani et al. 2023, ViT-22B)."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x_BSD, vec_BD):
        c = self.config
        (mod,) = modulations(zero_dense(c, 3 * c.hidden_size, "mod"), vec_BD)
        h = dense(c, 3 * c.hidden_size + c.mlp_size, "linear1")(mod.into(x_BSD))
        q, k, v = split_heads(h[..., : 3 * c.hidden_size], c.num_heads)
        q, k = RMSNorm(name="query_norm")(q), RMSNorm(name="key_norm")(k)
        attended = attention(q, k, v).reshape(x_BSD.shape)
        h = jnp.concatenate([attended, nn.gelu(h[..., 3 * c.hidden_size :])], axis=-1)
        return mod.add(x_BSD, dense(c, c.hidden_size, "linear2")(h)), None


class Final(nn.Module):
    """(1 + scale) norm(x) + shift, then a linear layer to the latent channels; its chunks are shift, scale."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x_BLD, vec_BD):
        c = self.config
        out_B1D = zero_dense(c, 2 * c.hidden_size, "mod")(nn.silu(vec_BD)).astype(jnp.float32)[
            :, None
        ]
        shift_B1D, scale_B1D = jnp.split(out_B1D, 2, axis=-1)
        x_BLD = (1 + scale_B1D) * layer_norm(x_BLD) + shift_B1D
        return zero_dense(c, c.latent_dim, "linear")(x_BLD).astype(jnp.float32)
