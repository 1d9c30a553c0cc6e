"""Advantages from the rewards of a whole rollout: every estimator of the field under one signature.

An estimator is a baseline, a scale, and whether the KL penalty is summed over the sequence or returned to each token:
`RULES` is the table of them. They run on the host in float64, once per rollout and before it is split into minibatches,
so what they average over is the whole batch. Where processes hold parts of it, `gather` exchanges a few numbers per
response (a group may be spread over processes) and sums of tokens, never tokens.

Equations are those of REINFORCE++ (arXiv 2501.03262 v9) unless another paper is named.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import numpy as np

from research.rl.whitening import Gather, Whitening, alone, total, whiten

# Rewards that differ by less than this are equal: dividing by the deviation of float noise would make signal of it.
EQUAL_REWARDS = 1e-6


@dataclasses.dataclass(frozen=True)
class Rule:
    """baseline: what is subtracted from the reward R of a response (before the scale).
      none · group: mean of its group · others: mean of the rest of its group · greedy: reward of the greedy response ·
      moving: mean reward of past batches · value: V of every token, by generalised advantage estimation.
    scale: what it is divided by.
      none · group_std · batch_std: deviation of the rewards · whiten: tokens to mean 0 and variance 1.
    per_token: KL is subtracted from the reward token by token, and A_t holds what comes after t (eq. 4); otherwise the
      response's sum is subtracted from R, and all its tokens get the same A.
    balance: sum of positive A = -(sum of negative A) over responses (MiniMax-01, section 5.4.2).
    """

    baseline: Literal["none", "group", "others", "greedy", "moving", "value"]
    scale: Literal["none", "group_std", "batch_std", "whiten"] = "none"
    per_token: bool = False
    balance: bool = False

    @property
    def compares(self) -> bool:
        """Whether it needs several responses to a prompt."""
        return self.baseline in ("group", "others")


Estimator = Literal[
    "ppo", "grpo", "dr_grpo", "rloo", "remax", "reinforce", "reinforce_pp", "reinforce_pp_baseline",
    "batch_std", "dapo", "gspo", "cispo", "minimax_grpo",
]  # fmt: skip
GRPO = Rule("group", "group_std")
RULES: dict[Estimator, Rule] = {
    "ppo": Rule("value", "whiten", per_token=True),
    "grpo": GRPO,  # DeepSeek-R1 v1 eq. 3
    "dr_grpo": Rule("group"),
    "rloo": Rule("others"),
    "remax": Rule("greedy"),
    "reinforce": Rule("moving"),
    "reinforce_pp": Rule("none", "whiten", per_token=True),  # eq. 4, 5
    "reinforce_pp_baseline": Rule("group", "whiten", per_token=True),  # eq. 6, 7
    "batch_std": Rule("group", "batch_std"),
    # GRPO's advantages; what is their own is in the loss (`algorithms.ALGORITHMS`).
    "dapo": GRPO,
    "gspo": GRPO,
    "cispo": GRPO,
    "minimax_grpo": Rule("group", "group_std", balance=True),
}


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """Switches that the estimators share; each reads those that its rule speaks of.

    ddof, epsilon: of the deviation of rewards, std(ddof) + epsilon (epsilon None: 1e-6, and 1e-4 for batch_std).
      The papers say neither; N - 1 is what public trainers use.
    gamma, lam: discount per token of the policy's own, and GAE's lambda.
    reward_clip: rewards are clipped to +- this (None: not).
    baseline_decay: of the moving average over batches.
    """

    ddof: int = 1
    epsilon: float | None = None
    whiten: Whitening = Whitening()
    gamma: float = 1.0
    lam: float = 1.0
    reward_clip: float | None = None
    baseline_decay: float = 0.9

    def __post_init__(self):
        for name in ("gamma", "lam", "baseline_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must lie in [0, 1]")


class Estimate(NamedTuple):
    """advantages: [B, T] float32, 0 outside the mask. returns: [B, T] float32, what a value function is to predict.

    statistics, over the whole batch: `rollout/dropped` (rewards that are not finite), `reward/used` (mean of the
    others, KL of the sequence subtracted where the rule does), `rollout/zero_std` (share of the groups of two and more
    whose rewards are equal), `rollout/lone` (groups that drops left with one response), `advantages/abs` (mean |A| of a
    token), and where tokens are whitened, `advantages/mean` and `advantages/std` before that.
    """

    advantages: np.ndarray
    returns: np.ndarray
    statistics: dict[str, float]


def estimate(
    name: str,
    rewards: np.ndarray,
    mask: np.ndarray,
    group: np.ndarray,
    *,
    kl: np.ndarray | None = None,
    values: np.ndarray | None = None,
    greedy: np.ndarray | None = None,
    baseline: float | None = None,
    config: AdvantageConfig = AdvantageConfig(),
    gather: Gather = alone,
) -> Estimate:
    """Advantages and returns by the estimator `name` (a key of `RULES`).

    Args:
      rewards: [B] float, one for each response. Those that are not finite are dropped with their response.
      mask: [B, T] bool, tokens that the policy chose. Others in between (a tool's output) carry the return through.
      group: [B] int, which prompt it answers; equal ids may be anywhere, in other processes too.
      kl: [B, T] penalty at each token, coefficient included, from log-probabilities frozen at the rollout.
      values: [B, T] of the critic before the token, for `ppo`.
      greedy: [B] reward of the greedy response to the same prompt, for `remax`.
      baseline: mean reward of past batches, for `reinforce`; None (no past): this batch's mean.
      gather: value → the values of all processes, in the same order for all; every one must call `estimate`.

    Raises:
      ValueError: an unknown name; shapes that disagree; what the estimator needs is missing; a group of one where
        groups are compared; fewer than two tokens to whiten.
    """
    rule = rule_of(name)
    rewards, mask = np.asarray(rewards, np.float64), np.asarray(mask, bool)
    group = np.asarray(group)
    _check_shapes(rewards, mask, group=group, kl=kl, values=values, greedy=greedy)
    finite = np.isfinite(rewards)
    if rule.baseline == "greedy":
        greedy = _needed(name, "greedy", greedy, "rewards of greedy responses")
        finite &= np.isfinite(greedy)
        greedy = np.where(finite, greedy, 0.0)
    mask = mask & finite[:, None]
    rewards = _clipped(np.where(finite, rewards, 0.0), config)
    kl = np.zeros(mask.shape) if kl is None else np.where(mask, kl, 0.0)
    if not rule.per_token:
        rewards = rewards - kl.sum(axis=1)

    batch = _Batch(rewards, group, finite, config.ddof, gather)
    if rule.compares and (batch.sizes == 1).any():
        raise ValueError(
            f"{name} compares the responses to a prompt, and {int((batch.sizes == 1).sum())} of {len(batch.sizes)} "
            "groups have one; sample more to each, or take reinforce_pp, reinforce or remax"
        )
    scores = rewards - _baseline(rule, batch, rewards, greedy, baseline)
    if rule.baseline == "others":
        scores *= (batch.kept / np.maximum(batch.kept - 1, 1))[batch.place]
    if rule.compares:
        scores = np.where(batch.equal[batch.place], 0.0, scores)
    if rule.scale == "group_std":
        scores = scores / (batch.std + _epsilon(config, 1e-6))[batch.place]
    elif rule.scale == "batch_std":
        varies = batch.spread >= EQUAL_REWARDS
        scores = scores / (batch.batch_std + _epsilon(config, 1e-4)) if varies else 0.0 * scores
    if rule.balance:
        scores = balanced(scores, finite, gather)

    if rule.baseline == "value":
        values = _needed(name, "values", values, "a critic's values")
        advantages, returns = gae(
            at_last(rewards, mask) - kl, values, mask, gamma=config.gamma, lam=config.lam
        )
    elif rule.per_token:
        advantages = returns_to_go(at_last(scores, mask) - kl, mask, gamma=config.gamma)
        returns = returns_to_go(at_last(rewards, mask) - kl, mask, gamma=config.gamma)
    else:
        advantages, returns = (np.where(mask, x[:, None], 0.0) for x in (scores, rewards))

    statistics = batch.statistics()
    if rule.scale == "whiten":
        advantages, moments = whiten(advantages, mask, config.whiten, gather)
        statistics |= {f"advantages/{key}": value for key, value in moments.items()}
    size, count = total((np.abs(advantages).sum(), mask.sum()), gather)
    statistics["advantages/abs"] = float(size / max(count, 1))
    return Estimate(advantages.astype(np.float32), returns.astype(np.float32), statistics)


def unequal(
    rewards: np.ndarray, group: np.ndarray, config: AdvantageConfig = AdvantageConfig()
) -> np.ndarray:
    """[groups] bool, in the order of their ids: whose rewards differ, as `estimate` clips and drops them.

    The others teach nothing where responses to a prompt are compared. (A KL penalty is known later, and is not looked
    at.)
    """
    rewards = np.asarray(rewards, np.float64)
    finite = np.isfinite(rewards)
    rewards = _clipped(np.where(finite, rewards, 0.0), config)
    return ~_Batch(rewards, np.asarray(group), finite, config.ddof, alone).equal


def rule_of(name: str) -> Rule:
    if name not in RULES:
        raise ValueError(f"unknown estimator {name!r}; there are {', '.join(RULES)}")
    return RULES[name]


def at_last(rewards_B: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    """[B, T]: the reward at the last token of the mask, 0 elsewhere and in a row without tokens."""
    out = np.zeros(mask_BT.shape)
    rows = np.flatnonzero(mask_BT.any(axis=1))
    last = mask_BT.shape[1] - 1 - np.argmax(mask_BT[rows, ::-1], axis=1)
    out[rows, last] = rewards_B[rows]
    return out


def returns_to_go(rewards_BT: np.ndarray, mask_BT: np.ndarray, *, gamma: float = 1.0) -> np.ndarray:
    """A_t = sum_{i >= t} gamma^(steps from t to i) rew_i (eq. 4), [B, T] float64, 0 outside the mask.

    Only tokens of the mask are steps: what stands between them neither earns nor ends nor ages the return.
    """
    rewards_BT = np.where(mask_BT, rewards_BT, 0.0)
    if gamma == 1.0:
        out = np.cumsum(rewards_BT[:, ::-1], axis=1)[:, ::-1]
        return np.where(mask_BT, out, 0.0)
    zeros = np.zeros(mask_BT.shape)
    return gae(rewards_BT, zeros, mask_BT, gamma=gamma, lam=1.0)[0]


def gae(
    rewards_BT: np.ndarray,
    values_BT: np.ndarray,
    mask_BT: np.ndarray,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): advantages and returns, both [B, T] float64.

        delta_t = rew_t + gamma V_{t+1} - V_t,   A_t = sum_l (gamma lam)^l delta_{t+l},   returns = A + V

    t + 1 is the next token of the mask, and V is 0 after the last. Outside the mask all is 0.
    """
    rows, length = mask_BT.shape
    advantages = np.zeros((rows, length))
    running, next_value = np.zeros(rows), np.zeros(rows)
    for t in reversed(range(length)):
        here = mask_BT[:, t]
        delta = rewards_BT[:, t] + gamma * next_value - values_BT[:, t]
        running = np.where(here, delta + gamma * lam * running, running)
        next_value = np.where(here, values_BT[:, t], next_value)
        advantages[:, t] = np.where(here, running, 0.0)
    return advantages, np.where(mask_BT, advantages + values_BT, 0.0)


def balanced(scores_B: np.ndarray, counted_B: np.ndarray, gather: Gather = alone) -> np.ndarray:
    """Positive and negative advantages rescaled to the same sum of |A|, half of what it is together.

    MiniMax-01 section 5.4.2 asks for balanced advantages and gives no formula: this one is a choice. A batch that has
    one sign alone stays as it is.
    """
    scores_B = np.where(counted_B, scores_B, 0.0)
    positive, negative = total(
        (np.maximum(scores_B, 0).sum(), np.maximum(-scores_B, 0).sum()), gather
    )
    if not (positive > 0 and negative > 0):
        return scores_B
    half = (positive + negative) / 2
    return scores_B * np.where(scores_B > 0, half / positive, half / negative)


def overlong_penalty(lengths: np.ndarray, limit: int, buffer: int) -> np.ndarray:
    """DAPO's soft punishment of length (arXiv 2503.14476, eq. 13), added to the reward; [N] float64 in [-1, 0].

    0 up to limit - buffer tokens, from there linearly down to -1 at `limit` and beyond. buffer 0: no penalty at all.
    """
    if not buffer:
        return np.zeros(len(lengths))
    return -np.clip((np.asarray(lengths, np.float64) - (limit - buffer)) / buffer, 0.0, 1.0)


def moving_average(state_2: np.ndarray, mean: float, decay: float) -> np.ndarray:
    """The state after a batch: float [2], the decayed sum of batch means and that of their weights."""
    return decay * np.asarray(state_2, np.float64) + (1 - decay) * np.array([mean, 1.0])


def average_of(state_2: np.ndarray) -> float | None:
    """The moving average, without the bias of its start; None before the first batch."""
    return float(state_2[0] / state_2[1]) if state_2[1] > 0 else None


class _Batch:
    """Statistics of the rewards of all processes, by group and together.

    Arrays over the groups: sizes and kept, responses before and after drops; mean; std; equal, where there is nothing
    to compare. `place` [B] is where each response of this process finds its group in them.
    """

    def __init__(self, rewards, group, finite, ddof: int, gather: Gather):
        parts = zip(*gather((rewards, group, finite)), strict=True)
        everyone, groups, kept = (np.concatenate(part) for part in parts)
        ids, owner = np.unique(groups, return_inverse=True)
        used, owner_used = everyone[kept], owner[kept]
        n = len(ids)
        self.place = np.searchsorted(ids, group)
        self.sizes = np.bincount(owner, minlength=n)
        self.kept = np.bincount(owner_used, minlength=n)
        self.mean = np.bincount(owner_used, used, n) / np.maximum(self.kept, 1)
        squares = np.bincount(owner_used, (used - self.mean[owner_used]) ** 2, n)
        self.std = np.sqrt(squares / np.maximum(self.kept - ddof, 1))
        low, high = np.full(n, np.inf), np.full(n, -np.inf)
        np.minimum.at(low, owner_used, used)
        np.maximum.at(high, owner_used, used)
        self.equal = ~(high - low >= EQUAL_REWARDS)
        self.dropped = int((~kept).sum())
        self.batch_mean = float(used.mean()) if len(used) else 0.0
        self.spread = float(np.ptp(used)) if len(used) else 0.0
        self.batch_std = float(used.std(ddof=ddof)) if len(used) > ddof else 0.0

    def statistics(self) -> dict[str, float]:
        several = self.sizes > 1
        figures = {
            "rollout/dropped": float(self.dropped),
            "reward/used": self.batch_mean,
            "rollout/lone": float((several & (self.kept == 1)).sum()),
        }
        if several.any():
            figures["rollout/zero_std"] = float(self.equal[several].mean())
        return figures


def _baseline(rule: Rule, batch: _Batch, rewards, greedy, baseline) -> Any:
    if rule.compares:
        return batch.mean[batch.place]
    if rule.baseline == "greedy":
        return greedy
    if rule.baseline == "moving":
        return batch.batch_mean if baseline is None else baseline
    return 0.0


def _clipped(rewards: np.ndarray, config: AdvantageConfig) -> np.ndarray:
    limit = config.reward_clip
    return rewards if limit is None else np.clip(rewards, -limit, limit)


def _epsilon(config: AdvantageConfig, usual: float) -> float:
    return usual if config.epsilon is None else config.epsilon


def _needed(name: str, argument: str, value: np.ndarray | None, what: str) -> np.ndarray:
    if value is None:
        raise ValueError(f"{name} needs {what} ({argument}=)")
    return np.asarray(value, np.float64)


def _check_shapes(rewards: np.ndarray, mask: np.ndarray, **others: Any) -> None:
    if rewards.ndim != 1 or mask.ndim != 2 or len(mask) != len(rewards):
        raise ValueError(f"rewards {rewards.shape} and mask {mask.shape} are not [B] and [B, T]")
    wanted: dict[str, tuple[int, ...]] = {"group": rewards.shape, "greedy": rewards.shape}
    for name, value in others.items():
        shape = wanted.get(name, mask.shape)
        if value is not None and np.shape(value) != shape:
            raise ValueError(f"{name} has shape {np.shape(value)}, not {shape}")
