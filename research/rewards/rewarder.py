"""From completions to rewards: accuracy, format, and the random-reward control."""

import collections
import dataclasses
import enum
import math
import random
from collections.abc import Mapping, Sequence
from typing import Literal

from research.rewards import completion
from research.rewards.pool import Pool
from research.tasks import Problem, Task, Unparsed

_WINDOW = 1024  # grades over which the share of failures is taken
_ENOUGH = 32  # grades before it is judged


class Status(enum.StrEnum):
    """How grading an answer went.

    right, wrong: the verifier's verdict (several different answers count as wrong).
    unparsed: there is no answer, or none that the task can read.
    timeout, error: the verifier was killed for taking too long, or failed; rewarded as wrong.
    """

    RIGHT = "right"
    WRONG = "wrong"
    UNPARSED = "unparsed"
    TIMEOUT = "timeout"
    ERROR = "error"


@dataclasses.dataclass(frozen=True)
class Reward:
    """What a completion earned, and why.

    Attributes:
        total: the reward, the weighted parts added up.
        parts: scores in 0 to 1 before weights: 'accuracy', 'format', and 'random' in the control.
            'accuracy' is the truth in the control as well.
        status: how grading went.
        answer: the answer in canonical form, for votes; None if it cannot be read.
        note: what was wrong, for unparsed, timeout and error.
    """

    total: float
    parts: Mapping[str, float]
    status: Status
    answer: str | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """accuracy * right + format * well-formed (DeepSeek-R1: both weights equal, no neural model).

    accuracy, format: weights.
    accuracy_needs_format: an answer out of format is not even read (status unparsed).
    format_needs_answer: a well-formed completion whose answer cannot be read scores no format.
    think_required: the think block must not be empty.
    think_prefilled: the prompt ends in '<think>', so completions lack it.
    answer_from: the <answer> block, the last \\boxed{}, or all the text after the reasoning.
    random: the control. Not None: a coin of this probability, tossed from (seed, index) alone,
      stands in for accuracy. Format is not rewarded then, so that the reward tells nothing
      whatever about the completion; with random_keeps_format it is.
    timeout_s: for one answer, before its process is killed (verifiers that can hang).
    workers: grading processes for these; 0 takes one for each CPU, at most 8.
    max_failure_share: share of timeouts and errors among the last 1024 grades that stops the run.
    """

    accuracy: float = 1.0
    format: float = 1.0
    accuracy_needs_format: bool = False
    format_needs_answer: bool = False
    think_required: bool = True
    think_prefilled: bool = False
    answer_from: Literal["answer_tag", "boxed", "text"] = "answer_tag"
    random: float | None = None
    random_keeps_format: bool = False
    timeout_s: float = 5.0
    workers: int = 0
    max_failure_share: float = 0.2

    def __post_init__(self):
        if self.random is not None and not 0.0 <= self.random <= 1.0:
            raise ValueError(f"random={self.random} is not a probability, 0 to 1")
        if not 0.0 <= self.max_failure_share <= 1.0:
            raise ValueError(f"max_failure_share={self.max_failure_share} is not a share, 0 to 1")
        if self.timeout_s <= 0 or self.workers < 0:
            raise ValueError(f"timeout_s={self.timeout_s} must be > 0, workers={self.workers} >= 0")


class RewardFailure(RuntimeError):
    """Too many answers could not be graded for the rewards to mean anything."""


class Rewarder:
    """Grades completions of a task's problems. May be called from any thread.

    Verifiers that can hang run in a `Pool`, whose processes start when they are first needed and
    stay until `close`.
    """

    def __init__(self, config: RewardConfig, task: Task):
        self.config = config
        self.task = task
        self._pool = (
            Pool(task.isolated, config.workers, config.timeout_s) if task.isolated else None
        )
        self._recent: collections.deque[Status] = collections.deque(maxlen=_WINDOW)
        self._failures: collections.deque[str] = collections.deque(maxlen=3)

    def __call__(
        self,
        problems: Sequence[Problem],
        completions: Sequence[str],
        finished: Sequence[bool],
        seed: int,
    ) -> list[Reward]:
        """One reward for each completion.

        Args:
          problems: the problem of each completion.
          completions: texts without the prompt and without the end token.
          finished: False where the length limit cut the completion off; that is out of format.
          seed: of the control; the coin of completion i depends on (seed, i) alone.

        Raises:
          RewardFailure: timeouts and errors passed `max_failure_share`.
          ValueError: the arguments differ in length.
        """
        if not len(problems) == len(completions) == len(finished):
            raise ValueError(
                f"{len(problems)} problems, {len(completions)} completions and {len(finished)} "
                "finished flags; there must be one of each for every completion"
            )
        config = self.config
        if config.think_prefilled:
            completions = ["<think>" + text for text in completions]
        formatted = [
            bool(done) and completion.well_formed(text, think_required=config.think_required)
            for text, done in zip(completions, finished, strict=True)
        ]
        rewards: list[Reward | None] = [None] * len(problems)
        answers: dict[int, str] = {}
        for i, (problem, text) in enumerate(zip(problems, completions, strict=True)):
            try:
                if config.accuracy_needs_format and not formatted[i]:
                    raise Unparsed("out of format")
                answer = self._extract(text)
                quick = False if answer is None else self.task.quick(problem, answer)
            except Unparsed as error:
                rewards[i] = self._reward(Status.UNPARSED, formatted[i], seed, i, note=str(error))
                continue
            if quick is None:
                answers[i] = answer
                continue
            status = Status.RIGHT if quick else Status.WRONG
            rewards[i] = self._reward(
                status, formatted[i], seed, i, self._canonical(problem, answer)
            )
        for i, (status, note) in self._grade(problems, answers).items():
            canonical = None if status == "unparsed" else self._canonical(problems[i], answers[i])
            rewards[i] = self._reward(Status(status), formatted[i], seed, i, canonical, note)
        self._watch(problems, completions, rewards)
        return rewards

    def close(self) -> None:
        """Ends the worker processes."""
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> "Rewarder":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _extract(self, text: str) -> str | None:
        match self.config.answer_from:
            case "answer_tag":
                return completion.tagged_answer(text)
            case "boxed":
                return completion.boxed_answer(text)
            case _:
                return completion.reply(text).strip()

    def _canonical(self, problem: Problem, answer: str | None) -> str | None:
        try:
            return None if answer is None else self.task.canonical(problem, answer)
        except Unparsed:
            return None

    def _grade(self, problems: Sequence[Problem], answers: dict[int, str]) -> dict[int, tuple]:
        """Grades by the pool; the same answer to the same problem is graded once."""
        if not answers:
            return {}
        places: dict[tuple[str, str], int] = {}
        for i, answer in answers.items():
            places.setdefault((problems[i].id, answer), i)
        grades = self._pool.grade([(problems[i], answers[i]) for i in places.values()])
        known = dict(zip(places, grades, strict=True))
        return {i: known[problems[i].id, answer] for i, answer in answers.items()}

    def _reward(
        self,
        status: Status,
        formatted: bool,
        seed: int,
        index: int,
        answer: str | None = None,
        note: str = "",
    ) -> Reward:
        config = self.config
        if config.format_needs_answer and status is Status.UNPARSED:
            formatted = False
        parts = {"accuracy": float(status is Status.RIGHT), "format": float(formatted)}
        if config.random is None:
            total = config.accuracy * parts["accuracy"] + config.format * parts["format"]
        else:
            parts["random"] = float(random.Random(f"{seed}/{index}").random() < config.random)
            total = config.accuracy * parts["random"]
            if config.random_keeps_format:
                total += config.format * parts["format"]
        return Reward(total, parts, status, answer, note)

    def _watch(
        self, problems: Sequence[Problem], completions: Sequence[str], rewards: Sequence[Reward]
    ) -> None:
        for problem, text, reward in zip(problems, completions, rewards, strict=True):
            self._recent.append(reward.status)
            if reward.status in (Status.TIMEOUT, Status.ERROR):
                self._failures.append(
                    f"{reward.status}: {reward.note}\n  problem {problem.id}, right answer "
                    f"{problem.answer[:80]!r}, completion ends {text[-160:]!r}"
                )
        counts = collections.Counter(self._recent)
        failed = counts[Status.TIMEOUT] + counts[Status.ERROR]
        graded = len(self._recent)
        if graded >= _ENOUGH and failed > self.config.max_failure_share * graded:
            examples = "\n".join(self._failures)
            raise RewardFailure(
                f"{counts[Status.TIMEOUT]} timeouts and {counts[Status.ERROR]} errors among the last "
                f"{graded} grades of {self.task.name}, more than reward.max_failure_share="
                f"{self.config.max_failure_share:g}. The latest:\n{examples}"
            )


def summarize(rewards: Sequence[Reward]) -> dict[str, float]:
    """Means over rewards: 'reward/mean', 'reward/std', 'reward/PART', and 'status/STATUS' shares.

    Raises ValueError if there are none.
    """
    if not rewards:
        raise ValueError("no rewards to summarize")
    count = len(rewards)
    totals = [reward.total for reward in rewards]
    mean = math.fsum(totals) / count
    summary = {
        "reward/mean": mean,
        "reward/std": math.sqrt(math.fsum((total - mean) ** 2 for total in totals) / count),
    }
    for part in rewards[0].parts:
        summary[f"reward/{part}"] = math.fsum(reward.parts[part] for reward in rewards) / count
    statuses = collections.Counter(reward.status for reward in rewards)
    return summary | {f"status/{status}": statuses[status] / count for status in Status}
