"""REINFORCE++'s tables: rules judge as they say, arms have equal samples, a row runs at a tiny size."""

import dataclasses
import random

import numpy as np
import pytest
from absl.testing import flagsaver

from experiments import table as reproducer
from experiments.configs.reinforce_pp import countdown
from experiments.configs.reinforce_pp import knights as knights_config
from experiments.configs.reinforce_pp import tools as tools_config
from experiments.tables.reinforce_pp import (
    TABLES,
    arms,
    bases,
    bias,
    comparison,
    knights,
    overfit,
    small,
    tools,
    transfer,
)
from research.core.loop import LoopConfig
from research.deepseek_r1 import base_data
from research.lm.tokenizer import Tokenizer
from research.reinforce_pp import knights_data
from research.rewards import RewardConfig
from research.rl.algorithms import ALGORITHMS
from research.rl.trainer import EvalConfig
from research.tasks import TaskConfig, make
from research.tasks import knights as knights_task

SEEDS = range(5)


def judged(table, results):
    verdicts = {c.number: reproducer.judge(c, results) for c in TABLES[table].claims}
    return {number: verdict.status for number, verdict in verdicts.items()}, verdicts


def arm(shared, tuned=None):
    """An arm's figures in a seed, at the shared rate and the best."""
    usual = {"training": [{"step": 1, "pass@1": 0.5, "mean |A|": 0.8}], "moved": 0.1}
    runs = [usual | run for run in (shared, tuned or shared)]
    return {"rates": [1e-3, 2e-3], "shared": 0, "tuned": 1, "runs": runs}


def examined(**figures):
    return {"tests": {name: {"pass@1": x} for name, x in figures.items()}}


def noise(seed, size=0.01):
    return size * (-1) ** seed


# The theorem.


def test_bias_rules():
    def found(mean_of, error=0.001):
        return {s: {str(n): (mean_of(n), error) for n in bias.SIZES} for s in SEEDS}

    as_theory = {"gaussian": found(lambda n: 2 - 4 / n), "binary": found(lambda n: 3 - 8 / n)}
    assert judged("bias", as_theory)[0] == {"B1": "confirmed", "B2": "confirmed", "B3": "not run"}
    unbiased = {"gaussian": found(lambda n: 2.0), "binary": found(lambda n: 3.0)}
    assert judged("bias", unbiased)[0] == {"B1": "refuted", "B2": "refuted", "B3": "not run"}
    slow = {"gaussian": found(lambda n: 2 - 2 / np.sqrt(n)), "binary": found(lambda n: 2.0)}
    statuses, verdicts = judged("bias", slow)
    assert statuses == {"B1": "not resolved", "B2": "not resolved", "B3": "not run"}
    exponent = verdicts["B1"].numbers["exponent of N in the bias"]
    assert exponent.value == pytest.approx(-0.5)


def test_weight_rules():
    from research.reinforce_pp.bias import weight

    def found(grpo, ours):
        exact = {
            "grpo": {str(n): [(grpo(n, p), 0.01) for p in bias.RATES] for n in bias.WEIGHED},
            "dr_grpo": {str(n): [((n - 1) / n, 0.01)] * 4 for n in bias.WEIGHED},
            "reinforce_pp_baseline": {str(n): [(ours(p), 0.01) for p in bias.RATES] for n in bias.WEIGHED},
        }  # fmt: skip
        return {"weights": dict.fromkeys(SEEDS, exact)}

    exact = lambda n, p: float(weight(n, p))  # noqa: E731
    assert judged("bias", found(exact, lambda p: 2.0))[0]["B3"] == "confirmed"
    assert judged("bias", found(lambda n, p: 1.0, lambda p: 2.0))[0]["B3"] == "refuted"
    assert judged("bias", found(exact, lambda p: 1 / p))[0]["B3"] == "not resolved"


def test_the_theorems_table_runs(tmp_path, monkeypatch):
    table = dataclasses.replace(TABLES["bias"], scales={"tiny": bias._runs(20_000)})
    results, origins = reproducer.collect(table, "tiny", [0], tmp_path, run=True)
    assert len(origins) == 3 and set(results) == {"gaussian", "binary", "weights"}
    verdicts = {claim.number: reproducer.judge(claim, results) for claim in table.claims}
    assert verdicts["B2"].numbers["truth"] == pytest.approx(3.0)
    reproducer.write(table, "tiny", results, verdicts, origins, tmp_path)
    assert (tmp_path / "reinforce_pp" / "bias-tiny.png").stat().st_size > 10_000


# Table 2.


def run_of(train, held_out):
    """Evaluated after steps 2, 4, …, with training accuracy of the policies after these steps."""
    steps = [2 * (i + 1) for i in range(len(train))]
    training = [
        {"step": step + after, "pass@1": x, "mean |A|": 0.8}
        for step, x in zip(steps, train, strict=True)
        for after in (0, 1)
    ]
    evaluations = [
        {"step": s, "pass@16": y, "pass@1": y / 2} for s, y in zip(steps, held_out, strict=True)
    ]
    return {"training": training, "evaluations": evaluations}


def test_figures_at_equal_accuracy():
    run = run_of([0.2, 0.6, 0.9], [0.8, 0.6, 0.5])
    assert overfit.train_accuracy(run) == [(2, 0.2), (4, 0.6), (6, 0.9)]
    for accuracy, expected in ((0.1, 0.8), (0.2, 0.8), (0.4, 0.7), (0.6, 0.6), (0.9, 0.5)):
        assert overfit.at_accuracy(run, accuracy, "pass@16") == pytest.approx(expected)
    with pytest.raises(ValueError, match="never reaches 0.95"):
        overfit.at_accuracy(run, 0.95, "pass@16")
    falling = run_of([0.7, 0.5, 0.8], [0.5, 0.9, 0.1])
    assert overfit.at_accuracy(falling, 0.7, "pass@16") == 0.5  # where it is first reached
    assert overfit.common_accuracy([run, falling]) == 0.8
    assert overfit.common_accuracy([run_of([0.99], [1.0])] * 2) == 0.95


@pytest.mark.parametrize(
    "held_out, equal_accuracy, equal_steps",
    [  # GRPO has .7 where its training accuracy is .7, and .6 at the end
        ([0.9, 0.8], "confirmed", "confirmed"),
        ([0.6, 0.5], "refuted", "refuted"),
        ([0.9, 0.7], "not resolved", "confirmed"),
        ([0.9, 0.6], "refuted", "not resolved"),
    ],
)
def test_overfitting_rules(held_out, equal_accuracy, equal_steps):
    def of(curve, train, seed):
        return arm(run_of(train, [x + noise(seed) for x in curve]))

    results = {"grpo": {s: arm(run_of([0.5, 0.9], [0.8, 0.6])) for s in SEEDS}}
    results |= {name: {s: of(held_out, [0.5, 0.7], s) for s in SEEDS} for name in overfit.ARMS[1:]}
    statuses, verdicts = judged("overfit", results)
    assert statuses == dict(
        zip(("T2-1", "T2-2", "T2-3", "T2-4"), (equal_accuracy, equal_steps) * 2, strict=True)
    )
    numbers = verdicts["T2-1"].numbers
    assert numbers["training accuracy compared at (shared lr)"].value == pytest.approx(0.7)
    assert numbers["training accuracy, equal steps (shared lr)"].value == pytest.approx(-0.2)


# Figure 4, Table 3 and the comparison.


def sizes(*rates):
    return {str(n + 2): rate for n, rate in enumerate(rates)}


@pytest.mark.parametrize(
    "ours, expected",
    [
        ((0.9, 0.8, 0.7, 0.6, 0.5), ("confirmed", "confirmed", "confirmed")),
        ((0.9, 0.7, 0.5, 0.3, 0.1), ("not resolved", "not resolved", "not resolved")),
        ((0.9, 0.6, 0.3, 0.1, 0.0), ("refuted", "refuted", "refuted")),
        ((1.0, 0.9, 0.5, 0.2, 0.0), ("confirmed", "refuted", "refuted")),
    ],
)
def test_knights_rules(ours, expected):
    grpo = (0.9, 0.7, 0.5, 0.3, 0.1)
    results = {"base": {s: examined(**sizes(*[0.1] * 5)) for s in SEEDS}}
    results["grpo"] = {s: arm(examined(**sizes(*grpo))) for s in SEEDS}
    for name in knights.ARMS[1:]:
        results[name] = {
            s: arm(examined(**sizes(*(x + noise(s) * (i - 1.8) for i, x in enumerate(ours))), validation=0.5))
            for s in SEEDS
        }  # fmt: skip
    assert tuple(judged("knights", results)[0].values()) == expected


def test_the_best_rate_is_that_of_validation():
    scores = ((0.9, 0.2), (0.1, 0.6), (0.5, 0.4))
    assert arms.best([examined(**{"held-out": x, "validation": y}) for x, y in scores]) == 1


def test_both_matchings_must_agree():
    def results(shared, tuned):
        ours = {s: arm(examined(**sizes(*shared)), examined(**sizes(*tuned))) for s in SEEDS}
        grpo = {s: arm(examined(**sizes(0.5, 0.5, 0.5))) for s in SEEDS}
        base = {s: examined(**sizes(0, 0, 0)) for s in SEEDS}
        return {"base": base, "grpo": grpo, "reinforce_pp": ours, "reinforce_pp_baseline": ours}

    better, worse = (0.8, 0.8, 0.8), (0.4, 0.4, 0.4)
    assert judged("knights", results(better, better))[0]["F4-1"] == "confirmed"
    assert judged("knights", results(better, worse))[0]["F4-1"] == "not resolved"
    assert judged("knights", results(worse, worse))[0]["F4-1"] == "refuted"
    _, verdicts = judged("knights", results(better, worse))
    numbers = verdicts["F4-1"].numbers
    assert numbers["reinforce_pp_baseline - grpo (shared lr)"].value == pytest.approx(0.3)
    assert numbers["reinforce_pp_baseline - grpo (tuned lr)"].value == pytest.approx(-0.1)
    assert numbers["grpo: moved, mean |A|, tuned lr"] == "0.100, 0.80, 0.002"


@pytest.mark.parametrize(
    "easy, hard, expected",
    [
        (0.80, 0.5, ("confirmed", "confirmed")),
        (0.80, 0.3, ("refuted", "confirmed")),
        (0.90, 0.4, ("not resolved", "refuted")),
        (0.82, 0.4, ("not resolved", "not resolved")),
    ],
)
def test_transfer_rules(easy, hard, expected):
    def of(seed, easy, hard, size):
        figures = {
            transfer.EASY: easy + noise(seed, size),
            transfer.HARD: hard,
            transfer.HARDER: hard,
        }
        return examined(**{k: x + noise(seed, size) for k, x in figures.items()})

    results = {"base": {s: of(s, 0.2, 0.1, 0) for s in SEEDS}}
    results |= {
        name: {s: arm(of(s, easy, hard, 0.003)) for s in SEEDS} for name in transfer.ARMS[1:]
    }
    results["grpo"] = {s: arm(of(s, 0.8, 0.4, 0)) for s in SEEDS}
    assert tuple(judged("transfer", results)[0].values()) == expected


@pytest.mark.parametrize(
    "ours, expected",
    [
        ((0.9, 0.8, 0.5, 0.2), "confirmed"),
        ((0.9, 0.7, 0.4, 0.0), "not resolved"),  # as good as the better of the two
        ((0.9, 0.6, 0.4, 0.0), "refuted"),  # better than PPO, worse than GRPO
    ],
)
def test_tool_rules(ours, expected):
    def of(seed, *rates):
        return arm(examined(**{str(n + 1): x + noise(seed) for n, x in enumerate(rates)}))

    results = {"base": {s: examined(**{str(n): 0.1 for n in tools.CALLS}) for s in SEEDS}}
    results["ppo"] = {s: of(0, 0.5, 0.4, 0.3, 0.0) for s in SEEDS}
    results["grpo"] = {s: of(1, 0.91, 0.71, 0.41, 0.01) for s in SEEDS}
    results["reinforce_pp_baseline"] = {s: of(s, *ours) for s in SEEDS}
    statuses, verdicts = judged("tools", results)
    assert statuses == {"T4": expected}
    assert verdicts["T4"].numbers["ppo, by calls (tuned lr)"] == "0.510 0.410 0.310 0.010"


def test_comparison_rule_and_figure(tmp_path):
    def run(end):
        training = [
            {"step": i + 1, "pass@1": i / 12, "mean |A|": 0.5, "rounds": 2.0} for i in range(12)
        ]
        return arm(examined(**{"held-out": end, "validation": 0.0}) | {"training": training})

    results = {"base": {s: examined(**{"held-out": 0.2}) for s in SEEDS}}
    results |= {name: {s: run(0.5 + noise(s)) for s in SEEDS} for name in ALGORITHMS}
    assert judged("comparison", results)[0] == {"C": "confirmed"}
    comparison.figure(results, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 30_000
    results["cispo"] = {s: run(0.2 + noise(s)) for s in SEEDS}
    assert judged("comparison", results)[0] == {"C": "not resolved"}
    results["cispo"] = {s: run(0.1) for s in SEEDS}
    assert judged("comparison", results)[0] == {"C": "refuted"}
    del results["cispo"]
    assert judged("comparison", results)[0] == {"C": "not run"}


@pytest.mark.parametrize(
    "table, title, names, at",
    [
        ("knights", "pass@1 by number of people", "34", (3, 4)),
        ("tools", "pass@1 by the number of calls that it takes", "1234", (1, 2, 3, 4)),
        ("transfer", "pass@1: 0 in distribution, 1 harder, 2 hardest", tuple(transfer._SMALL), (0, 1, 2)),
    ],
)  # fmt: skip
def test_figures_show_examinations_at_the_shared_rate(table, title, names, at, monkeypatch):
    def run(add):
        return examined(**{name: x / 10 + add for x, name in enumerate(names)}, validation=0.0)

    results = {
        "base": {0: run(0.0)},
        "grpo": {s: arm(run(0.5 + s / 100), run(0.9)) for s in (0, 1)},
    }
    drawn = {}
    monkeypatch.setattr(arms.plots, "curves", lambda path, panels, **_: drawn.update(panels))
    TABLES[table].figure(results, "somewhere")
    rates = [x / 10 for x in range(len(names))]
    assert drawn == {
        title: {
            "grpo": [
                list(zip(at, (x + 0.5 + s / 100 for x in rates), strict=True)) for s in (0, 1)
            ],
            "base": [list(zip(at, rates, strict=True))],
        },
        "pass@1 on training problems by rollout": {"grpo": [[(1, 0.5)]] * 2},
    }


# What is compared.


def test_all_algorithms_sample_equally_many_responses():
    configs = {name: comparison.PLANS["cpu"].config(name, 0) for name in ALGORITHMS}
    assert set(configs) == {name for names in comparison.FAMILIES.values() for name in names} | {
        "grpo"
    }
    budget = {}
    for name, config in configs.items():
        each = config.rollout.group_size + (name == "remax")
        rounds = config.resolved().rollout.rounds
        budget[name] = config.loop.steps * rounds * config.rollout.prompts * each
    assert len(set(budget.values())) == 1 and len({c.optim for c in configs.values()}) == 1
    assert {c.updates for c in configs.values()} == {2}
    record = [{"pass@1": 0.0, "rounds": 2.0}, {"pass@1": 0.0, "rounds": 1.0}]
    np.testing.assert_array_equal(
        comparison.responses(configs["dapo"], {"training": record}), [0, 256]
    )
    np.testing.assert_array_equal(
        comparison.responses(configs["remax"], {"training": [{}] * 3}), [0, 128, 256]
    )


@pytest.mark.parametrize(
    "table", [overfit, transfer, knights, tools], ids=lambda t: t.__name__.split(".")[-1]
)
def test_arms_differ_in_the_estimator_alone(table):
    configs = [table.PLANS["cpu"].config(name, 3) for name in table.ARMS]
    for config in configs:
        assert dataclasses.replace(config, estimator=table.ARMS[0]) == configs[0]
        assert config.resolved().loss.kl_coef == 0.001 and config.seed == config.task.seed == 3
    for plan in table.PLANS.values():
        trained = plan.config(table.ARMS[0], 3).task
        for task in (*plan.tests.values(), plan.validation):
            assert task.seed >= 1000 and task.seed != trained.seed
        assert len({task.seed for task in plan.tests.values()} & {plan.validation.seed}) == 0
        for task in (*plan.tests.values(), plan.validation):
            make(task).problem("test", plan.problems - 1)  # there are so many


def test_knights_are_tested_beyond_the_sizes_of_training():
    for scale, (low, high) in knights.TRAINED.items():
        assert set(range(low, high + 1)) <= set(knights.TESTED[scale])
        assert high < sorted(knights.TESTED[scale])[-2]  # the two largest
    plan = knights.PLANS["cpu"]
    rollout = plan.config("grpo", 0).rollout
    task = make(plan.tests["6"])
    for problem in (task.problem("test", i) for i in range(plan.problems)):
        assert len(problem.question.split()) <= rollout.max_prompt
        worked = knights_data._response(problem.data, "worked", random.Random(0))
        assert len(worked.split()) <= rollout.max_new_tokens


@pytest.mark.parametrize("estimator", ["reinforce_pp", "reinforce_pp_baseline", "ppo"])
def test_configs_for_a_gpu(estimator):
    for module in (countdown, knights_config, tools_config):
        config = module.get_config(estimator)
        assert (
            config.estimator == estimator
            and config.rollout.prompts * config.rollout.group_size == 1024
        )
    with pytest.raises(ValueError, match="unknown estimator 'gpro'"):
        countdown.get_config("gpro")
    assert knights_config.get_config().task.name == "knights"


@pytest.mark.parametrize("name", ["overfit", "transfer", "knights", "tools", "comparison"])
def test_gpu_rows_ask_for_a_model(name, tmp_path):
    row = TABLES[name].scales["gpu"][0]
    with pytest.raises(ValueError, match="scale gpu needs --init_from=DIRECTORY"):
        row.measure(0, tmp_path, {})


def test_knights_examples():
    """What is thought of a number of knights is true, and who thinks it through is right."""
    task = make(
        TaskConfig("knights", options=("terse=True", f"kinds={bases.KINDS}"), max_difficulty=4)
    )
    pairs = knights_data.examples(task, 600, seed=0)
    tokenizer = Tokenizer.words(knights_data.WORDS, pad=base_data.PAD, eos=base_data.END)
    (first, *_) = bases._tokenized(tokenizer, pairs[:1])
    assert first["loss_mask"].sum() == len(pairs[0][1].split()) and first["loss_mask"][-1] == 1
    right = {"worked": [], "hasty": [], "guess": []}
    for i, (question, response) in enumerate(pairs):
        problem = task.problem("train", 1_000_000 + i)
        assert problem.question == question
        thoughts, _, rest = response.removeprefix("<think> ").partition("</think> <answer> ")
        answer, _, after = rest.partition(" </answer>")
        assert after == " $"
        tried, roles = [], None
        for thought in thoughts.split(" . ")[:-1]:
            number, _, found = thought.partition(" : ")
            roles, _, knights_found = found.rpartition(" ")
            assert roles.split()[::2] == problem.data["names"]
            assert roles.split().count("knight") == int(knights_found)
            # Somebody is called a knight just if the statement holds among that many knights.
            world = (1 << int(number)) - 1
            for role, statement in zip(
                roles.split()[1::2], problem.data["statements"], strict=True
            ):
                truth = knights_task._truth(statement, len(problem.data["names"])) >> world & 1
                assert role == ("knight" if truth else "knave")
            tried.append((int(number), int(knights_found)))
        assert roles in (None, answer)
        if not tried:
            way = "guess"
        elif tried[0][0] == 0 and [n == found for n, found in tried] == [False] * (
            len(tried) - 1
        ) + [True]:
            way = "worked"  # or a hasty one in luck
            assert [n for n, _ in tried] == list(range(len(tried)))
        else:
            way = "hasty"
            assert len(tried) == 1
        right[way].append(task.verify(problem, answer))
    assert np.mean(right["worked"]) == 1 and 0.05 < np.mean(right["guess"]) < 0.3
    shares = {way: len(found) / len(pairs) for way, found in right.items()}
    assert shares == pytest.approx(knights_data.MIXTURE, abs=0.07)


@pytest.mark.slow
def test_a_row_runs(tmp_path):
    """The base model, an arm at two rates, and what is written of them."""
    tiny = bases.Base(bases.BASES["arithmetic"].tokenizer, _few, steps=3, width=16, layers=1)
    task = TaskConfig(min_difficulty=2, max_difficulty=3, test_size=6, options=small.SUMS)

    def config(name, seed):
        return small.config(
            name, seed, task=task, steps=2, prompts=2, group_size=2, max_prompt=5, max_new_tokens=4, row_length=16,
            micro_rows=1, mesh="data=1", reward=RewardConfig(random=0.5),
            eval=EvalConfig(problems=2, samples=2), loop=LoopConfig(steps=2, eval_every=1),
        )  # fmt: skip

    plan = arms.Plan(
        ("grpo",), small.arithmetic, config, (1e-3, 1e-2), {"held-out": dataclasses.replace(task, seed=1000)},
        dataclasses.replace(task, seed=1001), problems=3, samples=2,
    )  # fmt: skip
    table = dataclasses.replace(TABLES["overfit"], scales={"tiny": plan.runs()})
    bases.base.cache_clear()
    with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver(bases=str(tmp_path / "bases")):
        patch.setitem(bases.BASES, "arithmetic", tiny)
        results, _ = reproducer.collect(table, "tiny", [0], tmp_path / "runs", run=True)
    bases.base.cache_clear()
    figures = results["grpo"][0]
    assert figures["rates"] == [1e-3, 1e-2] and len(figures["runs"]) == 2
    first, second = figures["runs"]
    assert {"pass@1", "pass@2"} <= set(results["base"][0]["tests"]["held-out"])
    assert 0 < first["moved"] < second["moved"]
    wanted = {"step", "pass@1", "length", "zero_std", "mean |A|", "kl", "entropy", "clip_frac"}
    assert [wanted <= set(record) for record in first["training"]] == [True, True]
    assert [e["step"] for e in first["evaluations"]] == [1, 2]
    assert figures["tuned"] == arms.best(figures["runs"]) and figures["shared"] == 0
    assert (tmp_path / "runs" / "grpo" / "seed0" / "lr0.01" / "metrics.jsonl").exists()


def _few(tokenizer, seed):
    return bases._tokenized(tokenizer, base_data.textbook(60, seed).texts())
