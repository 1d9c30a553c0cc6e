"""A mixture of SwiGLU experts in place of a layer's one SwiGLU, and what keeps its load even.

MiniMax-01, section 2.1. E experts; the other shape suffixes as in `layers`.
"""

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from pallas_kernels.moe_dispatch import moe_mlp, route
from research.core.metrics import Max, Mean
from research.lm.config import DecoderConfig, MoEConfig
from research.lm.layers import Kernel, deepnorm_gain, xavier


class RouterStats(flax.struct.PyTreeNode):
    """What a layer's router did, as float32 sums over valid tokens: stats of two batches add up.

    load_E: tokens that chose each expert, before any is dropped. probs_E: router probabilities.
    dropped []: choices that met a full expert. entropy []: of the probabilities, in nats. tokens [].
    Any leading axes (layers) come before these.
    """

    load_E: jax.Array
    probs_E: jax.Array
    dropped: jax.Array
    entropy: jax.Array
    tokens: jax.Array


class MoE(nn.Module):
    """sum_k weight_k expert_k(x) over the `top_k` experts with the highest router logits (eq. 1).

    The router works in float32, whatever the compute dtype.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        valid_BT: jax.Array | None = None,
        capacity_factor: float = 0.0,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterStats]:
        """Runs the layer.

        Args:
          x_BTD: `[B, T, D]`.
          valid_BT: bool; other tokens are padding: their output is 0 and no expert sees them. None:
            all are valid.
          capacity_factor: an expert takes ceil(factor * top_k * B T / E) tokens, first choices before
            second ones and tokens in their order; the output for a dropped choice is 0. 0: all.
          key: of the jitter of the router's input (`config.moe.jitter`); None: none.

        Returns:
          y_BTD in x's type, and the router's statistics.
        """
        c, moe = self.config, self.config.moe
        D, F, E = c.hidden_size, c.mlp_size, moe.num_experts
        std = (xavier(D, F, deepnorm_gain(c)),)
        gate_EDF, _ = Kernel(c, (E, D, F), stds=std, name="gate")()
        up_EDF, _ = Kernel(c, (E, D, F), stds=std, name="up")()
        down_EFD, _ = Kernel(c, (E, F, D), stds=std, name="down")()
        wide = dataclasses.replace(c, dtype="float32")
        router_DE, _ = Kernel(wide, (D, E), stds=(xavier(D, E),), name="router")()

        x_ND = x_BTD.reshape(-1, D)
        router_ND = x_ND.astype(jnp.float32)
        if key is not None and moe.jitter > 0:
            low, high = 1 - moe.jitter, 1 + moe.jitter
            router_ND *= jax.random.uniform(key, router_ND.shape, minval=low, maxval=high)
        logits_NE = jnp.matmul(router_ND, router_DE, precision=jax.lax.Precision.HIGHEST)
        routing = route(logits_NE, moe.top_k)
        valid_N = jnp.ones(len(x_ND), bool) if valid_BT is None else valid_BT.reshape(-1)
        experts_NK = jnp.where(valid_N[:, None], routing.experts_NK, E)
        capacity = None
        if capacity_factor > 0:
            capacity = math.ceil(capacity_factor * moe.top_k * len(x_ND) / E)
        y_ND, kept_NK = moe_mlp(
            x_ND, gate_EDF, up_EDF, down_EFD, experts_NK, routing.weights_NK, capacity=capacity,
            implementation=c.implementation,
        )  # fmt: skip
        probs_NE = jnp.where(valid_N[:, None], routing.probs_NE, 0.0)
        entropy_N = -jnp.sum(probs_NE * jax.nn.log_softmax(logits_NE), axis=1)
        stats = RouterStats(
            load_E=jnp.sum(experts_NK[:, :, None] == jnp.arange(E), axis=(0, 1), dtype=jnp.float32),
            probs_E=jnp.sum(probs_NE, axis=0),
            dropped=jnp.sum(valid_N[:, None] & ~kept_NK, dtype=jnp.float32),
            entropy=jnp.sum(entropy_N),
            tokens=jnp.sum(valid_N, dtype=jnp.float32),
        )
        return y_ND.reshape(x_BTD.shape), stats


def aux_loss(stats: RouterStats, top_k: int, form: Literal["paper", "switch"]) -> jax.Array:
    """The load-balancing loss of each leading index of `stats`, before its coefficient.

    f_i is the share of tokens that chose expert i (all shares sum to top_k), m_i the mean
    probability of expert i. Gradients flow through m alone; f is a count.

      paper:  (1/E) sum_i f_i m_i   (MiniMax-01, section 2.1); top_k / E^2 when balanced
      switch:  E  sum_i f_i m_i     (Fedus et al. 2021, eq. 4, summed over choices); top_k

    Stats without a token give 0. The forms differ by E^2, so that a coefficient fits one of them.
    """
    load_E = jax.lax.stop_gradient(stats.load_E)
    f_E = top_k * load_E / jnp.maximum(jnp.sum(load_E, axis=-1, keepdims=True), 1)
    m_E = stats.probs_E / jnp.maximum(stats.tokens, 1)[..., None]
    num_experts = load_E.shape[-1]
    scale = {"paper": 1 / num_experts, "switch": num_experts}[form]
    return scale * jnp.sum(f_E * m_E, axis=-1)


def metrics(stats: RouterStats, config: MoEConfig) -> dict[str, Mean | Max]:
    """How the routers of all layers (any leading axes of `stats`) did.

    router/load/<e>    share of all choices that fell on expert e; 1 / E when balanced
    router/max_load    load of the busiest expert over the mean load: mean over layers and batches
    router/worst_load  the same: maximum
    router/dead        fraction of experts that no token of a batch chose: mean over layers
    router/dropped     fraction of choices that met a full expert
    router/entropy     of the router's probabilities, nats
    router/aux, router/aux_pooled  `aux_loss`: mean over layers, and of all layers taken as one,
                       which is blind to layers whose imbalances cancel
    """
    stats = jax.lax.stop_gradient(stats)
    E, lead = config.num_experts, tuple(range(stats.tokens.ndim))
    pooled = jax.tree.map(lambda x: jnp.sum(x, axis=lead), stats)
    choices = config.top_k * stats.tokens
    peak = jnp.max(stats.load_E, axis=-1) * E / jnp.maximum(choices, 1)
    aux = {
        name: aux_loss(x, config.top_k, config.aux_form)
        for name, x in {"aux": stats, "aux_pooled": pooled}.items()
    }
    return {
        **{f"router/load/{e}": Mean(pooled.load_E[e], jnp.sum(choices)) for e in range(E)},
        "router/max_load": Mean.of(peak, stats.tokens),
        "router/worst_load": Max.of(peak),
        "router/dead": Mean.of(jnp.mean(stats.load_E == 0, axis=-1), stats.tokens),
        "router/dropped": Mean(pooled.dropped, jnp.sum(choices)),
        "router/entropy": Mean(pooled.entropy, pooled.tokens),
        "router/aux": Mean.of(aux["aux"], stats.tokens),
        "router/aux_pooled": Mean.of(aux["aux_pooled"], pooled.tokens),
    }
