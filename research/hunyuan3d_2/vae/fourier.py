"""Fourier features of positions (Hunyuan3D 2.0, section 3.1; as in 3DShape2VecSet)."""

import jax
import jax.numpy as jnp


def fourier_features(x: jax.Array, num_freqs: int) -> jax.Array:
    """[x, sin(x_d 2^k), cos(x_d 2^k)] for k < num_freqs, without a factor of pi.

    float32 `[..., D]` -> `[..., D (1 + 2 num_freqs)]`; within the sines, and within the cosines, the
    frequencies of one dimension are neighbours.
    """
    x = x.astype(jnp.float32)
    angles = x[..., None] * 2.0 ** jnp.arange(num_freqs, dtype=jnp.float32)
    angles = angles.reshape(*x.shape[:-1], -1)
    return jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles)], axis=-1)
