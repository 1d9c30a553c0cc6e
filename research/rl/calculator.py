"""A calculator for policies to call: exact arithmetic on what a model wrote, read by a parser of its own.

    sum     = product (('+' | '-') product)*
    product = signed (('*' | '/' | '//' | '%') signed)*
    signed  = ('+' | '-') signed | power
    power   = number ('**' signed)?            from right to left, before a sign on its left, as in Python
    number  = digits ('.' digits)? | '(' sum ')'

Values are rational numbers, so that 1/3*3 is 1. Nothing is executed, and limits on length, nesting and the size of
every value keep a call within microseconds, whatever was written.
"""

import decimal
import re
from fractions import Fraction

MAX_CHARACTERS = 200
MAX_DEPTH = 32  # of parentheses, signs and powers in each other
MAX_BITS = 256  # of the numerator and denominator of every value
MAX_WRITTEN = 100  # characters of what it says, digits or reason
DIGITS = 12  # significant ones of a result that is no whole number

_TOKEN = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\*\*|//|[-+*/%()])")


class ToolError(ValueError):
    """A call that has no result. The message is what the policy is told."""


def calculate(expression: str, *, operations: int = 0) -> str:
    """The value of an arithmetic expression: a whole number, or a decimal one of at most 12 digits.

    operations: most of them in one expression, signs not counted (0: any number).

    Raises ToolError.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ToolError("too long")
    tokens, end = [], 0
    while match := _TOKEN.match(expression, end):
        tokens.append(match[1])
        end = match.end()
    if expression[end:].strip():
        raise ToolError("not arithmetic")
    parser = _Parser(tokens)
    value = parser.sum(0)
    if parser.place < len(tokens):
        raise ToolError("not arithmetic")
    if operations and parser.operations > operations:
        raise ToolError("too many operations")
    return _written(value)


class _Parser:
    """Recursive descent that evaluates as it reads; `place` is the next token."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.place, self.operations = tokens, 0, 0

    def take(self, *wanted: str) -> str | None:
        if self.place < len(self.tokens) and self.tokens[self.place] in wanted:
            self.place += 1
            return self.tokens[self.place - 1]
        return None

    def sum(self, depth: int) -> Fraction:
        return self.chain(self.product, ("+", "-"), depth)

    def product(self, depth: int) -> Fraction:
        return self.chain(self.signed, ("*", "/", "//", "%"), depth)

    def chain(self, operand, operators: tuple[str, ...], depth: int) -> Fraction:
        value = operand(depth)
        while operator := self.take(*operators):
            value = self.apply(operator, value, operand(depth))
        return value

    def signed(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise ToolError("nested too deeply")
        if sign := self.take("+", "-"):
            value = self.signed(depth + 1)
            return -value if sign == "-" else value
        value = self.number(depth)
        if self.take("**"):
            value = self.apply("**", value, self.signed(depth + 1))
        return value

    def number(self, depth: int) -> Fraction:
        if self.take("("):
            value = self.sum(depth + 1)
            if not self.take(")"):
                raise ToolError("not arithmetic")
            return value
        if self.place == len(self.tokens) or not self.tokens[self.place][0].isdigit():
            raise ToolError("not arithmetic")
        self.place += 1
        return _bounded(Fraction(self.tokens[self.place - 1]))

    def apply(self, operator: str, a: Fraction, b: Fraction) -> Fraction:
        self.operations += 1
        if operator in ("/", "//", "%") and not b:
            raise ToolError("division by zero")
        match operator:
            case "+":
                value = a + b
            case "-":
                value = a - b
            case "*":
                value = a * b
            case "/":
                value = a / b
            case "//":
                value = Fraction(a // b)
            case "%":
                value = a % b
            case _:
                value = _power(a, b)
        return _bounded(value)


def _power(a: Fraction, b: Fraction) -> Fraction:
    if b.denominator != 1:
        raise ToolError("the exponent is no whole number")
    if not a and b < 0:
        raise ToolError("division by zero")
    if not a:
        return Fraction(b == 0)
    bits = max(abs(a.numerator), a.denominator).bit_length() - 1
    if not bits:  # 1 or -1, for which no exponent is too large
        return a ** (int(b) % 2)
    if bits * abs(b) > MAX_BITS:  # known before it is computed
        raise ToolError("too large")
    return Fraction(a ** int(b))


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator).bit_length() > MAX_BITS:
        raise ToolError("too large")
    return value


def _written(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    with decimal.localcontext(prec=DIGITS):
        quotient = decimal.Decimal(value.numerator) / decimal.Decimal(value.denominator)
    text = f"{quotient:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
