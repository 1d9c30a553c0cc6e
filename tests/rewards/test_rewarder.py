"""Rewards: weights, statuses, the control, and when a run must stop."""

import json
import math
import statistics
import threading
import time

import pool_verifiers
import pytest

from research import tasks
from research.core import config
from research.rewards import Reward, RewardConfig, Rewarder, RewardFailure, Status, summarize

ARITHMETIC = tasks.make("arithmetic")
PROBLEM = ARITHMETIC.problem("train", 0)
RIGHT = PROBLEM.answer
WRONG = str((int(RIGHT) + 1) % 10)


def text(answer, think="x"):
    return f"<think> {think} </think> <answer> {answer} </answer>"


def reward(completion, finished=True, **options):
    with Rewarder(RewardConfig(**options), ARITHMETIC) as rewarder:
        (result,) = rewarder([PROBLEM], [completion], [finished], 0)
    return result


def test_both_parts_weigh_the_same_unless_told_otherwise():
    assert reward(text(RIGHT)) == Reward(2.0, {"accuracy": 1.0, "format": 1.0}, Status.RIGHT, RIGHT)
    assert reward(text(WRONG)) == Reward(1.0, {"accuracy": 0.0, "format": 1.0}, Status.WRONG, WRONG)
    loose = f"<answer>{RIGHT}</answer>"
    assert reward(loose) == Reward(1.0, {"accuracy": 1.0, "format": 0.0}, Status.RIGHT, RIGHT)
    assert reward(text(RIGHT), accuracy=3.0, format=0.25).total == 3.25


def test_without_an_answer_there_is_nothing_to_earn():
    for completion in ("", RIGHT, f"<answer> {RIGHT}", "<think> 1 </think>"):
        result = reward(completion)
        assert (result.total, result.status, result.answer) == (0.0, Status.UNPARSED, None)
        assert "<answer>" in result.note


def test_an_answer_the_task_cannot_read_keeps_the_format_unless_that_needs_it():
    kept = reward(text("six"))
    assert (kept.total, kept.status) == (1.0, Status.UNPARSED)
    assert reward(text("six"), format_needs_answer=True).total == 0.0
    assert reward(text(RIGHT), format_needs_answer=True).total == 2.0
    assert reward(text(WRONG), format_needs_answer=True).total == 1.0


def test_enumerating_answers_is_wrong():
    everything = "".join(f"<answer>{d}</answer>" for d in range(10))
    assert reward(f"<think> x </think> {everything}").status == Status.WRONG


def test_accuracy_may_need_the_format():
    loose = f"<answer>{RIGHT}</answer>"
    result = reward(loose, accuracy_needs_format=True)
    assert (result.total, result.parts["accuracy"], result.status) == (0.0, 0.0, Status.UNPARSED)
    assert reward(text(RIGHT), accuracy_needs_format=True).total == 2.0


def test_a_completion_cut_off_is_out_of_format():
    assert reward(text(RIGHT), finished=False).parts == {"accuracy": 1.0, "format": 0.0}
    assert reward(text(RIGHT), finished=False, accuracy_needs_format=True).total == 0.0


def test_empty_reasoning_is_an_option():
    assert reward(text(RIGHT, think="")).parts["format"] == 0.0
    assert reward(text(RIGHT, think=""), think_required=False).parts["format"] == 1.0


def test_the_prompt_may_have_opened_the_reasoning():
    completion = text(RIGHT).removeprefix("<think>")
    assert reward(completion).parts["format"] == 0.0
    assert reward(completion, think_prefilled=True).total == 2.0
    assert reward(text(RIGHT), think_prefilled=True).parts["format"] == 0.0  # opened twice


def test_answers_may_be_boxed_or_plain():
    assert reward(rf"so \boxed{{{RIGHT}}}.", answer_from="boxed").status == Status.RIGHT
    assert (
        reward(rf"\boxed{{{RIGHT}}} \boxed{{{WRONG}}}", answer_from="boxed").status == Status.WRONG
    )
    assert reward(text(RIGHT), answer_from="boxed").status == Status.UNPARSED
    assert reward(f" {RIGHT}\n", answer_from="text").status == Status.RIGHT
    assert reward(f"<think> {WRONG} </think> {RIGHT}", answer_from="text").status == Status.RIGHT


def test_the_control_pays_by_coin_whatever_was_written():
    problems = [ARITHMETIC.problem("train", i) for i in range(2000)]
    good = [text(p.answer) for p in problems]
    bad = [""] * 2000
    with Rewarder(RewardConfig(random=0.3), ARITHMETIC) as rewarder:
        paid = rewarder(problems, good, [True] * 2000, 5)
        same = rewarder(problems, bad, [False] * 2000, 5)
        other = rewarder(problems, good, [True] * 2000, 6)
        fewer = rewarder(problems[:10], good[:10], [True] * 10, 5)
    totals = [r.total for r in paid]
    assert totals == [r.total for r in same]
    assert totals[:10] == [r.total for r in fewer]
    assert set(totals) == {0.0, 1.0}
    assert abs(statistics.mean(totals) - 0.3) < 5 * math.sqrt(0.3 * 0.7 / 2000)
    agree = statistics.mean(a.total == b.total for a, b in zip(paid, other, strict=True))
    assert abs(agree - (0.3**2 + 0.7**2)) < 0.06  # coins of two seeds are independent
    assert all(
        r.parts["accuracy"] == 1.0 and r.status == Status.RIGHT for r in paid
    )  # still measured
    assert all(r.parts["random"] == r.total for r in paid)


def test_the_control_may_keep_the_format():
    for p, coin in ((0.0, 0.0), (1.0, 1.0)):
        options = {"random": p, "random_keeps_format": True, "format": 0.2}
        assert reward(text(WRONG), **options).total == pytest.approx(coin + 0.2)
        assert reward("", **options).total == coin


def test_settings_out_of_range_are_refused_and_the_rest_round_trips():
    for options in (
        {"random": 1.5},
        {"max_failure_share": -0.1},
        {"timeout_s": 0.0},
        {"workers": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            RewardConfig(**options)
    settings = RewardConfig(random=0.5, answer_from="boxed")
    assert config.from_config_dict(RewardConfig, config.to_config_dict(settings)) == settings


def test_arguments_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="1 problems, 2 completions and 1"):
        Rewarder(RewardConfig(), ARITHMETIC)([PROBLEM], ["", ""], [True], 0)


def test_summaries_are_means_and_shares():
    parts = {"accuracy": 1.0, "format": 0.5}
    rewards = [
        Reward(1.5, parts, Status.RIGHT),
        Reward(0.5, parts | {"accuracy": 0.0}, Status.TIMEOUT),
    ]
    assert summarize(rewards) == {
        "reward/mean": 1.0,
        "reward/std": 0.5,
        "reward/accuracy": 0.5,
        "reward/format": 0.5,
        "status/right": 0.5,
        "status/wrong": 0.0,
        "status/unparsed": 0.0,
        "status/timeout": 0.5,
        "status/error": 0.0,
    }
    with pytest.raises(ValueError):
        summarize([])


class Commanded:
    """A task whose answers say what happens to them; see pool_verifiers."""

    name = "commanded"
    isolated = pool_verifiers.Obedient()

    def quick(self, problem, answer):
        return None

    def canonical(self, problem, answer):
        return answer


def run(rewarder, *answers):
    problem = tasks.Problem("commanded/0", "?", "gold", 0)
    return rewarder([problem] * len(answers), list(map(text, answers)), [True] * len(answers), 0)


def test_a_run_stops_when_too_many_answers_cannot_be_graded():
    settings = RewardConfig(max_failure_share=0.25, workers=1, timeout_s=2.0)
    with Rewarder(settings, Commanded()) as rewarder:
        run(rewarder, *["error bad luck"] * 8)  # too few to judge by
        run(rewarder, *["right"] * 24)  # a quarter, which is allowed
        with pytest.raises(RewardFailure) as failure:
            run(rewarder, "error broken pipe", "exit 9", "sleep 600")
    message = str(failure.value)
    assert "1 timeouts and 10 errors among the last 35 grades of commanded" in message
    assert "max_failure_share=0.25" in message
    assert "broken pipe" in message and "exit code 9" in message and "killed after 2 s" in message
    assert "problem commanded/0" in message and "'gold'" in message


def test_failures_are_forgotten_in_time():
    settings = RewardConfig(max_failure_share=0.1, workers=1)
    with Rewarder(settings, Commanded()) as rewarder:
        for _ in range(2):
            run(rewarder, *["wrong"] * 1000)
            rewards = run(rewarder, *["error x"] * 100)  # 9 %, twice: never more at a time
        run(rewarder, *["unparsed x"] * 1000)  # what a poor policy writes is no failure
        run(rewarder, *["error x"] * 100)
    assert {r.status for r in rewards} == {Status.ERROR}
    assert rewards[0].total == 1.0 and rewards[0].parts["accuracy"] == 0.0  # the format stands


def test_equal_answers_to_a_problem_are_graded_once(tmp_path):
    with Rewarder(RewardConfig(workers=1), Commanded()) as rewarder:
        rewards = run(rewarder, *[f"pid {tmp_path / 'pids'}"] * 16, "wrong")
    assert [r.status for r in rewards] == [Status.RIGHT] * 16 + [Status.WRONG]
    assert len((tmp_path / "pids").read_text().split()) == 1


@pytest.fixture(scope="module")
def math_rewarder(tmp_path_factory):
    path = tmp_path_factory.mktemp("math") / "test.jsonl"
    answers = ["42", r"\frac{x+1}{2}"]
    path.write_text("".join(json.dumps({"problem": a, "answer": a}) + "\n" for a in answers))
    task = tasks.make("math", test_file=str(path))
    with Rewarder(RewardConfig(workers=1, timeout_s=3.0, max_failure_share=1.0), task) as rewarder:
        yield rewarder


def grade_math(rewarder, index, *answers):
    problem = rewarder.task.problem("test", index)
    count = len(answers)
    started = time.monotonic()
    rewards = rewarder([problem] * count, list(map(text, answers)), [True] * count, 0)
    assert time.monotonic() - started < 60
    return [r.status.value for r in rewards]


def test_mathematics_is_graded_by_meaning(math_rewarder):
    assert grade_math(math_rewarder, 0, "42", "$42.0$", r"\boxed{42}", r"\sqrt{1764}", "43", "x=42") == [
        "right", "right", "right", "right", "wrong", "right",
    ]  # fmt: skip
    assert grade_math(math_rewarder, 1, "0.5(1+x)", r"\frac{1+x}{2}", r"\boxed{x}", "x") == [
        "right", "right", "wrong", "wrong",
    ]  # fmt: skip


def test_mathematics_that_never_ends_is_cut_short(math_rewarder):
    statuses = grade_math(math_rewarder, 0, "42", "9^{9^{9}}", r"2 \cdot 21", r"84/2+0x")
    assert statuses == ["right", "timeout", "right", "right"]


def test_mathematical_hacks(math_rewarder):
    statuses = grade_math(
        math_rewarder, 0,
        "",
        "٤٢",
        "４２",
        r"\boxed{41} \boxed{42} \boxed{43}",
        "41, 42, 43",
        "41 or 42",
        "__import__('os').system('true')",
        "(" * 400 + "42" + ")" * 400,
        "42" * 600,
        "\\frac{42}{0}",
        "42\x00",
        r"\text{the right answer}",
    )  # fmt: skip
    assert "right" not in statuses[:7]
    assert statuses[:3] == ["unparsed"] * 3
    assert statuses[3] == "wrong"
    assert statuses[7] in (
        "right",
        "unparsed",
        "timeout",
    )  # which is what it says, if it can be read
    assert statuses[8] == "unparsed"
    assert "right" not in statuses[9:]


def test_grading_works_off_the_main_thread(math_rewarder):
    """Where a time limit by alarm fails, and once made every answer wrong."""
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(grade_math(math_rewarder, 1, "(1+x)/2", "x/2"))
    )
    thread.start()
    thread.join(60)
    assert found == ["right", "wrong"]


@pytest.mark.gym
def test_a_gym_scorer_that_evaluates_answers_is_cut_short():
    pytest.importorskip("reasoning_gym")
    task = tasks.make("gym:puzzle24", test_size=1)
    problem = task.problem("test", 0)
    settings = RewardConfig(workers=1, timeout_s=2.0, max_failure_share=1.0)
    with Rewarder(settings, task) as rewarder:
        answers = ["9**9**9**9", problem.answer, f"({problem.answer}) + 0", "__import__('os')"]
        rewards = rewarder([problem] * 4, list(map(text, answers)), [True] * 4, 0)
    assert [r.status for r in rewards] == [Status.TIMEOUT, Status.RIGHT, Status.WRONG, Status.UNPARSED]
