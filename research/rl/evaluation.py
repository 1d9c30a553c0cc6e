"""Metrics of sampled responses, in NumPy: pass@1, pass@k, cons@k, lengths, format, reflection.

P problems with N responses each; every metric of several problems is a mean over problems, and
its uncertainty that of having drawn these problems (DeepSeek-R1, Nature supplement 4; v1 table 2).
"""

import collections
import dataclasses
import re
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

REFLECTION_WORDS = (
    "wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check",
)  # fmt: skip

_REFLECTION = re.compile(rf"\b(?:{'|'.join(REFLECTION_WORDS)})\b", re.IGNORECASE)
_WAIT = re.compile(r"\bwait\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Samples:
    """Graded responses to P problems, N to each.

    Attributes:
        correct: [P, N] bool.
        answers: P lists of N canonical answers; None where it could not be read.
        formatted: [P, N] bool, the format kept to.
        lengths: [P, N] tokens of the response.
        truncated: [P, N] bool, cut off by the length limit.
        difficulty: [P] int.
        texts: P lists of N responses.
    """

    correct: np.ndarray
    answers: Sequence[Sequence[str | None]]
    formatted: np.ndarray
    lengths: np.ndarray
    truncated: np.ndarray
    difficulty: np.ndarray
    texts: Sequence[Sequence[str]]

    def __post_init__(self):
        shape = np.shape(self.correct)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"correct has shape {shape}, not [problems, responses]")
        for name in ("formatted", "lengths", "truncated"):
            if np.shape(getattr(self, name)) != shape:
                raise ValueError(f"{name} has shape {np.shape(getattr(self, name))}, not {shape}")
        for name in ("answers", "texts"):
            rows = [len(row) for row in getattr(self, name)]
            if rows != [shape[1]] * shape[0]:
                raise ValueError(f"{name} is not {shape[0]} lists of {shape[1]}")
        if np.shape(self.difficulty) != shape[:1]:
            raise ValueError(f"difficulty has shape {np.shape(self.difficulty)}, not {shape[:1]}")


def join(parts: Sequence[Samples]) -> Samples:
    """The problems of all parts, which have equally many responses to each."""

    def joined(name):
        values = [getattr(part, name) for part in parts]
        lists = isinstance(values[0], Sequence)
        return [row for rows in values for row in rows] if lists else np.concatenate(values)

    return Samples(**{field.name: joined(field.name) for field in dataclasses.fields(Samples)})


def report(samples: Samples, *, k: int = 16, seed: int = 0) -> dict[str, float]:
    """All the metrics of one evaluation.

    pass@1 with its standard error and 95 % interval; pass@k and cons@k for `k` responses, or for
    all N if there are fewer; pass@1 at each difficulty; format and truncation rates; mean lengths;
    reflection words per response, and the share of responses with 'wait'. A mean over nothing (the
    length of correct responses, when none is) is left out. `seed` is for resampling.
    """
    correct = np.asarray(samples.correct, bool)
    lengths = np.asarray(samples.lengths, float)
    k = min(k, correct.shape[1])
    rates = correct.mean(axis=1)
    votes = consensus(samples.answers, correct, k, seed=seed)
    low, high = bootstrap(rates, seed=seed)
    texts = [text for row in samples.texts for text in row]
    metrics = {
        "pass@1": float(rates.mean()),
        "pass@1/stderr": standard_error(rates),
        "pass@1/low": low,
        "pass@1/high": high,
        f"pass@{k}": float(pass_at_k(correct.shape[1], correct.sum(axis=1), k).mean()),
        f"cons@{k}": float(votes.mean()),
        f"cons@{k}/stderr": standard_error(votes),
        "format": float(np.mean(samples.formatted)),
        "truncated": float(np.mean(samples.truncated)),
        "length": float(lengths.mean()),
        "reflection/words": float(np.mean([len(_REFLECTION.findall(text)) for text in texts])),
        "reflection/wait": float(np.mean([has_wait(text) for text in texts])),
    }
    if correct.any():
        metrics["length/correct"] = float(lengths[correct].mean())
    if not correct.all():
        metrics["length/wrong"] = float(lengths[~correct].mean())
    for difficulty, (rate, _) in breakdown(rates, samples.difficulty).items():
        metrics[f"difficulty/{difficulty}"] = rate
    return metrics


def pass_at_k(n: int, correct: np.ndarray | int, k: int) -> np.ndarray:
    """Unbiased pass@k = 1 - C(n - c, k) / C(n, k) of n responses with c correct ones.

    As a product, 1 - prod_{i = n-c+1..n} (1 - k / i), which does not overflow (Chen et al. 2021,
    "Evaluating Large Language Models Trained on Code", eq. 1).

    Args:
        correct: integer c of any shape, which the float64 result has too.

    Raises ValueError unless 1 <= k <= n and 0 <= c <= n.
    """
    counts = np.asarray(correct)
    if not 1 <= k <= n or counts.size and not (0 <= counts.min() and counts.max() <= n):
        raise ValueError(
            f"pass@{k} of {n} responses with {counts.tolist()} correct: need k, c <= n"
        )
    by_count = np.empty(n + 1)
    for c in range(n + 1):
        by_count[c] = 1.0 - np.prod(1.0 - k / np.arange(max(n - c + 1, k), n + 1)) if c else 0.0
    return by_count[counts]


def consensus(
    answers: Sequence[Sequence[Hashable | None]],
    correct: np.ndarray,
    k: int,
    *,
    draws: int = 256,
    seed: int = 0,
) -> np.ndarray:
    """[P] float64: how probably a majority vote over k of the N answers is right (cons@k).

    None never wins; without any other answer the vote is wrong. Of tied answers each wins equally
    often. For k < N it is the mean over `draws` subsets of k answers, drawn without replacement.

    Raises ValueError unless 1 <= k <= N.
    """
    correct = np.asarray(correct, bool)
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"cons@{k} of {n} responses: need 1 <= k <= {n}")
    rng = np.random.default_rng(seed)
    result = np.zeros(len(correct))
    for p, (row, right) in enumerate(zip(answers, correct, strict=True)):
        classes = list(dict.fromkeys(answer for answer in row if answer is not None))
        if not classes:
            continue
        member = np.array([[answer == c for c in classes] for answer in row])  # [N, C]
        accuracy = (member * right[:, None]).sum(axis=0) / member.sum(axis=0)
        if k == n:
            counts = member.sum(axis=0)[None]
        else:
            subsets = rng.permuted(np.tile(np.arange(n), (draws, 1)), axis=1)[:, :k]
            counts = member[subsets].sum(axis=1)
        winners = (counts == counts.max(axis=1, keepdims=True)) & (counts > 0)
        votes = (winners * accuracy).sum(axis=1) / np.maximum(winners.sum(axis=1), 1)
        result[p] = votes.mean()
    return result


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of per-problem values [P]; 0 for a single problem.

    Responses to one problem are not independent, so the problem is the unit (clustered errors).
    """
    values = np.asarray(values, float)
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def bootstrap(
    values: np.ndarray, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of per-problem (or per-seed) values [P], resampled."""
    values = np.asarray(values, float)
    rng = np.random.default_rng(seed)
    n, means = len(values), np.empty(draws)
    at_once = max(1, 2**16 // n)  # few calls, and indices that stay in cache
    for start in range(0, draws, at_once):
        part = means[start : start + at_once]
        part[:] = values[rng.integers(0, n, (len(part), n))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def breakdown(values: np.ndarray, labels: Iterable[int]) -> dict[int, tuple[float, int]]:
    """label → (mean of the values [P] under it, their number), in the labels' order."""
    values, labels = np.asarray(values, float), np.asarray(labels)
    return {
        int(label): (float(values[labels == label].mean()), int((labels == label).sum()))
        for label in np.unique(labels)
    }


def reflections(text: str) -> collections.Counter[str]:
    """How often each of the paper's reflection words stands in a text: whole words, any case."""
    return collections.Counter(word.lower() for word in _REFLECTION.findall(text))


def reflection_words(text: str) -> str:
    """The reflection words of a text alone, in their order: `report` finds in it what it finds in the text."""
    return " ".join(_REFLECTION.findall(text))


def has_wait(text: str) -> bool:
    """Whether the word 'wait' is in it, in any case."""
    return _WAIT.search(text) is not None
