"""How near a shape is to an image, by two towers that were trained for that alone: what ULIP and Uni3D do in Table 2.

A ViT of front views and a PointNet (Qi et al. 2017) of surface points learn from the training shapes which image is of
which shape, by the symmetric InfoNCE of CLIP (Radford et al. 2021, figure 3). Shapes that are scored are none of these.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import trimesh

from experiments.tables.hunyuan3d_2 import generated, vaes
from research.core import checkpoint, loop, step
from research.core import mesh as meshes
from research.core import optim as optimizers
from research.core.loop import LoopConfig, Trainer
from research.core.metrics import Mean
from research.core.optim import OptimConfig
from research.core.state import TrainState
from research.hunyuan3d_2.data import shapes
from research.hunyuan3d_2.dit.tower import Tower, load_tower
from research.hunyuan3d_2.geometry import surface
from research.hunyuan3d_2.render.shading import on_white

_LARGEST_SCALE = 100.0  # of the logits, as in CLIP, which starts at 1 / 0.07


@dataclasses.dataclass(frozen=True)
class Config:
    """points: of a surface. jitter: standard deviation of what is added to them, for surfaces that are not quite right
    to be told by; a shape is 2 long. dim: of the embeddings."""

    seed: int = 0
    data: str = ""
    tower: str = "tiny"
    image_size: int = 32
    points: int = 384
    jitter: float = 0.02
    dim: int = 64
    batch_size: int = 64
    optim: OptimConfig = OptimConfig(lr=1e-3, weight_decay=0.01, schedule="cosine", warmup_steps=50)
    loop: LoopConfig = LoopConfig(steps=600, log_every=10, checkpoint_every=200)


SCALES: Mapping[str, Config] = {
    "cpu": Config(),
    "gpu": Config(
        tower="small", image_size=224, points=4096, dim=256, batch_size=512,
        loop=LoopConfig(steps=10_000, log_every=50, checkpoint_every=2000),
    ),
}  # fmt: skip


class PointNet(nn.Module):
    """Points [N, P, 3] → embeddings [N, dim], whatever their order."""

    dim: int

    @nn.compact
    def __call__(self, x_NPC: jax.Array) -> jax.Array:
        for width in (64, 128, 256):
            x_NPC = nn.gelu(nn.Dense(width)(x_NPC))
        return nn.Dense(self.dim)(nn.gelu(nn.Dense(256)(x_NPC.max(axis=1))))


def loss_fn(tower: Tower, config: Config, params: Any, batch: dict[str, jax.Array]):
    """Mean cross-entropy of each image's shape among the batch's shapes, and of each shape's image among its images.

    'image' uint8 [B, S, S, 3], 'points' float32 [B, P, 3]. Metric 'top1': shares of images whose shape is the nearest.
    """
    image_BD, point_BD = embedded(tower, config, params, batch["image"], batch["points"])
    logits_BB = jnp.minimum(jnp.exp(params["scale"]), _LARGEST_SCALE) * image_BD @ point_BD.T
    own = jnp.arange(len(logits_BB))
    both = [
        optax.softmax_cross_entropy_with_integer_labels(x, own) for x in (logits_BB, logits_BB.T)
    ]
    found_B = (jnp.argmax(logits_BB, axis=1) == own).astype(jnp.float32)
    return jnp.mean(jnp.concatenate(both)), {"top1": Mean.of(found_B)}


def embedded(
    tower: Tower, config: Config, params: Any, image_NSS3: jax.Array, points_NP3: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Unit vectors of images and of clouds, float32 [N, dim] each."""
    image = tower.apply(params["tower"], image_NSS3)[:, 0] @ params["projection"]
    point = PointNet(config.dim).apply({"params": params["points"]}, points_NP3)
    unit = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (image, point))
    return tuple(unit)


def init(tower: Tower, config: Config, key: jax.Array) -> dict[str, Any]:
    of_tower, of_points, of_projection = jax.random.split(key, 3)
    return {
        "tower": tower.init(of_tower),
        "points": PointNet(config.dim).init(of_points, jnp.zeros((1, 1, 3)))["params"],
        "projection": jax.random.normal(of_projection, (tower.dim, config.dim)) / tower.dim**0.5,
        "scale": jnp.asarray(math.log(1 / 0.07)),
    }


def build(config: Config) -> Trainer:
    """On the training shapes of `config.data`, one device."""
    tower = load_tower(config.tower, config.image_size)
    optimizer = optimizers.make(config.optim, config.loop.steps)
    update = step.data_parallel(
        functools.partial(loss_fn, tower, config), optimizer, meshes.make("data=1")
    )
    rows = grain.MapDataset.source(shapes.open_split(config.data, "train")).seed(config.seed)
    rows = rows.shuffle().repeat().random_map(_Pick(config)).batch(config.batch_size)
    iterator = iter(rows.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

    @jax.jit
    def start() -> TrainState:
        of_params, key = jax.random.split(jax.random.key(config.seed))
        return TrainState.create(init(tower, config, of_params), optimizer, key)

    return Trainer(
        start, lambda state, at: (next(iterator), {}), update, None, iterator, iterator.close
    )


class _Pick(grain.transforms.RandomMap):
    """A shape's pools → its front view and some points of its surface, moved a little."""

    def __init__(self, config: Config):
        self._config = config

    def random_map(self, element: generated.Pools, rng: np.random.Generator):
        chosen = rng.choice(len(element["uniform"]), self._config.points, replace=False)
        noise = self._config.jitter * rng.standard_normal((self._config.points, 3))
        return {
            "image": on_white(element["views"][generated.FRONT]),
            "points": (element["uniform"][chosen, :3] + noise).astype(np.float32),
        }


@functools.lru_cache
def trained(scale: str) -> "Scorer":
    """The encoder that all rows are scored by; trains it, beside the VAEs, if it is not."""
    config = dataclasses.replace(SCALES[scale], data=vaes.data())
    run = vaes.directory(f"{scale}/alignment")
    loop.run(build(config), config.loop, run, fingerprint_of=config, name="image-point encoder")
    return Scorer(config, run)


class Scorer:
    """A trained encoder."""

    def __init__(self, config: Config, run: pathlib.Path):
        self._config = config
        self._params = checkpoint.load_params(run)
        tower = load_tower(config.tower, config.image_size)
        self._embedded = jax.jit(functools.partial(embedded, tower, config))

    def cosines(
        self, image_NSS3: np.ndarray, made: Sequence[trimesh.Trimesh | None], seed: int
    ) -> np.ndarray:
        """Of each image with each surface, float32 [N, N]; 0 for no surface. Images are uint8, on white."""
        rng = np.random.default_rng([seed, 13])
        there = np.asarray([mesh is not None for mesh in made])
        points = np.zeros((len(made), self._config.points, 3), np.float32)
        for i in np.flatnonzero(there):
            points[i] = surface.sample_uniform(made[i], self._config.points, rng)[:, :3]
        image_ND, point_ND = map(
            np.asarray, self._embedded(self._params, jnp.asarray(image_NSS3), points)
        )
        return np.where(there, image_ND @ point_ND.T, 0.0)
