"""The decoder: one Linen module, one stacked parameter tree, for training, scoring and decoding.

Parameters of all layers of a kind are stacked on axis 0 in the layers' order, whatever `scan_layers` says, so a
checkpoint does not depend on how it is run. L layers, of which Ls have softmax and Ll lightning attention:

    embed/embedding [V, D]                     final_norm/scale [D]       head/kernel [D, V] if untied
    layers/attn_norm/scale [L, D]              layers/mlp_norm/scale [L, D]
    layers/attn/qkv/kernel [Ls, D, N, G+2, K]  (per key-value head: its G query heads, its key, its
    layers/attn/qkv/bias [Ls, N, G+2, K]        value; bias if qkv_bias)
    layers/attn/{q,k}_norm/scale [Ls, K]       if qk_norm
    layers/attn/o/kernel [Ls, N, G, K, D]
    layers/lightning/qkv/kernel [Ll, D, H, 3, K]   layers/lightning/gate/kernel [Ll, D, H, K]
    layers/lightning/norm/scale [Ll, H, K]         layers/lightning/o/kernel [Ll, H, K, D]
    layers/mlp/{gate,up}/kernel [L, D, F]      layers/mlp/down/kernel [L, F, D]          without experts
    layers/moe/router/kernel [L, D, E]         layers/moe/{gate,up}/kernel [L, E, D, F]
    layers/moe/down/kernel [L, E, F, D]                                                  with experts
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.lm.attention import (
    Attention,
    Cache,
    Memory,
    cached_bias,
    segment_positions,
)
from research.lm.config import DecoderConfig
from research.lm.layers import Kernel, RMSNorm, SwiGLU, rope_angles, xavier
from research.lm.lightning import Lightning, slopes
from research.lm.moe import MoE, RouterStats
from research.lm.quantize import dequantize

MIXERS = {"softmax": "attn", "lightning": "lightning"}  # name of a mixer → of its parameters


class Context(NamedTuple):
    """What all layers of a call share."""

    cos: jax.Array  # [B or 1, T, R/2]
    sin: jax.Array
    segment_ids: jax.Array | None = None  # [B, T]
    valid_BT: jax.Array | None = None  # tokens that are not padding; None: all
    slot: jax.Array | None = None  # where the cache is written,
    bias_BTS: jax.Array | None = None  # and what softmax attention sees of it: 0, else MASKED


class Block(nn.Module):
    """A token mixer, then a SwiGLU or experts, each inside a residual connection (see `Residual`)."""

    config: DecoderConfig
    mixer: str

    @nn.compact
    def __call__(
        self, x_BTD, context: Context, slopes_H, key=None, memory: Memory | None = None
    ) -> tuple[jax.Array, Memory | None, RouterStats | None]:
        """`key`: of the router's jitter. Returns (x_BTD, what the layer now remembers, the router's statistics)."""
        c, given = self.config, memory is not None

        def join(x, normed, y, scales):
            alpha, beta = scales
            residual = normed if c.residual.post_norm else x
            if (alpha, beta) == (1.0, 1.0):
                return residual + y
            return alpha * residual + beta * y

        u = RMSNorm(c.norm_eps, c.param_dtype, name="attn_norm")(x_BTD)
        if self.mixer == "lightning":
            y, memory = Lightning(c, name="lightning")(
                u, slopes_H, context.segment_ids, context.valid_BT, memory
            )
        else:
            y, memory = Attention(c, name="attn")(
                u, context.cos, context.sin, context.segment_ids, memory, context.slot, context.bias_BTS
            )
        x_BTD = join(x_BTD, u, y, getattr(c.residual, self.mixer))
        u, stats = RMSNorm(c.norm_eps, c.param_dtype, name="mlp_norm")(x_BTD), None
        if c.moe is None:
            y = SwiGLU(c, name="mlp")(u)
        else:
            factor = 0.0 if given else c.moe.capacity_factor
            y, stats = MoE(c, name="moe")(u, context.valid_BT, factor, key)
        return join(x_BTD, u, y, c.residual.mlp), memory, stats


class Embed(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self):
        c = self.config
        init = nn.initializers.normal(c.init_std)
        return self.param("embedding", init, (c.vocab_size, c.hidden_size), c.param_dtype)


class Decoder(nn.Module):
    """tokens → next-token logits, or hidden states; with a cache, the continuation of its rows.

    With experts, the collection 'router' (`mutable=["router"]`) gets `stats`: RouterStats with a leading [L]. Jitter
    takes the random stream 'router', and is off without it.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT,
        positions=None,
        segment_ids=None,
        *,
        cache: Cache | None = None,
        fresh: bool = False,
        return_hidden: bool = False,
    ):
        """Runs the decoder.

        Args:
          tokens_BT: int `[B, T]`.
          positions: int `[B, T]`, position of each token in its sequence; by default counted within
            each segment. Required with a cache, where -1 marks padding, never attended to; it stands
            before the tokens of its row.
          segment_ids: int `[B, T]`; tokens attend within their own segment only. 0 = padding.
          cache: what the layers remember so far. The T tokens are written at its head, and T must not
            run over the end of the ring.
          fresh: the cache is empty, and these tokens need not look into it: much faster for many.
          return_hidden: skip the output projection.

        Returns:
          float32 logits `[B, T, V]`, or hidden states `[B, T, D]` after the final norm; with a
          cache, a pair of that and the new cache.
        """
        c = self.config
        B, T = tokens_BT.shape
        if T > c.max_position:
            raise ValueError(f"{T} tokens a row, but max_position is {c.max_position}")
        embedding_VD = Embed(c, name="embed")()
        x_BTD = embedding_VD[tokens_BT].astype(c.dtype)
        if cache is not None:
            if positions is None or segment_ids is not None:
                raise ValueError("a cache needs positions, and takes no segment_ids")
            slot, valid_BT = cache.slot, positions >= 0
            seen_BS = jax.lax.dynamic_update_slice(
                cache.positions, positions.astype(jnp.int32), (0, slot)
            )
            bias = None if fresh else cached_bias(positions, seen_BS)
            segment_ids = valid_BT.astype(jnp.int32) if fresh else None
        else:
            slot, bias, valid_BT = None, None, None if segment_ids is None else segment_ids > 0
            if positions is None and segment_ids is not None:
                positions = segment_positions(segment_ids)
            elif positions is None:
                positions = jnp.arange(T)[None]
        context = Context(*rope_angles(positions, c), segment_ids, valid_BT, slot, bias)

        if self.is_initializing():
            self.param("layers", lambda key: _init_layers(c, key))
        else:
            keys = [None] * c.num_layers
            if c.moe and c.moe.jitter and self.has_rng("router"):
                keys = jax.random.split(self.make_rng("router"), c.num_layers)
            layers = self.get_variable("params", "layers")
            if cache is not None or not c.scan_layers:
                memories = [None] * c.num_layers if cache is None else cache.layers
                x_BTD, written, stats = _run(c, c.layer_mixers, per_layer(layers, c), x_BTD, context,
                                             _slopes(c), keys, memories)  # fmt: skip
                if cache is not None:
                    cache = Cache(tuple(written), seen_BS, cache.index + T)
            else:
                x_BTD, stats = _scan(c, layers, x_BTD, context, keys)
            if c.moe:
                self.sow("router", "stats", stats)

        x_BTD = RMSNorm(c.norm_eps, c.param_dtype, name="final_norm")(x_BTD)
        if c.tie_embeddings:
            head_DV = embedding_VD.astype(c.dtype).T
        else:
            stds = (xavier(c.hidden_size, c.vocab_size),)
            head_DV, _ = Kernel(c, (c.hidden_size, c.vocab_size), stds=stds, name="head")()
        if not return_hidden:
            x_BTD = jnp.einsum("BTD,DV->BTV", x_BTD, head_DV, preferred_element_type=jnp.float32)
        return x_BTD if cache is None else (x_BTD, cache)


def unstack(params, config: DecoderConfig):
    """The same parameters with one pytree per layer, for decode loops: `layers/0`, `layers/1`, …

    Slicing the stacked arrays inside a decode loop would copy every weight at every token.
    """
    layers = per_layer(params["layers"], config)
    return {**params, "layers": {str(i): layer for i, layer in enumerate(layers)}}


def head_kernel(params, config: DecoderConfig) -> jax.Array:
    """The output projection `[D, V]`: the embedding transposed if the two are tied."""
    return params["embed"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"]


def per_layer(layers, config: DecoderConfig) -> list[dict]:
    """The parameters of every layer, from the stacked ones, or from those that `unstack` made."""
    if "0" in layers:
        return [layers[str(i)] for i in range(len(layers))]
    return _deal(layers, config.layer_mixers)


def _deal(layers, mixers) -> list[dict]:
    """Stacked parameters of layers with these mixers → those of each layer."""

    def cut(tree):
        # lax.split, not indexing: its transpose is one concatenation, not L padded additions
        leaves, structure = jax.tree.flatten(tree)
        split = [jax.lax.split(x, (1,) * x.shape[0], axis=0) for x in leaves]
        return iter([structure.unflatten([part[0] for part in parts]) for parts in zip(*split, strict=True)])

    parts = {name: cut(tree) for name, tree in layers.items()}
    other = lambda mixer: {name for kind, name in MIXERS.items() if kind != mixer}  # noqa: E731
    return [{name: next(part) for name, part in parts.items() if name not in other(mixer)} for mixer in mixers]


def _run(c, mixers, layers, x_BTD, context, slopes_LH, keys, memories):
    """Layers one after another: (x_BTD, what each remembers, the routers' statistics, stacked)."""
    written, stats = [], []
    for i, (mixer, params) in enumerate(zip(mixers, layers, strict=True)):
        x_BTD, memory, router = _layer(c, mixer)(
            params, x_BTD, context, slopes_LH[i], keys[i], memories[i]
        )
        written.append(memory)
        stats.append(router)
    return x_BTD, written, jax.tree.map(lambda *x: jnp.stack(x), *stats)


def _scan(c, layers, x_BTD, context, keys):
    """The same as a scan over the repetitions of the pattern `c.mixers`, without memories."""
    count = c.num_layers // len(c.mixers)
    stacked = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), tree
    )
    none = [None] * len(c.mixers)
    jitters = keys[0] is not None

    def period(x_BTD, xs):
        layers, slopes_PH, *keys = xs
        x_BTD, _, stats = _run(c, c.mixers, _deal(layers, c.mixers), x_BTD, context, slopes_PH,
                               *(keys or [none]), none)  # fmt: skip
        return x_BTD, stats

    xs = (stacked(layers), stacked(_slopes(c)), *([stacked(keys)] if jitters else []))
    x_BTD, stats = jax.lax.scan(period, x_BTD, xs)
    return x_BTD, jax.tree.map(lambda x: x.reshape(c.num_layers, *x.shape[2:]), stats)


def _layer(config: DecoderConfig, mixer: str):
    """(params, x_BTD, context, slopes_H, key, memory) → what Block returns, remembered as `remat` says."""

    def apply(params, x_BTD, *args):
        params = dequantize(params, config.dtype, after=x_BTD)
        return Block(config, mixer, parent=None).apply({"params": params}, x_BTD, *args)

    if config.remat == "none":
        return apply
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(
        apply,
        policy=policy if config.remat == "dots" else None,
        prevent_cse=not config.scan_layers,
    )


def _slopes(c: DecoderConfig) -> jax.Array:
    return jnp.asarray(slopes(c.num_heads, c.num_layers, c.lightning.slopes), jnp.float32)


def _init_layers(c: DecoderConfig, key: jax.Array) -> dict:
    """Fresh stacked parameters of all layers."""
    # Of shapes, compiled, and layer by layer: otherwise all operations of a layer would run, and random numbers are
    # slow to compile.
    x_BTD = jax.ShapeDtypeStruct((1, 1, c.hidden_size), c.dtype)
    angles = jax.ShapeDtypeStruct((1, 1, c.turned_dim // 2), jnp.float32)
    slopes_H = jax.ShapeDtypeStruct((c.num_heads,), jnp.float32)

    def stack(key, mixer, count, part=None):
        def init(key):
            params = Block(c, mixer, parent=None).lazy_init(key, x_BTD, Context(angles, angles), slopes_H)
            return params["params"] if part is None else params["params"][part]

        return jax.jit(lambda keys: jax.lax.map(init, keys))(jax.random.split(key, count))

    first, *others = dict.fromkeys(c.mixers)
    keys = jax.random.split(key, 1 + len(others))
    layers = stack(keys[0], first, c.num_layers)
    if others:
        own = MIXERS[first]
        layers[own] = jax.tree.map(lambda x: x[: c.layer_mixers.count(first)], layers[own])
    for key, mixer in zip(keys[1:], others, strict=True):
        layers[MIXERS[mixer]] = stack(key, mixer, c.layer_mixers.count(mixer), MIXERS[mixer])
    return layers
