"""Chained arithmetic modulo 10: `4 *3 -5 +9 =`, worked out from left to right, is 6.

The first operand is a digit; every operation is one word: +0 to +9, -1 to -9, *2, *3. A small
decoder learns to add within one step but needs several for a product, which leaves something for
reinforcement learning to find. Difficulty is the number of operands.
"""

import random
import re
from collections.abc import Sequence

from research.tasks.base import GeneratedTask, Problem, Unparsed

DIGITS = tuple(str(d) for d in range(10))
SUMS = tuple(f"+{d}" for d in range(10)) + tuple(f"-{d}" for d in range(1, 10))
PRODUCTS = ("*2", "*3")
OPERATIONS = SUMS + PRODUCTS
SYMBOLS = DIGITS + OPERATIONS + ("=",)

_DIGIT = re.compile(r"[0-9]")  # not \d, which takes the digits of every script


def apply(value: int, operation: str) -> int:
    """The running value, 0 to 9, after one operation."""
    operand = int(operation[1:])
    match operation[0]:
        case "+":
            value += operand
        case "-":
            value -= operand
        case _:
            value *= operand
    return value % 10


def canonical_problem(words: Sequence[str]) -> str:
    """The text for `base.held_out` of the problem with these operands."""
    return "arithmetic: " + " ".join(words)


class Arithmetic(GeneratedTask):
    """Problems of `min_difficulty` to `max_difficulty` operands.

    Each operation is a product with `product_probability`, as long as there are fewer than
    `max_products` of them; otherwise a sum, uniform over the 19 words. `data['products']` is
    their number.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        test_size: int = 512,
        train_size: int = 0,
        min_difficulty: int = 3,
        max_difficulty: int = 7,
        product_probability: float = 0.25,
        max_products: int = 2,
    ):
        if not 0.0 <= product_probability <= 1.0:
            raise ValueError(f"product_probability={product_probability} is not within 0 to 1")
        super().__init__(
            "arithmetic", (2, 64), min_difficulty, max_difficulty, seed, test_size, train_size
        )
        self.product_probability = product_probability
        self.max_products = max_products

    def draw(self, rng: random.Random, difficulty: int) -> list[str]:
        words = [rng.choice(DIGITS)]
        products = 0
        for _ in range(difficulty - 1):
            if products < self.max_products and rng.random() < self.product_probability:
                products += 1
                words.append(rng.choice(PRODUCTS))
            else:
                words.append(rng.choice(SUMS))
        return words

    def canonical_problem(self, drawn: list[str]) -> str:
        return canonical_problem(drawn)

    def build(self, drawn: list[str], id: str, difficulty: int, rng: random.Random) -> Problem:
        value = int(drawn[0])
        for operation in drawn[1:]:
            value = apply(value, operation)
        products = sum(word in PRODUCTS for word in drawn)
        return Problem(id, " ".join([*drawn, "="]), str(value), difficulty, {"products": products})

    def verify(self, problem: Problem, answer: str) -> bool:
        return self.canonical(problem, answer) == problem.answer

    def canonical(self, problem: Problem, answer: str) -> str:
        answer = answer.strip()
        if not _DIGIT.fullmatch(answer):
            raise Unparsed(f"{answer[:40]!r} is not one digit")
        return answer
