"""The latents of shapes, encoded once by the frozen VAE and kept beside the shapes.

`<data>/latents/<name>.npz` holds the mean and log-variance of every shape of a split; its name is a digest of the VAE,
the number of latents and the shapes' index, so that another VAE's are never taken for this one's.
"""

import functools
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from research.core import config as configs
from research.hunyuan3d_2.data.shapes import open_split
from research.hunyuan3d_2.dit.config import DiTConfig
from research.hunyuan3d_2.dit.examples import Decode, Example, check
from research.hunyuan3d_2.vae import checkpoint as vae_checkpoint
from research.hunyuan3d_2.vae.config import VAEConfig
from research.hunyuan3d_2.vae.model import ShapeVAE

ROWS = 8  # shapes that are encoded at a time
EVAL_POINTS = 8192  # of the volume, that a V-IoU counts


def load(
    data: str, vae: str, model: DiTConfig, views: int = 1
) -> tuple[Sequence[Example], Sequence[Example], Decode, float | None]:
    """(examples to learn, held-out ones, the VAE's decoder, its scale_factor or None if it has none).

    data: a directory of shapes, as `research.hunyuan3d_2.data` builds it. vae: a run's or a released directory, with
    the encoder. model, views: what is to learn them. What is not encoded yet is encoded now.

    Raises ValueError or FileNotFoundError, before anything is encoded, for directories that are no such, a VAE without
    an encoder, and what `examples.check` refuses.
    """
    if not data or not vae:
        raise ValueError(
            "set `data` to a directory of shapes and `vae` to a trained VAE's directory"
        )
    config, params = vae_checkpoint.load(vae)
    if "pre_kl" not in params:
        raise ValueError(
            f"{vae} is a decoder alone; take the VAE that was released with its encoder"
        )
    splits = {split: open_split(data, split) for split in ("train", "heldout")}
    for shapes in splits.values():
        if not shapes.config.views:
            raise ValueError(
                f"the shapes in {data} have no views to learn from; build them with some"
            )
        check(model, views, config.latent_dim, shapes.config.views)
    made = []
    for split, shapes in splits.items():
        index = pathlib.Path(data) / split / "index.json"
        identity = f"{index.stat().st_mtime_ns} {index.read_text()}"
        mean, logvar = encoded(
            pathlib.Path(data) / "latents", config, params, shapes, model.num_latents, identity
        )
        made.append(Examples(shapes, mean, logvar, 0 if split == "train" else EVAL_POINTS))
    scale = None if config.scale_factor == 1 else config.scale_factor
    return *made, decoder(config, params), scale


class Examples(Sequence):
    """Shapes with their latents, as `examples` describes them; `points` of the volume are for evaluation."""

    def __init__(
        self, shapes: Sequence[Mapping[str, np.ndarray]], mean_NLC, logvar_NLC, points: int = 0
    ):
        self._shapes, self._mean, self._logvar, self._points = shapes, mean_NLC, logvar_NLC, points

    def __len__(self) -> int:
        return len(self._mean)

    def __getitem__(self, i: int) -> Example:
        shape = self._shapes[i]
        example = {"mean": self._mean[i], "logvar": self._logvar[i], "image": shape["views"]}
        if not self._points:
            return example
        volume_Q4 = shape["volume"][: self._points]
        return example | {"points": volume_Q4[:, :3], "distance": volume_Q4[:, 3]}


def encode(
    vae: VAEConfig, params: Any, shapes: Sequence[Mapping[str, np.ndarray]], num_latents: int
) -> tuple[np.ndarray, np.ndarray]:
    """(mean, logvar), float32 [N, L, C], of shapes with the clouds 'uniform' [M, 7] and 'sharp' [N, 7].

    Of each cloud the first points are taken, as many as the VAE was made for. Raises ValueError if there are fewer.
    """
    model = ShapeVAE(vae)
    params = {"params": jax.device_put(params)}
    counts = {"uniform": vae.uniform_points, "sharp": vae.sharp_points}
    for name, count in counts.items():
        if shapes and len(shapes[0][name]) < count:
            raise ValueError(
                f"the VAE takes {count} {name} points, the shapes have {len(shapes[0][name])}"
            )
    parts = []
    for start in tqdm(range(0, len(shapes), ROWS), "latents", disable=not sys.stderr.isatty()):
        index = [
            min(start + i, len(shapes) - 1) for i in range(ROWS)
        ]  # one program: the last is repeated
        rows = [shapes[i] for i in index]
        clouds = [
            np.stack([row[name][:count] for row in rows]).astype(np.float32)
            for name, count in counts.items()
        ]
        parts.append(jax.device_get(_encode(model, num_latents, params, *clouds)))
    mean, logvar = (np.concatenate(part)[: len(shapes)] for part in zip(*parts, strict=True))
    return mean, logvar


def encoded(
    directory: pathlib.Path,
    vae: VAEConfig,
    params: Any,
    shapes: Sequence[Mapping],
    num_latents: int,
    identity: str,
) -> tuple[np.ndarray, np.ndarray]:
    """`encode`, from the file in `directory` if there is one, else kept there; `identity` is that of the shapes."""
    digest = hashlib.sha256(json.dumps([configs.to_dict(vae), num_latents, identity]).encode())
    for leaf in jax.tree.leaves(params):
        digest.update(np.ascontiguousarray(leaf).data)
    path = directory / f"{digest.hexdigest()[:16]}.npz"
    if not path.is_file():
        mean, logvar = encode(vae, params, shapes, num_latents)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp.npz")
        np.savez(temporary, mean=mean, logvar=logvar)
        os.replace(temporary, path)
    with np.load(path) as file:
        return file["mean"], file["logvar"]


def decoder(vae: VAEConfig, params: Any):
    """latents [B, L, C] of the VAE, points [B, Q, 3] → its field [B, Q], as one compiled program."""
    model, params = ShapeVAE(vae), {"params": jax.device_put(params)}
    return functools.partial(_decode, model, params)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(model, num_latents, params, uniform_BM7, sharp_BN7):
    return model.apply(params, uniform_BM7, sharp_BN7, num_latents, method="encode")


@functools.partial(jax.jit, static_argnums=0)
def _decode(model, params, latents_BLC, points_BQ3):
    tokens_BLD = model.apply(params, latents_BLC, method="decode")
    return model.apply(params, tokens_BLD, points_BQ3, method="query")
