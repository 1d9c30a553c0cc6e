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

import matplotlib.pyplot as plt
import numpy as np
from absl import flags

from experiments import plots  # noqa: F401  (it sets up matplotlib without a display)
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
from research.core import loop, metrics
from research.core.data import DataConfig
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.lm import checkpoints, reward_model
from research.lm import trainer as lm
from research.reinforce_pp import over_optimisation as study
from research.rl import trainer as rl
from research.rl.losses import LossConfig
from research.rl.reward_model import RewardModelConfig
from research.rl.trainer import EvalConfig, RolloutConfig

ARMS = {  # arm → (estimator, responses to a prompt, and greedy ones)
    "rpp": ("reinforce_pp", 1, 0),
    "grpo": ("grpo", 4, 0),
    "rloo": ("rloo", 4, 0),
    "remax": ("remax", 1, 1),
}
TUNING_SEED = 1000  # of the runs that choose rates


@dataclasses.dataclass(frozen=True, eq=False)
class Settings:
    """base: of the policy, None: the directory of --init_from. `samples` responses per step, `steps` of them, judged
    every `every` on `judged` held-out requests. pairs: for the reward model, before ties are dropped; `flip`: share of
    them labelled the wrong way round. rate: of `equal`; rates: those that `tuned` chooses from.
    """

    base: lm.Config | None
    proxy: reward_model.Config
    task: Mapping[str, Any]
    samples: int
    steps: int
    every: int
    judged: int
    pairs: int
    flip: float
    rate: float
    rates: tuple[float, ...]
    beta: float = 0.01
    max_prompt: int = 7
    max_new_tokens: int = 20
    micro_rows: int = 8
    dtype: str = "float32"


NOUNS = tuple(
    "apple river stone cloud tiger bread music window garden silver train ocean candle forest paper winter bridge "
    "lemon horse mirror basket island thunder button".split()
)
SCALES = {
    "cpu": Settings(
        base=study.base_config(0),
        proxy=reward_model.Config(
            data=DataConfig(seq_len=32, batch_size=32, pack="none", overlong="drop"),
            optim=OptimConfig(lr=3e-3, schedule="cosine", warmup_steps=10),
            loop=LoopConfig(steps=250, log_every=50),
        ),
        task={},
        samples=128, steps=40, every=4, judged=128, pairs=4000, flip=0.15, rate=1e-3, rates=(3e-4, 1e-3, 3e-3),
    ),
    "gpu": Settings(
        base=None,
        proxy=reward_model.Config(
            dtype="bfloat16",
            data=DataConfig(seq_len=256, batch_size=64, pack="none", overlong="drop"),
            micro_rows=16,
            optim=OptimConfig(lr=6e-6, schedule="cosine", warmup_steps=10),
            loop=LoopConfig(steps=200),
        ),
        task={
            "vocabulary": NOUNS, "waste": 0.02,
            "question": "Write one short sentence that uses each of these words once: {words}.\nSentence:",
        },
        samples=1024, steps=200, every=10, judged=256, pairs=16_000, flip=0.25, rate=1e-6,
        rates=(5e-7, 1e-6, 2e-6), max_prompt=96, max_new_tokens=128, dtype="bfloat16",
    ),
}  # fmt: skip


def task_of(s: Settings, seed: int) -> study.Requests:
    return study.Requests(seed=seed, test_size=s.judged, **s.task)


def base_of(s: Settings, seed: int, directory: pathlib.Path):
    """(model, parameters, tokenizer) of a seed's base policy, whose run is `directory`."""
    if s.base is None:
        if not flags.FLAGS.init_from:
            raise ValueError("scale gpu needs --init_from=DIRECTORY, of a Hugging Face model")
        return checkpoints.load(flags.FLAGS.init_from)
    config = dataclasses.replace(
        s.base, seed=seed, data=dataclasses.replace(s.base.data, seed=seed)
    )
    return study.train_base(config, task_of(s, seed), directory / "policy")


def actor_of(s: Settings, model, tokenizer, task: study.Requests):
    return study.make_actor(
        model,
        tokenizer,
        study.GoldRewarder(task),
        slots=2 * s.judged,
        max_prompt=s.max_prompt,
        max_new_tokens=s.max_new_tokens,
    )


def prepare(s: Settings, seed: int, directory: pathlib.Path, results: Any) -> dict[str, Any]:
    """The base policy and its reward model."""
    del results
    task, base = task_of(s, seed), base_of(s, seed, directory)
    model, params, tokenizer = base
    actor = actor_of(s, model, tokenizer, task)
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
def judge_of(s: Settings, seed: int, prepared: pathlib.Path) -> tuple[Any, study.Judge]:
    """(base, judge)"""
    base = model, params, tokenizer = base_of(s, seed, prepared)
    task = task_of(s, seed)
    actor, proxy = actor_of(s, model, tokenizer, task), proxy_of(prepared)
    return base, study.Judge(model, actor, task, params, proxy, problems=s.judged, seed=seed)


def proxy_of(prepared: pathlib.Path) -> RewardModelConfig:
    return RewardModelConfig(path=str(prepared / "proxy"), normalise=True)


def config_of(
    s: Settings, arm: str, rate: float, seed: int, prepared: pathlib.Path, steps: int
) -> rl.Config:
    estimator, group, greedy = ARMS[arm]
    return rl.Config(
        seed=seed,
        mesh="data=-1",
        dtype=s.dtype,
        scan_layers=s.base is None,
        reward_model=proxy_of(prepared),
        rollout=RolloutConfig(
            prompts=s.samples // (group + greedy),
            group_size=group,
            max_prompt=s.max_prompt,
            max_new_tokens=s.max_new_tokens,
        ),
        estimator=estimator,
        loss=LossConfig(kl_coef=s.beta),
        reference_every=0,
        micro_rows=s.micro_rows,
        optim=OptimConfig(name="adam", lr=rate, b2=0.95),
        eval=EvalConfig(problems=0),
        save_samples_every=0,
        loop=LoopConfig(steps=steps, eval_every=s.every, checkpoint_every=steps),
    )


def train(
    s: Settings, arm: str, rate: float, seed: int, directory: pathlib.Path, prepared: pathlib.Path
) -> dict[str, Any]:
    """Figures at every evaluation, and of training."""
    (model, params, tokenizer), judge = judge_of(s, seed, prepared)
    config = config_of(s, arm, rate, seed, prepared, s.steps)
    rewarder = study.GoldRewarder(task_of(s, seed))
    trainer = rl.build(
        config, directory, model=model, params=params, tokenizer=tokenizer, rewarder=rewarder
    )
    trainer = dataclasses.replace(trainer, evaluate=lambda state: judge(state.params))
    loop.run(
        trainer, config.loop, directory, fingerprint_of=config, name=f"{arm} {rate:g} seed {seed}"
    )
    history = metrics.read(directory / "metrics.jsonl")
    return {
        "rate": rate,
        "curve": [
            {"step": r["step"]}
            | {k[5:]: round(v, 5) for k, v in r.items() if k.startswith("eval/")}
            for r in history
            if "eval/gold" in r
        ],
        **{
            name: float(np.mean([r[key] for r in history if r.get(key) is not None]))
            for name, key in (
                ("abs_advantage", "advantages/abs"),
                ("grad_norm", "grad_norm"),
                ("entropy", "entropy"),
                ("sampled_length", "rollout/length"),
            )
        },
        **{
            name: float(np.mean([r.get(key) or 0.0 for r in history]))
            for name, key in (("clipped", "clip_frac"), ("zero_std", "rollout/zero_std"))
        },
    }


def equal(s: Settings, arm: str, seed: int, directory: pathlib.Path, results: Any) -> dict:
    prepared = directory.parent.parent / "base" / directory.name
    return {"base": results["base"]["figures"]} | train(s, arm, s.rate, seed, directory, prepared)


def tuned(s: Settings, arm: str, seed: int, directory: pathlib.Path, results: Any) -> dict:
    """The rate is chosen once, by runs on a base and a reward model of another seed."""
    prepared = directory.parent.parent / "base" / directory.name
    rate = best_rate(s, arm, directory.parent.parent / "tuning")
    if rate == s.rate:  # that run has been made
        made = json.loads(
            (directory.parent.parent / f"{arm}-equal" / directory.name / "result.json").read_text()
        )
        return made["figures"]
    return {"base": results["base"]["figures"]} | train(s, arm, rate, seed, directory, prepared)


def best_rate(s: Settings, arm: str, directory: pathlib.Path) -> float:
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
        ends[rate] = late(figures, "gold")
    best = max(ends, key=ends.get)
    chosen.write_text(
        json.dumps({"rate": best, "gold": {f"{k:g}": v for k, v in ends.items()}}) + "\n"
    )
    return best


# Verdicts.


def late(figures: Mapping[str, Any], key: str) -> float:
    """Mean over the last three evaluations."""
    return float(np.mean([point[key] for point in figures["curve"][-3:]]))


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
    gold = gap(results, f"rpp-{how}", f"grpo-{how}", lambda f: late(f, "gold"))
    tokens = gap(results, f"rpp-{how}", f"grpo-{how}", lambda f: late(f, "length"))
    levels = {
        f"{arm} gold": over_seeds([late(f, "gold") for f in results[f"{arm}-{how}"].values()])
        for arm in ("rpp", "grpo")
    }
    return verdict(
        gold.low > -0.05 and tokens.high < 0,
        gold.high < -0.05 or tokens.low > 0,
        {**levels, "gold, rpp - grpo": gold, "tokens, rpp - grpo": tokens},
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
        return late(figures, "gold") / late(figures, "length")

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
        gains.append(late(figures, "proxy") - figures["base"]["proxy"])
        falls.append(max(golds) - late(figures, "gold"))
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


def runs(s: Settings) -> Sequence[Run]:
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
    scales={scale: runs(s) for scale, s in SCALES.items()},
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
)  # fmt: skip
