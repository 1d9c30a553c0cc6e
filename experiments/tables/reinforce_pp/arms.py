"""What the rows that train share: runs at equal samples, matched update sizes, what is logged, and examinations.

Adam divides the gradient by its own size, so at one learning rate all estimators make updates of like size, whatever
the scale of their advantages: that is the matched setting, `shared`, and mean |A| and the distance that the parameters
went are logged to show it. Beside it every method gets the learning rate that is best for it on validation problems,
`tuned`. A claim is judged in both.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import plots
from experiments.tables.base import Interval, Results, Run, Status, Verdict, over_seeds
from research.core import loop, metrics
from research.core import mesh as meshes
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder
from research.lm.sampler import Sampler, Sampling
from research.lm.tokenizer import Tokenizer
from research.rewards import Rewarder
from research.rl import trainer as rl
from research.rl.rollout import Actor, evaluate
from research.tasks import Task, TaskConfig, make

MATCHINGS = ("shared", "tuned")
Start = tuple[Decoder, Any, Tokenizer]

_LOGGED = {  # metric → name in the results
    "rollout/pass@1": "pass@1",
    "rollout/length": "length",
    "rollout/zero_std": "zero_std",
    "rollout/rounds": "rounds",
    "reward/mean": "reward",
    "advantages/abs": "mean |A|",
    "kl": "kl",
    "entropy": "entropy",
    "clip_frac": "clip_frac",
    "grad_norm": "grad_norm",
}


def trained(config: rl.Config, directory: pathlib.Path, start: Start) -> tuple[Any, dict[str, Any]]:
    """The parameters after the run of `config`, and what was logged: `training`, `evaluations`, `moved`.

    `moved` is the distance from the base model, as a share of its norm.
    """
    model, params, tokenizer = start
    trainer = rl.build(config, directory, model=model, params=params, tokenizer=tokenizer)
    name = f"{directory.parent.name} {directory.name}"
    state = loop.run(trainer, config.loop, directory, fingerprint_of=config, name=name)
    history = metrics.read(directory / "metrics.jsonl")
    evaluations = [
        {"step": r["step"]} | {k[5:]: round(x, 4) for k, x in r.items() if k.startswith("eval/")}
        for r in history
        if "eval/pass@1" in r
    ]
    return state.params, {
        "training": [_logged(record) for record in history],
        "evaluations": evaluations,
        "moved": round(_distance(state.params, params), 5),
    }


def _logged(record: Mapping[str, float]) -> dict[str, float]:
    found = {name: record[key] for key, name in _LOGGED.items() if record.get(key) is not None}
    return {"step": record["step"]} | {name: round(x, 5) for name, x in found.items()}


def _distance(after: Any, before: Any) -> float:
    pairs = zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
    squares = np.array(
        [
            (np.sum((np.asarray(x, float) - y) ** 2), np.sum(np.square(y, dtype=float)))
            for x, y in pairs
        ]
    )
    return float(np.sqrt(squares[:, 0].sum() / squares[:, 1].sum()))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A table's training runs at one scale.

    start: seed → the base model. config: (arm, seed) → the run, but for its learning rate.
    rates: learning rates; all arms share the first, and each gets the best of them.
    tests: problems to examine by name; `problems` of each, with `samples` responses.
    validation: problems on which the best rate is found, and which no claim reads.
    """

    arms: tuple[str, ...]
    start: Callable[[int], Start]
    config: Callable[[str, int], rl.Config]
    rates: tuple[float, ...]
    tests: Mapping[str, TaskConfig]
    validation: TaskConfig
    problems: int
    samples: int = 16

    def runs(self) -> list[Run]:
        """The base model's examination, and every arm at every rate."""
        trained = [Run(arm, functools.partial(_arm, self, arm)) for arm in self.arms]
        return [Run("base", functools.partial(_base, self)), *trained]


def _base(plan: Plan, seed: int, directory: pathlib.Path, results: Any) -> dict[str, Any]:
    del directory, results
    start = plan.start(seed)
    return {"tests": examine(plan, plan.config(plan.arms[0], seed), start, start[1])}


def _arm(plan: Plan, arm: str, seed: int, directory: pathlib.Path, results: Any) -> dict[str, Any]:
    del results
    start, config, runs = plan.start(seed), plan.config(arm, seed), []
    for rate in plan.rates:
        one = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=rate))
        params, figures = trained(one, directory / f"lr{rate:g}", start)
        runs.append(figures | {"tests": examine(plan, one, start, params)})
    return {"rates": list(plan.rates), "shared": 0, "tuned": best(runs), "runs": runs}


def best(runs: Sequence[Mapping[str, Any]]) -> int:
    """Which of an arm's runs does best on validation problems."""
    return int(np.argmax([figures["tests"]["validation"]["pass@1"] for figures in runs]))


def examine(
    plan: Plan, config: rl.Config, start: Start, params: Any
) -> dict[str, dict[str, float]]:
    """test, and 'validation' → the report of `research.rl.evaluation`, always with the same random numbers."""
    model, _, tokenizer = start
    rollout, reports = config.rollout, {}
    shape = dataclasses.replace(
        model.config, dtype=config.dtype, scan_layers=config.scan_layers, kernels=config.kernels
    )
    sampler = _sampler(shape, config.mesh, rollout.max_prompt, rollout.longest_response)
    sampling = Sampling(max_new_tokens=rollout.longest_response, stop_ids=tokenizer.stop_ids)
    for name, described in {**plan.tests, "validation": plan.validation}.items():
        task = _task(described)
        with Rewarder(config.reward, task) as rewarder:
            report, _ = evaluate(
                Actor(sampler, tokenizer, rewarder, rollout.template, rollout.chat, rollout.tools),
                params,
                task,
                problems=plan.problems,
                samples=plan.samples,
                sampling=sampling,
                seed=0,
            )
        reports[name] = {key: round(value, 4) for key, value in report.items()}
    return reports


@functools.lru_cache(maxsize=16)
def _task(described: TaskConfig) -> Task:
    """One for all the runs of a process: its test problems are drawn once."""
    return make(described)


@functools.lru_cache(maxsize=4)
def _sampler(shape: DecoderConfig, mesh: str, max_prompt: int, max_new_tokens: int) -> Sampler:
    """One for all the runs of a process: its programs are compiled once."""
    grid = meshes.make(mesh)
    return Sampler(
        Decoder(shape),
        slots=512 // grid.size * grid.size,
        max_prompt=max_prompt,
        max_new_tokens=max_new_tokens,
        mesh=grid,
    )


# Judging.

Read = Callable[[Mapping[str, Any]], float]


def chosen(figures: Mapping[str, Any], matching: str) -> Mapping[str, Any]:
    """The run of an arm under a matching."""
    return figures["runs"][figures[matching]]


def level(results: Results, arm: str, read: Read, matching: str = "shared") -> Interval:
    return over_seeds([read(chosen(figures, matching)) for figures in results[arm].values()])


def difference(
    results: Results, one: str, other: str, read: Read, matching: str = "shared"
) -> Interval:
    """Of a figure between two arms, seed by seed."""
    seeds = results[one].keys() & results[other].keys()
    return over_seeds(
        [read(chosen(results[one][s], matching)) - read(chosen(results[other][s], matching)) for s in sorted(seeds)]
    )  # fmt: skip


def over_base(results: Results, read: Read) -> Interval:
    """A figure of the base models."""
    return over_seeds([read(figures) for figures in results["base"].values()])


def in_both(judge: Callable[[str], Verdict], extra: Mapping[str, Any] | None = None) -> Verdict:
    """The verdict that holds in both matchings; 'not resolved' where they differ. `extra` is added to its numbers."""
    verdicts = {matching: judge(matching) for matching in MATCHINGS}
    statuses = {v.status for v in verdicts.values()}
    status: Status = statuses.pop() if len(statuses) == 1 else "not resolved"
    numbers = {
        f"{name} ({matching} lr)": value
        for matching, v in verdicts.items()
        for name, value in v.numbers.items()
    }
    return Verdict(status, numbers | dict(extra or {}))


def update_sizes(results: Results, arms: Sequence[str]) -> dict[str, str]:
    """What shows that updates were of one size: distance from the base model, mean |A|; means over seeds."""
    found = {}
    for arm in arms:
        runs = [chosen(figures, "shared") for figures in results[arm].values()]
        size = np.mean([np.mean([x["mean |A|"] for x in run["training"]]) for run in runs])
        moved = np.mean([run["moved"] for run in runs])
        rates = [figures["rates"][figures["tuned"]] for figures in results[arm].values()]
        found[f"{arm}: moved, mean |A|, tuned lr"] = f"{moved:.3f}, {size:.2f}, {_listed(rates)}"
    return found


def _listed(rates: Sequence[float]) -> str:
    counts = {rate: list(rates).count(rate) for rate in sorted(set(rates))}
    return " and ".join(
        f"{rate:g}" + (f" ({n} of {len(rates)})" if len(counts) > 1 else "")
        for rate, n in counts.items()
    )


def curves(
    results: Results, arms: Sequence[str], key: str, where: str = "training"
) -> dict[str, list]:
    """arm → (step, figure) of each seed at the shared rate, for `plots.curves`."""
    return {
        arm: [
            [
                (point["step"], point[key])
                for point in chosen(figures, "shared")[where]
                if key in point
            ]
            for figures in results[arm].values()
        ]
        for arm in arms
        if results.get(arm)
    }


def figure(
    results: Results,
    path: pathlib.Path,
    arms: Sequence[str],
    *,
    title: str,
    xlabel: str,
    points: Callable[[Mapping[str, Any]], list[tuple[float, float]]],
) -> None:
    """What the arms at the shared rate and the base models do in examinations, beside their learning curves.

    points: of the figures of a run; title and xlabel: of their panel.
    """
    examined = {
        arm: [points(chosen(figures, "shared")) for figures in results[arm].values()]
        for arm in arms
        if results.get(arm)
    }
    if results.get("base"):
        examined["base"] = [points(figures) for figures in results["base"].values()]
    panels = {
        title: examined,
        "pass@1 on training problems by rollout": curves(results, arms, "pass@1"),
    }
    plots.curves(path, panels, xlabel=f"{xlabel}, or rollout", smooth=1)
