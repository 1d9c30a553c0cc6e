"""The field on a grid, of which only the cells near the surface need to be evaluated.

`decode_grid` evaluates densely, or hierarchically as FlashVDM: each level has twice the resolution of
the one before and is evaluated only around the cells where that one changes sign or is not saturated.
On top of that, points of one region may share a selection of the tokens to attend to.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from research.hunyuan3d_2.vae.model import ShapeVAE

COARSEST = 63  # no level of a hierarchy has fewer cells along an axis
SATURATED = 0.95  # |field| from here on is not near the surface
TILE = 256  # points that are queried with one selection of tokens
COARSE_BINS, FINE_BINS = 4, 6  # regions along an axis that select tokens: first level, later ones
COARSE_STRIDE, FINE_STRIDE, MERGE_STRIDE = 100, 50, 30  # every so many points of a region choose
MERGE_LEAST = 1e-6
SELECTED = {3072: 1024, 512: 256}  # tokens -> tokens selected; a third of others
# Points in one program call, whatever the budget; measured on CPU, where activations should stay in cache.
MOST, DEFAULT_MOST = {"cpu": 2**12}, 2**16
_IN_FLIGHT = 2  # calls that are dispatched and not fetched


@dataclasses.dataclass(frozen=True)
class GridConfig:
    """How to sample the field.

    resolution: R cells along an axis, R + 1 points of linspace(-bound, bound, R + 1).
    method: 'dense' evaluates every point, 'hierarchical' those near the surface.
    flash_levels: the first level becomes round(r / 4) 4 - 1 and the later ones its doubles, as FlashVDM
      has it: 256 turns into 252 and 384 into 380. The grid says what it became.
    selection: 'topk' attends, per head, to the third of the tokens that fit a region's mean query best;
      'merge' does so on the first level and then keeps what any sampled point of the region attends to.
    level: of the surface that is to be found.
    memory: bytes that the points in work may take on the device; it sets their number.
    """

    resolution: int = 384
    bound: float = 1.01
    method: Literal["dense", "hierarchical"] = "hierarchical"
    flash_levels: bool = False
    selection: Literal["none", "topk", "merge"] = "none"
    level: float = 0.0
    memory: int = 2**30

    def __post_init__(self):
        if self.resolution < 1:
            raise ValueError(f"resolution must be at least 1, got {self.resolution}")
        if not self.bound > 0:
            raise ValueError(f"bound must be positive, got {self.bound}")
        if self.method == "dense" and (self.selection != "none" or self.flash_levels):
            raise ValueError("selection and flash_levels need method='hierarchical'")


@dataclasses.dataclass(frozen=True)
class Grid:
    """`field_XYZ` float32 [R + 1] * 3, positive inside, at linspace(-bound, bound, R + 1) on each axis.

    evaluated_XYZ: bool; elsewhere the field is that of the nearest point of the level before.
    levels: resolutions, the coarsest first and R = levels[-1].
    queries: points that were evaluated, over all levels.
    """

    field_XYZ: np.ndarray
    evaluated_XYZ: np.ndarray
    bound: float
    levels: tuple[int, ...]
    queries: int

    @property
    def query_ratio(self) -> float:
        """Points evaluated, by those of the dense grid."""
        return self.queries / self.field_XYZ.size


def decode_grid(
    model: ShapeVAE,
    params: Any,
    latents_Ld: jax.Array,
    config: GridConfig,
    *,
    progress: bool = False,
) -> Grid:
    """The field of one shape's latents (what a diffusion model made, divided by scale_factor).

    A program is compiled for two numbers of points, for any resolution; with `selection` for two
    more. `progress` shows a bar if stderr is a terminal. Raises ValueError for latents that are not
    [L, latent_dim], a budget too small for any work, and a field that is not finite.
    """
    if np.ndim(latents_Ld) != 2 or latents_Ld.shape[1] != model.config.latent_dim:
        raise ValueError(
            f"latents must be [L, {model.config.latent_dim}], got {np.shape(latents_Ld)}"
        )
    work = _Work(model, params, latents_Ld, config, progress and sys.stderr.isatty())
    levels = levels_of(config)
    n = levels[0] + 1
    values = work.evaluate(np.arange(n**3), levels[0], True)
    field_XYZ, evaluated_XYZ = values.reshape(n, n, n), np.ones((n, n, n), bool)
    queries = n**3
    for r in levels[1:]:
        near_XYZ = near_surface(field_XYZ, evaluated_XYZ, config.level)
        evaluated_XYZ = refine(near_XYZ, r, last=r == levels[-1])
        field_XYZ = _stretch(field_XYZ, r)
        chosen = np.flatnonzero(evaluated_XYZ)
        field_XYZ.reshape(-1)[chosen] = work.evaluate(chosen, r, False)
        queries += len(chosen)
    if not np.isfinite(field_XYZ).all():
        raise ValueError("the field is not finite; are the latents or the parameters?")
    return Grid(field_XYZ, evaluated_XYZ, config.bound, levels, queries)


def levels_of(config: GridConfig) -> tuple[int, ...]:
    """Resolutions from the coarsest to the finest: halves of it, while they are not below 63."""
    levels = [config.resolution]
    while config.method == "hierarchical" and levels[-1] // 2 >= COARSEST:
        levels.append(levels[-1] // 2)
    levels.reverse()
    if config.flash_levels:
        first = round(levels[0] / COARSE_BINS) * COARSE_BINS - 1
        if first < 1:
            raise ValueError(
                f"flash_levels need a resolution of at least 6, got {config.resolution}"
            )
        levels = [first * 2**i for i in range(len(levels))]
    return tuple(levels)


def near_surface(field_XYZ: np.ndarray, evaluated_XYZ: np.ndarray, level: float) -> np.ndarray:
    """Evaluated points whose sign differs from that of one of 6 neighbours, or with |field| < 0.95."""
    sign = np.sign(field_XYZ - level).astype(np.int8)
    near = np.abs(field_XYZ) < SATURATED
    for axis in range(3):
        low, high = _slices(axis, slice(None, -1)), _slices(axis, slice(1, None))
        differ = (sign[low] != sign[high]) & evaluated_XYZ[low] & evaluated_XYZ[high]
        near[low] |= differ
        near[high] |= differ
    return near & evaluated_XYZ


def refine(near_XYZ: np.ndarray, resolution: int, last: bool) -> np.ndarray:
    """Points to evaluate on a level of `resolution` cells, about twice the one before.

    The points near the surface, grown by one, at twice their indices, grown by one; the last level
    grows by two there instead.
    """
    coarse = near_XYZ if last else dilate(near_XYZ)
    fine = np.zeros((resolution + 1,) * 3, bool)
    end = 2 * len(near_XYZ) - 1
    fine[:end:2, :end:2, :end:2] = coarse
    fine = dilate(fine)
    return dilate(fine) if last else fine


def dilate(mask_XYZ: np.ndarray) -> np.ndarray:
    """True in the 3 x 3 x 3 neighbourhood of what is."""
    for axis in range(3):
        low, high = _slices(axis, slice(None, -1)), _slices(axis, slice(1, None))
        grown = mask_XYZ.copy()
        grown[low] |= mask_XYZ[high]
        grown[high] |= mask_XYZ[low]
        mask_XYZ = grown
    return mask_XYZ


class _Work:
    """Points of one shape, evaluated in calls of few sizes."""

    def __init__(self, model, params, latents_Ld, config, progress):
        self.model, self.config, self.progress = model, config, progress
        self.params = {"params": params}
        self.k, self.v = _keys_values(model, self.params, jnp.asarray(latents_Ld)[None])
        vae = model.config
        tokens = self.k.shape[1]
        # Scores; a dozen activations besides the MLP's two; selected keys and values.
        per_point = vae.field_heads * tokens + vae.field_width * (12 + 2 * vae.field_mlp_ratio)
        if config.selection != "none":
            per_point += 2 * vae.field_width * tokens // TILE
        per_point *= 4
        most = min(MOST.get(jax.default_backend(), DEFAULT_MOST), config.memory // per_point)
        if most < 8 * TILE:
            raise ValueError(
                f"memory={config.memory} bytes is too little: {8 * TILE} points with {tokens} tokens "
                f"take {8 * TILE * per_point}"
            )
        self.chunk = most // (8 * TILE) * 8 * TILE

    def evaluate(self, chosen: np.ndarray, resolution: int, first: bool) -> np.ndarray:
        """The field, float32 [N], at flat indices into a grid of resolution + 1 points along an axis."""
        axis = np.linspace(-self.config.bound, self.config.bound, resolution + 1, dtype=np.float32)
        shape = (resolution + 1,) * 3

        def points(flat):
            return axis[np.stack(np.unravel_index(flat, shape), axis=-1)]

        bar = tqdm(
            total=len(chosen), desc=f"field at {resolution}", unit="point", unit_scale=True, leave=False,
            disable=not self.progress,
        )  # fmt: skip
        with bar:
            if self.config.selection == "none" or not len(chosen):
                calls = (
                    (part, self._query(points(chosen[part]))) for part in self._parts(len(chosen))
                )
                return _fetched(calls, len(chosen), bar)
            order, regions = self._regions(chosen, shape, first)
            inverse = np.empty_like(order)
            inverse[order] = np.arange(len(order))
            calls = self._query_selected(points, chosen[order], regions, first)
            return _fetched(calls, len(chosen), bar)[inverse]

    def _parts(self, count: int, unit: int = 1) -> Iterator[slice]:
        """Slices of `count`: whole chunks, and an eighth of one at a time for the rest."""
        start, chunk = 0, self.chunk // unit
        while start < count:
            size = chunk if count - start >= chunk else chunk // 8
            yield slice(start, min(start + size, count))
            start += size

    def _padded(self, count: int, unit: int = 1) -> int:
        chunk = self.chunk // unit
        return chunk if count > chunk // 8 else chunk // 8

    def _query(self, points_Q3: np.ndarray) -> jax.Array:
        points = np.resize(points_Q3, (self._padded(len(points_Q3)), 3))
        return _query(self.model, self.params, points[None], self.k, self.v)[0]

    def _regions(self, chosen, shape, first):
        """(order that sorts points by region, number of points of each region)."""
        bins = COARSE_BINS if first else FINE_BINS
        at_3N = np.stack(np.unravel_index(chosen, shape))
        low_3, high_3 = at_3N.min(axis=1), at_3N.max(axis=1)
        if first:  # equal boxes of points
            at_3N = at_3N * bins // shape[0]
        else:  # of the points' bounding box; the last one includes its end
            extent_31 = np.maximum(high_3 - low_3, 1)[:, None]
            at_3N = ((at_3N - low_3[:, None]) / extent_31 * (bins - 1e-3)).astype(np.int64)
        region_N = np.ravel_multi_index(tuple(at_3N), (bins,) * 3)
        return np.argsort(region_N, kind="stable"), np.bincount(region_N, minlength=bins**3)

    def _query_selected(self, points, chosen, counts, first):
        """Calls on tiles of points of one region, which attend to its tokens; `chosen` is sorted by it."""
        index_GHS, keep_GS = self._selection(points, chosen, counts, first)
        starts = np.cumsum(counts) - counts
        tiles = [
            (region, start, min(start + TILE, starts[region] + counts[region]))
            for region in np.flatnonzero(counts)
            for start in range(starts[region], starts[region] + counts[region], TILE)
        ]
        for part in self._parts(len(tiles), TILE):
            group = tiles[part]
            size = self._padded(len(group), TILE)
            flat_GT = np.stack([np.resize(chosen[start:stop], TILE) for _, start, stop in group])
            region_G = np.asarray([region for region, *_ in group], np.int32)
            points_GT3 = np.resize(points(flat_GT), (size, TILE, 3))
            values_GT = _query_tiles(
                self.model, self.params, points_GT3, np.resize(region_G, size), index_GHS, keep_GS,
                self.k, self.v,
            )  # fmt: skip
            filled = np.concatenate(
                [i * TILE + np.arange(stop - start) for i, (_, start, stop) in enumerate(group)]
            )
            yield slice(group[0][1], group[-1][2]), (values_GT, filled)

    def _selection(self, points, chosen, counts, first):
        """(tokens of each region and head, int32 [G, H or 1, S]; which of them to keep, or None)."""
        merge = self.config.selection == "merge" and not first
        stride = COARSE_STRIDE if first else MERGE_STRIDE if merge else FINE_STRIDE
        starts = np.cumsum(counts) - counts
        sampled = np.concatenate(
            [np.arange(s, s + n, stride) for s, n in zip(starts, counts, strict=True)]
        )
        region_S = np.repeat(np.arange(len(counts)), -(-counts // stride)).astype(np.int32)
        size, tokens = self.chunk // 8, self.k.shape[1]
        found = None
        for start in range(0, len(sampled), size):
            region = region_S[start : start + size]
            # what is padded belongs to no region, and is dropped
            region = np.pad(region, (0, size - len(region)), constant_values=len(counts))
            at = np.resize(points(chosen[sampled[start : start + size]]), (size, 3))
            choose = _merged if merge else _sum_queries
            part = choose(self.model, self.params, at[None], region, self.k, len(counts))
            found = part if found is None else found + part
        if not merge:
            return _best(found, self.k, SELECTED.get(tokens, max(1, tokens // 3))), None
        most = int(jnp.max(jnp.sum(found > 0, axis=1)))
        step = max(8, tokens // 8)  # few sizes, few programs
        keep_GS, index_GS = jax.lax.top_k(
            (found > 0).astype(jnp.int32), min(tokens, -(-most // step) * step)
        )
        return index_GS[:, None], keep_GS > 0


def _fetched(calls, count: int, bar) -> np.ndarray:
    """The results of `calls`, (slice, values) or (slice, (values, those that count)), a few in flight."""
    values, waiting = np.empty(count, np.float32), []

    def fetch():
        part, result = waiting.pop(0)
        if isinstance(result, tuple):
            values[part] = np.asarray(result[0]).reshape(-1)[result[1]]
        else:
            values[part] = np.asarray(result)[: part.stop - part.start]
        bar.update(part.stop - part.start)

    for call in calls:
        waiting.append(call)
        if len(waiting) > _IN_FLIGHT:
            fetch()
    while waiting:
        fetch()
    return values


@functools.partial(jax.jit, static_argnums=0)
def _keys_values(model, variables, latents_BLd):
    tokens_BLD = model.apply(variables, latents_BLd, method="decode")
    return model.apply(variables, tokens_BLD, method="keys_values")


@functools.partial(jax.jit, static_argnums=0)
def _query(model, variables, points_BQ3, k_BLHK, v_BLHK):
    return model.apply(variables, points_BQ3, k_BLHK, v_BLHK, method="query_keys")


@functools.partial(jax.jit, static_argnums=0)
def _query_tiles(model, variables, points_GT3, region_G, index_RHS, keep_RS, k_BLHK, v_BLHK):
    index_GHS = index_RHS[region_G]

    def of(x_BLHK):
        x_GHSK = jnp.take_along_axis(x_BLHK[0].swapaxes(0, 1)[None], index_GHS[..., None], axis=2)
        return x_GHSK.swapaxes(1, 2)

    keep_GS = None if keep_RS is None else keep_RS[region_G]
    return model.apply(variables, points_GT3, of(k_BLHK), of(v_BLHK), keep_GS, method="query_keys")


@functools.partial(jax.jit, static_argnums=(0, 5))
def _sum_queries(model, variables, points_BS3, region_S, k_BLHK, regions):
    """Sums of the points' queries by region, `[regions, H, K]`."""
    del k_BLHK
    q_BSHK = model.apply(variables, points_BS3, method="attention_queries")
    return jax.ops.segment_sum(q_BSHK[0].astype(jnp.float32), region_S, regions)


@functools.partial(jax.jit, static_argnums=2)
def _best(q_GHK, k_BLHK, count):
    """The `count` tokens with the largest mean q . k over a region's points, int32 `[regions, H, count]`.

    The mean of products is the product with the mean, and a positive factor does not change the order.
    """
    scores_GHL = jnp.einsum("ghk,lhk->ghl", q_GHK, k_BLHK[0].astype(jnp.float32))
    return jax.lax.top_k(scores_GHL, count)[1]


@functools.partial(jax.jit, static_argnums=(0, 5))
def _merged(model, variables, points_BS3, region_S, k_BLHK, regions):
    """How many of a region's points attend to each token, `[regions, L]`: softmax(q . k), mean over heads.

    FlashVDM leaves out the scale 1 / sqrt(K) here, so the choice is narrower than the attention.
    """
    q_BSHK = model.apply(variables, points_BS3, method="attention_queries")
    scores_SHL = jnp.einsum(
        "shk,lhk->shl", q_BSHK[0], k_BLHK[0], preferred_element_type=jnp.float32
    )
    attended_SL = jnp.mean(jax.nn.softmax(scores_SHL), axis=1) > MERGE_LEAST
    return jax.ops.segment_sum(attended_SL.astype(jnp.int32), region_S, regions)


def _stretch(field_XYZ: np.ndarray, resolution: int) -> np.ndarray:
    """The field at the nearest point of a coarser level."""
    nearest = np.rint(np.arange(resolution + 1) * ((len(field_XYZ) - 1) / resolution)).astype(
        np.int64
    )
    return field_XYZ[np.ix_(nearest, nearest, nearest)]


def _slices(axis: int, part: slice) -> tuple[slice, ...]:
    return tuple(part if i == axis else slice(None) for i in range(3))
