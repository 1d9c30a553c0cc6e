"""Chained arithmetic modulo 10."""

import collections

import pytest

from research import tasks


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("4 *3 -5 +9 =", "6"),
        ("0 -9 =", "1"),
        ("9 +9 +9 =", "7"),
        ("7 *3 *3 =", "3"),
        ("8 *2 -7 +0 =", "9"),
    ],
)
def test_worked_examples(question, answer):
    task = tasks.make("arithmetic", min_difficulty=2)
    words = question.split()[:-1]
    problem = task.build(words, "x", len(words), None)
    assert (problem.question, problem.answer) == (question, answer)


def test_answers_are_those_of_plain_integer_arithmetic():
    """Reduced modulo 10 at the very end, which is the same."""
    task = tasks.make("arithmetic", min_difficulty=2, max_difficulty=8)
    for index in range(500):
        problem = task.problem("train", index)
        first, *operations = problem.question.removesuffix(" =").split()
        expression = first
        for word in operations:
            expression = f"({expression}) {word[0]} {word[1]}"
        assert int(problem.answer) == eval(expression) % 10
        assert problem.difficulty == len(operations) + 1
        assert problem.data["products"] == problem.question.count("*")


def test_the_distribution_is_the_stated_one():
    task = tasks.make("arithmetic")
    problems = [task.problem("train", i) for i in range(6000)]
    products = collections.Counter(p.data["products"] for p in problems)
    # 1 - mean over 2..6 operations of 0.75^k = 0.657: the share with a product at all.
    assert abs(1 - products[0] / 6000 - 0.657) < 0.03
    assert set(products) == {0, 1, 2}
    words = collections.Counter(w for p in problems for w in p.question.split()[1:-1])
    assert set(words) == {
        *(f"+{d}" for d in range(10)),
        *(f"-{d}" for d in range(1, 10)),
        "*2",
        "*3",
    }
    sums = [n for w, n in words.items() if w[0] != "*"]
    assert max(sums) < 1.25 * min(sums)
    assert abs(words["*2"] - words["*3"]) < 5 * words["*2"] ** 0.5
    assert {p.question.split()[0] for p in problems} == set("0123456789")


def test_products_can_be_turned_off():
    task = tasks.make("arithmetic", product_probability=0.0)
    assert not any("*" in task.problem("train", i).question for i in range(300))
    with pytest.raises(ValueError, match="product_probability=1.5"):
        tasks.make("arithmetic", product_probability=1.5)


@pytest.mark.parametrize(
    "answer", ["", " ", "12", "-3", "+6", "6.0", "six", "٦", "６", "²", "6 6", "\\boxed{6}"]
)
def test_only_one_ascii_digit_is_an_answer(answer):
    task = tasks.make("arithmetic")
    problem = task.problem("train", 0)
    with pytest.raises(tasks.Unparsed):
        task.verify(problem, answer)


def test_exactly_one_digit_is_right():
    task = tasks.make("arithmetic")
    for index in range(20):
        problem = task.problem("train", index)
        assert [d for d in "0123456789" if task.verify(problem, d)] == [problem.answer]
