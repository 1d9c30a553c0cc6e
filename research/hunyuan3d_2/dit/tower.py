"""The image tower of a diffusion transformer: frozen and published, or small and trained along."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from research.hunyuan3d_2.dit import multiview
from research.vision import hf
from research.vision.dinov2 import PRESETS, preprocess
from research.vision.vit import ViT


@dataclasses.dataclass(frozen=True, eq=False)
class Tower:
    """Images uint8 [N, S, S, 3] → tokens [N, T, dim] by `apply(params, images)`.

    params: those of a frozen tower; None if they are trained along, made by `init(key)`.
    """

    dim: int
    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, jax.Array], jax.Array]
    params: Any = None


def load_tower(name: str, image_size: int, dtype: str = "float32") -> Tower:
    """The tower that `name` says: a directory of a published DINOv2 (frozen), or a preset's name (trained along).

    Images of any size are resized to image_size, of which the tower's patch size must be a divisor; `dtype` is of the
    activations, and of a frozen tower's parameters. Raises ValueError for what is neither, and what `hf.load` does.
    """
    if name in PRESETS:
        model, params = (
            ViT(dataclasses.replace(PRESETS[name], image_size=image_size, dtype=dtype)),
            None,
        )
    elif name and pathlib.Path(name).is_dir():
        model, params = hf.load(name, dtype=dtype)
    else:
        raise ValueError(
            f"tower={name!r} is neither a directory nor one of the presets {', '.join(PRESETS)}"
        )
    patch = model.config.patch_size
    if image_size % patch:
        raise ValueError(
            f"image_size={image_size} must be a multiple of the tower's patch_size={patch}"
        )

    def init(key):
        return model.init(key, jnp.zeros((1, image_size, image_size, 3)))["params"]

    def apply(params, image_NSS3):
        pixels = preprocess(image_NSS3.astype(jnp.float32) / 127.5 - 1, image_size)
        return model.apply({"params": params}, pixels)

    return Tower(model.config.hidden_size, init, apply, params)


def condition(tower: Tower, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """The condition tokens [B, T, E]: 'tokens', or those of 'image', uint8 [B, V, S, S, 3], which with the ids 'view'
    [B, V] say of which view they are."""
    if "tokens" in batch:
        return batch["tokens"]
    image = batch["image"]
    B, V = image.shape[:2]
    tokens = tower.apply(params["tower"], image.reshape(B * V, *image.shape[2:]))
    tokens_BVTE = tokens.reshape(B, V, *tokens.shape[1:])
    if "view" in batch:
        return multiview.join(tokens_BVTE, batch["view"])
    return tokens_BVTE.reshape(B, -1, tokens.shape[-1])
