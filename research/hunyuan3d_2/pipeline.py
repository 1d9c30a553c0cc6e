"""An image becomes a mesh: image tower, diffusion transformer, shape decoder, isosurface.

    pipeline = ImageToShape.load("runs/dit")           # a run, or a released directory
    shape = pipeline("chair.png", seed=1, steps=30)
    shape.mesh.export("chair.glb"); shape.statistics["time"]

A model of several views takes a mapping of them: pipeline({"front": "a.png", "back": "b.png"}).
"""

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import trimesh
import yaml
from tqdm import tqdm

from research.hunyuan3d_2 import condition
from research.hunyuan3d_2.condition import Matting, Source
from research.hunyuan3d_2.dit import checkpoint as dit_checkpoint
from research.hunyuan3d_2.dit import model as dit_model
from research.hunyuan3d_2.dit import multiview, sampler
from research.hunyuan3d_2.dit.config import DiTConfig
from research.hunyuan3d_2.dit.tower import load_tower
from research.hunyuan3d_2.geometry import cleaning, isosurface
from research.hunyuan3d_2.vae import checkpoint as vae_checkpoint
from research.hunyuan3d_2.vae.config import VAEConfig
from research.hunyuan3d_2.vae.grid import GridConfig, decode_grid
from research.hunyuan3d_2.vae.model import ShapeVAE
from research.vision import dinov2, hf
from research.vision.vit import ViT

_BUNDLE_CONFIG = "config.yaml"
_TOWER = "main_image_encoder"


@dataclasses.dataclass(frozen=True)
class Shape:
    """What an image became.

    mesh: y up, facing +z, in about [-1, 1], faces outward.
    statistics: what it was made with (seed, steps, guidance, resolution, faces_limit, ...), what it is (faces,
      vertices, watertight, volume), and seconds by stage ('time').
    """

    mesh: trimesh.Trimesh
    statistics: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageToShape:
    """A loaded system. Made by `load`; a call makes a shape.

    dit, vae: their configurations; params: of 'dit', 'vae' and 'tower'.
    tower: (parameters, images uint8 [N, S, S, 3]) → tokens [N, T, cond_dim].
    image_size: of the images that are prepared for the tower.
    multi_view: whether it knows views by name.
    scale_factor: of the transformer's latents to the decoder's.
    turbo_grid: times that a consistency-distilled transformer knows; None: it is none.
    """

    dit: DiTConfig
    vae: VAEConfig
    params: Mapping[str, Any]
    tower: Callable[[Any, jax.Array], jax.Array]
    image_size: int
    multi_view: bool = False
    scale_factor: float = 1.0
    turbo_grid: int | None = None

    @classmethod
    def load(
        cls,
        directory: str | pathlib.Path,
        *,
        step: int | Literal["best"] | None = None,
        vae: str | pathlib.Path | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
    ) -> "ImageToShape":
        """A run that trained a diffusion transformer, with the VAE that it names, or a released directory.

        Args:
          directory: a run's, or one with config.yaml and the safetensors of transformer, VAE and image tower.
          step: which checkpoint of a run; None: the newest.
          vae: a directory to take the VAE from; None: the one that the run names, or the release holds.
          dtype: of activations; None: as the models have it.

        Raises:
          FileNotFoundError, ValueError, research.core.checkpoint.CheckpointError: what is missing, or is no such model.
        """
        directory = pathlib.Path(directory)
        if not directory.is_dir():
            raise FileNotFoundError(f"there is no checkpoint directory {directory}")
        if (directory / dit_checkpoint.DESCRIPTION).is_file():
            made = _from_run(cls, directory, step, vae, dtype or "float32")
        elif (directory / _BUNDLE_CONFIG).is_file():
            if step is not None:
                raise ValueError(
                    f"{directory} is a released checkpoint, which has no step {step!r}"
                )
            made = _from_release(cls, directory, vae, dtype or "float32")
        else:
            raise ValueError(
                f"{directory} is no image-to-shape model: it has neither {dit_checkpoint.DESCRIPTION} (a run that "
                f"trained a diffusion transformer) nor {_BUNDLE_CONFIG} (a released directory)"
            )
        if made.dit.latent_dim != made.vae.latent_dim:
            raise ValueError(
                f"the transformer makes latents of {made.dit.latent_dim} channels, the VAE has {made.vae.latent_dim}"
            )
        if dtype is not None:
            parts = {
                name: dataclasses.replace(getattr(made, name), dtype=dtype)
                for name in ("dit", "vae")
            }
            made = dataclasses.replace(made, **parts)
        return dataclasses.replace(made, params=jax.device_put(made.params))

    @property
    def default_steps(self) -> int:
        """What the released demos use: 5 for turbo models, 10 for those that take guidance as an input, 50."""
        return 5 if self.turbo_grid is not None else 10 if self.dit.guidance_embed else 50

    def __call__(
        self,
        image: Source | Mapping[str, Source],
        *,
        seed: int = 1234,
        steps: int | None = None,
        guidance: float = 5.0,
        num_latents: int | None = None,
        resolution: int = 256,
        method: Literal["dense", "hierarchical"] = "hierarchical",
        selection: Literal["none", "topk", "merge"] = "none",
        surface: Literal["marching_cubes", "surface_nets"] = "marching_cubes",
        level: float = 0.0,
        faces: int | None = cleaning.FACES,
        matting: Matting | None = None,
        progress: bool = False,
    ) -> Shape:
        """The shape of an image, or of views by name ('front', 'left', 'back', 'right').

        Args:
          image: see `condition.cut_out`.
          seed: of the noise; the same seed makes the same shape.
          steps: network evaluations; None: `default_steps`.
          guidance: how strongly the image counts; 1 is none.
          num_latents: tokens to generate; None: as trained.
          resolution: cells of the grid along an axis.
          method, selection: how the grid is decoded (`vae.grid.GridConfig`).
          surface: how the surface is found; level: of the field.
          faces: at most about so many, by edge collapse; None: as they come.
          matting: cuts out the object of an opaque image (`condition.Matting`).
          progress: bars on stderr.

        Raises:
          condition.ImageError: an image that cannot be used. geometry.isosurface.NoSurface: the field has no surface at
          the level. ValueError: settings that do not fit. All but the second before any work.
        """
        steps = self.default_steps if steps is None else steps
        grid = GridConfig(resolution=resolution, method=method, selection=selection, level=level)
        times = (
            sampler.times(steps)
            if self.turbo_grid is None
            else sampler.turbo_times(steps, self.turbo_grid)
        )
        if num_latents is not None and num_latents < 1:
            raise ValueError(f"num_latents must be at least 1, got {num_latents}")
        if faces is not None and faces < 4:
            raise ValueError(f"a closed mesh has at least 4 faces; cannot make it of {faces}")
        if surface not in ("marching_cubes", "surface_nets"):
            raise ValueError(f"surface must be 'marching_cubes' or 'surface_nets', not {surface!r}")
        clock = _Clock()
        with clock("prepare"):
            pixels_VSS3, ids_V = self._prepare(image, matting)
        with clock("encode"):
            tokens_1TE = jax.block_until_ready(self._encode(pixels_VSS3, ids_V))
        with clock("diffuse"), _bar("diffuse", progress) as report:
            x_1LC = sampler.noise((seed,), num_latents or self.dit.num_latents, self.dit.latent_dim)
            latents_1LC = sampler.integrate(
                self._dit, self.params["dit"], x_1LC, tokens_1TE, times, guidance, report
            )
            latents_LC = jax.block_until_ready(latents_1LC[0] / self.scale_factor)
        with clock("decode"):
            decoded = decode_grid(
                self._vae, self.params["vae"], latents_LC, grid, progress=progress
            )
        with clock("extract"):
            mesh = isosurface.extract(decoded.field_XYZ, decoded.bound, surface, level)
        with clock("clean"):
            mesh = cleaning.clean(mesh, faces)
        return Shape(
            mesh,
            {
                "seed": seed,
                "steps": steps,
                "guidance": guidance,
                "latents": len(latents_LC),
                "resolution": decoded.levels[-1],
                "method": method,
                "selection": selection,
                "query_ratio": decoded.query_ratio,
                "surface": surface,
                "level": level,
                "faces_limit": faces,
                "faces": len(mesh.faces),
                "vertices": len(mesh.vertices),
                "watertight": bool(mesh.is_watertight),
                "volume": float(mesh.volume),
                "time": clock.seconds | {"total": sum(clock.seconds.values())},
            },
        )

    @functools.cached_property
    def _dit(self):
        return dit_model.build(self.dit)

    @functools.cached_property
    def _vae(self):
        return ShapeVAE(self.vae)

    @functools.cached_property
    def _tokens(self):
        def tokens(params, images_VSS3, ids_V):
            tokens_VTE = self.tower(params, images_VSS3)
            if not self.multi_view:
                return tokens_VTE
            return multiview.join(tokens_VTE[None], ids_V)

        return jax.jit(tokens)

    def _encode(self, pixels_VSS3: np.ndarray, ids_V: np.ndarray) -> jax.Array:
        return self._tokens(self.params["tower"], pixels_VSS3, ids_V)

    def _prepare(self, image, matting) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [V, S, S, 3] and the views' ids [V]."""
        views = image if isinstance(image, Mapping) else {"front": image}
        ids = multiview.view_ids(views)
        if len(views) > 1 and not self.multi_view:
            raise ValueError(
                f"this model takes one image, not {len(views)} views ({', '.join(views)})"
            )
        images = [
            condition.prepare(view, self.image_size, matting=matting).image_SS3
            for view in views.values()
        ]
        order = np.argsort(ids)
        return np.rint((np.stack(images)[order] + 1) * 127.5).astype(np.uint8), ids[order]


def _from_run(cls, directory: pathlib.Path, step, vae, dtype: str) -> ImageToShape:
    made, params = dit_checkpoint.load_run(directory, step)
    vae_config, vae_params = vae_checkpoint.load(vae or find_vae(directory, made.vae))
    tower = load_tower(made.tower, made.image_size, dtype)
    return cls(
        dit=made.model,
        vae=vae_config,
        params={
            "dit": params["dit"],
            "vae": vae_params,
            "tower": params.get("tower", tower.params),
        },
        tower=tower.apply,
        image_size=made.image_size,
        multi_view=made.views > 1,
        scale_factor=made.scale_factor,
    )


def find_vae(run: pathlib.Path, named: str) -> pathlib.Path:
    """The VAE that a run names, from where the run was started or from the run's own place.

    Raises FileNotFoundError if it is in neither.
    """
    places = [pathlib.Path(named), run.parent / named, run.parent / pathlib.Path(named).name]
    for place in places if named else []:
        if place.is_dir():
            return place
    raise FileNotFoundError(
        f"{run} was trained with the VAE {named!r}, which is not there; say where it is (vae=DIRECTORY, or --vae)"
    )


def _from_release(cls, directory: pathlib.Path, vae, dtype: str) -> ImageToShape:
    try:
        content = yaml.safe_load((directory / _BUNDLE_CONFIG).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{directory / _BUNDLE_CONFIG} is not YAML: {error}") from None
    parts = dit_checkpoint.read_bundle(directory)
    missing = [
        name for name in ("model", "conditioner") if name not in parts or name not in content
    ]
    if missing:
        raise ValueError(
            f"{directory} has no {' and no '.join(missing)}: it is no whole image-to-shape model"
        )
    vae_config, vae_params = vae_checkpoint.load(vae or directory)
    dit_config, dit_params = dit_checkpoint.from_tensors(parts["model"])
    dit_config = dataclasses.replace(
        dit_config, num_latents=vae_config.num_tokens
    )  # its tensors do not say
    entry = content["conditioner"].get("params", {}).get(_TOWER, {})
    arguments = entry.get("kwargs", {})
    if not str(entry.get("type", "")).startswith("DinoImageEncoder") or not arguments.get("config"):
        raise ValueError(
            f"{directory}: the image tower {entry.get('type')!r} is not supported; DinoImageEncoder is"
        )
    tower_config = dataclasses.replace(hf.read_config(arguments["config"]), dtype=dtype)
    prefix = f"{_TOWER}.model."
    tensors = {
        name: x.read() for name, x in parts["conditioner"].items() if name.startswith(prefix)
    }
    scheduler = content.get("scheduler", {})
    turbo = "Consistency" in str(scheduler.get("target", ""))
    return cls(
        dit=dit_config,
        vae=vae_config,
        params={
            "dit": dit_params,
            "vae": vae_params,
            "tower": hf.from_tensors(tower_config, tensors, prefix),
        },
        tower=_tower(ViT(tower_config), arguments.get("image_size", tower_config.image_size)),
        image_size=content.get("image_processor", {}).get("params", {}).get("size", 512),
        multi_view=entry["type"].endswith("MV"),
        scale_factor=vae_config.scale_factor,
        turbo_grid=scheduler.get("params", {}).get("pcm_timesteps", 50) if turbo else None,
    )


def _tower(model: ViT, size: int) -> Callable[[Any, jax.Array], jax.Array]:
    def apply(params, image_NSS3):
        pixels = dinov2.preprocess(image_NSS3.astype(jnp.float32) / 127.5 - 1, size)
        return model.apply({"params": params}, pixels)

    return apply


class _Clock:
    """Seconds by stage."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start


@contextmanager
def _bar(name: str, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    if not shown or not sys.stderr.isatty():
        yield None
        return
    with tqdm(desc=name, leave=False, unit="step") as bar:

        def report(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        yield report
