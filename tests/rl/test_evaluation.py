"""Metrics of evaluations, against values worked out by hand."""

import fractions
import itertools
import math

import numpy as np
import pytest

from research.rl import evaluation


@pytest.mark.parametrize(
    ("n", "c", "k", "value"),
    [(16, 3, 4, 0.6071429), (16, 3, 8, 0.9), (64, 10, 8, 0.7649284), (16, 14, 4, 1.0)],
)
def test_pass_at_k_of_known_cases(n, c, k, value):
    """1 - C(n-c, k) / C(n, k), worked out with exact fractions."""
    assert evaluation.pass_at_k(n, c, k) == pytest.approx(value, abs=5e-8)
    exact = 1 - fractions.Fraction(math.comb(n - c, k), math.comb(n, k))
    assert evaluation.pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-12)


def test_pass_at_k_is_the_share_of_subsets_with_a_correct_response():
    n = 6
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
        share = sum(any(subset) for subset in subsets) / len(subsets)
        assert evaluation.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_takes_arrays_and_large_numbers():
    counts = np.array([[0, 1], [5, 10]])
    values = evaluation.pass_at_k(10, counts, 1)
    np.testing.assert_allclose(values, counts / 10, atol=1e-15)
    assert evaluation.pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)  # C(n, k) has 3009 digits
    for n, c, k in [(4, 5, 2), (4, -1, 2), (4, 2, 5), (4, 2, 0)]:
        with pytest.raises(ValueError, match="need k, c <= n"):
            evaluation.pass_at_k(n, c, k)


def vote(answers, correct, k=None, **options):
    return evaluation.consensus([answers], [correct], k or len(answers), **options)[0]


def test_the_most_frequent_answer_wins():
    assert vote(["7", "3", "7"], [True, False, True]) == 1.0
    assert vote(["7", "3", "3"], [True, False, False]) == 0.0


def test_tied_answers_win_equally_often():
    assert vote(["7", "3"], [True, False]) == 0.5
    assert vote(["7", "3", "1", "3", "7"], [True, False, False, False, True]) == 0.5
    assert vote(["7", "3", "1"], [True, False, False]) == pytest.approx(1 / 3)


def test_what_cannot_be_read_never_wins():
    assert vote([None, None, None, "7"], [False, False, False, True]) == 1.0
    assert vote([None, None], [False, False]) == 0.0


def test_a_vote_of_one_is_pass_at_1_of_what_can_be_read_and_is_resampled():
    answers, correct = ["7", "7", "3", None], [True, True, False, False]
    assert vote(answers, correct, 1, draws=20_000) == pytest.approx(0.5, abs=0.02)


def test_a_vote_of_fewer_is_the_mean_over_all_subsets():
    answers = ["7", "7", "7", "3", "3", "1", None]
    correct = [a == "7" for a in answers]
    subsets = itertools.combinations(range(7), 3)
    exact = np.mean([vote([answers[i] for i in s], [correct[i] for i in s]) for s in subsets])
    assert 0.3 < exact < 0.9
    assert vote(answers, correct, 3, draws=20_000) == pytest.approx(exact, abs=0.015)
    assert vote(answers, correct, 3, seed=1) == vote(answers, correct, 3, seed=1)
    with pytest.raises(ValueError, match="cons@8 of 7"):
        vote(answers, correct, 8)


def test_standard_errors_count_problems_not_responses():
    """sqrt(((0-.5)^2 + (1-.5)^2 + 0) / 2) / sqrt(3)."""
    assert evaluation.standard_error(np.array([0.0, 1.0, 0.5])) == pytest.approx(0.5 / math.sqrt(3))
    assert evaluation.standard_error(np.array([0.3])) == 0.0


def test_the_bootstrap_agrees_with_normal_theory():
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    low, high = evaluation.bootstrap(values)
    error = values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)
    assert evaluation.bootstrap(np.full(5, 0.25)) == (0.25, 0.25)
    assert (
        evaluation.bootstrap(values, seed=1) == evaluation.bootstrap(values, seed=1) != (low, high)
    )
    narrow = evaluation.bootstrap(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_breakdown_by_label():
    values = np.array([1.0, 0.0, 0.5, 0.25])
    assert evaluation.breakdown(values, [7, 3, 7, 3]) == {3: (0.125, 2), 7: (0.75, 2)}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Wait, wait! WAIT.", 3),
        ("However, I verify: a mistake, an error. But check it, retry", 7),
        ("waiting awaits waited await wait_ mistaken checks checked butter erroneous", 0),
        ("wrong;evaluate(wait)", 3),
        ("4 *3 7 wait 4 +4 8", 1),
        ("", 0),
    ],
)
def test_reflections_are_whole_words_of_the_papers_list(text, count):
    assert sum(evaluation.reflections(text).values()) == count


def test_reflections_are_counted_by_word():
    assert evaluation.reflections("Wait. wait, but") == {"wait": 2, "but": 1}
    assert evaluation.has_wait("so Wait!")
    assert not evaluation.has_wait("waiting")


def samples(**changes):
    values = {
        "correct": np.array([[True, True, False, False], [False, False, False, True]]),
        "answers": [["7", "7", "3", None], ["1", "1", "2", "5"]],
        "formatted": np.array([[True, True, True, False], [True] * 4]),
        "lengths": np.array([[10, 20, 30, 40], [1, 2, 3, 6]]),
        "truncated": np.array([[False, False, False, True], [False] * 4]),
        "difficulty": np.array([5, 3]),
        "texts": [["wait, but", "wait wait", "", ""], ["check", "", "", ""]],
    }
    return evaluation.Samples(**(values | changes))


def test_a_report_by_hand():
    report = evaluation.report(samples(), k=4)
    expected = {
        "pass@1": (2 / 4 + 1 / 4) / 2,
        "pass@1/stderr": 0.125,  # deviations of 1/8: sqrt(2 / 64) / sqrt(2)
        "pass@4": 1.0,
        "cons@4": 0.5,
        "cons@4/stderr": 0.5,
        "format": 7 / 8,
        "truncated": 1 / 8,
        "length": 112 / 8,
        "length/correct": 36 / 3,
        "length/wrong": 76 / 5,
        "reflection/words": 5 / 8,
        "reflection/wait": 2 / 8,
        "difficulty/3": 0.25,
        "difficulty/5": 0.5,
    }
    interval = {"pass@1/low", "pass@1/high"}
    assert set(report) == set(expected) | interval
    assert {key: report[key] for key in expected} == pytest.approx(expected)
    assert (report["pass@1/low"], report["pass@1/high"]) == (0.25, 0.5)
    assert all(type(value) is float for value in report.values())


def test_a_report_of_fewer_responses_than_k_takes_all_of_them():
    report = evaluation.report(samples(), k=16)
    assert report["pass@4"] == 1.0
    assert "pass@16" not in report
    two = evaluation.report(samples(), k=2)
    assert two["pass@2"] == pytest.approx(
        (1 - 1 / 6 + 1 - 3 / 6) / 2
    )  # C(2,2), C(3,2) of C(4,2) = 6


def test_a_mean_over_nothing_is_left_out():
    none = evaluation.report(samples(correct=np.zeros((2, 4), bool)))
    assert "length/correct" not in none and none["length/wrong"] == 14.0 and none["pass@1"] == 0.0
    every = evaluation.report(samples(correct=np.ones((2, 4), bool)))
    assert "length/wrong" not in every and every["length/correct"] == 14.0


@pytest.mark.parametrize(
    "changes",
    [
        {"correct": np.zeros((0, 4), bool)},
        {"correct": np.zeros(4, bool)},
        {"lengths": np.zeros((2, 3))},
        {"answers": [["7"] * 4, ["7"] * 3]},
        {"texts": [[""] * 4]},
        {"difficulty": np.zeros(3)},
    ],
)
def test_ragged_samples_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        samples(**changes)
