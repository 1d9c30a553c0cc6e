"""Arithmetic for a calculator: what the problems are, and that one operation at a time leads to the answer."""

import re

import pytest

from research.rl.calculator import ToolError, calculate
from research.tasks import Unparsed, make


@pytest.mark.parametrize("difficulty", [1, 2, 3, 5, 8])
def test_the_answer_is_python_s_and_the_steps_lead_to_it(difficulty):
    task = make("tool_arithmetic", min_difficulty=difficulty, max_difficulty=difficulty)
    parenthesised = 0
    for index in range(100):
        problem = task.problem("train", index)
        expression = problem.question.removesuffix("=")
        assert re.fullmatch(r"[0-9()+*-]+", expression)
        assert problem.answer == str(eval(expression)) == calculate(expression)
        steps = problem.data["steps"]
        assert len(steps) == difficulty and "*" in steps[0]
        results = [int(calculate(step, operations=1)) for step in steps]
        assert str(results[-1]) == problem.answer and all(0 <= x <= 10**6 for x in results)
        for before, step in zip(results, steps[1:], strict=False):
            assert re.match(r"[0-9]+", step)[0] == str(before)
        if difficulty > 1:
            with pytest.raises(ToolError):
                calculate(expression, operations=difficulty - 1)
        parenthesised += "(" in expression
    assert (parenthesised > 10) == (difficulty > 2)


def test_answers_are_whole_numbers():
    task = make("tool_arithmetic")
    problem = task.problem("test", 0)
    assert task.verify(problem, f" +{int(problem.answer):,} ")
    assert not task.verify(problem, problem.answer + "0")
    assert task.canonical(problem, "-0012") == "-12"
    for text in ("", "12.0", "4*3", "about 12"):
        with pytest.raises(Unparsed, match="no|not a whole number"):
            task.verify(problem, text)
