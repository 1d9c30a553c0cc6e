r"""Mathematical answers: boxes, spellings, the quick path and math-verify."""

from fractions import Fraction

import pytest

from research.tasks import Problem, Unparsed, math_answers


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        (r"so \boxed{42}.", ["42"]),
        (r"\boxed{\frac{1}{2}} and $\boxed{ x^{2} }$", [r"\frac{1}{2}", "x^{2}"]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
        (r"\boxed{\left\{ \frac{a}{b} \right\}}", [r"\left\{ \frac{a}{b} \right\}"]),
        (r"\boxed{\boxed{7}}", ["7"]),
        (r"\fbox{3}", ["3"]),
        (r"$\boxed 5$", ["5"]),
        (r"\boxed {6}", ["6"]),
        (r"\boxed{}", [""]),
        (r"\boxed{1 + {2", []),  # cut short
        (r"\boxed{unclosed and \boxed{8}", ["8"]),
        ("no box, boxed{3}", []),
    ],
)
def test_boxes_are_matched_by_their_braces(text, boxes):
    assert math_answers.boxed(text) == boxes


def test_the_last_box_counts_unless_there_are_different_ones():
    assert math_answers.last_boxed(r"\boxed{1} then \boxed{ 1 }") == "1"
    assert math_answers.last_boxed(r"\boxed{0.5}, \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert math_answers.last_boxed(r"\boxed{1} or \boxed{2}") is None
    with pytest.raises(Unparsed):
        math_answers.last_boxed("2")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("-3", -3),
        ("+3", 3),
        ("007", 7),
        ("1,234", 1234),
        ("1{,}234{,}567", 1234567),
        ("0.50", Fraction(1, 2)),
        (".5", Fraction(1, 2)),
        ("3.", 3),
        ("-6/4", Fraction(-3, 2)),
        (r"\frac{2}{4}", Fraction(1, 2)),
        (r"-\dfrac{1}{3}", Fraction(-1, 3)),
        ("1/0", None),
        (r"\frac{1}{0}", None),
        ("1,23", None),
        ("12,3456", None),
        ("1e5", None),
        ("٣", None),
        ("３", None),
        ("²", None),
        ("1 2", None),
        ("--1", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_plain_numbers(text, value):
    assert math_answers.number(text) == value


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("18", " 18 "),
        ("18", "$18$"),
        ("18", r"\$18"),
        ("18", "18."),
        ("18", "18.00"),
        ("1000", "1,000"),
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{1}{2}", r"\dfrac{1}{2}"),
        ("p - q", "p-q"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"\text{Monday}", r"\text{Monday}"),
        (r"x \in [0, 1]", r"\(x\in[0,1]\)"),
    ],
)
def test_equal_spellings_need_no_computer_algebra(gold, answer):
    assert math_answers.quick(gold, answer) is True


@pytest.mark.parametrize(
    ("gold", "answer"),
    [("18", "19"), ("1/2", "1/3"), ("-1", "1"), ("1000", "1,001"), ("12", "1 2x")],
)
def test_different_numbers_are_never_equal(gold, answer):
    assert not math_answers.quick(gold, answer)
    assert not math_answers.equal(gold, answer)


def test_a_list_is_not_a_number_with_a_thousands_comma():
    assert math_answers.quick("1234", "1, 234") is None
    assert not math_answers.equal("1234", "1, 234")


def test_rounded_decimals_and_formulas_are_not_settled_in_haste():
    assert math_answers.quick("1/3", "0.333333") is None
    assert math_answers.quick("x+1", "1+x") is None


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("x^2+1", "1 + x^2"),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt2}{2}"),
        ("1/3", "0.333333"),
        ("1024", "2^{10}"),
        ("1024", "2**10"),
        ("5", "x = 5"),
        ("90", r"90^\circ"),
        (r"\text{Monday}", "Monday"),
        (r"\{1, 2\}", r"\{2, 1\}"),
        ("(x-1)(x+1)", "x^2 - 1"),
    ],
)
def test_equal_mathematics(gold, answer):
    assert math_answers.equal(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("x^2+1", "x^2-1"),
        ("5", "5, 6"),
        ("5", r"5 \text{ or } 6"),
        ("7", "$5$ or $7$"),  # of several, the last one would be right
        ("7", "$$5$$ $$7$$"),
        ("(1, 2)", "(2, 1)"),
        ("1/3", "0.33"),
        ("2", "2x"),
    ],
)
def test_different_mathematics(gold, answer):
    assert not math_answers.equal(gold, answer)


@pytest.mark.parametrize("answer", ["", "  ", "٤٢", "x = ４２", "1" * 1001, r"\boxed{ }"])
def test_what_cannot_be_an_answer_is_refused(answer):
    with pytest.raises(Unparsed):
        math_answers.read(answer)


def test_the_verifier_reads_boxes_and_refuses_a_bad_reference():
    verifier = math_answers.MathVerify()
    verifier.prepare()
    problem = Problem("x", "?", "x+1", 0)
    assert verifier(problem, r"it is \boxed{1+x}")
    assert not verifier(problem, r"\boxed{1+x} or \boxed{x}")
    with pytest.raises(Unparsed):
        verifier(problem, "__import__('os')")
    with pytest.raises(ValueError, match="cannot read the reference answer"):
        verifier(Problem("x", "?", "$", 0), "x+1")


def test_prepare_notices_a_math_verify_that_finds_everything_wrong(monkeypatch):
    """As one does whose time limit fails on every call."""
    monkeypatch.setattr("math_verify.verify", lambda *_, **__: False)
    with pytest.raises(RuntimeError, match="math-verify"):
        math_answers.MathVerify().prepare()


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("18", "18 dollars", True),
        ("18", "18 eggs", True),  # in the units' place, or not: letters are no variables here
        ("18", "18 dollars per day.", True),
        ("18", "**18**", True),
        ("18", "€18", True),
        ("18", "The answer is 18", True),
        ("18", "The answer is 18.", True),
        ("18", "She makes $18 every day.", True),
        ("18", "She makes $19 every day.", False),
        ("1234", "1,234 apples", True),
        ("2.50", "2.5 dollars", True),
        ("0.5", "0.25 cups", False),
        ("-3", "3 degrees", False),
        # Another number than the one that is written, or none that is meant.
        ("18", "18 or 19", False),
        ("18", "17 and 18", False),
        ("18", "not 18", False),
        ("18", "more than 18", False),
        ("18", "18 hundred", False),
        ("18", "18 dozen eggs", False),
        ("18", "minus 18", False),
        ("18", "18 pi", False),
        ("18", "18 x", False),
        ("18", "18x", False),
        ("18", "2**18", False),
        ("18", "Step 3: 18 eggs", False),
        # Where no number is asked for, words are not passed over.
        ("x", "18 eggs", False),
    ],
)
def test_a_number_counts_among_words(gold, answer, same):
    assert math_answers.equal(gold, answer) is same
    assert math_answers.quick(gold, answer) in (same, None)
