"""How well shapes are reconstructed: volume and surface IoU of the decoded field's sign (section 5.1).

The paper gives neither counts nor the width of "near the surface". Here, for a shape's stored pools:

- v_iou: points uniform in the cube [-1.05, 1.05]^3.
- s_iou: points near the surface (a normal step away from uniform surface points) with |d| < band.
- sharp_s_iou: the same for points near sharp edges; NaN for a shape that has none.

Each is measured for the posterior's mean and, with the suffix `_sample`, for one sample of it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from research.core import mesh as meshes
from research.core import sharding
from research.hunyuan3d_2.vae.config import VAEConfig
from research.hunyuan3d_2.vae.model import ShapeVAE

# A shape's stored points, float32: 'uniform' [M, 7], 'sharp' [N, 7], and 'volume', 'near', 'near_sharp'
# [Q, 4], a position and its signed distance.
Pools = Mapping[str, np.ndarray]
METRICS = {"v_iou": "volume", "s_iou": "near", "sharp_s_iou": "near_sharp"}
_CHUNK = 8192  # points decoded at a time


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """volume_points, surface_points: of each metric, or all that a shape's pool has, if those are fewer.

    band: largest |signed distance| of a point near the surface.
    shapes: how many to evaluate; 0: all.
    """

    volume_points: int = 100_000
    surface_points: int = 100_000
    band: float = 0.02
    shapes: int = 0

    def __post_init__(self):
        if min(self.volume_points, self.surface_points) < 1 or not self.band > 0 or self.shapes < 0:
            raise ValueError(
                "volume_points and surface_points must be at least 1, and band positive"
            )


def iou(inside: np.ndarray, predicted: np.ndarray) -> float:
    """|A and B| / |A or B| of two bool arrays; 1 if both are empty."""
    union = np.count_nonzero(inside | predicted)
    return np.count_nonzero(inside & predicted) / union if union else 1.0


def reconstruction(
    model: ShapeVAE,
    params: Any,
    shapes: Sequence[Pools],
    config: EvalConfig = EvalConfig(),
    *,
    num_tokens: int | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> dict[str, np.ndarray]:
    """Metric -> its value for each shape, float64 [shapes]: those of METRICS, and with `_sample`.

    Shapes are spread over the axis 'data' of `mesh` (default: one device). Raises ValueError for pools
    that are too small for the encoder.
    """
    mesh = mesh or meshes.make({"data": 1})
    num_tokens = num_tokens or model.config.num_tokens
    shapes = [shapes[i] for i in range(min(len(shapes), config.shapes or len(shapes)))]
    found: dict[str, list[float]] = {name + end: [] for name in METRICS for end in ("", "_sample")}
    ways = mesh.shape["data"]
    for start in range(0, len(shapes), ways):
        group = shapes[start : start + ways]
        questions = [_questions(pools, config) for pools in group]
        rows = [_row(model.config, pools, asked, config, seed + start + i)
                for i, (pools, asked) in enumerate(zip(group, questions, strict=True))]  # fmt: skip
        rows += rows[:1] * (ways - len(rows))
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        inside_B2Q = np.asarray(_occupied(model, num_tokens, mesh)(
            sharding.place(params, sharding.replicated(mesh)), _placed(batch, mesh)
        ))  # fmt: skip
        for inside_2Q, asked in zip(inside_B2Q, questions, strict=False):
            at = 0
            for name, points_Q4 in asked.items():
                part = slice(at, at + len(points_Q4))
                at = part.stop
                for end, inside_Q in zip(("", "_sample"), inside_2Q, strict=True):
                    empty = not len(points_Q4)
                    value = np.nan if empty else iou(points_Q4[:, 3] > 0, inside_Q[part])
                    found[name + end].append(value)
    return {name: np.asarray(values) for name, values in found.items()}


def means(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The mean of each metric over the shapes that have it."""
    present = {name: x[np.isfinite(x)] for name, x in values.items()}
    return {name: float(x.mean()) if len(x) else float("nan") for name, x in present.items()}


def _questions(pools: Pools, config: EvalConfig) -> dict[str, np.ndarray]:
    """Metric -> points and distances [<= count, 4]."""
    asked = {}
    for name, pool in METRICS.items():
        points_Q4 = pools[pool]
        if pool != "volume":
            points_Q4 = points_Q4[np.abs(points_Q4[:, 3]) < config.band]
        if name == "sharp_s_iou" and not pools["sharp"][:, 6].any():
            points_Q4 = points_Q4[:0]
        count = config.volume_points if pool == "volume" else config.surface_points
        count = min(count, len(points_Q4))
        # evenly over the pool, whose points come in groups of one distance after another
        asked[name] = points_Q4[np.arange(count) * len(points_Q4) // max(count, 1)]
    return asked


def _row(
    vae: VAEConfig, pools: Pools, asked, config: EvalConfig, seed: int
) -> dict[str, np.ndarray]:
    """One shape as fixed shapes: points are padded to whole chunks of the most that there can be."""
    most = config.volume_points + 2 * config.surface_points
    most = min(most, sum(len(pools[pool]) for pool in METRICS.values()))
    points = np.concatenate([points_Q4[:, :3] for points_Q4 in asked.values()])
    chunk = min(_CHUNK, most)
    points = np.pad(points, ((0, -(-most // chunk) * chunk - len(points)), (0, 0)))
    return {
        "uniform": pools["uniform"][: vae.uniform_points],
        "sharp": pools["sharp"][: vae.sharp_points],
        "points": points.reshape(-1, chunk, 3).astype(np.float32),
        "seed": np.uint32(seed % 2**32),
    }


@functools.lru_cache(maxsize=16)
def _occupied(model: ShapeVAE, num_tokens: int, mesh: Mesh):
    """(params, rows) -> bool [B, 2, Q]: where the field of the mean, and of a sample, is positive."""

    def one(params, row):
        def call(method, *args):
            return model.apply({"params": params}, *args, method=method)

        mean, logvar = call("encode", row["uniform"][None], row["sharp"][None], num_tokens)
        noise = jax.random.normal(jax.random.key(row["seed"]), mean.shape)
        latents = jnp.concatenate([mean, mean + jnp.exp(0.5 * logvar) * noise])
        k, v = call("keys_values", call("decode", latents))

        def inside(points_Q3):
            points_2Q3 = jnp.broadcast_to(points_Q3, (2, *points_Q3.shape))
            return call("query_keys", points_2Q3, k, v) > 0

        return jax.lax.map(inside, row["points"]).swapaxes(0, 1).reshape(2, -1)

    rows = jax.shard_map(
        lambda params, batch: jax.lax.map(lambda row: one(params, row), batch),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec("data"),
    )
    return jax.jit(rows, out_shardings=sharding.replicated(mesh))


def _placed(batch, mesh: Mesh):
    """Every process has all shapes, and gives the rows of its devices."""
    share = len(batch["seed"]) // jax.process_count()
    mine = slice(jax.process_index() * share, (jax.process_index() + 1) * share)
    return sharding.place_rows({name: x[mine] for name, x in batch.items()}, mesh)
