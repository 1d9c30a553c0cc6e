"""What holds for every task that generates its problems."""

import collections
import dataclasses
import pickle

import pytest

from research import tasks
from research.tasks.base import held_out

NAMES = ["arithmetic", "countdown", "knights", "tool_arithmetic"]


@pytest.fixture(scope="module", params=NAMES)
def task(request):
    return tasks.make(request.param)


def canonical(task, problem):
    """The canonical problem, recomputed from what the problem shows."""
    match task.name:
        case "arithmetic":
            return "arithmetic: " + problem.question.removesuffix(" =")
        case "countdown":
            return f"countdown: {sorted(problem.data['numbers'])} {problem.data['target']}"
        case "tool_arithmetic":
            return "tool_arithmetic: " + problem.question.removesuffix("=")
        case _:
            return f"knights: {problem.data['statements']}"


def test_a_problem_depends_on_seed_split_and_index_alone(task):
    again = tasks.make(task.name)
    for index in (7, 3, 100_000):  # in another order, from another object
        assert again.problem("train", index) == task.problem("train", index)
    assert again.problem("test", 511) == task.problem("test", 511)
    other = tasks.make(task.name, seed=1)
    differ = [
        other.problem(s, i) != task.problem(s, i) for s in ("train", "test") for i in range(9)
    ]
    assert sum(differ) > 9


def test_training_has_no_end_and_the_test_split_has_its_size(task):
    assert task.size("train") is None
    assert task.size("test") == 512
    assert task.problem("train", 10**12).question
    with pytest.raises(IndexError, match="512"):
        task.problem("test", 512)
    with pytest.raises(IndexError):
        task.problem("train", -1)
    with pytest.raises(ValueError, match="'dev'"):
        task.problem("dev", 0)


def test_reference_answers_are_right_and_problems_pickle(task):
    for index in range(200):
        problem = task.problem("train", index)
        assert task.verify(problem, problem.answer)
        assert task.quick(problem, f"  {problem.answer}\n")
        assert pickle.loads(pickle.dumps(problem)) == problem
        assert task.canonical(problem, problem.answer)


def test_test_problems_differ_and_have_equal_shares_in_every_prefix(task):
    problems = [task.problem("test", i) for i in range(512)]
    assert len({canonical(task, p) for p in problems}) == 512
    for prefix in (30, 200, 512):
        shares = collections.Counter(p.difficulty for p in problems[:prefix])
        assert set(shares) == set(task.difficulties)
        assert max(shares.values()) - min(shares.values()) <= 1


def test_training_draws_every_difficulty_equally_often(task):
    counts = collections.Counter(task.problem("train", i).difficulty for i in range(1500))
    expected = 1500 / len(task.difficulties)
    assert set(counts) == set(task.difficulties)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_no_test_problem_of_any_seed_is_ever_drawn_for_training(task):
    for seed in (0, 1):
        drawn = tasks.make(task.name, seed=seed)
        assert not any(held_out(canonical(task, drawn.problem("train", i))) for i in range(1000))
        assert all(held_out(canonical(task, drawn.problem("test", i))) for i in range(512))


def test_a_small_space_is_divided_without_overlap():
    """All 210 problems of two operands: the two splits are disjoint and together complete."""
    words = [f"+{d}" for d in range(10)] + [f"-{d}" for d in range(1, 10)] + ["*2", "*3"]
    space = {f"{first} {word} =" for first in range(10) for word in words}
    test_side = {q for q in space if held_out("arithmetic: " + q.removesuffix(" ="))}
    task = tasks.make("arithmetic", min_difficulty=2, max_difficulty=2, test_size=len(test_side))
    test = {task.problem("test", i).question for i in range(len(test_side))}
    train = {task.problem("train", i).question for i in range(6000)}
    assert test == test_side
    assert train == space - test_side
    assert 0.15 < len(test_side) / len(space) < 0.35


def test_a_space_too_small_for_the_test_split_is_an_error():
    task = tasks.make("arithmetic", min_difficulty=2, max_difficulty=2, test_size=200)
    with pytest.raises(ValueError, match="difficulty 2 has too few problems for test_size=200"):
        task.problem("test", 0)


@pytest.mark.parametrize("limits", [(0, 3), (5, 4), (3, 1000)])
def test_a_range_that_the_task_does_not_have_is_refused(task, limits):
    with pytest.raises(ValueError, match=f"{task.name} has difficulties"):
        tasks.make(task.name, min_difficulty=limits[0], max_difficulty=limits[1])


def test_unknown_names_and_options_name_the_nearest():
    with pytest.raises(ValueError, match="no task 'countdwn'; did you mean 'countdown'"):
        tasks.make("countdwn")
    with pytest.raises(ValueError, match="countdown, knights, tool_arithmetic, gsm8k, math, gym:NAME"):
        tasks.make("xyzzy")
    with pytest.raises(ValueError, match="no option 'max_products_'; did you mean 'max_products'"):
        tasks.make("arithmetic", max_products_=1)


def test_a_config_makes_the_task_its_fields_describe():
    config = tasks.TaskConfig("arithmetic", seed=3, max_difficulty=4, options=("max_products=0",))
    expected = tasks.make("arithmetic", seed=3, max_difficulty=4, max_products=0)
    made = tasks.make(config)
    assert [made.problem("train", i) for i in range(20)] == [
        expected.problem("train", i) for i in range(20)
    ]
    assert made.size("test") == 512
    with pytest.raises(ValueError, match="'max_products' is not 'name=value'"):
        tasks.make(dataclasses.replace(config, options=("max_products",)))


def test_a_few_training_problems():
    """The first of the endless stream, always the same; the test side does not follow."""
    few, endless = (tasks.make(tasks.TaskConfig(train_size=n, test_size=8)) for n in (3, 0))
    assert few.size("train") == 3 and endless.size("train") is None
    for split, count in (("train", 3), ("test", 8)):
        assert [few.problem(split, i) for i in range(count)] == [
            endless.problem(split, i) for i in range(count)
        ]
    with pytest.raises(IndexError, match="no train problem 3; its size is 3"):
        few.problem("train", 3)
    with pytest.raises(ValueError, match="train_size=-1 must not be negative"):
        tasks.make("arithmetic", train_size=-1)
