"""Weights as int8, for inference in half the memory of bfloat16.

    params = quantize(params)           # or, while reading: hf.load(directory, quantize=True)
    logits = model.apply({"params": params}, tokens)

A matrix becomes int8 values and a float32 scale for each output channel, w ~ values * scale with
scale = max |w| / 127 over the inputs that the channel sums over, so that no weight is off by more
than half a scale. All matrices of the layers are large enough to be worth it, the experts' most of
all; embeddings, the output projection, norms, biases and routers, which small errors hurt most, stay
as they are. The decoder turns one layer's matrices back just before it uses them, all of its experts'
included: what is saved is memory, not time. (On two CPU cores a model of 15 M parameters decodes one
sequence at a third of the speed, 32 at nine tenths; and XLA's CPU scheduler restores layers early.)

MiniMax-Text-01 was sized for this: 8-bit weights and a context of a million tokens in 640 GB
(MiniMax-01, section 2.4).
"""

from __future__ import annotations

import functools
import re
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

# Matrices by the end of their path, with the axes (after that of the layer) that they sum over.
_SUMMED = (
    ("attn/qkv/kernel", (1,)),  # [L, D, N, G+2, K]
    ("attn/o/kernel", (1, 2, 3)),  # [L, N, G, K, D]
    ("lightning/(qkv|gate)/kernel", (1,)),  # [L, D, H, 3, K], [L, D, H, K]
    ("lightning/o/kernel", (1, 2)),  # [L, H, K, D]
    ("mlp/(gate|up|down)/kernel", (1,)),  # [L, D, F], [L, F, D]
    ("moe/(gate|up|down)/kernel", (2,)),  # [L, E, D, F], [L, E, F, D]
)


class Quantized(flax.struct.PyTreeNode):
    """A matrix as values * scale; `scale` has size 1 on the axes that are summed over."""

    values: jax.Array  # int8
    scale: jax.Array  # float32


def quantize(params: Any) -> Any:
    """A decoder's parameters, stacked, with its large matrices `Quantized`."""

    def convert(path, leaf):
        axes = summed("/".join(key.key for key in path))
        return leaf if axes is None else quantize_array(leaf, axes)

    return jax.tree_util.tree_map_with_path(convert, params)


def dequantize(tree: Any, dtype: Any, after: jax.Array) -> Any:
    """`tree` with every `Quantized` leaf as an array of `dtype`; others stay as they are.

    They are restored when `after`, the layer's input, is there: otherwise the compiler would restore
    all layers' before a loop that decodes, and keep them.
    """

    def restore(leaf):
        if not isinstance(leaf, Quantized):
            return leaf
        values, _ = jax.lax.optimization_barrier((leaf.values, after))
        return (values.astype(jnp.float32) * leaf.scale).astype(dtype)

    return jax.tree.map(restore, tree, is_leaf=lambda leaf: isinstance(leaf, Quantized))


def summed(path: str) -> tuple[int, ...] | None:
    """The axes of a stacked parameter that its output channels sum over; None: it stays."""
    for pattern, axes in _SUMMED:
        if re.search(rf"(?:^|/){pattern}$", path):
            return axes
    return None


@functools.partial(jax.jit, static_argnums=1)
def quantize_array(array: jax.Array, axes: tuple[int, ...]) -> Quantized:
    """Symmetric int8 with one scale for all of `axes`; channels of zeros have scale 0."""
    array = jnp.asarray(array, jnp.float32)
    scale = jnp.max(jnp.abs(array), axis=axes, keepdims=True) / 127
    values = jnp.round(array / jnp.where(scale > 0, scale, 1))
    return Quantized(values.astype(jnp.int8), scale)


def scale_sharding(sharding: NamedSharding, axes: tuple[int, ...]) -> NamedSharding:
    """Where the scale of a matrix lies that lies as `sharding` says."""
    spec = (*sharding.spec,)
    kept = (None if axis in axes else name for axis, name in enumerate(spec))
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))
