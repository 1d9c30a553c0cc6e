"""Rewards that a program can check: a problem and a completion in; a reward, its parts and a status out."""

from research.rewards.rewarder import (
    Reward,
    RewardConfig,
    Rewarder,
    RewardFailure,
    Status,
    summarize,
)

__all__ = ["Reward", "RewardConfig", "RewardFailure", "Rewarder", "Status", "summarize"]
