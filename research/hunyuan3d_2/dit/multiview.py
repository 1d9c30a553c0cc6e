"""Conditions from several views (Hunyuan3D-2mv): each view's tokens say which view they are of.

tokens_BVTE = tower(images_BVSSC)              # any subset of the four views, in any order
cond_BSE = join(tokens_BVTE, view_ids(("front", "back")))
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

VIEWS = {"front": 0, "left": 1, "back": 2, "right": 3}
MAX_PERIOD = 10_000.0


def view_ids(names: Iterable[str]) -> np.ndarray:
    """The numbers of views, int32 [V]. Raises ValueError for a view that there is not, that is named twice, or none."""
    names = list(names)
    unknown = [name for name in names if name not in VIEWS]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"views must be different ones of {', '.join(VIEWS)}, got {', '.join(names) or 'none'}"
        )
    return np.asarray([VIEWS[name] for name in names], np.int32)


def embedding(ids_V: np.ndarray, dim: int) -> np.ndarray:
    """[sin(id ω), cos(id ω)] with ω_i = 10000^(-i / (dim/2)), float32 [V, dim]; front, 0, is zeros, then ones."""
    if dim % 2:
        raise ValueError(f"the tokens' size must be even, got {dim}")
    omega = MAX_PERIOD ** (-np.arange(dim // 2) / (dim // 2))
    angles = np.asarray(ids_V, np.float64)[..., None] * omega
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)


def join(tokens_BVTE: jax.Array, ids: jax.Array) -> jax.Array:
    """One sequence of condition tokens, [B, V * T, E] in the tokens' dtype, each with its view's embedding added.

    `ids` are [V], or [B, V] where the rows have different views. Raises ValueError for other shapes.
    """
    B, V, T, E = tokens_BVTE.shape
    if ids.shape not in ((V,), (B, V)):
        raise ValueError(f"{V} views need ids [{V}] or [{B}, {V}], got {ids.shape}")
    table = jnp.asarray(embedding(np.arange(len(VIEWS)), E), tokens_BVTE.dtype)
    added = jnp.broadcast_to(table[ids], (B, V, E))[:, :, None]
    return (tokens_BVTE + added).reshape(B, V * T, E)
