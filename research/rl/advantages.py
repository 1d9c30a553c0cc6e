"""Advantages from the rewards of a whole rollout (host side, NumPy: a few thousand scalars)."""

from typing import Literal

import numpy as np

Scale = Literal["group_std", "none"]

# Rewards that differ by less than this are equal: dividing by the deviation of float noise would make signal of it.
EQUAL_REWARDS = 1e-6


def group_relative(
    rewards: np.ndarray,
    group_size: int,
    *,
    scale: Scale = "group_std",
    ddof: int = 1,
    epsilon: float = 1e-6,
) -> tuple[np.ndarray, np.ndarray]:
    """GRPO's advantages, A_i = (R_i - mean_j R_j) / (std_j R_j + epsilon) within each group.

    DeepSeek-R1 v1 eq. 3; `scale='none'` drops the division (Dr.GRPO). The paper gives neither the degrees of freedom
    of the deviation nor epsilon: `ddof=1` and 1e-6 are what public trainers use.

    Args:
      rewards: [N] float, groups of one prompt contiguous, N a multiple of `group_size`.
      group_size: G, the number of responses to a prompt.

    Returns:
      advantages [N] float32, and degenerate [N / G] bool: groups whose rewards are all equal, and whose advantages
      are exactly zero.

    Raises:
      ValueError: N is not a multiple of G, or a reward is not finite.
    """
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 1 or group_size < 1 or len(rewards) % group_size:
        raise ValueError(
            f"rewards of shape {rewards.shape} do not split into groups of {group_size}"
        )
    if not np.isfinite(rewards).all():
        bad = np.flatnonzero(~np.isfinite(rewards))[:5].tolist()
        raise ValueError(f"rewards must be finite; rows {bad} are not. Mend the reward function.")
    groups = rewards.reshape(-1, group_size)
    degenerate = np.ptp(groups, axis=1) < EQUAL_REWARDS
    centred = groups - groups.mean(axis=1, keepdims=True)
    if scale == "group_std":
        std = groups.std(axis=1, ddof=min(ddof, group_size - 1), keepdims=True)
        centred = centred / (std + epsilon)
    elif scale != "none":
        raise ValueError(f"unknown advantage scale {scale!r}; use 'group_std' or 'none'")
    advantages = np.where(degenerate[:, None], 0.0, centred)
    return advantages.reshape(-1).astype(np.float32), degenerate
