"""Farthest point sampling: the encoder's queries are a well-spread subset of the surface points."""

import functools

import jax
import jax.numpy as jnp

_LANES = 128


@functools.partial(jax.jit, static_argnames="count")
def farthest_points(points_BN3: jax.Array, count: int, start_B: jax.Array) -> jax.Array:
    """Indices of `count` points, each the farthest from those before it.

    Args:
      points_BN3: [B, N, 3] floating; distances are taken in float32.
      count: K, static; at most N.
      start_B: [B] integers in [0, N), the first point of each cloud. A random start (as in §2.3 of
        Hunyuan3D 2.0) is the caller's: `jax.random.randint(key, (B,), 0, N)`.

    Returns:
      int32 [B, K], distinct as long as the points are; of points equally far the lowest index is
      taken, so the result is a function of the arguments alone.

    Raises ValueError if K is not in 1…N or the shapes do not fit.
    """
    _check(points_BN3, count, start_B)
    one = functools.partial(_one_cloud, count=count)
    clouds = points_BN3.astype(jnp.float32), start_B.astype(jnp.int32)
    # One after another a cloud stays in a core's cache; elsewhere the steps wait for one another
    # and clouds side by side cost nothing.
    return jax.lax.platform_dependent(
        *clouds,
        cpu=lambda *clouds: jax.lax.map(lambda cloud: one(*cloud), clouds),
        default=jax.vmap(one),
    )


def _one_cloud(points_N3: jax.Array, start: jax.Array, count: int) -> jax.Array:
    # Coordinates apart, points in rows of lanes, and the maximum before its index: these vectorise,
    # where a sum over an axis of 3 and an argmax do not.
    N = points_N3.shape[0]
    rows = -(-N // _LANES)
    x, y, z = jnp.pad(points_N3.T, ((0, 0), (0, rows * _LANES - N))).reshape(3, rows, _LANES)
    index = jnp.arange(rows * _LANES, dtype=jnp.int32).reshape(rows, _LANES)

    def add(k, carry):
        last, nearest, chosen_K = carry
        at = points_N3[last]
        squared = (x - at[0]) ** 2 + (y - at[1]) ** 2 + (z - at[2]) ** 2
        nearest = jnp.minimum(nearest, squared)
        farthest = nearest.max(0).max()
        last = jnp.where(nearest == farthest, index, N - 1).min(0).min()
        return last, nearest, chosen_K.at[k].set(last)

    # Made like the points, so that inside shard_map they vary over the devices as these do.
    start += jnp.full_like(points_N3, 0, jnp.int32, ())
    chosen_K = jnp.full_like(points_N3, 0, jnp.int32, (count,)).at[0].set(start)
    nearest = jnp.where(index < N, jnp.full_like(x, jnp.inf), -1.0)  # padding is never the farthest
    return jax.lax.fori_loop(1, count, add, (start, nearest, chosen_K))[2]


def _check(points_BN3: jax.Array, count: int, start_B: jax.Array) -> None:
    shape = points_BN3.shape
    if len(shape) != 3 or shape[2] != 3 or start_B.shape != shape[:1]:
        raise ValueError(f"points must be [B, N, 3] and start [B], got {shape} and {start_B.shape}")
    if not 1 <= count <= shape[1]:
        raise ValueError(
            f"cannot choose {count} of {shape[1]} points; give the cloud more points or ask for fewer"
        )
