"""Whitening: advantages to mean 0 and variance 1 over all tokens of a rollout (REINFORCE++, eq. 5 and 7).

Public trainers differ in what they weigh and how they guard the division; the defaults are OpenRLHF's:

    OpenRLHF   weight=token   ddof=0   eps_mode=clamp     1e-8
    verl       weight=token   ddof=1   eps_mode=variance  1e-8
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

# value → the values of all processes, in the same order on each
Gather = Callable[[Any], list[Any]]


@dataclasses.dataclass(frozen=True)
class Whitening:
    """weight: of the mean and variance, every `token` equally or every `sample` (long responses then weigh no more).
    ddof: variance = sum of squares / (number of tokens, or samples, - ddof).
    eps_mode, epsilon: A / sqrt(max(var, epsilon)) for clamp, A / sqrt(var + epsilon) for variance,
      A / (sqrt(var) + epsilon) for deviation.
    recenter: subtract the mean. After group means are subtracted the mean over *tokens* is not 0 where length goes with
      reward, and a group of equal rewards then gets -mean / std; without it, it gets 0.
    divide: by the deviation at all; without it only the mean is subtracted.
    """

    weight: Literal["token", "sample"] = "token"
    ddof: int = 0
    eps_mode: Literal["clamp", "variance", "deviation"] = "clamp"
    epsilon: float = 1e-8
    recenter: bool = True
    divide: bool = True


# Below this deviation the values are equal, whatever `epsilon` says.
EQUAL = 1e-6


def alone(value: Any) -> list[Any]:
    """The `Gather` of a single process."""
    return [value]


def total(values: Sequence[float], gather: Gather) -> np.ndarray:
    """Sums over processes of a few numbers, float64."""
    return np.sum(gather(np.asarray(values, np.float64)), axis=0)


def whiten(
    values_BT: np.ndarray, mask_BT: np.ndarray, config: Whitening, gather: Gather = alone
) -> tuple[np.ndarray, dict[str, float]]:
    """((values - mean) / deviation, {'mean', 'std'}) over the masked tokens of all processes; 0 outside, float64.

    The variance is a second pass: E[x^2] - mean^2 cancels. Equal values give zeros.

    Raises ValueError for fewer than two tokens.
    """
    lengths = mask_BT.sum(axis=1)
    weights = mask_BT / np.maximum(lengths, 1)[:, None] if config.weight == "sample" else mask_BT
    values_BT = np.where(mask_BT, values_BT, 0.0)  # before any product: nan * 0 is nan
    tokens, samples, weight, weighted = total(
        (lengths.sum(), (lengths > 0).sum(), weights.sum(), (weights * values_BT).sum()), gather
    )
    if tokens < 2:
        raise ValueError(
            f"{int(tokens)} tokens in the whole rollout: there is nothing to whiten. Are all responses empty or masked?"
        )
    mean = weighted / weight
    (squares,) = total(((weights * (values_BT - mean) ** 2).sum(),), gather)
    count = tokens if config.weight == "token" else samples
    var = squares / weight * count / max(count - config.ddof, 1)
    moments = {"mean": float(mean), "std": float(np.sqrt(var))}
    if np.sqrt(var) < EQUAL:
        return np.zeros(mask_BT.shape), moments
    if config.eps_mode == "clamp":
        deviation = np.sqrt(max(var, config.epsilon))
    elif config.eps_mode == "variance":
        deviation = np.sqrt(var + config.epsilon)
    else:
        deviation = np.sqrt(var) + config.epsilon
    shifted = values_BT - mean if config.recenter else values_BT
    return np.where(mask_BT, shifted / (deviation if config.divide else 1.0), 0.0), moments
