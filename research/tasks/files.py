"""Mathematics problems read from JSON Lines files.

    gsm8k   {"question": ..., "answer": "... #### 18"}
    math    {"problem": ..., "answer": ... and/or "solution": "... \\boxed{18}", "level": "Level 5"}

'problem' and 'question' are the same field to both readers.
"""

import json
import logging
import os
import pathlib
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

from research.tasks import math_answers
from research.tasks.base import Problem, Split, Unparsed, check_index

_LEVEL = re.compile(r"(?:level\s*)?([0-9]+)", re.IGNORECASE)

# A row of a file → (question, answer, difficulty, data). Raises ValueError saying what is wrong.
Reader = Callable[[Mapping[str, Any]], tuple[str, str, int, dict[str, Any]]]


class FileTask:
    """Problems from a training file, a test file or both.

    The test split is the test file in its order. The training split goes through the training
    file again and again, in an order drawn from (seed, pass); `size('train')` is one pass.
    Training rows whose question is in the test file are left out.

    Answers are graded by `math_answers`; `canonical` tells apart what only math-verify would
    find equal, since that cannot run here.
    """

    def __init__(self, name: str, read: Reader, *, train: str = "", test: str = "", seed: int = 0):
        """Raises ValueError or FileNotFoundError naming the file, the line and the remedy."""
        self.name = name
        self._seed = seed
        self._rows = {
            "train": _load(name, "train", train, read) if train else [],
            "test": _load(name, "test", test, read) if test else [],
        }
        if not train and not test:
            raise ValueError(
                f"{name} reads its problems from files: give the path of a .jsonl file as "
                "test_file (to evaluate) or train_file (to train)"
            )
        held_out = {_key(p) for p in self._rows["test"]}
        kept = [p for p in self._rows["train"] if _key(p) not in held_out]
        if len(kept) < len(self._rows["train"]):
            dropped = len(self._rows["train"]) - len(kept)
            logging.getLogger(__name__).info(
                "%s: %d are in %s as well, left out", train, dropped, test
            )
            if not kept:
                raise ValueError(f"{train}: every problem is in {test} as well; give another file")
        self._rows["train"] = kept

    isolated = math_answers.MathVerify()

    def size(self, split: Split) -> int:
        return len(self._rows[split])

    def problem(self, split: Split, index: int) -> Problem:
        rows = self._rows.get(split)
        if rows == []:
            raise ValueError(f"{self.name} was given no {split} file: set {split}_file to its path")
        check_index(self.name, split, index, len(rows) if rows and split == "test" else None)
        if split == "test":
            return rows[index]
        passes, place = divmod(index, len(rows))
        return rows[self._order(passes)[place]]

    def verify(self, problem: Problem, answer: str) -> bool:
        """May run for ever; see `isolated`."""
        return self.isolated(problem, answer)

    def quick(self, problem: Problem, answer: str) -> bool | None:
        given = math_answers.read(answer)
        return False if given is None else math_answers.quick(problem.answer, given)

    def canonical(self, problem: Problem, answer: str) -> str:
        given = math_answers.read(answer)
        if given is None:
            raise Unparsed("several different boxes")
        return math_answers.normalise(given)

    def _order(self, passes: int) -> list[int]:
        if self._shuffled[0] != passes:
            order = list(range(len(self._rows["train"])))
            random.Random(f"{self.name}/{self._seed}/{passes}").shuffle(order)
            self._shuffled = passes, order
        return self._shuffled[1]

    _shuffled: tuple[int, list[int]] = (-1, [])  # the last pass asked for, as its order


def read_gsm8k(row: Mapping[str, Any]) -> tuple[str, str, int, dict[str, Any]]:
    """GSM8K: the answer is what follows the last '####'. Difficulty 0."""
    question, solution = _field(row, "question", "problem"), _field(row, "answer")
    _, marker, answer = solution.rpartition("####")
    if not marker or not answer.strip():
        raise ValueError("its 'answer' does not end in '#### N'; is this file for the 'math' task?")
    return question, answer.strip(), 0, {"solution": solution}


def read_math(row: Mapping[str, Any]) -> tuple[str, str, int, dict[str, Any]]:
    r"""MATH: 'answer', or else the last \boxed{} of 'solution'. Difficulty is 'level', or 0.

    data keeps 'subject' (or 'type') where there is one.
    """
    question = _field(row, "problem", "question")
    if row.get("answer") not in (None, ""):
        answer = str(row["answer"])
    else:
        boxes = math_answers.boxed(_field(row, "solution"))
        if not boxes:
            raise ValueError("no 'answer', and no \\boxed{...} in its 'solution'; add one of them")
        answer = boxes[-1]
    level = _LEVEL.fullmatch(str(row.get("level") or "").strip())
    subject = row.get("subject") or row.get("type")
    data = {"subject": subject} if subject else {}
    return question, answer, int(level[1]) if level else 0, data


def _load(name: str, split: str, path: str, read: Reader) -> list[Problem]:
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"{name}: {os.fspath(file)!r} is not there; set {split}_file to a .jsonl file"
        )
    problems = []
    with file.open(encoding="utf-8") as lines:
        for place, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object like {...}")
                question, answer, difficulty, data = read(row)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{place}: not JSON ({error}); each line must be one JSON object"
                ) from None
            except ValueError as error:
                raise ValueError(f"{path}:{place}: {error}") from None
            id = f"{name}/{split}/{len(problems)}"
            problems.append(Problem(id, question, answer, difficulty, data))
    if not problems:
        raise ValueError(f"{path}: no problems in it; each line must be one JSON object")
    return problems


def _field(row: Mapping[str, Any], *names: str) -> str:
    for name in names:
        if isinstance(row.get(name), str) and row[name].strip():
            return row[name]
    wanted = " or ".join(repr(name) for name in names)
    raise ValueError(f"no text under {wanted}; its keys are {sorted(row)}")


def _key(problem: Problem) -> str:
    return " ".join(problem.question.split()).lower()
