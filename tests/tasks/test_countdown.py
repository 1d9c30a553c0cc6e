"""Countdown: solvable problems, and a verifier that cannot be talked into anything."""

import re
import time
from fractions import Fraction

import pytest

from research import tasks
from research.tasks.countdown import evaluate

TASK = tasks.make("countdown", max_difficulty=5)
# (3 + 5) * 2 / 4 = 4
PROBLEM = tasks.Problem("x", "?", "", 4, {"numbers": [2, 3, 4, 5], "target": 4})


def test_the_question_shows_numbers_and_target():
    problem = TASK.problem("train", 11)
    shown = [int(n) for n in re.findall(r"[0-9]+", problem.question)]
    assert shown == [*problem.data["numbers"], problem.data["target"]]
    assert len(problem.data["numbers"]) == problem.difficulty


def test_every_problem_has_a_solution_with_exactly_its_numbers():
    """By Python's own arithmetic on the reference expression."""
    for index in range(300):
        problem = TASK.problem("train", index)
        fractions = re.sub(r"([0-9]+)", r"Fraction(\1)", problem.answer)
        assert eval(fractions, {"Fraction": Fraction}) == problem.data["target"]
        used = sorted(int(n) for n in re.findall(r"[0-9]+", problem.answer))
        assert used == sorted(problem.data["numbers"])
        assert 1 <= problem.data["target"] <= 100


def test_options_bound_numbers_and_targets():
    task = tasks.make("countdown", max_number=9, max_target=30, test_size=50)
    for split, count in (("train", 100), ("test", 50)):
        problems = [task.problem(split, i) for i in range(count)]
        assert max(n for p in problems for n in p.data["numbers"]) == 9
        assert all(p.data["target"] <= 30 for p in problems)
    with pytest.raises(ValueError, match="max_number=0"):
        tasks.make("countdown", max_number=0)


@pytest.mark.parametrize(
    "answer",
    ["(3 + 5) * 2 / 4", "2*(3+5)/4", " ( ( 5+3 ) )*2 /4\n", "(2/4)*(3+5)", "-(3+5)*-(2/4)"],
)
def test_right_however_written(answer):
    assert TASK.verify(PROBLEM, answer)
    assert TASK.canonical(PROBLEM, answer) == "4"


@pytest.mark.parametrize(
    "answer",
    [
        "2 + 3 + 4 + 5",  # another value
        "4",  # numbers left out
        "2 + 2",
        "4 * 5 / 5",
        "(3 + 5) * 2 / 4 + 5 - 5",  # a number too often
        "24 / (3 + 5) + 1",  # digits joined
        "4 / (2 + 3 - 5)",  # by zero
        "(2 - 2) / (3 - 3)",
        "1 / 0",
    ],
)
def test_wrong(answer):
    assert TASK.verify(PROBLEM, answer) is False
    assert TASK.canonical(PROBLEM, answer) != "4"


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "four",
        "2 ** 2",
        "9**9**9",
        "5 // 4",
        "5 % 3",
        "(3 + 5) * 2 / 4 = 4",
        "4.0",
        "1e3",
        "2_0",
        "0x4",
        "2, 3",
        "٢ + ٣",
        "２ + 2",
        "2 × 2",
        "(2",
        "2)",
        "2(3)",
        "2 3",
        "()",
        "+2",
        "~2",
        "02",
        "2 + 3 # + 4",
        "2 if 3 else 4",
        "(lambda: 4)()",
        "[4][0]",
        "__import__('os').system('true')",
        "().__class__",
        "(" * 5000 + "4" + ")" * 5000,
        "-" * 199 + "x",
        "1" * 5000,
    ],
)
def test_anything_but_an_expression_is_refused_at_once(answer):
    started = time.perf_counter()
    with pytest.raises(tasks.Unparsed):
        TASK.verify(PROBLEM, answer)
    assert time.perf_counter() - started < 0.5


def test_long_but_legal_expressions_are_evaluated():
    assert evaluate("-" * 199 + "4") == (Fraction(-4), [4])
    assert evaluate("(" * 90 + "4" + ")" * 90) == (Fraction(4), [4])
    nines = "*".join(["99999"] * 33)
    assert evaluate(nines)[0] == 99999**33


def test_fractions_are_exact():
    assert evaluate("1/3 + 1/3 + 1/3")[0] == 1
    assert evaluate("1/49*49")[0] == 1  # 0.9999999999999999 in floating point
