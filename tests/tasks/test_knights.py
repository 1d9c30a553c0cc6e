"""Knights and knaves: one solution, found by trying all worlds in another way."""

import itertools

import pytest

from research import tasks
from research.tasks.knights import NAMES as NAMES_IN_ORDER
from research.tasks.knights import WORDS, parse_assignment, solutions

TASK = tasks.make("knights")
NAMES = ["Ada", "Ben", "Cleo"]


def holds(statement, kinds):
    """The truth of a statement in one world, straight from its definition."""
    match statement:
        case ("is", person, knight):
            return kinds[person] == knight
        case ("not", inner):
            return not holds(inner, kinds)
        case ("and", a, b):
            return holds(a, kinds) and holds(b, kinds)
        case ("or", a, b):
            return holds(a, kinds) or holds(b, kinds)
        case ("iff", a, b):
            return holds(a, kinds) == holds(b, kinds)
        case ("if", a, b):
            return holds(b, kinds) if holds(a, kinds) else True
        case ("exactly", count):
            return sum(kinds) == count
        case ("at least", count):
            return sum(kinds) >= count
        case ("at most", count):
            return sum(kinds) <= count
    raise AssertionError(statement)


def test_the_reference_is_the_only_world_in_which_just_the_knights_tell_the_truth():
    kinds_seen = set()
    for index in range(250):
        problem = TASK.problem("train", index)
        statements = problem.data["statements"]
        fitting = [
            world
            for world in itertools.product((False, True), repeat=problem.difficulty)
            if all(holds(s, world) == world[i] for i, s in enumerate(statements))
        ]
        assert fitting == [problem.data["kinds"]] == solutions(statements)
        kinds_seen |= {s[0] for s in statements}
    assert kinds_seen == {"is", "not", "and", "or", "iff", "if", "exactly", "at least", "at most"}


def test_puzzles_with_none_or_several_solutions_have_them():
    liar = [("is", 1, True), ("is", 0, False)]  # A: B is a knight. B: A is a knave.
    assert solutions(liar) == []
    mutual = [("is", 1, True), ("is", 0, True)]
    assert sorted(solutions(mutual)) == [(False, False), (True, True)]


def test_the_question_has_everybody_and_what_they_say():
    problem = TASK.build(
        [("not", ("or", ("is", 0, False), ("is", 1, True))), ("at most", 1)], "x", 2, _Fixed()
    )
    assert problem.answer == "Ada is a knave, Ben is a knight"
    assert "You meet Ada and Ben." in problem.question
    assert (
        'Ada says: "it is neither true that Ada is a knave nor that Ben is a knight."'
        in problem.question
    )
    assert 'Ben says: "at most 1 of us is a knight."' in problem.question


def test_the_answer_is_not_in_the_question():
    for index in range(50):
        problem = TASK.problem("test", index)
        assert problem.answer not in problem.question


@pytest.mark.parametrize(
    "answer",
    [
        "Ada is a knight, Ben is a knave, Cleo is a knave",
        "ADA IS A KNIGHT. BEN IS A KNAVE. CLEO IS A KNAVE.",
        "Cleo is a knave; Ben is a knave; Ada is a knight",
        "Ada: knight\nBen: knave\nCleo: knave",
        "(1) Ada is a knight\n(2) Ben is a knave\n(3) Cleo is a knave",
        "1. **Ada** - knight\n2. **Ben** - knave\n3. **Cleo** - knave",
        '{"Ada": "knight", "Ben": "knave", "Cleo": "knave"}',
        "Ada = knight, Ben = knave, Cleo = knave",
        "| Ada | knight | Ben | knave | Cleo | knave |",
        "Ada is a knight and Ben and Cleo are knaves",
        "Ada is a knight, while Ben and Cleo are both knaves.",
        "Knights: Ada. Knaves: Ben, Cleo",
        "The knight is Ada and the knaves are Ben and Cleo",
        "knave: Cleo, Ben; knight: Ada",
        "Ada (knight), Ben (knave), Cleo (knave)",
        "Ada → knight\nBen → knave\nCleo → knave",
        "Ada is a knight. Ada is a knight. Ben is a knave. Cleo is a knave.",
    ],
)
def test_the_usual_ways_to_write_an_assignment(answer):
    assert parse_assignment(answer, NAMES) == (True, False, False)


def test_nobody_and_everybody():
    assert parse_assignment("All of them are knaves.", NAMES) == (False,) * 3
    assert parse_assignment("Everyone is a knight", NAMES) == (True,) * 3
    assert parse_assignment("Knights: none; knaves: Ada, Ben, Cleo", NAMES) == (False,) * 3
    assert parse_assignment("Knights: all", NAMES) == (True,) * 3


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "knight",
        "Ada is a knight",  # somebody left out
        "Ada is a knight, Ben is a knave, Cleo",
        "Ada is a knight, Ben is a knave, Cleo is a knave, Dan is a knave",
        "Ada is not a knight, Ben is a knave, Cleo is a knave",
        "Ada != knight, Ben = knave, Cleo = knave",
        "Ada is a non-knight, Ben is a knave, Cleo is a knave",
        "Ada is a knight or a knave, Ben is a knave, Cleo is a knave",
        "Ada: knight/knave, Ben: knave, Cleo: knave",
        "Ada is a knight, Ada is a knave, Ben is a knave, Cleo is a knave",
        "All are knights, all are knaves",
        "If Ada is a knight, Ben is a knave, Cleo is a knave",
        "Ada is a knïght, Ben is a knave, Cleo is a knave",
        "Ada, Ben, Cleo knight knave knave",
        "Ada is a knight. The knave is Ben. Cleo is a knave.",
        "Ada is a knight, Ben is a knave, Cleo is a knave. " * 50,
    ],
)
def test_what_is_ambiguous_or_incomplete_is_refused(answer):
    with pytest.raises(tasks.Unparsed):
        parse_assignment(answer, NAMES)


def test_exactly_one_assignment_is_right_and_votes_see_through_spelling():
    problem = TASK.problem("test", 5)
    names, kinds = problem.data["names"], problem.data["kinds"]
    for world in itertools.product((False, True), repeat=len(names)):
        roles = ["knight" if k else "knave" for k in world]
        written = "; ".join(f"{n}: {r}" for n, r in zip(names, roles, strict=True))
        assert TASK.verify(problem, written) == (world == kinds)
        assert (TASK.canonical(problem, written) == problem.answer) == (world == kinds)


def test_terse_problems_are_the_same_problems_in_few_words():
    terse = tasks.make("knights", terse=True)
    kinds = set()
    for index in range(60):
        problem, prose = terse.problem("train", index), TASK.problem("train", index)
        assert problem.data["statements"] == prose.data["statements"]
        assert problem.data["names"] == NAMES_IN_ORDER[: problem.difficulty]
        assert set(problem.question.split()) | set(problem.answer.split()) <= set(WORDS)
        assert terse.verify(problem, problem.answer)
        *rest, last = problem.answer.split()
        other = {"knight": "knave", "knave": "knight"}[last]
        assert not terse.verify(problem, " ".join([*rest, other]))
        kinds |= {s[0] for s in problem.data["statements"]}
    assert len(kinds) == 9
    statements = [
        ("not", ("and", ("is", 1, True), ("is", 2, False))),
        ("at least", 2),
        ("is", 0, False),
    ]
    drawn = terse.build(statements, "id", 3, _Fixed())
    assert (
        drawn.question
        == "Ada : not and Ben knight Cleo knave . Ben : at least 2 . Cleo : Ada knave ?"
    )
    assert drawn.answer == "Ada knight Ben knave Cleo knave"


def test_only_some_kinds_of_statements():
    few = tasks.make(tasks.TaskConfig("knights", options=("kinds=('is','and')", "terse=True")))
    assert {s[0] for i in range(40) for s in few.problem("train", i).data["statements"]} == {
        "is",
        "and",
    }
    with pytest.raises(ValueError, match="kinds=.*'maybe'.*there are is, not"):
        tasks.make("knights", kinds=("is", "maybe"))


class _Fixed:
    """A stand-in for random.Random that names people in alphabetical order."""

    def sample(self, population, count):
        return sorted(population)[:count]
