"""The decoder: one Linen module, one stacked parameter tree, for training, scoring and decoding.

Parameters of all layers are stacked on axis 0 whatever `scan_layers` says, so a checkpoint does
not depend on how it is run:

    embed/embedding [V, D]                    final_norm/scale [D]       head/kernel [D, V] if untied
    layers/attn_norm/scale [L, D]             layers/mlp_norm/scale [L, D]
    layers/attn/qkv/kernel [L, D, N, G+2, K]  (per key-value head: its G query heads, its key, its
    layers/attn/qkv/bias [L, N, G+2, K]        value; bias if qkv_bias)
    layers/attn/{q,k}_norm/scale [L, K]       if qk_norm
    layers/attn/o/kernel [L, N, G, K, D]
    layers/mlp/{gate,up}/kernel [L, D, F]     layers/mlp/down/kernel [L, F, D]
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from research.lm.attention import (
    Attention,
    Cache,
    cached_bias,
    causal_bias,
    segment_positions,
)
from research.lm.config import DecoderConfig
from research.lm.layers import Kernel, RMSNorm, SwiGLU, rope_angles


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD, cos, sin, bias_BTS, cache=None, slot=None):
        c = self.config
        norm = lambda name: RMSNorm(c.norm_eps, c.param_dtype, name=name)  # noqa: E731
        y_BTD, cache = Attention(c, name="attn")(
            norm("attn_norm")(x_BTD), cos, sin, bias_BTS, cache, slot
        )
        x_BTD = x_BTD + y_BTD
        return x_BTD + SwiGLU(c, name="mlp")(norm("mlp_norm")(x_BTD)), cache


class Embed(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self):
        c = self.config
        init = nn.initializers.normal(c.init_std)
        return self.param("embedding", init, (c.vocab_size, c.hidden_size), c.param_dtype)


class Decoder(nn.Module):
    """tokens → next-token logits, or hidden states; with a cache, the continuation of its rows."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT,
        positions=None,
        segment_ids=None,
        *,
        cache: Cache | None = None,
        return_hidden: bool = False,
    ):
        """Runs the decoder.

        Args:
          tokens_BT: int `[B, T]`.
          positions: int `[B, T]`, position of each token in its sequence; by default counted within
            each segment. Required with a cache, where -1 marks padding, never attended to.
          segment_ids: int `[B, T]`; tokens attend within their own segment only. 0 = padding.
          cache: keys and values so far. The T tokens are written at its head, and T must not run
            over the end of the ring.
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
            slot = cache.slot
            seen_BS = jax.lax.dynamic_update_slice(
                cache.positions, positions.astype(jnp.int32), (0, slot)
            )
            bias = cached_bias(positions, seen_BS)
        else:
            bias = causal_bias(T, segment_ids)
            if positions is None and segment_ids is not None:
                positions = segment_positions(segment_ids)
            elif positions is None:
                positions = jnp.arange(T)[None]
        cos, sin = rope_angles(positions, c)

        layer = _remat(Block, c)
        if not self.is_initializing() and (cache is not None or not c.scan_layers):
            written = []
            for i, params in enumerate(_per_layer(self.get_variable("params", "layers"))):
                given = () if cache is None else (cache.layers[i], slot)
                x_BTD, pair = layer(c, parent=None).apply({"params": params}, x_BTD, cos, sin, bias,
                                                          *given)
                written.append(pair)
            if cache is not None:
                cache = Cache(tuple(written), seen_BS, cache.index + T)
        else:
            stack = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=c.num_layers,
            )
            x_BTD, _ = stack(c, name="layers")(x_BTD, cos, sin, bias)

        x_BTD = RMSNorm(c.norm_eps, c.param_dtype, name="final_norm")(x_BTD)
        if c.tie_embeddings:
            head_DV = embedding_VD.astype(c.dtype).T
        else:
            head_DV, _ = Kernel(c, (c.hidden_size, c.vocab_size), name="head")()
        if not return_hidden:
            x_BTD = jnp.einsum("BTD,DV->BTV", x_BTD, head_DV, preferred_element_type=jnp.float32)
        return x_BTD if cache is None else (x_BTD, cache)


def unstack(params):
    """The same parameters with one pytree per layer, for decode loops: `layers/0`, `layers/1`, …

    Slicing the stacked arrays inside a decode loop would copy every weight at every token.
    """
    layers = _per_layer(params["layers"])
    return {**params, "layers": {str(i): layer for i, layer in enumerate(layers)}}


def head_kernel(params, config: DecoderConfig) -> jax.Array:
    """The output projection `[D, V]`: the embedding transposed if the two are tied."""
    return params["embed"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"]


def _per_layer(layers):
    if "0" in layers:
        return [layers[str(i)] for i in range(len(layers))]
    # lax.split, not indexing: its transpose is one concatenation, not L padded additions
    leaves, tree = jax.tree.flatten(layers)
    split = [jax.lax.split(x, (1,) * x.shape[0], axis=0) for x in leaves]
    return [tree.unflatten([part[0] for part in parts]) for parts in zip(*split, strict=True)]


def _remat(module, config: DecoderConfig):
    if config.remat == "none":
        return module
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return nn.remat(
        module,
        policy=policy if config.remat == "dots" else None,
        prevent_cse=not config.scan_layers,
    )
