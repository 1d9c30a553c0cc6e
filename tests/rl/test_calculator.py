"""The calculator against Python's own arithmetic, and what it refuses."""

import random
import re
import string
import time
from fractions import Fraction

import pytest

from research.rl.calculator import MAX_BITS, MAX_WRITTEN, ToolError, calculate


def drawn(rng, depth=0):
    """A random expression, spaces and superfluous parentheses included, of small whole numbers."""
    if depth > 3 or rng.random() < 0.25:
        return str(rng.randint(0, 20))
    space = rng.choice(["", " "])
    match rng.randrange(4):
        case 0:
            return f"({drawn(rng, depth + 1)})"
        case 1:
            return f"{rng.choice('+-')}{space}{drawn(rng, depth + 1)}"
        case _:
            operator = rng.choice(["+", "-", "*", "/", "//", "%", "**"])
            return f"{drawn(rng, depth + 1)}{space}{operator}{space}{drawn(rng, depth + 1)}"


class Exact(Fraction):
    """A rational number that Python's operators keep rational."""

    def __pow__(self, other):
        if other.denominator != 1:
            raise ArithmeticError("a root")
        if abs(other) > 64 and abs(self) not in (0, 1):
            raise ArithmeticError("too large to wait for")
        return Exact(Fraction(self) ** int(other))


for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "pos"):
    method = getattr(Fraction, f"__{name}__")
    setattr(Exact, f"__{name}__", lambda *args, method=method: Exact(method(*args)))


def by_python(expression):
    """Python's own parser and precedence, with every number made exact."""
    exact = re.sub(r"\d+", lambda number: f"Exact({int(number[0])})", expression)
    return Fraction(eval(exact, {"Exact": Exact}))


def test_it_computes_what_python_computes():
    rng = random.Random(0)
    values = refused = 0
    for _ in range(4000):
        expression = drawn(rng)
        try:
            want = by_python(expression)
        except ArithmeticError:  # division by zero is one
            want = None
        try:
            got = calculate(expression)
        except ToolError as error:
            refused += 1
            # Either Python refuses too, or a value on the way is out of bounds.
            assert want is None or str(error) in ("too large", "too long"), expression
            continue
        assert want is not None, expression
        values += 1
        if want.denominator == 1:
            assert got == str(int(want)), expression
        else:
            assert Fraction(got) == pytest.approx(want, rel=1e-11), expression
    assert values > 2500 and refused > 150


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*34", "408"),
        ("7/2", "3.5"),
        ("1/3*3", "1"),
        ("2/3", "0.666666666667"),
        ("-2**2", "-4"),
        ("2**-1", "0.5"),
        ("2**3**2", "512"),
        ("-7//2", "-4"),
        ("-7%3", "2"),
        ("1.5+1.25", "2.75"),
        ("0**0", "1"),
        ("(-1)**99999999999999999999", "-1"),
        ("10**76", "1" + "0" * 76),
        ("1/10**20", "0.00000000000000000001"),
        (" ( 2 + 3 ) * 4 ", "20"),
    ],
)
def test_values(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "not arithmetic"),
        ("1 2", "not arithmetic"),
        ("1+", "not arithmetic"),
        ("(1", "not arithmetic"),
        ("1)", "not arithmetic"),
        ("1e5", "not arithmetic"),
        ("__import__('os')", "not arithmetic"),
        ("٣+1", "not arithmetic"),
        ("1..2", "not arithmetic"),
        ("1/0", "division by zero"),
        ("5%(2-2)", "division by zero"),
        ("0**-1", "division by zero"),
        ("4**(1/2)", "no whole number"),
        ("9**9**9", "too large"),
        ("2**1000000000000", "too large"),
        ("(1/2)**1000000000000", "too large"),
        ("9" * 100, "too large"),
        ("(" * 60 + "1" + ")" * 60, "nested too deeply"),
        ("-" * 100 + "1", "nested too deeply"),
        ("1" * 201, "too long"),
    ],
)
def test_what_has_no_value_is_refused_with_the_reason(expression, message):
    with pytest.raises(ToolError, match=message):
        calculate(expression)


def test_the_longest_results():
    largest, smallest = calculate("-(2**255+2**254)"), calculate("-1/(2**255+1)")
    assert 70 < len(largest) < len(smallest) <= MAX_WRITTEN
    assert Fraction(smallest) == pytest.approx(-(2.0**-255), rel=1e-11)


def test_a_limit_on_operations():
    assert calculate("-2*-(3)", operations=1) == "6"
    with pytest.raises(ToolError, match="too many operations"):
        calculate("2*3+1", operations=1)
    assert calculate("2*3+1", operations=2) == "7"


def test_no_text_takes_long_or_raises_anything_else():
    rng = random.Random(1)
    started = time.perf_counter()
    for _ in range(3000):
        alphabet = rng.choice(["0123456789+-*/%().", "9*", "9()-*", string.printable])
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 200)))
        try:
            said = calculate(text)
        except ToolError as error:
            assert len(f"error: {error}") <= MAX_WRITTEN
            continue
        assert len(said) <= MAX_WRITTEN
        value = Fraction(said)
        assert max(abs(value.numerator), value.denominator) < 10 ** (MAX_BITS // 2)
    assert time.perf_counter() - started < 3.0
