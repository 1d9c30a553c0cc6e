"""What a table is: training runs, and claims judged on what they measured."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from absl import flags

INIT_FROM = flags.DEFINE_string(
    "init_from", "", "gpu scale: Hugging Face directory of the base model."
)

Status = Literal["confirmed", "not resolved", "refuted", "not run"]
Results = Mapping[str, Mapping[int, Mapping[str, Any]]]  # run → seed → what it measured


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run: `measure(seed, directory, results_so_far_of_this_seed)` returns JSON-ready figures.

    `needs` names runs of the same seed that come first.
    """

    name: str
    measure: Callable[[int, pathlib.Path, Mapping[str, Mapping[str, Any]]], dict[str, Any]]
    needs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`numbers`: what was measured for the claim, by label."""

    status: Status
    numbers: Mapping[str, Interval | float | str]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement of the paper, what it reports, and a predicate on our figures.

    Attributes:
      number: the claim's number within the paper's list in `research/<paper>/README.md`.
      paper: the paper's figures and where they stand; never printed in our column.
      rule: in words, when the claim counts as confirmed and when as refuted.
      needs: the runs that `judge` reads.
    """

    number: str
    statement: str
    paper: str
    rule: str
    needs: tuple[str, ...]
    judge: Callable[[Results], Verdict]


@dataclasses.dataclass(frozen=True)
class Table:
    """`scales`: the runs at each scale; `figure(results, path)` draws them; `seeds`: where --seeds names none."""

    name: str
    title: str
    scales: Mapping[str, Sequence[Run]]
    claims: Sequence[Claim]
    figure: Callable[[Results, pathlib.Path], None]
    seeds: tuple[int, ...] = (0, 1, 2)


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean over seeds with its bootstrap 95 % percentile interval (10,000 resamples of the seeds, fixed stream).

    With few seeds that is too narrow: of normal values it holds the mean in 74 % of the cases with three seeds, in 83 %
    with five. An end that is close to a threshold settles nothing.
    """
    values = np.asarray(values, np.float64)
    picks = np.random.default_rng(0).integers(0, len(values), (10_000, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def verdict(
    confirmed: bool, refuted: bool, numbers: Mapping[str, Interval | float | str]
) -> Verdict:
    status: Status = "confirmed" if confirmed else "refuted" if refuted else "not resolved"
    return Verdict(status, numbers)
