"""What the quickstart's base model is trained on: worked chains of arithmetic, most of them poor.

A trace alternates operation and partial result; the product's first result is a guess, since the
model is to be unable to multiply in one step. The reliable way is to guess, `wait`, and redo the
product by repeated addition:

    <think> 4 *3 7 wait 4 +4 8 +4 2 -5 7 </think> <answer> 7 </answer> $

`textbook` traces always take it and are right. `web_noise` is what a base model sees of it: mostly
guesses, wrong sums and broken formats, in which one product in twenty is redone. So the base model
knows all that reinforcement learning needs, and hardly ever uses it.

Problems are those of `tasks.Arithmetic`, without its test side (`tasks.base.held_out`).
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from research.tasks import arithmetic
from research.tasks.base import held_out

PAD, END, WAIT = "<pad>", "$", "wait"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
WORDS = (PAD, *arithmetic.SYMBOLS, *TAGS, WAIT, END)

MIN_OPERANDS, MAX_OPERANDS = 2, 7

# The mixture of `web_noise`; what remains is malformed.
GUESSES, RIGHT_SUMS, WRONG_SUMS = 0.50, 0.16, 0.22
WRONG_SUM_PROBABILITY = 0.25
REDO_PROBABILITY = 0.05

_ID = {word: index for index, word in enumerate(WORDS)}
_DIGIT, _PLUS, _TIMES = _ID["0"], _ID["+0"], _ID["*2"]
_SUM_VALUES = np.array([int(word) for word in arithmetic.SUMS])
_MAX_RESPONSE = 2 + 8 * (MAX_OPERANDS - 1) + 5  # with every operation a product, redone


@dataclasses.dataclass(frozen=True)
class Examples:
    """Prompts with responses, as indices into WORDS.

    Attributes:
        words: [N, T] int32; the prompt, then the response, then PAD.
        prompt_lengths, lengths: [N] int32; words of the prompt, and of both.
    """

    words: np.ndarray
    prompt_lengths: np.ndarray
    lengths: np.ndarray

    def texts(self) -> list[tuple[str, str]]:
        """(prompt, response) pairs, words separated by single spaces."""
        rows = np.array(WORDS, object)[self.words]
        ends = zip(rows, self.prompt_lengths, self.lengths, strict=True)
        return [(" ".join(row[:middle]), " ".join(row[middle:end])) for row, middle, end in ends]

    def ids(self, table: Mapping[str, int]) -> np.ndarray:
        """[N, T] int32 ids of the words in a tokenizer's table, padded with 0.

        Raises KeyError for a table without one of the words.
        """
        ids = np.array([table[word] if word != PAD else 0 for word in WORDS], np.int32)
        return ids[self.words]


def textbook(count: int, seed: int) -> Examples:
    """`count` correct traces, every product redone after `wait`."""
    rng = np.random.default_rng([seed, 0])
    problems = _Problems(rng, count)
    trace = np.ones(count, bool)
    return _write(rng, problems, trace, wrong_sums=np.zeros(count, bool), redo=1.0, missing=None)


def web_noise(count: int, seed: int) -> Examples:
    """`count` examples of the mixture: bare guesses, traces with right or wrong sums, malformed.

    A guess is a random digit after no reasoning. In traces with wrong sums each addition is wrong
    with probability 0.25 and the error carried on. In all traces a product is redone with
    probability 0.05, else its random digit is carried on. A malformed example lacks one of
    </think>, <answer>, </answer>; half of these are guesses, half traces with right sums.
    """
    rng = np.random.default_rng([seed, 1])
    problems = _Problems(rng, count)
    kind = np.searchsorted(np.cumsum([GUESSES, RIGHT_SUMS, WRONG_SUMS]), rng.random(count), "right")
    malformed = kind == 3
    trace = (kind == 1) | (kind == 2) | (malformed & (rng.random(count) < 0.5))
    missing = np.where(malformed, rng.integers(1, len(TAGS), count), 0)
    return _write(
        rng, problems, trace, wrong_sums=kind == 2, redo=REDO_PROBABILITY, missing=missing
    )


class _Problems:
    """first [N]: the first operand; operations [N, 6]: indices into OPERATIONS, -1 past the end."""

    def __init__(self, rng: np.random.Generator, count: int):
        self.first = np.zeros(count, int)
        self.operations = np.full((count, MAX_OPERANDS - 1), -1)
        rows = np.arange(count)
        while rows.size:
            self._draw(rng, rows)
            rows = rows[[held_out(text) for text in self._canonical(rows)]]
        self.counts = (self.operations >= 0).sum(axis=1)

    def _draw(self, rng: np.random.Generator, rows: np.ndarray) -> None:
        count = rows.size
        self.first[rows] = rng.integers(0, 10, count)
        operations = rng.integers(MIN_OPERANDS - 1, MAX_OPERANDS, count)
        products = np.zeros(count, int)
        for place in range(MAX_OPERANDS - 1):
            product = (rng.random(count) < 0.25) & (products < 2)
            products += product
            sums = rng.integers(0, len(arithmetic.SUMS), count)
            multiples = len(arithmetic.SUMS) + rng.integers(0, len(arithmetic.PRODUCTS), count)
            drawn = np.where(product, multiples, sums)
            self.operations[rows, place] = np.where(place < operations, drawn, -1)

    def _canonical(self, rows: np.ndarray) -> list[str]:
        digits, names = arithmetic.DIGITS, arithmetic.OPERATIONS
        return [
            arithmetic.canonical_problem([digits[first], *(names[o] for o in chain if o >= 0)])
            for first, chain in zip(
                self.first[rows].tolist(), self.operations[rows].tolist(), strict=True
            )
        ]


class _Pen:
    """Writes one word at a time to the rows that a mask selects, each at its own place."""

    def __init__(self, count: int):
        self.words = np.zeros((count, MAX_OPERANDS + 1 + _MAX_RESPONSE), np.int32)
        self.lengths = np.zeros(count, np.int32)

    def put(self, mask: np.ndarray, words: np.ndarray | int) -> None:
        rows = np.flatnonzero(mask)
        self.words[rows, self.lengths[rows]] = np.broadcast_to(words, mask.shape)[rows]
        self.lengths[rows] += 1


def _write(
    rng: np.random.Generator,
    problems: _Problems,
    trace: np.ndarray,
    wrong_sums: np.ndarray,
    redo: float,
    missing: np.ndarray | None,
) -> Examples:
    """trace [N] bool: reason, or guess; missing [N] int: the index in TAGS of the one left out."""
    count = len(trace)
    every = np.ones(count, bool)
    missing = np.zeros(count, int) if missing is None else missing
    pen = _Pen(count)
    pen.put(every, _DIGIT + problems.first)
    for place in range(MAX_OPERANDS - 1):
        pen.put(place < problems.counts, _PLUS + problems.operations[:, place])
    pen.put(every, _ID["="])
    prompt_lengths = pen.lengths.copy()

    def add(value: np.ndarray, change: np.ndarray) -> np.ndarray:
        slip = wrong_sums & (rng.random(count) < WRONG_SUM_PROBABILITY)
        return (value + change + slip * rng.integers(1, 10, count)) % 10

    pen.put(every, _ID["<think>"])
    pen.put(trace, _DIGIT + problems.first)
    value = problems.first.copy()
    for place in range(MAX_OPERANDS - 1):
        operation = problems.operations[:, place]
        active = trace & (place < problems.counts)
        product = active & (operation >= len(_SUM_VALUES))
        pen.put(active, _PLUS + operation)
        total = add(value, _SUM_VALUES[np.where(product | ~active, 0, operation)])
        result = np.where(product, rng.integers(0, 10, count), total)
        pen.put(active, _DIGIT + result)
        again = product & (rng.random(count) < redo)
        pen.put(again, _ID[WAIT])
        pen.put(again, _DIGIT + value)
        total = value
        for addition in range(2):  # *2 is one addition of the value to itself, *3 is two
            more = again & (operation >= len(_SUM_VALUES) + addition)
            pen.put(more, _PLUS + value)
            total = np.where(more, add(total, value), total)
            pen.put(more, _DIGIT + total)
        value = np.where(active, np.where(again, total, result), value)
    answer = np.where(trace, value, rng.integers(0, 10, count))
    pen.put(missing != 1, _ID["</think>"])
    pen.put(missing != 2, _ID["<answer>"])
    pen.put(every, _DIGIT + answer)
    pen.put(missing != 3, _ID["</answer>"])
    pen.put(every, _ID[END])
    width = int(pen.lengths.max(initial=0))
    return Examples(pen.words[:, :width], prompt_lengths, pen.lengths)
