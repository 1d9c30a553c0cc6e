"""reasoning-gym tasks."""

import pickle
import sys

import pytest

from research import tasks


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'january\[gym\]'"):
        tasks.make("gym:chain_sum")


@pytest.fixture
def gym(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some of its datasets run programs that write files
    return pytest.importorskip("reasoning_gym")


@pytest.mark.gym
def test_a_task_is_pure_in_seed_split_and_index(gym):
    task = tasks.make("gym:chain_sum", test_size=20)
    again = tasks.make("gym:chain_sum", test_size=20)
    assert again.problem("train", 5000) == task.problem("train", 5000)  # another chunk first
    assert again.problem("train", 3) == task.problem("train", 3)
    assert [again.problem("test", i) for i in range(20)] == [
        task.problem("test", i) for i in range(20)
    ]
    other = tasks.make("gym:chain_sum", test_size=20, seed=1)
    assert other.problem("train", 3).question != task.problem("train", 3).question
    assert (task.size("train"), task.size("test")) == (None, 20)
    with pytest.raises(IndexError):
        task.problem("test", 20)


@pytest.mark.gym
def test_options_reach_the_dataset(gym):
    task = tasks.make("gym:chain_sum", min_terms=2, max_terms=2, test_size=5)
    assert {task.problem("train", i).data["entry"]["metadata"]["num_terms"] for i in range(30)} == {
        2
    }


@pytest.mark.gym
def test_a_small_space_is_divided_without_overlap(gym):
    """The sums and differences of two digits, drawn until hardly any is missing."""
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    task = tasks.make("gym:chain_sum", test_size=40, **options)
    test = {task.problem("test", i).question for i in range(40)}
    train = {task.problem("train", i).question for i in range(1500)}
    assert len(test) == 40
    assert len(train) > 120
    assert not test & train
    other = tasks.make("gym:chain_sum", test_size=40, seed=1, **options)
    assert not train & {other.problem("test", i).question for i in range(40)}


@pytest.mark.gym
def test_too_small_a_space_is_an_error(gym):
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    task = tasks.make("gym:chain_sum", test_size=5000, **options)
    assert task.problem("test", 0)
    with pytest.raises(ValueError, match="for tests, of test_size=5000. Ask for fewer"):
        task.problem("test", 4999)


@pytest.mark.gym
def test_unknown_names_and_settings_name_what_there_is(gym):
    with pytest.raises(ValueError, match="no 'chain_sun'; did you mean chain_sum"):
        tasks.make("gym:chain_sun")
    with pytest.raises(ValueError, match="refuses .*max_term.*its options are .*max_terms"):
        tasks.make("gym:chain_sum", max_term=3)
    with pytest.raises(ValueError, match="refuses"):
        tasks.make("gym:chain_sum", min_terms=5, max_terms=2)


@pytest.mark.parametrize(
    "name",
    ["chain_sum", "countdown", "acre", "word_ladder", "simple_integration", "string_insertion"],
)
@pytest.mark.gym
def test_reference_answers_are_right_and_nonsense_is_not(gym, name):
    task = tasks.make(f"gym:{name}", test_size=3)
    verifier = pickle.loads(pickle.dumps(task.isolated))
    verifier.prepare()
    for problem in (task.problem("test", 2), task.problem("train", 2001)):
        problem = pickle.loads(pickle.dumps(problem))
        if problem.answer:
            assert task.quick(problem, f" {problem.answer}\n") is True
            assert verifier(problem, problem.answer)
        for nonsense in ("xyzzy", "((", "__import__('os')", "1/0"):
            try:
                assert not task.verify(problem, nonsense)
            except tasks.Unparsed:
                pass
        with pytest.raises(tasks.Unparsed):
            verifier(problem, " ")
        with pytest.raises(tasks.Unparsed):
            task.canonical(problem, "")


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("puzzle24", "__import__('pathlib').Path({path!r}).touch()"),
        ("countdown", "open({path!r}, 'w')"),
        ("simple_integration", "S('__im' + 'port__(\"pathlib\").Path({path!r}).touch()')"),
        ("string_insertion", "[open({path!r}, 'w')]"),
        ("n_queens", "[[c for c in open({path!r}, 'w')]]"),
        ("spiral_matrix", "[__import__('pathlib').Path({path!r}).touch()]"),
        *(
            (name, r"[a[\"open\x28{path!r}, 'w'\x29\"] for a.__class__.__getitem__ in [exec]]")
            for name in ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
        ),
    ],
)
@pytest.mark.gym
def test_an_answer_is_never_run(gym, tmp_path, name, answer):
    """These datasets evaluate answers, so one that could call anything is refused beforehand."""
    path = tmp_path / "ran"
    task = tasks.make(f"gym:{name}", test_size=1)
    with pytest.raises(tasks.Unparsed, match="could run as a program"):
        task.verify(task.problem("test", 0), answer.format(path=str(path)))
    assert not path.exists()


@pytest.mark.parametrize("name", ["countdown", "puzzle24"])
@pytest.mark.gym
def test_letters_are_no_numbers(gym, name):
    """Where each given number must be used once, x/x would add a 1 that was not given."""
    task = tasks.make(f"gym:{name}", test_size=1)
    problem = task.problem("test", 0)
    for answer in (f"{problem.answer or '1'} + x - x", "x/x"):
        with pytest.raises(tasks.Unparsed, match="could run as a program"):
            task.verify(problem, answer)


@pytest.mark.gym
def test_scorers_of_expressions_still_take_expressions(gym):
    task = tasks.make("gym:simple_integration", test_size=1)
    problem = task.problem("test", 0)
    body = problem.answer.removesuffix(" + C")
    assert task.verify(problem, f"C + ({body}) + sin(1)**2 - sin(1)**2")
