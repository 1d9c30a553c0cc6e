"""Every task of the reasoning-gym package, as `gym:NAME`.

Training and test problems come from different seeds, and each only from its side of
`base.held_out`: a training problem whose question belongs to the test side is replaced by another.
"""

import difflib
import functools
import re
from typing import Any

from research.tasks.base import Problem, Split, Unparsed, check_index, held_out

_CHUNK = 1000  # problems for each seed; some datasets prepare all of theirs when they are made
_SEEDS = 1 << 24  # between the first problems of two splits; a dataset adds the index to its seed
_PATIENCE = 4000  # draws without a new test problem before there are no more
_MAX_CHARACTERS = 20_000

# Most scorers read an answer that makes no sense by tripping over it.
_TRIPPED = (ArithmeticError, AttributeError, LookupError, SyntaxError, TypeError, ValueError)

# Datasets that `eval` an answer, in Python or through SymPy, and what they may therefore be given.
_LISTS = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
_ARITHMETIC = ("countdown", "puzzle24")  # whose scorers look for the given numbers alone: x/x would be a free 1
_EXPRESSIONS = ("intermediate_integration", "polynomial_multiplication", "simple_integration")
_FUNCTIONS = frozenset(
    "sin cos tan sec csc cot asin acos atan sinh cosh tanh sqrt exp log ln pi Abs".split()
)
_LIST = re.compile(r"[\w\s,\[\]'\"-]*")  # no call, and nothing that could become one
_DIGITS = re.compile(r"[0-9+\-*/().\s]*")
_EXPRESSION = re.compile(r"[A-Za-z0-9+\-*/^().,=|\s]*")


class GymTask:
    """A reasoning-gym dataset. Right is a score of 1; its partial credits count as wrong.

    Its scorers differ in care, and some evaluate what they are given. So an answer that does not
    equal the reference is graded in another process, and one that could call anything is refused.
    Difficulty is the dataset's if that is a whole number, else 0.
    """

    def __init__(self, name: str, *, seed: int = 0, test_size: int = 512, **options: Any):
        """`options` are fields of the dataset's configuration.

        Raises ModuleNotFoundError without the package, and ValueError for an unknown dataset or a
        setting that it refuses.
        """
        self.name = f"gym:{name}"
        self._dataset = name
        self._options = options
        self._seed = seed
        self._test_size = test_size
        self._tests: list[Problem] = []  # as many as were asked for: some tasks take their time
        self._test_draws = 0
        _make_dataset(name, options, 0)

    @functools.cached_property
    def isolated(self) -> "GymScorer":
        return GymScorer(self._dataset, self._options)

    def size(self, split: Split) -> int | None:
        return self._test_size if split == "test" else None

    def problem(self, split: Split, index: int) -> Problem:
        check_index(self.name, split, index, self.size(split))
        if split == "test":
            while len(self._tests) <= index:
                self._tests.append(self._next_test())
            return self._tests[index]
        for attempt in range(100):
            entry = self._entry("train", index + attempt * (_SEEDS // 128))
            if not self._held_out(entry):
                return self._problem("train", index, entry)
        raise ValueError(f"{self.name} has no training problems: widen its options")

    def verify(self, problem: Problem, answer: str) -> bool:
        """May run for ever; see `isolated`."""
        known = self.quick(problem, answer)
        return self.isolated(problem, answer) if known is None else known

    def quick(self, problem: Problem, answer: str) -> bool | None:
        return True if problem.answer and answer.strip() == problem.answer.strip() else None

    def canonical(self, problem: Problem, answer: str) -> str:
        text = " ".join(answer.split())
        if not text:
            raise Unparsed("an empty answer")
        return text

    def _next_test(self) -> Problem:
        seen = {problem.question for problem in self._tests}
        for draw in range(self._test_draws, self._test_draws + _PATIENCE):
            entry = self._entry("test", draw)
            if self._held_out(entry) and entry["question"] not in seen:
                self._test_draws = draw + 1
                return self._problem("test", len(self._tests), entry)
        raise ValueError(
            f"{self.name} has too few problems: {len(self._tests)} for tests, of "
            f"test_size={self._test_size}. Ask for fewer, or widen its options"
        )

    def _held_out(self, entry: dict[str, Any]) -> bool:
        return held_out(f"{self.name}: {entry['question']}")

    def _entry(self, split: Split, index: int) -> dict[str, Any]:
        chunk, place = divmod(index, _CHUNK)
        seed = (2 * self._seed + (split == "train")) * _SEEDS + chunk * _CHUNK
        return self._dataset_of(seed)[place]

    @functools.cached_property
    def _dataset_of(self):
        make = functools.partial(_make_dataset, self._dataset, self._options)
        return functools.lru_cache(maxsize=4)(make)

    def _problem(self, split: Split, index: int, entry: dict[str, Any]) -> Problem:
        difficulty = entry["metadata"].get("difficulty")
        return Problem(
            f"{self.name}/{split}/{index}",
            entry["question"],
            entry["answer"] if isinstance(entry["answer"], str) else "",
            difficulty if type(difficulty) is int else 0,
            {"entry": entry},
        )


class GymScorer:
    """`base.Verifier` by a dataset's own scorer."""

    def __init__(self, dataset: str, options: dict[str, Any]):
        self._dataset = dataset
        self._options = options

    def prepare(self) -> None:
        self._scorer  # noqa: B018

    def __call__(self, problem: Problem, answer: str) -> bool:
        answer = answer.strip()
        if not answer or len(answer) > _MAX_CHARACTERS:
            raise Unparsed(f"an answer of {len(answer)} characters")
        if not _harmless(self._dataset, answer):
            raise Unparsed(f"{answer[:60]!r} could run as a program, or is no plain answer")
        try:
            return self._scorer.score_answer(answer, problem.data["entry"]) >= 1.0
        except _TRIPPED as error:
            raise Unparsed(f"{answer[:60]!r}: {error}") from None

    @functools.cached_property
    def _scorer(self):
        return _make_dataset(self._dataset, self._options, 0)


def _harmless(dataset: str, answer: str) -> bool:
    if dataset in _LISTS:
        return bool(_LIST.fullmatch(answer))
    if dataset in _ARITHMETIC:
        return bool(_DIGITS.fullmatch(answer))
    if dataset in _EXPRESSIONS:
        names = re.findall(r"[A-Za-z]+", answer)
        known = all(len(name) == 1 or name in _FUNCTIONS for name in names)
        return known and bool(_EXPRESSION.fullmatch(answer))
    return True


def _make_dataset(name: str, options: dict[str, Any], seed: int):
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"gym:{name} needs the reasoning-gym package: pip install 'january[gym]'"
        ) from error
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, 3, 0.4) or sorted(DATASETS)[:3]
        raise ValueError(f"reasoning-gym has no {name!r}; did you mean {', '.join(near)}?")
    try:
        return reasoning_gym.create_dataset(name, **options, seed=seed, size=_CHUNK)
    except (AssertionError, TypeError, ValueError) as error:
        fields = sorted(set(DATASETS[name][1].__dataclass_fields__) - {"seed", "size"})
        raise ValueError(
            f"gym:{name} refuses {options}: {error}; its options are {', '.join(fields)}"
        ) from error
