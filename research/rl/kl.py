"""Per-token estimators of KL(policy || reference) from samples of the policy, and what their gradients are.

With r = log p_ref(token) - log p(token), tokens drawn from the policy (J. Schulman, "Approximating KL divergence"):

    k1 = -r              unbiased, high variance, may be negative
    k2 = r^2 / 2         biased, low variance
    k3 = e^r - r - 1     unbiased, never negative; DeepSeek-R1 v1 eq. 2 writes it with x = e^r
    k3+                  the value of k3 with the gradient of k2
    minimax              sg(p - p_ref) log p: no divergence by its value (MiniMax-01 section 5.4.2)

An unbiased value does not make an unbiased gradient. On-policy expectations (REINFORCE++ section 3):

             as a loss, differentiated              inside the reward, by the score function
    k1       0                                      the gradient of KL(p || p_ref)
    k2       the gradient of KL(p || p_ref)         grad E[k2] - grad KL(p || p_ref)
    k3       the gradient of KL(p_ref || p)         grad KL(p || p_ref) - grad KL(p_ref || p)
    minimax  E[(p - p_ref) grad log p]              (not defined)

So k1 belongs into the reward, and k2 (or k3+) into the loss. Per token they agree; over a sequence, k1 in a return also
holds what a token does to the divergence of later ones, which a loss per token leaves out.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Estimator = Literal["k1", "k2", "k3", "k3+", "minimax"]
IN_REWARD = ("k1", "k2", "k3")

# e^20 is far outside any ratio that carries information, and far inside float32.
MAX_LOG_RATIO = 20.0


def estimate(
    logprobs: Array,
    ref_logprobs: Array,
    estimator: Estimator = "k3",
    *,
    limit: float | None = None,
) -> Array:
    """Per-token KL estimate, same shape and dtype as `logprobs`; log-ratios are clamped to +-20.

    `limit` clamps the estimate to +- that, and with it the gradient to 0 outside: OpenRLHF has 10 for all three, verl
    10 for k3 alone, None is no clamp.
    """
    log_ratio = jnp.clip(ref_logprobs - logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        value = -log_ratio
    elif estimator == "k2":
        value = 0.5 * jnp.square(log_ratio)
    elif estimator == "k3":
        value = jnp.exp(log_ratio) - log_ratio - 1.0
    elif estimator == "k3+":
        k2 = estimate(logprobs, ref_logprobs, "k2", limit=limit)
        k3 = estimate(logprobs, ref_logprobs, "k3", limit=limit)
        return k2 + jax.lax.stop_gradient(k3 - k2)
    elif estimator == "minimax":
        gap = jnp.exp(logprobs) - jnp.exp(ref_logprobs)
        value = jax.lax.stop_gradient(gap) * logprobs
    else:
        raise ValueError(
            f"unknown KL estimator {estimator!r}; use 'k1', 'k2', 'k3', 'k3+' or 'minimax'"
        )
    return value if limit is None else jnp.clip(value, -limit, limit)


def in_reward(
    logprobs: np.ndarray,
    ref_logprobs: np.ndarray,
    estimator: Estimator = "k1",
    *,
    limit: float | None = None,
) -> np.ndarray:
    """The same on the host, float64, for log-probabilities frozen at the rollout. Only k1, k2 and k3 have this form."""
    if estimator not in IN_REWARD:
        raise ValueError(f"KL estimator {estimator!r} has no form inside the reward; use 'k1'")
    gap = np.asarray(ref_logprobs, np.float64) - np.asarray(logprobs, np.float64)
    log_ratio = np.clip(gap, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    value = {
        "k1": lambda r: -r,
        "k2": lambda r: 0.5 * r**2,
        "k3": lambda r: np.expm1(r) - r,
    }[estimator](log_ratio)
    return value if limit is None else np.clip(value, -limit, limit)
