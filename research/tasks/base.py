"""What a task is, and how generated tasks keep training and test problems apart.

A task is a source of problems whose answers a program can check. Problems are numbered: `problem`
depends on (seed, split, index) alone, so a run needs no state to resume and processes can share
the work by index.
"""

import abc
import dataclasses
import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

Split = Literal["train", "test"]

# One canonical problem in this many belongs to the test side, whatever the seed and the size.
HELD_OUT_ONE_IN = 4
_PATIENCE = 50_000  # draws without a new problem before the space counts as used up


class Unparsed(ValueError):
    """The answer cannot be read in the task's language, so it is not even wrong."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A question with what is needed to check an answer to it.

    Attributes:
        id: names the problem within its task, such as 'arithmetic/test/17'.
        question: the text to put to a model, without any template.
        answer: a right answer, in a form that `Task.verify` accepts ('' if none is known).
        difficulty: the task's own scale; 0 where it has none.
        data: what else the task keeps (picklable).
    """

    id: str
    question: str
    answer: str
    difficulty: int
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)


class Verifier(Protocol):
    """A picklable verifier that may hang, eat memory or die, so its process must be expendable."""

    def prepare(self) -> None:
        """Called once in the process: slow imports, and a check that it works here at all."""
        ...

    def __call__(self, problem: Problem, answer: str) -> bool:
        """As `Task.verify`."""
        ...


class Task(Protocol):
    """A source of problems with an exact verifier.

    Attributes:
        name: such as 'arithmetic' or 'gym:chain_sum'.
        isolated: None if `verify` always returns within microseconds. Otherwise what decides the
            answers on which `quick` is None, to be called in a process that can be killed.
    """

    name: str
    isolated: Verifier | None

    def size(self, split: Split) -> int | None:
        """Number of problems; None if there is no end of them."""
        ...

    def problem(self, split: Split, index: int) -> Problem:
        """The problem of that number. Raises IndexError past the end of a finite split."""
        ...

    def verify(self, problem: Problem, answer: str) -> bool:
        """Whether the answer is right. Raises Unparsed if it cannot be read."""
        ...

    def quick(self, problem: Problem, answer: str) -> bool | None:
        """`verify` where that is a matter of microseconds, else None."""
        ...

    def canonical(self, problem: Problem, answer: str) -> str:
        """One string for all the ways to write an answer, for votes. Raises Unparsed."""
        ...


def held_out(canonical: str) -> bool:
    """Whether the problem of that canonical text belongs to the test side.

    A hash of the text decides, so a test problem can never be drawn for training: not with
    another seed, another size or another range of difficulties.
    """
    digest = hashlib.blake2b(canonical.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_ONE_IN == 0


def check_index(name: str, split: str, index: int, size: int | None) -> None:
    """Raises ValueError for an unknown split and IndexError for an index outside of it."""
    if split not in ("train", "test"):
        raise ValueError(f"{name} has splits 'train' and 'test', not {split!r}")
    if index < 0 or (size is not None and index >= size):
        raise IndexError(f"{name} has no {split} problem {index}; its size is {size}")


class GeneratedTask(abc.ABC):
    """A task that draws its problems: endless for training, `test_size` different ones for tests.

    With a `train_size` there are that many for training, and always the same (some may be alike).
    Test problems have equal shares of every difficulty (to within one), in turn, so that each
    prefix of the split is balanced too; training problems draw their difficulty uniformly.

    A subclass gives `draw`, `canonical_problem` and `build`, and its verifier.
    """

    isolated = None

    def __init__(
        self,
        name: str,
        limits: tuple[int, int],
        min_difficulty: int,
        max_difficulty: int,
        seed: int,
        test_size: int,
        train_size: int = 0,
    ):
        """limits: the smallest and largest difficulty that the task knows.

        Raises ValueError for difficulties outside of `limits`, or none at all.
        """
        if not limits[0] <= min_difficulty <= max_difficulty <= limits[1]:
            raise ValueError(
                f"{name} has difficulties {limits[0]} to {limits[1]}, and min_difficulty="
                f"{min_difficulty}, max_difficulty={max_difficulty} is no range of these"
            )
        if test_size < 0 or train_size < 0:
            raise ValueError(
                f"test_size={test_size} and train_size={train_size} must not be negative"
            )
        self.name = name
        self.difficulties = range(min_difficulty, max_difficulty + 1)
        self._seed = seed
        self._sizes = {"train": train_size or None, "test": test_size}
        self._tests: list[Problem] | None = None

    @abc.abstractmethod
    def draw(self, rng: random.Random, difficulty: int) -> Any:
        """Anything that may become a problem, or None if the draw came to nothing."""

    @abc.abstractmethod
    def canonical_problem(self, drawn: Any) -> str:
        """The same text for the same problem, beginning with the task's name; see `held_out`."""

    @abc.abstractmethod
    def build(self, drawn: Any, id: str, difficulty: int, rng: random.Random) -> Problem | None:
        """The problem, or None if what was drawn does not make one."""

    def size(self, split: Split) -> int | None:
        return self._sizes.get(split)

    def problem(self, split: Split, index: int) -> Problem:
        check_index(self.name, split, index, self.size(split))
        if split == "test":
            if self._tests is None:
                self._tests = self._draw_tests()
            return self._tests[index]
        rng = random.Random(f"{self.name}/{self._seed}/train/{index}")
        difficulty = rng.choice(self.difficulties)
        problem, _ = self._next(rng, f"{self.name}/train/{index}", difficulty, test=False)
        return problem

    def quick(self, problem: Problem, answer: str) -> bool | None:
        return self.verify(problem, answer)

    @abc.abstractmethod
    def verify(self, problem: Problem, answer: str) -> bool: ...

    def _draw_tests(self) -> list[Problem]:
        streams = {
            d: random.Random(f"{self.name}/{self._seed}/test/{d}") for d in self.difficulties
        }
        seen: set[str] = set()
        problems = []
        for index in range(self._sizes["test"]):
            difficulty = self.difficulties[index % len(self.difficulties)]
            id = f"{self.name}/test/{index}"
            problem, text = self._next(streams[difficulty], id, difficulty, test=True, seen=seen)
            seen.add(text)
            problems.append(problem)
        return problems

    def _next(
        self,
        rng: random.Random,
        id: str,
        difficulty: int,
        *,
        test: bool,
        seen: Sequence[str] | set[str] = (),
    ) -> tuple[Problem, str]:
        for _ in range(_PATIENCE):
            drawn = self.draw(rng, difficulty)
            if drawn is None:
                continue
            text = self.canonical_problem(drawn)
            if held_out(text) != test or text in seen:
                continue
            problem = self.build(drawn, id, difficulty, rng)
            if problem is not None:
                return problem, text
        raise ValueError(
            f"{self.name} of difficulty {difficulty} has too few problems for test_size="
            f"{self._sizes['test']}: ask for fewer, or leave that difficulty out"
            if test
            else f"{self.name} of difficulty {difficulty} has no training problems"
        )
