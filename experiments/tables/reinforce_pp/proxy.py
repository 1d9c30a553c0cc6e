"""Table 1 and Figure 2: a policy trained on a reward model's score, judged by the score the reward model was made from.

Every seed has its own base policy, pairs and reward model, which all arms share. An arm samples equally many responses
per step, the greedy ones of ReMax counted: REINFORCE++ one to each prompt, GRPO and RLOO four, ReMax one and a greedy
one. Updates are matched in two ways, and claims are judged in both: `equal`, where all arms have one rate, so that
Adam, which does not see the scale of advantages, makes updates of equal size; and `tuned`, where each has the rate
whose gold score ends highest on a seed that no figure comes from.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.plots import plt
from experiments.tables.base import (
    Claim,
    Interval,
    Results,
    Run,
    Table,
    Verdict,
    over_seeds,
    verdict,
)
from experiments.tables.reinforce_pp import gold
from research.reinforce_pp import over_optimisation as study
from research.rl import trainer as rl
from research.rl.reward_model import RewardModelConfig

ARMS = {  # arm → (estimator, responses to a prompt, and greedy ones)
    "rpp": ("reinforce_pp", 1, 0),
    "grpo": ("grpo", 4, 0),
    "rloo": ("rloo", 4, 0),
    "remax": ("remax", 1, 1),
}
TUNING_SEED = 1000  # of the runs that choose rates


def prepare(s: gold.Settings, seed: int, directory: pathlib.Path, results: Any) -> dict[str, Any]:
    """The base policy and its reward model."""
    del results
    task, base = gold.task_of(s, seed), gold.base_of(s, seed, directory)
    model, params, tokenizer = base
    actor = gold.actor_of(s, model, tokenizer, task)
    drawn = [
        study.scored_samples(
            actor, params, task, problems=n, samples=2, first=first, seed=seed + first
        )
        for n, first in ((s.pairs, 10**6), (s.pairs // 4, 2 * 10**6))
    ]
    # Held out pairs are labelled rightly, so that their figures are those of the gold score.
    train, held_out = (
        study.noisy_pairs(x, flip, seed) for x, flip in zip(drawn, (s.flip, 0.0), strict=True)
    )
    config = dataclasses.replace(s.proxy, seed=seed)
    figures = study.train_proxy(config, directory / "proxy", train, held_out, base=base)
    scores = np.array([[x["score"], len(x["response"].split())] for x in drawn[1]])
    _, judge = judge_of(s, seed, directory)
    return {
        "proxy": figures,
        "pairs": len(train),
        "length_and_gold": float(np.corrcoef(scores.T)[0, 1]),
        "figures": judge(params),
    }


@functools.lru_cache(maxsize=2)  # the arms of a seed share one, and its compiled programs
def judge_of(s: gold.Settings, seed: int, prepared: pathlib.Path) -> tuple[Any, study.Judge]:
    """(base, judge)"""
    base = model, params, tokenizer = gold.base_of(s, seed, prepared)
    task = gold.task_of(s, seed)
    actor, proxy = gold.actor_of(s, model, tokenizer, task), proxy_of(prepared)
    return base, study.Judge(model, actor, task, params, proxy, problems=s.judged, seed=seed)


def proxy_of(prepared: pathlib.Path) -> RewardModelConfig:
    return RewardModelConfig(path=str(prepared / "proxy"), normalise=True)


def config_of(
    s: gold.Settings, arm: str, rate: float, seed: int, prepared: pathlib.Path, steps: int
) -> rl.Config:
    estimator, group, greedy = ARMS[arm]
    config = gold.run_of(
        s, estimator, seed, prompts=s.samples // (group + greedy), group=group, rate=rate, kl_coef=s.beta, steps=steps,
        every=s.every,
    )  # fmt: skip
    return dataclasses.replace(config, reward_model=proxy_of(prepared))


def train(
    s: gold.Settings,
    arm: str,
    rate: float,
    seed: int,
    directory: pathlib.Path,
    prepared: pathlib.Path,
) -> dict[str, Any]:
    """Figures at every evaluation, and of training."""
    base, judge = judge_of(s, seed, prepared)
    config = config_of(s, arm, rate, seed, prepared, s.steps)
    rewarder = study.GoldRewarder(gold.task_of(s, seed))
    name = f"{arm} {rate:g} seed {seed}"
    _, curve, history = gold.judged(config, directory, base, judge, rewarder, name)
    return {
        "rate": rate,
        "curve": curve,
        "abs_advantage": gold.mean_of(history, "advantages/abs"),
        "grad_norm": gold.mean_of(history, "grad_norm"),
        "entropy": gold.mean_of(history, "entropy"),
        "sampled_length": gold.mean_of(history, "rollout/length"),
        # Where they are not logged, they are 0.
        "clipped": float(np.mean([r.get("clip_frac") or 0.0 for r in history])),
        "zero_std": float(np.mean([r.get("rollout/zero_std") or 0.0 for r in history])),
    }


def equal(s: gold.Settings, arm: str, seed: int, directory: pathlib.Path, results: Any) -> dict:
    prepared = directory.parent.parent / "base" / directory.name
    return {"base": results["base"]["figures"]} | train(s, arm, s.rate, seed, directory, prepared)


def tuned(s: gold.Settings, arm: str, seed: int, directory: pathlib.Path, results: Any) -> dict:
    """The rate is chosen once, by runs on a base and a reward model of another seed."""
    prepared = directory.parent.parent / "base" / directory.name
    rate = best_rate(s, arm, directory.parent.parent / "tuning")
    if rate == s.rate:  # that run has been made
        made = json.loads(
            (directory.parent.parent / f"{arm}-equal" / directory.name / "result.json").read_text()
        )
        return made["figures"]
    return {"base": results["base"]["figures"]} | train(s, arm, rate, seed, directory, prepared)


def best_rate(s: gold.Settings, arm: str, directory: pathlib.Path) -> float:
    """Of `rates`, the one with the highest gold score, mean over the last three evaluations."""
    chosen = directory / f"{arm}.json"
    if chosen.exists():
        return json.loads(chosen.read_text())["rate"]
    prepared = directory / "base"
    if not (prepared / "result.json").exists():
        figures = prepare(s, TUNING_SEED, prepared, None)
        (prepared / "result.json").write_text(json.dumps(figures) + "\n")
    ends = {}
    for rate in s.rates:
        figures = train(s, arm, rate, TUNING_SEED, directory / f"{arm}-{rate:g}", prepared)
        ends[rate] = gold.late(figures, "gold")
    best = max(ends, key=ends.get)
    chosen.write_text(
        json.dumps({"rate": best, "gold": {f"{k:g}": v for k, v in ends.items()}}) + "\n"
    )
    return best


# Verdicts.


def path_of(figures: Mapping[str, Any]) -> list[Mapping[str, float]]:
    """The base, then every evaluation."""
    return [figures["base"], *figures["curve"]]


def gap(results: Results, one: str, other: str, read) -> Interval:
    seeds = results[one]
    return over_seeds([read(results[one][seed]) - read(results[other][seed]) for seed in seeds])


def in_both(judge, results: Results) -> Verdict:
    """The verdict that holds in both matchings, with the figures of each."""
    verdicts = {how: judge(results, how) for how in ("equal", "tuned")}
    numbers = {f"{how}: {k}": v for how, x in verdicts.items() for k, v in x.numbers.items()}
    statuses = {x.status for x in verdicts.values()}
    return Verdict(statuses.pop() if len(statuses) == 1 else "not resolved", numbers)


def _as_good(results: Results, how: str) -> Verdict:
    score = gap(results, f"rpp-{how}", f"grpo-{how}", lambda f: gold.late(f, "gold"))
    tokens = gap(results, f"rpp-{how}", f"grpo-{how}", lambda f: gold.late(f, "length"))
    levels = {
        f"{arm} gold": over_seeds([gold.late(f, "gold") for f in results[f"{arm}-{how}"].values()])
        for arm in ("rpp", "grpo")
    }
    return verdict(
        score.low > -0.05 and tokens.high < 0,
        score.high < -0.05 or tokens.low > 0,
        {**levels, "gold, rpp - grpo": score, "tokens, rpp - grpo": tokens},
    )


def _frontier(results: Results, how: str) -> Verdict:
    pairs = [
        study.at_equal_kl(
            path_of(results[f"rpp-{how}"][seed]), path_of(results[f"grpo-{how}"][seed])
        )
        for seed in results[f"rpp-{how}"]
    ]
    if not np.isfinite(pairs).all():
        return Verdict(
            "not resolved", {"seeds without a common range of KL": float(np.isnan(pairs).sum())}
        )
    found = over_seeds(pairs)
    return verdict(found.low >= 0, found.high < 0, {"gold at equal KL, rpp - grpo": found})


def _per_token(results: Results, how: str) -> Verdict:
    def read(figures):
        return gold.late(figures, "gold") / gold.late(figures, "length")

    levels = {
        f"{arm}, per token": over_seeds([read(f) for f in results[f"{arm}-{how}"].values()])
        for arm in ARMS
    }
    found = gap(results, f"rpp-{how}", f"grpo-{how}", read)
    others = [gap(results, f"rpp-{how}", f"{arm}-{how}", read) for arm in ("grpo", "rloo")]
    return verdict(all(x.low > 0 for x in others), found.high < 0, {**levels, "rpp - grpo": found})


def _faster(results: Results, how: str) -> Verdict:
    """Over the first half of training, where neither has flattened."""

    def read(key):
        def half(figures):
            points = figures["curve"][: max(1, len(figures["curve"]) // 2)]
            return float(np.mean([point[key] for point in points]))

        return half

    proxy = gap(results, f"grpo-{how}", f"rpp-{how}", read("proxy"))
    kl = gap(results, f"grpo-{how}", f"rpp-{how}", read("kl"))
    return verdict(
        proxy.low > 0 and kl.low > 0,
        proxy.high < 0 or kl.high < 0,
        {"proxy, grpo - rpp": proxy, "KL, grpo - rpp": kl},
    )


def _over_optimised(results: Results) -> Verdict:
    """Whether the set-up shows what it is for, under the arm that moves furthest."""
    numbers, gains, falls = {}, [], []
    for seed, figures in results["grpo-equal"].items():
        del seed
        golds = [point["gold"] for point in path_of(figures)]
        gains.append(gold.late(figures, "proxy") - figures["base"]["proxy"])
        falls.append(max(golds) - gold.late(figures, "gold"))
    numbers["proxy gained"] = over_seeds(gains)
    numbers["gold, best less last"] = over_seeds(falls)
    return verdict(
        numbers["proxy gained"].low > 0 and numbers["gold, best less last"].low > 0.05,
        numbers["gold, best less last"].high < 0.05,
        numbers,
    )


def figure(results: Results, path: pathlib.Path) -> None:
    fig, axes = plt.subplots(2, 3, figsize=(12, 6.4), sharex="col")
    for row, how in zip(axes, ("equal", "tuned"), strict=True):
        for arm, color in zip(
            ARMS, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False
        ):
            for at, figures in enumerate(results.get(f"{arm}-{how}", {}).values()):
                points = path_of(figures)
                x = np.sqrt([max(p["kl"], 0.0) for p in points])
                label = arm if at == 0 else None
                row[0].plot(x, [p["gold"] for p in points], color=color, lw=0.9, label=label)
                row[1].plot(x, [p["proxy"] for p in points], color=color, lw=0.9)
                row[2].plot(
                    [p.get("step", 0) for p in points],
                    [p["length"] for p in points],
                    color=color,
                    lw=0.9,
                )
        for axis, title in zip(row, ("gold score", "proxy score", "tokens"), strict=True):
            axis.set(
                title=f"{title} ({how})", xlabel="sqrt(KL), nats" if title != "tokens" else "step"
            )
            axis.grid(alpha=0.3)
        if row[0].lines:
            row[0].legend(frameon=False)
    fig.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _runs(*arms: str) -> tuple[str, ...]:
    return tuple(f"{arm}-{how}" for how in ("equal", "tuned") for arm in arms)


def runs(s: gold.Settings) -> Sequence[Run]:
    return [
        Run("base", functools.partial(prepare, s)),
        *(Run(f"{arm}-equal", functools.partial(equal, s, arm), ("base",)) for arm in ARMS),
        *(
            Run(f"{arm}-tuned", functools.partial(tuned, s, arm), ("base", f"{arm}-equal"))
            for arm in ARMS
        ),
    ]


TABLE = Table(
    name="reinforce_pp/proxy",
    title="REINFORCE++: gold against proxy reward (Table 1, Figure 2)",
    scales={scale: runs(s) for scale, s in gold.SCALES.items()},
    claims=[
        Claim(
            "T1-0",
            "A policy trained on a reward model exploits it",
            "premise of Figure 2 (the authors call GRPO's faster rise reward hacking); no gold score there",
            "under GRPO at the common rate the proxy ends above its start (lower bound), and the gold score ends more "
            "than 0.05 below the best it had (lower bound); refuted if the upper bound is below 0.05.",
            ("base", "grpo-equal"),
            _over_optimised,
        ),
        Claim(
            "T1-1",
            "REINFORCE++ with one response to a prompt is as good as GRPO with four, in fewer tokens",
            "score 46.7 and 46.8, 832 and 860 tokens (Table 1)",
            "in both matchings: gold, REINFORCE++ - GRPO, above -0.05 (lower bound), and tokens fewer (upper bound "
            "below 0); refuted if gold's upper bound is below -0.05 or tokens' lower bound above 0.",
            _runs("rpp", "grpo"),
            functools.partial(in_both, _as_good),
        ),
        Claim(
            "T1-2",
            "It has the higher score per token",
            "0.0561 REINFORCE++, 0.0544 GRPO, 0.0515 RLOO, 0.0560 ReMax (Table 1)",
            "in both matchings: gold per token above GRPO's and RLOO's (lower bounds above 0); refuted if the upper "
            "bound against GRPO is below 0.",
            _runs(*ARMS),
            functools.partial(in_both, _per_token),
        ),
        Claim(
            "T1-3",
            "At equal KL its gold score is at least GRPO's",
            "GRPO's reward and KL both rise faster, which the authors read as reward hacking (Figure 2); no numbers",
            "in both matchings: mean gold over the range of sqrt(KL) that both reach, REINFORCE++ - GRPO, at least 0 "
            "(lower bound); refuted if the upper bound is below 0.",
            _runs("rpp", "grpo"),
            functools.partial(in_both, _frontier),
        ),
        Claim(
            "F2",
            "Under GRPO proxy reward and KL rise faster",
            "curves of Figure 2; no numbers",
            "in both matchings: proxy and KL, mean over the first half of training, GRPO - REINFORCE++ above 0 (both "
            "lower bounds); refuted if an upper bound is below 0.",
            _runs("rpp", "grpo"),
            functools.partial(in_both, _faster),
        ),
    ],
    figure=figure,
    seeds=(0, 1, 2, 3, 4),
)  # fmt: skip
