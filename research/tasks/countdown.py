"""Countdown: write an expression with the given numbers, each used exactly once, for a target.

Every problem has a solution, since the target is the value of an expression that was drawn.
Difficulty is the count of numbers.
"""

import ast
import collections
import random
import re
from fractions import Fraction

from research.tasks.base import GeneratedTask, Problem, Unparsed

_CHARACTERS = re.compile(r"[0-9+\-*/() \t\n]+")
_MAX_CHARACTERS = 200
_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


class Countdown(GeneratedTask):
    """Numbers are uniform over 1 to `max_number`; targets lie within 1 to `max_target`."""

    def __init__(
        self,
        *,
        seed: int = 0,
        test_size: int = 512,
        train_size: int = 0,
        min_difficulty: int = 3,
        max_difficulty: int = 4,
        max_number: int = 99,
        max_target: int = 100,
    ):
        if max_number < 1 or max_target < 1:
            raise ValueError(
                f"max_number={max_number} and max_target={max_target} must be positive"
            )
        super().__init__(
            "countdown", (2, 8), min_difficulty, max_difficulty, seed, test_size, train_size
        )
        self.max_number = max_number
        self.max_target = max_target

    def draw(self, rng: random.Random, difficulty: int) -> tuple[list[int], int, str] | None:
        numbers = [rng.randint(1, self.max_number) for _ in range(difficulty)]
        parts = [(Fraction(n), str(n)) for n in numbers]
        while len(parts) > 1:
            left = parts.pop(rng.randrange(len(parts)))
            right = parts.pop(rng.randrange(len(parts)))
            operator = rng.choice("+-*/")
            value = _apply(operator, left[0], right[0])
            if value is None:
                return None
            parts.append((value, f"({left[1]} {operator} {right[1]})"))
        target, expression = parts[0]
        if target.denominator != 1 or not 1 <= target <= self.max_target:
            return None
        return numbers, int(target), expression[1:-1]

    def canonical_problem(self, drawn: tuple[list[int], int, str]) -> str:
        return f"countdown: {sorted(drawn[0])} {drawn[1]}"

    def build(
        self, drawn: tuple[list[int], int, str], id: str, difficulty: int, rng: random.Random
    ) -> Problem:
        numbers, target, expression = drawn
        question = (
            f"Using each of the numbers {', '.join(map(str, numbers))} exactly once, with + - * / "
            f"and parentheses, write an expression whose value is {target}."
        )
        return Problem(id, question, expression, difficulty, {"numbers": numbers, "target": target})

    def verify(self, problem: Problem, answer: str) -> bool:
        value, numbers = evaluate(answer)
        return value == problem.data["target"] and _same(numbers, problem)

    def canonical(self, problem: Problem, answer: str) -> str:
        value, numbers = evaluate(answer)
        return f"{value}" if _same(numbers, problem) else f"{value} from other numbers"


def evaluate(expression: str) -> tuple[Fraction | None, list[int]]:
    """The exact value of an expression, None if it divides by zero, and the numbers in it.

    The expression may hold whole numbers, + - * /, unary minus and parentheses. Nothing is ever
    executed: the syntax tree is walked, and anything else in it is refused.

    Raises Unparsed.
    """
    expression = expression.strip()
    if len(expression) > _MAX_CHARACTERS:
        raise Unparsed(f"an expression of {len(expression)} characters")
    if not _CHARACTERS.fullmatch(expression):
        raise Unparsed(f"{expression[:40]!r} is not an expression of numbers and + - * / ( )")
    try:
        tree = ast.parse(" ".join(expression.split()), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise Unparsed(f"{expression[:40]!r}: {error}") from None
    numbers: list[int] = []
    return _walk(tree, numbers), numbers


def _walk(node: ast.expr, numbers: list[int]) -> Fraction | None:
    match node:
        case ast.Constant(value=int(value)):
            numbers.append(value)
            return Fraction(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = _walk(operand, numbers)
            return None if value is None else -value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            a, b = _walk(left, numbers), _walk(right, numbers)
            return None if a is None or b is None else _apply(_OPERATORS[type(op)], a, b)
    raise Unparsed(f"an expression may not hold a {type(node).__name__}")


def _apply(operator: str, a: Fraction, b: Fraction) -> Fraction | None:
    match operator:
        case "+":
            return a + b
        case "-":
            return a - b
        case "*":
            return a * b
        case _:
            return a / b if b else None


def _same(numbers: list[int], problem: Problem) -> bool:
    return collections.Counter(numbers) == collections.Counter(problem.data["numbers"])
