"""The VAE's loss (section 3.1, equation 1): reconstruction of the field, and KL divergence."""

import jax
import jax.numpy as jnp


def field_target(distance: jax.Array, truncation: float) -> jax.Array:
    """clip(d / truncation, -1, 1) of the signed distance d, positive inside."""
    return jnp.clip(distance / truncation, -1.0, 1.0)


def kl_divergence(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """KL(N(mean, e^logvar) || N(0, 1)) = (mean^2 + e^logvar - 1 - logvar) / 2 of each channel."""
    return 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)


def vae_loss(
    field_BQ: jax.Array,
    distance_BQ: jax.Array,
    mean_BLd: jax.Array,
    logvar_BLd: jax.Array,
    *,
    kl_coef: float,
    truncation: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(loss, reconstruction, KL) of each shape, float32 `[B]`: loss = reconstruction + kl_coef KL.

    The reconstruction is the mean square over points of field - field_target, the KL the mean over
    tokens and channels, so that kl_coef has one meaning for every number of tokens.
    """
    reconstruction_B = jnp.mean(
        jnp.square(field_BQ - field_target(distance_BQ, truncation)), axis=1
    )
    kl_B = jnp.mean(kl_divergence(mean_BLd, logvar_BLd), axis=(1, 2))
    return reconstruction_B + kl_coef * kl_B, reconstruction_B, kl_B
