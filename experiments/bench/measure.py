"""How two sides are compared: the same work, taken in turns, the median of rounds.

A benchmark yields `Row`s. `work` says what a side did in one round (tokens, sequences, a digest of the prompts); it is
counted from what came out, not from what was asked for, and a row of unlike works cannot be made.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from research.core import provenance

Work = Mapping[str, int | str]


class UnlikeWork(AssertionError):
    """The two sides did not do the same."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    ours, rival: medians in `unit`; `rival` is None if it was not run, and `rival_name` then says why.
    ratio: how many times better ours is, the median over rounds.
    goal: the least ratio, or (goal_of 'ours') the least value of ours. 0: none was set.
    bound: what limits it, told when the goal is not reached.
    """

    what: str
    unit: str
    ours: float
    rival: float | None
    rival_name: str
    ratio: float | None
    goal: float
    goal_of: str
    work: Work
    rounds: int
    bound: str = ""

    @property
    def reached(self) -> bool | None:
        """None where nothing was asked for, or the rival it is measured by was not run."""
        value = self.ours if self.goal_of == "ours" else self.ratio
        return None if value is None or not self.goal else value >= self.goal


def row(
    what: str,
    ours: Sequence[float],
    rival: Sequence[float] | None,
    *,
    our_work: Work,
    rival_work: Work | None,
    rival_name: str,
    amount: float | None = None,
    unit: str = "s",
    goal: float = 0.0,
    goal_of: str = "ratio",
    bound: str = "",
) -> Row:
    """A row from the seconds of each round, ours and the rival's in the same rounds.

    amount: how much of `unit` a round is worth ("tok/s": its tokens), None to show the seconds themselves.

    Raises UnlikeWork if the two works differ, or the numbers of rounds.
    """
    if rival is not None:
        if dict(our_work) != dict(rival_work or {}):
            raise UnlikeWork(f"{what}: ours did {dict(our_work)}, {rival_name} {rival_work}")
        if len(ours) != len(rival):
            raise UnlikeWork(f"{what}: {len(ours)} rounds of ours, {len(rival)} of {rival_name}")

    def shown(seconds):
        return statistics.median(s if amount is None else amount / s for s in seconds)

    return Row(
        what=what,
        unit=unit,
        ours=shown(ours),
        rival=None if rival is None else shown(rival),
        rival_name=rival_name,
        ratio=(
            None if rival is None else statistics.median(r / o for r, o in zip(rival, ours, strict=True))
        ),
        goal=goal,
        goal_of=goal_of,
        work=dict(our_work),
        rounds=len(ours),
        bound=bound,
    )  # fmt: skip


def alternate(
    sides: Sequence[Callable[[], Any] | None], rounds: int, warm_up: int = 1
) -> list[list[float] | None]:
    """Seconds of each round of each side, taken in turns so that a busy machine slows all alike; None for a None."""
    seconds = [None if side is None else [] for side in sides]
    for number in range(warm_up + rounds):
        for side, taken in zip(sides, seconds, strict=True):
            if side is None:
                continue
            started = time.perf_counter()
            side()
            if number >= warm_up:
                taken.append(time.perf_counter() - started)
    return seconds


def same_value(what: str, ours: float, rival: float, tolerance: float = 1e-3) -> None:
    """Raises UnlikeWork unless the two numbers agree to `tolerance`, relative (or absolute near 0)."""
    if not math.isclose(ours, rival, rel_tol=tolerance, abs_tol=tolerance):
        raise UnlikeWork(f"{what}: {ours} and {rival}")


def missing(*packages: str) -> str:
    """What a rival lacks, or ''."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not run: {', '.join(absent)} not installed" if absent else ""


def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows, ready for JSON."""
    return [dataclasses.asdict(r) | {"reached": r.reached} for r in rows]


def write(path: str | pathlib.Path, rows: Sequence[Row]) -> None:
    """{"rows": …, "provenance": …} as JSON."""
    content = {"rows": records(rows), "provenance": provenance.describe()}
    pathlib.Path(path).write_text(json.dumps(content, indent=2) + "\n")


def read(path: str | pathlib.Path) -> list[Row]:
    """The rows that `write` wrote."""
    found = json.loads(pathlib.Path(path).read_text())["rows"]
    return [Row(**{k: v for k, v in record.items() if k != "reached"}) for record in found]


def table(rows: Sequence[Row]) -> str:
    """what, ours, rival, ratio, goal, and whether it was reached or what bounds it."""
    lines = [f"{'':44} {'ours':>12} {'rival':>12} {'ratio':>7} {'goal':>9}"]
    for r in rows:
        ratio = "-" if r.ratio is None else f"{r.ratio:.2f}x"
        goal = "-" if not r.goal else f"{r.goal:g}x" if r.goal_of == "ratio" else _number(r.goal)
        verdict = {True: "reached", False: f"not reached: {r.bound or '?'}", None: ""}[r.reached]
        if r.rival is None:
            verdict = f"{verdict} ({r.rival_name})".strip()
        rival = "-" if r.rival is None else _number(r.rival)
        lines.append(
            f"{r.what + ', ' + r.unit:44} {_number(r.ours):>12} {rival:>12} {ratio:>7} {goal:>9}  {verdict}"
        )
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """What README.md shows of the rows: ours, the rival, the ratio."""
    lines = ["| | ours | rival | ratio |", "|---|---|---|---|"]
    for r in rows:
        rival = r.rival_name if r.rival is None else f"{_number(r.rival)} ({r.rival_name})"
        ratio = "-" if r.ratio is None else f"{r.ratio:.2f}x"
        lines.append(f"| {r.what}, {r.unit} | {_number(r.ours)} | {rival} | {ratio} |")
    return "\n".join(lines)


def command(rows: Callable[..., list[Row]], description: str) -> None:
    """The command line of a benchmark: --rounds, and --json to write the rows to."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="rounds that are timed")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the figures")
    args = parser.parse_args()
    result = rows(**({} if args.rounds is None else {"rounds": args.rounds}))
    print(table(result))
    if args.json:
        write(args.json, result)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
