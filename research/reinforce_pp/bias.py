"""What dividing by the deviation of a small group does (REINFORCE++ v9, section 3 and its theorem).

With N rewards of one prompt, A_i = (r_i - mean) / std is no unbiased estimate of the standardised advantage
z_i = (r_i - mu) / sigma: numerator and denominator share r_i, and |A_i| <= (N - 1) / sqrt(N) whatever r_i is. The bias
falls as 1 / N. For right-or-wrong rewards, what that makes of the policy gradient has a closed form,

    E[gradient of a prompt] = w_N(p) grad p,    w_N(p) = (N - 1) / N  E[std] / (p (1 - p)),

where p is the prompt's pass rate: for N → infinity it is 1 / sqrt(p (1 - p)), the gradient of 2 arcsin sqrt(p), which
favours prompts that are almost always or almost never answered. Without the division the weight is the constant
(N - 1) / N, and a deviation of the whole batch leaves it constant.

Simulations go through `research.rl.advantages.estimate`, so what is measured is what trains.
"""

from typing import NamedTuple

import numpy as np

from research.rl import advantages


class Estimated(NamedTuple):
    """A mean over independent trials, and its standard error."""

    mean: float
    error: float


def of_fixed_reward(group_size: int, z: float, trials: int, rng: np.random.Generator) -> Estimated:
    """E[A | r = mu + z sigma] under GRPO's normalisation, the other rewards of the group Gaussian."""
    rewards = rng.normal(size=(trials, group_size))
    rewards[:, 0] = z
    return _mean(_grpo(rewards)[:, 0])


def of_right_answer(group_size: int, p: float, trials: int, rng: np.random.Generator) -> Estimated:
    """E[A | r = 1] under GRPO's normalisation, the others of the group right with probability p."""
    rewards = (rng.random((trials, group_size)) < p).astype(float)
    rewards[:, 0] = 1.0
    return _mean(_grpo(rewards)[:, 0])


def of_right_answer_exactly(group_size: int, p: float) -> float:
    """The same by enumeration of how many of the others are right."""
    right = np.arange(group_size) + 1.0
    deviation = np.sqrt(right * (group_size - right) / (group_size * (group_size - 1)))
    mixed = right < group_size  # a group of equal rewards gets 0
    advantage = np.where(mixed, (1 - right / group_size) / np.where(mixed, deviation, 1.0), 0.0)
    return float(_binomial(group_size - 1, p) @ advantage)


def weight(group_size: int, p: float | np.ndarray) -> np.ndarray:
    """w_N(p) of GRPO for right-or-wrong rewards, deviation over N - 1; float64 of p's shape, 0 < p < 1."""
    p = np.asarray(p, float)
    n, right = group_size, np.arange(group_size + 1.0)
    deviation = np.sqrt(right * (n - right) / (n * (n - 1)))
    expected = np.array([_binomial(n, one) @ deviation for one in p.ravel()]).reshape(p.shape)
    return (n - 1) / n * expected / (p * (1 - p))


def limit(p: float | np.ndarray) -> np.ndarray:
    """w_N(p) for N → infinity."""
    p = np.asarray(p, float)
    return 1 / np.sqrt(p * (1 - p))


def sampled_weights(
    name: str, group_size: int, p: np.ndarray, groups: int, rng: np.random.Generator
) -> list[Estimated]:
    """The weight of every prompt's gradient under an estimator, from sampled groups.

    A prompt is a coin with a logit: d log prob / d logit = r - p, and d p / d logit = p (1 - p). All `groups` of all
    prompts (pass rates `p`, [P]) are one batch, so what the estimator takes from the batch it takes from the mixture.
    """
    rates = np.repeat(p, groups)
    rewards = (rng.random((len(rates), group_size)) < rates[:, None]).astype(float)
    gradient = (_advantages(name, rewards) * (rewards - rates[:, None])).mean(axis=1)
    relative = gradient / (rates * (1 - rates))
    return [_mean(part) for part in relative.reshape(len(p), groups)]


def _grpo(rewards_PG: np.ndarray) -> np.ndarray:
    return _advantages("grpo", rewards_PG)


def _advantages(name: str, rewards_PG: np.ndarray) -> np.ndarray:
    """Of responses of one token each; float64 [P, G]."""
    prompts, size = rewards_PG.shape
    group = np.repeat(np.arange(prompts), size)
    mask = np.ones((prompts * size, 1), bool)
    found = advantages.estimate(name, rewards_PG.ravel(), mask, group)
    return found.advantages.reshape(prompts, size).astype(float)


def _binomial(n: int, p: float) -> np.ndarray:
    """Probabilities of 0 to n successes, 0 < p < 1."""
    k = np.arange(n + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log_choose = log_factorial[n] - log_factorial[k] - log_factorial[n - k]
    return np.exp(log_choose + k * np.log(p) + (n - k) * np.log1p(-p))


def _mean(values: np.ndarray) -> Estimated:
    return Estimated(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))
