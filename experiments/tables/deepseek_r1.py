"""DeepSeek-R1's claims about reinforcement learning without supervision, at a scale where each can be tried.

`cpu`: the quickstart's task and model; every seed trains its own base model, and from it GRPO, Dr.GRPO (the same
without the two normalisations) and GRPO on a random reward, on equally many sampled responses. `gpu`: GSM8K from a
Qwen2.5 directory given by --init_from, with the files given by --gsm8k.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from experiments import plots, quickstart
from experiments.configs.deepseek_r1 import quickstart as quickstart_config
from experiments.configs.deepseek_r1 import zero_gsm8k
from experiments.tables.base import (
    INIT_FROM,
    Claim,
    Interval,
    Results,
    Run,
    Table,
    Verdict,
    over_seeds,
    verdict,
)
from research.core import config as configs
from research.core import loop, metrics
from research.core.loop import LoopConfig
from research.lm import checkpoints
from research.lm.decoder import Decoder
from research.rl import trainer as rl
from research.rl.evaluation import Samples
from research.rl.trainer import EvalConfig

_GSM8K = flags.DEFINE_list("gsm8k", [], "gpu scale: GSM8K's train and test .jsonl files.")

STEPS = 150
EVALUATED = 512  # held-out problems of GSM8K's 1,319
ARMS = ("grpo", "dr_grpo", "random")


# Runs.


def _config(seed: int) -> quickstart.Config:
    config = quickstart_config.config()
    return dataclasses.replace(
        config,
        base=dataclasses.replace(config.base, seed=seed),
        zero=dataclasses.replace(
            config.zero,
            seed=seed,
            eval=EvalConfig(problems=128, samples=16),
            save_samples_every=0,
            loop=LoopConfig(steps=STEPS, eval_every=10, checkpoint_every=50),
        ),
    )


def _base(seed: int, directory: pathlib.Path, results: Mapping[str, Any]) -> dict[str, Any]:
    del results
    config = _config(seed)
    model, params, tokenizer = quickstart.train_base(config, directory)
    figures, episodes = quickstart.Judge(config, model, tokenizer)(params)
    return {"eval": figures, "problems": _per_problem(episodes.samples())}


def _arm(
    arm: str, seed: int, directory: pathlib.Path, results: Mapping[str, Any]
) -> dict[str, Any]:
    del results
    config = _config(seed)
    zero = config.zero
    if arm == "dr_grpo":
        loss = dataclasses.replace(zero.loss, aggregation="drgrpo")
        zero = dataclasses.replace(zero, loss=loss, estimator="dr_grpo")
    elif arm == "grpo":
        zero = dataclasses.replace(zero, loss=dataclasses.replace(zero.loss, aggregation="grpo"))
    elif arm == "random":
        zero = dataclasses.replace(
            zero,
            loss=dataclasses.replace(zero.loss, aggregation="grpo"),
            reward=dataclasses.replace(zero.reward, random=0.5),
        )
    else:
        raise ValueError(f"no arm {arm!r}")
    config = dataclasses.replace(config, zero=zero)
    base = directory.parent.parent / "base" / directory.name
    model, params, tokenizer = checkpoints.load(base)
    params = quickstart.train_rl(zero, directory, model, params, tokenizer)
    judge = quickstart.Judge(config, model, tokenizer)
    figures, episodes = judge(params)
    silenced, _ = judge(params, suppress=("wait",))
    history = metrics.read(directory / "metrics.jsonl")
    return {
        "eval": figures,
        "without_wait": silenced,
        "problems": _per_problem(episodes.samples()),
        "evaluations": [_evaluation(r) for r in history if "eval/pass@1" in r],
        "training": [_training(r) for r in history],
    }


def _gpu_config(seed: int) -> quickstart.Config:
    """GSM8K as the quickstart's `zero`, which is what `Judge` reads."""
    if not INIT_FROM.value or len(_GSM8K.value) != 2:
        raise ValueError("scale gpu needs --init_from=DIRECTORY and --gsm8k=TRAIN.jsonl,TEST.jsonl")
    config = configs.from_config_dict(rl.Config, zero_gsm8k.get_config())
    train, test = _GSM8K.value
    zero = dataclasses.replace(
        config,
        seed=seed,
        init_from=INIT_FROM.value,
        task=dataclasses.replace(config.task, train_file=train, test_file=test),
        eval=EvalConfig(problems=128, samples=16),
    )
    return quickstart.Config(
        base=quickstart_config.config().base, zero=zero, problems=EVALUATED, samples=16
    )


def _gpu_base(seed: int, directory: pathlib.Path, results: Mapping[str, Any]) -> dict[str, Any]:
    del directory, results
    config = _gpu_config(seed)
    model, params, tokenizer = checkpoints.load(config.zero.init_from)
    model = Decoder(dataclasses.replace(model.config, dtype=config.zero.dtype))  # as the arms
    figures, episodes = quickstart.Judge(config, model, tokenizer)(params)
    return {"eval": figures, "problems": _per_problem(episodes.samples())}


def _gpu(
    arm: str, seed: int, directory: pathlib.Path, results: Mapping[str, Any]
) -> dict[str, Any]:
    del results
    config = _gpu_config(seed)
    zero = config.zero
    if arm == "dr_grpo":
        loss = dataclasses.replace(zero.loss, aggregation="drgrpo")
        zero = dataclasses.replace(zero, loss=loss, estimator="dr_grpo")
    elif arm == "random":
        zero = dataclasses.replace(zero, reward=dataclasses.replace(zero.reward, random=0.5))
    trainer = rl.build(zero, directory)
    params = loop.run(trainer, zero.loop, directory, fingerprint_of=zero, name=arm).params
    model, _, tokenizer = checkpoints.load(directory)
    figures, episodes = quickstart.Judge(config, model, tokenizer)(params)
    history = metrics.read(directory / "metrics.jsonl")
    return {
        "eval": figures,
        "problems": _per_problem(episodes.samples()),
        "evaluations": [_evaluation(r) for r in history if "eval/pass@1" in r],
        "training": [_training(r) for r in history],
    }


def _per_problem(samples: Samples) -> dict[str, list[float]]:
    return {
        "rate": np.round(samples.correct.mean(axis=1), 4).tolist(),
        "length": np.round(samples.lengths.mean(axis=1), 2).tolist(),
        "difficulty": samples.difficulty.tolist(),
    }


def _evaluation(record: Mapping[str, float]) -> dict[str, float]:
    names = (
        "pass@1",
        "cons@16",
        "length",
        "length/correct",
        "length/wrong",
        "reflection/wait",
        "format",
    )
    return {"step": record["step"]} | {
        n: round(record[f"eval/{n}"], 4) for n in names if f"eval/{n}" in record
    }


def _training(record: Mapping[str, float]) -> dict[str, float]:
    names = ("pass@1", "length", "length/correct", "reflection/wait", "zero_std", "truncated")
    kept = {n: record[f"rollout/{n}"] for n in names if record.get(f"rollout/{n}") is not None}
    kept |= {n: record[n] for n in ("entropy", "kl", "mismatch/max") if record.get(n) is not None}
    return {"step": record["step"]} | {n: round(value, 5) for n, value in kept.items()}


# Verdicts.


def _gain(results: Results, arm: str, key: str) -> Interval:
    """Change of a figure from the base to an arm, over seeds."""
    return over_seeds(
        [results[arm][s]["eval"][key] - results["base"][s]["eval"][key] for s in results[arm]]
    )


def _level(results: Results, arm: str, key: str) -> Interval:
    return over_seeds([results[arm][s]["eval"][key] for s in results[arm]])


def _learns(results: Results) -> Verdict:
    gain, control = _gain(results, "grpo", "pass@1"), _gain(results, "random", "pass@1")
    margins = [
        e["cons@16"] - e["pass@1"] for run in results["grpo"].values() for e in run["evaluations"]
    ]
    confirmed = gain.low >= 0.20 and min(margins) > 0 and control.high < 0.05
    refuted = gain.high < 0.20
    return verdict(
        confirmed,
        refuted,
        {
            "base pass@1": _level(results, "base", "pass@1"),
            "gain": gain,
            "gain in cons@16": _gain(results, "grpo", "cons@16"),
            "least cons@16 - pass@1": float(min(margins)),
            "control's gain": control,
        },
    )


def _lengthens(results: Results) -> Verdict:
    numbers = {f"{arm}: correct responses": _gain(results, arm, "length/correct") for arm in ARMS}
    grpo, dr, _ = numbers.values()
    wrong = {f"{arm}: all responses": _gain(results, arm, "length") for arm in ARMS}
    return verdict(grpo.low > 0 and dr.low > 0, grpo.high < 0 or dr.high < 0, {**numbers, **wrong})


def _reflects(results: Results) -> Verdict:
    key = "reflection/wait"
    ratios = over_seeds(
        [
            results["grpo"][s]["eval"][key] / max(results["base"][s]["eval"][key], 1e-4)
            for s in results["grpo"]
        ]
    )
    cost = over_seeds(
        [run["eval"]["pass@1"] - run["without_wait"]["pass@1"] for run in results["grpo"].values()]
    )
    return verdict(
        ratios.low >= 3 and cost.low > 0,
        ratios.high < 3 or cost.high < 0,
        {
            "base rate": _level(results, "base", key),
            "rate after": _level(results, "grpo", key),
            "ratio": ratios,
            "after, where needed": _level(results, "grpo", "self_correction"),
            "control's rate": _level(results, "random", key),
            "pass@1 lost without the word": cost,
        },
    )


def _adapts(results: Results) -> Verdict:
    correlations = []
    for seed, run in results["grpo"].items():
        # Difficulty of a problem is measured on the base, so that the two sides are independent samples.
        rate = np.array(results["base"][seed]["problems"]["rate"])
        length = np.array(run["problems"]["length"])
        correlations.append(_rank_correlation(rate, length))
    correlation = over_seeds(correlations)
    own = over_seeds(
        [
            _rank_correlation(
                np.array(run["problems"]["rate"]), np.array(run["problems"]["length"])
            )
            for run in results["grpo"].values()
        ]
    )
    # Longer chains are both harder and longer to write down: what is left at equal numbers of operands?
    within = over_seeds([_within_difficulty(run["problems"]) for run in results["grpo"].values()])
    gap = over_seeds(
        [
            run["eval"]["pass@1"] - results["base"][seed]["eval"]["cons@16"]
            for seed, run in results["grpo"].items()
        ]
    )
    return verdict(
        own.high < 0 and gap.low > 0,
        own.low > 0 or gap.high < 0,
        {
            "rank correlation of length with own pass rate": own,
            "the same among equally many operands": within,
            "with the base's pass rate": correlation,
            "pass@1 - base's cons@16": gap,
        },
    )


def _within_difficulty(problems: Mapping[str, Sequence[float]]) -> float:
    """Mean over difficulties of the rank correlation of length with pass rate among their problems."""
    rate, length, difficulty = (np.array(problems[k]) for k in ("rate", "length", "difficulty"))
    values = []
    for level in np.unique(difficulty):
        chosen = difficulty == level
        if np.ptp(rate[chosen]) > 0 and np.ptp(length[chosen]) > 0:
            values.append(_rank_correlation(rate[chosen], length[chosen]))
    return float(np.mean(values)) if values else 0.0


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 if one side does not vary."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0

    def ranks(values):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ends = np.cumsum(counts)
        return (ends - (counts - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def _figure(results: Results, path: pathlib.Path) -> None:
    titles = {
        "pass@1": "held-out pass@1",
        "cons@16": "held-out cons@16",
        "length/correct": "length of correct responses, tokens",
        "reflection/wait": 'share of responses with "wait"',
    }
    arms = [
        arm
        for arm in ARMS
        if arm in results and results.get("base", {}).keys() >= results[arm].keys()
    ]

    def curve(arm: str, seed: int, key: str) -> Sequence[tuple[float, float]]:
        run = results[arm][seed]
        points = [{"step": 0} | results["base"][seed]["eval"], *run["evaluations"]]
        return [(point["step"], point[key]) for point in points if key in point]

    plots.curves(
        path,
        {
            title: {arm: [curve(arm, seed, key) for seed in results[arm]] for arm in arms}
            for key, title in titles.items()
        },
        smooth=1,
    )


ZERO = Table(
    name="deepseek_r1/zero",
    title="DeepSeek-R1-Zero: claims 1, 2, 3 and 13",
    scales={
        "cpu": [
            Run("base", _base),
            *(Run(arm, functools.partial(_arm, arm), needs=("base",)) for arm in ARMS),
        ],
        "gpu": [
            Run("base", _gpu_base),
            *(Run(arm, functools.partial(_gpu, arm)) for arm in ARMS),
        ],
    },
    claims=[
        Claim(
            "1",
            "Reinforcement learning alone lifts a base model",
            "AIME 2024 pass@1 15.6 % to 71.0 %, cons@64 86.7 % (v1 Fig. 2, Table 2)",
            "pass@1 gains at least 20 points (lower bound), cons@16 above pass@1 at every evaluation, and the random "
            "reward gains less than 5 points; refuted if the gain's upper bound is below 20 points.",
            ("base", "grpo", "random"),
            _learns,
        ),
        Claim(
            "2",
            "Responses grow longer unprompted",
            "mean training length 0.5k to 9.6k tokens in 8.4k steps (v1 Fig. 3, read off)",
            "correct responses grow under GRPO and under Dr.GRPO (both lower bounds above 0 tokens); growth under GRPO "
            "alone would be its length normalisation. Refuted if an upper bound is below 0.",
            ("base", "grpo", "dr_grpo", "random"),
            _lengthens,
        ),
        Claim(
            "3",
            "Reflection emerges and helps",
            "reflective words up 5-7x over training; 'wait' spikes after step 8,000 (v2 Fig. 9)",
            "'wait' at least 3 times as frequent as in the base (lower bound), and pass@1 falls when the sampler may "
            "not use the word (lower bound above 0); refuted if an upper bound is below that.",
            ("base", "grpo", "random"),
            _reflects,
        ),
        Claim(
            "13",
            "Compute adapts to difficulty, and voting does not replace it",
            "R1 solves 61.8 % at 8,793 mean thinking tokens, below 7k on easy and above 18k on the hardest; GPT-4o "
            "24.7 % at 711 (v2 Fig. 18)",
            "length falls with the pass rate over problems (rank correlation below 0), and pass@1 beats the base's "
            "vote of 16, by the whole intervals; refuted if one of them is wholly on the other side.",
            ("base", "grpo"),
            _adapts,
        ),
    ],
    figure=_figure,
)

TABLES = {"zero": ZERO}
