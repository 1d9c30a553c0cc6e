"""What a diffusion transformer learns from: shapes as the frozen VAE sees them, and views of them.

An example is a mapping of 'mean' and 'logvar', float32 [L, C], of the latents, and 'image', uint8 [V, S, S, 3 or 4], of
which the first four are the views of `multiview.VIEWS`. One to be evaluated on also has 'points', float32 [Q, 3], and
'distance' [Q] to the surface, positive inside.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import grain
import jax
import numpy as np

from research.hunyuan3d_2.dit import multiview
from research.hunyuan3d_2.dit.config import DiTConfig
from research.hunyuan3d_2.render.shading import on_white

Example = Mapping[str, np.ndarray]
Decode = Callable[
    [jax.Array, np.ndarray], jax.Array
]  # latents [B, L, C], points [B, Q, 3] → field [B, Q]


def dataset(
    examples: Sequence[Example], views: int, batch_size: int, seed: int
) -> grain.IterDataset:
    """Endless batches of `row`s, every epoch in a new order; of several processes each gives its share."""
    processes = jax.process_count()
    if batch_size % processes:
        raise ValueError(f"batch_size={batch_size} must be a multiple of {processes} processes")
    seed = int(np.random.SeedSequence(seed % 2**63).generate_state(1)[0])
    rows = grain.MapDataset.source(examples).seed(seed).shuffle().repeat().random_map(_Pick(views))
    rows = rows[jax.process_index() :: processes].batch(batch_size // processes)
    return rows.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))


class _Pick(grain.transforms.RandomMap):
    """`row`, as Grain wants it."""

    def __init__(self, views: int):
        self._views = views

    def random_map(self, element: Example, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return row(element, self._views, rng)


def row(example: Example, views: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A training row: 'mean', 'logvar', 'image' uint8 [views, S, S, 3], 'seed' uint32 [2] of all that the device draws
    for it, and the ids of the views, 'view' int32 [views], if there are several."""
    count = len(example["image"])
    chosen = rng.choice(count if views == 1 else len(multiview.VIEWS), views, replace=False)
    made = {name: np.asarray(example[name], np.float32) for name in ("mean", "logvar")}
    made["image"] = on_white(np.asarray(example["image"])[chosen])
    made["seed"] = rng.integers(2**32, size=2, dtype=np.uint32)
    return made | ({"view": chosen.astype(np.int32)} if views > 1 else {})


def check(model: DiTConfig, views: int, latent_dim: int, there: int) -> None:
    """Raises ValueError where `model`, with conditions of so many views, cannot learn latents [L, latent_dim] of shapes
    of which so many views are there."""
    if latent_dim != model.latent_dim:
        raise ValueError(
            f"the VAE's latents are [L, {latent_dim}], the model's are [L, {model.latent_dim}] (model.latent_dim)"
        )
    if views > 1 and there < len(multiview.VIEWS):
        raise ValueError(
            f"views={views} needs shapes with the four named views, these have {there}"
        )


def latent_scale(examples: Sequence[Example], most: int = 512) -> float:
    """1 / the standard deviation of the latents' samples, over at most so many examples."""
    chosen = [examples[i] for i in range(0, len(examples), math.ceil(len(examples) / most))]
    mean = np.stack([example["mean"] for example in chosen]).astype(np.float64)
    noise = np.mean(np.exp(np.stack([example["logvar"] for example in chosen]).astype(np.float64)))
    return float(1 / np.sqrt(mean.var() + noise))
