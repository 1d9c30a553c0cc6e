"""Figures of single shapes, and their intervals over shapes and seeds.

A run's scores are lists with a number for each held-out shape, None where a shape has no such figure (no sharp edges,
say). All runs of a table score the same shapes in the same order, so differences are paired, shape by shape and seed by
seed.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.tables.base import Interval, Results

MARGIN = 0.01  # of an IoU: what "not worse than" may cost, one point
_RESAMPLES = 10_000

Read = Callable[[Mapping[str, Any]], Sequence[float | None]]  # a run's figures → its shapes' scores


def packed(values: Any, digits: int = 4) -> list[float | None]:
    """JSON-ready; None for NaN."""
    return [round(float(x), digits) if np.isfinite(x) else None for x in np.asarray(values, float)]


def unpacked(scores: Sequence[float | None]) -> np.ndarray:
    """float64 [N], NaN for None."""
    return np.asarray([np.nan if x is None else x for x in scores], float)


def over_shapes_and_seeds(values_SN: Any) -> Interval:
    """The mean over seeds and shapes with its bootstrap 95 % percentile interval.

    In each of 10,000 resamples (a fixed stream) the seeds are drawn with replacement, and so are the shapes, the same
    ones for all seeds: a row of `values_SN` is a seed, a column a shape. Shapes with a NaN are left out. Raises
    ValueError if none is left.
    """
    values = np.asarray(values_SN, float)
    values = values[:, np.isfinite(values).all(axis=0)]
    seeds, shapes = values.shape
    if not shapes:
        raise ValueError("no shape has this figure in every seed")
    of_seed, of_shape = _drawn(seeds, 0), _drawn(shapes, 1)
    means = np.einsum("rn,rn->r", of_seed @ values, of_shape) / values.size
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


@functools.lru_cache(maxsize=16)
def _drawn(count: int, stream: int) -> np.ndarray:
    """How often each of `count` is drawn in every resample, float64 [resamples, count]."""
    rng = np.random.default_rng(stream)
    return rng.multinomial(count, np.full(count, 1 / count), _RESAMPLES).astype(float)


def level(results: Results, run: str, read: Read) -> Interval:
    return over_shapes_and_seeds([unpacked(read(x)) for x in results[run].values()])


def difference(
    results: Results, one: str, other: str, read: Read, read_other: Read | None = None
) -> Interval:
    """Of `read` in run `one` less `read_other` (the same, if left out) in run `other`."""
    read_other = read_other or read
    pairs = ((results[one][seed], results[other][seed]) for seed in results[one])
    return over_shapes_and_seeds([unpacked(read(a)) - unpacked(read_other(b)) for a, b in pairs])


def at_least(*differences: Interval, margin: float = MARGIN) -> tuple[bool, bool]:
    """(confirmed, refuted): none is worse than by `margin`, or one is."""
    return (
        all(x.low >= -margin for x in differences),
        any(x.high < -margin for x in differences),
    )


def above(*differences: Interval) -> tuple[bool, bool]:
    """(confirmed, refuted): all are above 0, or one is below."""
    return all(x.low > 0 for x in differences), any(x.high < 0 for x in differences)
