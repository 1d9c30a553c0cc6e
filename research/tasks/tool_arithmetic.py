"""Arithmetic that takes a calculator: `(47*83-56)*12=`, products and sums of two-digit numbers.

Difficulty is the number of operations. A calculator that does one operation in a call has to be called that often, each
time but the first with what came out before.
"""

import random
import re

from research.tasks.base import GeneratedTask, Problem, Unparsed

_WHOLE = re.compile(r"[-+]?[0-9]{1,40}")
_LARGEST = 10**6  # of all values on the way


class ToolArithmetic(GeneratedTask):
    """Operands are uniform over 10 to 99; the first operation is a product, the others + - * in equal shares.

    All values on the way lie in 0 to 10^6. `data['steps']` are the calls of one operation that lead to the answer, as
    ('47*83', '3901-56', '3845*12').
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        test_size: int = 512,
        train_size: int = 0,
        min_difficulty: int = 2,
        max_difficulty: int = 2,
    ):
        super().__init__(
            "tool_arithmetic", (1, 8), min_difficulty, max_difficulty, seed, test_size, train_size
        )

    def draw(self, rng: random.Random, difficulty: int) -> tuple[int, list[tuple[str, int]]] | None:
        first = rng.randint(10, 99)
        operations = [
            (rng.choice("+-*") if place else "*", rng.randint(10, 99))
            for place in range(difficulty)
        ]
        value = first
        for operator, operand in operations:
            value = apply(value, operator, operand)
            if not 0 <= value <= _LARGEST:
                return None
        return first, operations

    def canonical_problem(self, drawn: tuple[int, list[tuple[str, int]]]) -> str:
        return f"tool_arithmetic: {expression(*drawn)}"

    def build(
        self,
        drawn: tuple[int, list[tuple[str, int]]],
        id: str,
        difficulty: int,
        rng: random.Random,
    ) -> Problem:
        value, steps = drawn[0], []
        for operator, operand in drawn[1]:
            steps.append(f"{value}{operator}{operand}")
            value = apply(value, operator, operand)
        data = {"steps": tuple(steps)}
        return Problem(id, f"{expression(*drawn)}=", str(value), difficulty, data)

    def verify(self, problem: Problem, answer: str) -> bool:
        return self.canonical(problem, answer) == problem.answer

    def canonical(self, problem: Problem, answer: str) -> str:
        text = answer.strip().replace(",", "")
        if not _WHOLE.fullmatch(text):
            raise Unparsed(f"{answer[:40]!r} is not a whole number")
        return str(int(text))


def apply(value: int, operator: str, operand: int) -> int:
    match operator:
        case "+":
            return value + operand
        case "-":
            return value - operand
        case _:
            return value * operand


def expression(first: int, operations: list[tuple[str, int]]) -> str:
    """The usual notation; a sum that is multiplied stands in parentheses."""
    text, is_sum = str(first), False
    for operator, operand in operations:
        if operator == "*" and is_sum:
            text = f"({text})"
        is_sum = operator != "*"
        text += f"{operator}{operand}"
    return text
