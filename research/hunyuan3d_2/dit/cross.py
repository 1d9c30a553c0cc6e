"""A diffusion transformer that sees its condition by cross-attention: Hunyuan3D 2.1's, and a baseline for 2.0's.

The time is one token in front of the latents, and nothing else is modulated. The blocks differ (skips, experts), so
each has parameters of its own: blocks_0, blocks_1, …

    latent_in/kernel [C, D]   time_in/{in_layer/kernel [D, F], out_layer/kernel [F, D]}
    blocks_i/ norm{1,2,3}/{scale, bias} [D]   attn{1,2}/{to_q,to_k,to_v,out_proj}/kernel, {q,k}_norm/scale [K]
              mlp/{in,out}/kernel, or moe/{gate/kernel [D, X], up_kernel [X, D, F], up_bias [X, F],
              down_kernel [X, F, D], down_bias [X, D], shared/{in,out}/kernel}
              skip_linear/kernel [2 D, D], skip_norm/{scale, bias}     in the second half
    final/{norm/{scale, bias}, linear/kernel [D, C]}
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.hunyuan3d_2.dit.config import DiTConfig
from research.hunyuan3d_2.dit.layers import (
    EPS,
    RMSNorm,
    attention,
    check_inputs,
    dense,
    rematerialised,
    sinusoids,
    with_positions,
    zero_dense,
)

MAX_PERIOD = 10_000.0


class CrossAttentionDiT(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(
        self,
        x_BLC: jax.Array,
        t_B: jax.Array,
        cond_BTE: jax.Array,
        guidance_B: jax.Array | None = None,
    ) -> jax.Array:
        """The velocity dx/dt; arguments, result and errors as those of `model.DoubleStreamDiT`."""
        c = self.config
        check_inputs(c, x_BLC, t_B, cond_BTE, guidance_B)
        x_BLD = with_positions(c, dense(c, c.hidden_size, "latent_in")(x_BLC))
        time_B1D = Time(c, name="time_in")(t_B)[:, None].astype(x_BLD.dtype)
        x_BSD = jnp.concatenate([time_B1D, x_BLD], axis=1)
        cond_BTE = cond_BTE.astype(c.dtype)
        block, half, skips = rematerialised(Block, c), c.depth // 2, []
        for i in range(c.depth):
            experts = c.depth - i <= c.moe_depth
            x_BSD = block(c, experts, name=f"blocks_{i}")(
                x_BSD, cond_BTE, skips.pop() if i > half else None
            )
            if i < half:
                skips.append(x_BSD)
        return Final(c, name="final")(x_BSD[:, 1:])


class Time(nn.Module):
    """sin and cos of t in [0, 1], through an MLP, in float32: [B] → [B, D]."""

    config: DiTConfig

    @nn.compact
    def __call__(self, t_B: jax.Array) -> jax.Array:
        c = self.config
        cos, sin = jnp.split(sinusoids(t_B, c.hidden_size, MAX_PERIOD), 2, axis=-1)
        h = dense(c, 4 * c.hidden_size, "in_layer", dtype="float32")(
            jnp.concatenate([sin, cos], axis=-1)
        )
        return dense(c, c.hidden_size, "out_layer", dtype="float32")(nn.gelu(h, approximate=False))


class Block(nn.Module):
    """x + self-attention, + attention to the condition, + MLP or experts; pre-norm."""

    config: DiTConfig
    experts: bool

    @nn.compact
    def __call__(self, x_BSD, cond_BTE, skip_BSD):
        c = self.config
        if skip_BSD is not None:
            joined = jnp.concatenate([skip_BSD, x_BSD], axis=-1)
            x_BSD = _norm("skip_norm")(dense(c, c.hidden_size, "skip_linear")(joined)).astype(
                x_BSD.dtype
            )
        h = _norm("norm1")(x_BSD).astype(x_BSD.dtype)
        x_BSD = x_BSD + Attention(c, name="attn1")(h, h)
        h = _norm("norm2")(x_BSD).astype(x_BSD.dtype)
        x_BSD = x_BSD + Attention(c, name="attn2")(h, cond_BTE)
        h = _norm("norm3")(x_BSD).astype(x_BSD.dtype)
        return x_BSD + (MoE(c, name="moe") if self.experts else MLP(c, name="mlp"))(h)


class Attention(nn.Module):
    """Of x to y, or of x to itself where they are the same array.

    The published projections are put side by side and cut into heads, [head][q|k|v][K] or, to a condition,
    [head][k|v][K]: what a weight is called is not what it serves as.
    """

    config: DiTConfig

    @nn.compact
    def __call__(self, x_BSD, y_BTE):
        c = self.config
        H, K = c.num_heads, c.head_dim

        def project(name, x):
            return dense(c, c.hidden_size, name, use_bias=c.qkv_bias)(x)

        q, k, v = project("to_q", x_BSD), project("to_k", y_BTE), project("to_v", y_BTE)
        if x_BSD is y_BTE:
            packed = jnp.concatenate([q, k, v], axis=-1).reshape(*q.shape[:2], H, 3 * K)
            q, k, v = jnp.split(packed, 3, axis=-1)
        else:
            packed = jnp.concatenate([k, v], axis=-1).reshape(*k.shape[:2], H, 2 * K)
            k, v = jnp.split(packed, 2, axis=-1)
            q = q.reshape(*q.shape[:2], H, K)
        y = attention(RMSNorm(name="q_norm")(q), RMSNorm(name="k_norm")(k), v)
        return dense(c, c.hidden_size, "out_proj")(y.reshape(x_BSD.shape))


class MLP(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        return dense(c, c.hidden_size, "out")(
            nn.gelu(dense(c, c.mlp_size, "in")(x), approximate=False)
        )


class MoE(nn.Module):
    """Σ_k p_k expert_k(x) over the experts with the highest probabilities p, plus an expert that sees every token.

    The probabilities are the softmax over all experts, not normalised again. Tokens are sorted by their expert, so
    that each computes its own alone.
    """

    config: DiTConfig

    @nn.compact
    def __call__(self, x_BSD):
        c = self.config
        D, F, X, top = c.hidden_size, c.mlp_size, c.num_experts, c.experts_per_token
        init = nn.initializers.xavier_uniform(in_axis=-2, out_axis=-1, batch_axis=(0,))
        up_XDF = self.param("up_kernel", init, (X, D, F)).astype(c.dtype)
        up_XF = self.param("up_bias", nn.initializers.zeros, (X, F)).astype(c.dtype)
        down_XFD = self.param("down_kernel", init, (X, F, D)).astype(c.dtype)
        down_XD = self.param("down_bias", nn.initializers.zeros, (X, D)).astype(c.dtype)

        x_ND = x_BSD.reshape(-1, D)
        gate = dense(
            c, X, "gate", use_bias=False, dtype="float32", precision=jax.lax.Precision.HIGHEST
        )
        probs_Nk, experts_Nk = jax.lax.top_k(jax.nn.softmax(gate(x_ND)), top)
        order = jnp.argsort(experts_Nk.reshape(-1), stable=True)
        expert = experts_Nk.reshape(-1)[order]
        token = order // top
        load_X = jnp.bincount(expert, length=X).astype(jnp.int32)
        h = jax.lax.ragged_dot(x_ND[token], up_XDF, load_X) + up_XF[expert]
        h = jax.lax.ragged_dot(nn.gelu(h, approximate=False), down_XFD, load_X) + down_XD[expert]
        h = h.astype(jnp.float32) * probs_Nk.reshape(-1)[order][:, None]
        y_ND = jnp.zeros(x_ND.shape, jnp.float32).at[token].add(h)
        return y_ND.reshape(x_BSD.shape).astype(x_BSD.dtype) + MLP(c, name="shared")(x_BSD)


class Final(nn.Module):
    config: DiTConfig

    @nn.compact
    def __call__(self, x_BLD):
        return zero_dense(self.config, self.config.latent_dim, "linear")(
            _norm("norm")(x_BLD)
        ).astype(jnp.float32)


def _norm(name: str) -> nn.LayerNorm:
    return nn.LayerNorm(EPS, dtype=jnp.float32, name=name)
