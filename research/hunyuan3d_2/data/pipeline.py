"""Batches of prepared shapes, on Grain: a fresh subset of each shape's points in every epoch.

What is in the batches is a function of the arguments alone, not of workers or processes, and an
iterator's `get_state` and `set_state` resume it exactly.
"""

import os
from collections.abc import Mapping

import grain
import jax
import numpy as np
from absl import flags

from research.hunyuan3d_2.data import shapes

_GROUPS = ("volume", "near", "near_sharp")


def vae_batches(
    directory: str | os.PathLike,
    *,
    batch_size: int,
    uniform: int,
    sharp: int,
    points: int,
    seed: int = 0,
    workers: int = 0,
) -> grain.IterDataset:
    """Endless batches of the training shapes, this process's rows of each; float32.

    'uniform' [B, uniform, 7] and 'sharp' [B, sharp, 7], drawn without replacement from the pools;
    'points' [B, points, 3] and 'distance' [B, points], a third of each group of query points (§2.5).

    batch_size: over all processes. workers: processes that read; 0: threads of this one, which do.

    Raises FileNotFoundError where there are no prepared shapes, ValueError for more points than a
    pool has or a batch that does not divide.
    """
    source = shapes.open_split(directory, "train")
    held = source.config
    for name, wanted, there in (
        ("uniform", uniform, held.uniform),
        ("sharp", sharp, held.sharp),
        ("points", points, 3 * held.queries),
    ):
        if not 0 <= wanted <= there:
            raise ValueError(
                f"{directory} has pools of {there} {name} points; {wanted} were asked for: build larger ones"
            )
    processes = jax.process_count()
    if batch_size < 1 or batch_size % processes:
        raise ValueError(
            f"batch_size={batch_size} must be a positive multiple of {processes} processes"
        )
    seed = int(
        np.random.SeedSequence(seed % 2**63).generate_state(1)[0]
    )  # Grain adds the epoch to it
    rows = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(_Subset(uniform, sharp, points))
    )
    rows = rows[jax.process_index() :: processes].batch(batch_size // processes)
    if not workers:
        return rows.to_iter_dataset(grain.ReadOptions(num_threads=4, prefetch_buffer_size=4))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads flags, which notebooks do not parse
    stream = rows.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    return stream.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    )


class _Subset(grain.transforms.RandomMap):
    """A shape's pools → one row; the generator is the row's own."""

    def __init__(self, uniform: int, sharp: int, points: int):
        self._clouds = {"uniform": uniform, "sharp": sharp}
        self._points = points

    def random_map(
        self, element: Mapping[str, np.ndarray], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        row = {name: _some(element[name], count, rng) for name, count in self._clouds.items()}
        shares = np.diff(np.arange(4) * self._points // 3)
        asked = [
            _some(element[name], count, rng) for name, count in zip(_GROUPS, shares, strict=True)
        ]
        asked = np.concatenate(asked)
        return row | {"points": asked[:, :3], "distance": asked[:, 3]}


def _some(pool: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    return pool[rng.choice(len(pool), count, replace=False, shuffle=False)]
