"""Per-token estimators of KL(policy || reference) from samples of the policy.

With r = log p_ref(token) - log p(token), tokens drawn from the policy (J. Schulman, "Approximating KL divergence"):

    k1 = -r              unbiased, high variance, may be negative
    k2 = r^2 / 2         biased, low variance; its gradient is that of the reverse KL on-policy
    k3 = e^r - r - 1     unbiased, never negative; DeepSeek-R1 v1 eq. 2 writes it with x = e^r
"""

from typing import Literal

import jax.numpy as jnp
from jax import Array

Estimator = Literal["k1", "k2", "k3"]

# e^20 is far outside any ratio that carries information, and far inside float32.
MAX_LOG_RATIO = 20.0


def estimate(logprobs: Array, ref_logprobs: Array, estimator: Estimator = "k3") -> Array:
    """Per-token KL estimate, same shape and dtype as `logprobs`; log-ratios are clamped to +-20."""
    log_ratio = jnp.clip(ref_logprobs - logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return 0.5 * jnp.square(log_ratio)
    if estimator == "k3":
        return jnp.exp(log_ratio) - log_ratio - 1.0
    raise ValueError(f"unknown KL estimator {estimator!r}; use 'k1', 'k2' or 'k3'")
