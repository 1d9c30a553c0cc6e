"""Farthest point sampling: the encoder's queries are a well-spread subset of the surface points."""

import functools

import jax
import jax.numpy as jnp


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
    B, N, _ = _check(points_BN3, count, start_B)
    # Coordinates apart, and the maximum before its index: both vectorise where an argmax over
    # [B, N] or a sum over an axis of 3 does not.
    x_3BN = jnp.moveaxis(points_BN3.astype(jnp.float32), -1, 0)
    index_N = jnp.arange(N, dtype=jnp.int32)
    start_B = start_B.astype(jnp.int32)

    def add(k, carry):
        last_B, nearest_BN, chosen_BK = carry
        at_3B1 = jnp.take_along_axis(x_3BN, last_B[None, :, None], axis=2)
        nearest_BN = jnp.minimum(nearest_BN, jnp.sum(jnp.square(x_3BN - at_3B1), axis=0))
        farthest_B1 = jnp.max(nearest_BN, axis=1, keepdims=True)
        last_B = jnp.min(jnp.where(nearest_BN == farthest_B1, index_N, N - 1), axis=1)
        return last_B, nearest_BN, chosen_BK.at[:, k].set(last_B)

    chosen_BK = jnp.zeros((B, count), jnp.int32).at[:, 0].set(start_B)
    nearest_BN = jnp.full((B, N), jnp.inf, jnp.float32)
    return jax.lax.fori_loop(1, count, add, (start_B, nearest_BN, chosen_BK))[2]


def _check(points_BN3: jax.Array, count: int, start_B: jax.Array) -> tuple[int, ...]:
    shape = points_BN3.shape
    if len(shape) != 3 or shape[2] != 3 or start_B.shape != shape[:1]:
        raise ValueError(f"points must be [B, N, 3] and start [B], got {shape} and {start_B.shape}")
    if not 1 <= count <= shape[1]:
        raise ValueError(
            f"cannot choose {count} of {shape[1]} points; give the cloud more points or ask for fewer"
        )
    return shape
