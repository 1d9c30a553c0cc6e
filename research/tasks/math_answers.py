"""Mathematical answers: taking them out of a text, and telling whether two are the same.

`quick` settles the usual cases (equal strings, whole numbers and fractions) at once. The rest is
for `equal`, which asks math-verify (SymPy underneath). An answer can make that run for hours or
fill the memory, so `equal` belongs in a process that can be killed. math-verify's own time limit
is off: it is an alarm, and these fail silently off the main thread.
"""

import functools
import logging
import re
from fractions import Fraction

from research.tasks.base import Problem, Unparsed

MAX_CHARACTERS = 1000

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{|[^\s{}\\$.,]+)")
_INTEGER = r"[0-9]+|[0-9]{1,3}(?:(?:,|\{,\})[0-9]{3})+"
_NUMBER = re.compile(rf"([+-]?)(?:({_INTEGER})(\.[0-9]*)?|(\.[0-9]+))")
_FRACTION = re.compile(r"([+-]?)(?:([0-9]+)/([0-9]+)|\\d?t?frac\{([0-9]+)\}\{([0-9]+)\})")
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_SPACES = re.compile(r"\\[ !,;:]|\\left(?![a-z])|\\right(?![a-z])|~|\s+")
_POWER = re.compile(r"\*\*\s*(\(?-?[0-9]+\)?)")
_WORDS = r"(?:[A-Za-z]{2,}|[aAI])(?:['-][A-Za-z]+)*[,:;]?"
_SENTENCE = re.compile(
    rf"(?:{_WORDS}\s+)*(?P<number>[+-]?(?:{_INTEGER})(?:\.[0-9]+)?)(?:\s+{_WORDS})*\s*[.!]?"
)
# Words that make another number of the one that stands beside them, or say that it is not the answer.
_MEANING = re.compile(
    r"\b(?:minus|negative|plus|times|over|divided|and|or|nor|to|not|no|than|least|most|between|about|around|roughly|almost"
    r"|nearly|approximately|more|less|fewer|half|halves|quarters?|thirds?|fourths?|fifths?|tenths?|dozens?|scores?|tens|pairs?"
    r"|hundreds?|thousands?|millions?|billions?|trillions?|percent|pi|sqrt|root|squared|cubed|square|cube|power|factorial"
    r"|mod|log|ln|exp|sin|cos|tan|degrees?|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty"
    r"|forty|fifty|sixty|seventy|eighty|ninety|cents?)\b",
    re.IGNORECASE,
)


def boxed(text: str) -> list[str]:
    r"""What stands in every \boxed{...} of the text, braces matched, in order.

    A box within a box counts once, by its inside. An unclosed box (a text cut short) is none.
    """
    found = []
    position = 0
    while match := _BOX.search(text, position):
        position = match.end()
        if match[1] != "{":  # \boxed 5
            found.append(match[1])
            continue
        end = _closing_brace(text, match.end())
        if end is None:
            continue
        inside = text[match.end() : end]
        if not _BOX.search(inside):
            found.append(inside.strip())
            position = end
    return found


def last_boxed(text: str) -> str | None:
    r"""The last \boxed{...} of a text; None if it has different ones, which would be guessing.

    Raises Unparsed if there is no box at all.
    """
    boxes = boxed(text)
    if not boxes:
        raise Unparsed("no \\boxed{...}")
    return boxes[-1] if len({normalise(box) for box in boxes}) == 1 else None


def normalise(answer: str) -> str:
    r"""A plain spelling: no math delimiters, spacing, \left, \right or full stop; one \frac.

    A whole number, decimal or fraction becomes its lowest terms: '0.50' and '\frac{2}{4}' are
    both '1/2'.
    """
    return _spell(answer)[0]


def number(text: str) -> Fraction | None:
    r"""The value of '-12', '1,234', '0.5', '3/4' or '\frac{3}{4}', exactly; None for all else."""
    text = text.strip()
    if len(text) > 100:  # a quick path has no use for more, and long integers are slow to read
        return None
    if match := _NUMBER.fullmatch(text):
        sign, whole, decimals, small = match.groups()
        digits = re.sub(r"[,{}]", "", whole or "0") + (decimals or small or "")
        return Fraction(f"{sign}{digits.rstrip('.')}")
    if match := _FRACTION.fullmatch(text):
        sign, *parts = match.groups()
        top, bottom = (int(part) for part in parts if part is not None)
        return None if bottom == 0 else Fraction(-top if sign == "-" else top, bottom)
    return None


def read(answer: str) -> str | None:
    r"""The answer itself, out of a \boxed{} if it is in one; None if in several different ones.

    Raises Unparsed if there is nothing to read, or too much of it.
    """
    if len(answer) > MAX_CHARACTERS:
        raise Unparsed(f"an answer of {len(answer)} characters")
    if _BOX.search(answer):
        box = last_boxed(answer)
        if box is None:
            return None
        answer = box
    answer = answer.strip()
    if not answer:
        raise Unparsed("an empty answer")
    if any(character.isdigit() and not character.isascii() for character in answer):
        raise Unparsed(f"digits that are not 0-9: {answer[:60]!r}")
    return answer


def quick(gold: str, answer: str) -> bool | None:
    """Whether the answers are the same, where equal spellings or plain numbers tell; else None."""
    (a, a_is_number), (b, b_is_number) = _spell(gold), _spell(_unit_free(gold, answer))
    if a == b:
        return True
    # Decimals may be rounded values of each other; what counts as equal then is for `equal`.
    return False if a_is_number and b_is_number and "." not in gold + answer else None


class MathVerify:
    """`base.Verifier` by math-verify, for problems whose answer is mathematics."""

    def prepare(self) -> None:
        """Raises RuntimeError if math-verify does not work here, rather than grade all as wrong."""
        if not equal(r"\frac{x}{2}", "0.5x") or equal("x", "2x"):
            raise RuntimeError(
                "math-verify grades x/2 = 0.5x or x = 2x wrongly: is it installed well?"
            )

    def __call__(self, problem: Problem, answer: str) -> bool:
        given = read(answer)
        return given is not None and equal(problem.answer, given)


def equal(gold: str, answer: str) -> bool:
    """Whether math-verify takes the answers for the same. May run for ever: see the module.

    Raises:
        Unparsed: the answer is not mathematics that can be read.
        ValueError: the reference answer is not.
    """
    known = quick(gold, answer)
    if known is not None:
        return known
    import math_verify  # half a second, and only where it is needed

    expected, given = _parse(gold), _parse(_unit_free(gold, answer))
    if not expected:
        raise ValueError(f"math-verify cannot read the reference answer {gold!r}")
    if all(isinstance(part, str) for part in given):
        raise Unparsed(f"math-verify cannot read {answer[:60]!r}")
    return math_verify.verify(list(expected), list(given), timeout_seconds=None)


def _unit_free(gold: str, answer: str) -> str:
    """Where a number is asked for: the number of an answer that is words around it ('18 eggs', 'She has $18 left.')."""
    if not _spell(gold)[1]:
        return answer
    plain = re.sub(r"\\?\$|[€£¥]", "", answer.strip())
    if re.fullmatch(r"\*\*[^*]+\*\*", plain):  # Markdown's bold
        plain = plain[2:-2]
    match = _SENTENCE.fullmatch(plain)
    return match["number"] if match and not _MEANING.search(plain) else answer


@functools.lru_cache(maxsize=4096)
def _spell(answer: str) -> tuple[str, bool]:
    """The plain spelling, and whether it is a number's."""
    answer = answer.strip().rstrip(".").strip()
    for left, right in _DELIMITERS:
        if answer.startswith(left) and answer.endswith(right):
            answer = answer[len(left) : max(len(left), len(answer) - len(right))].strip()
    answer = answer.removeprefix("\\$").removeprefix("$").strip()
    value = number(answer)
    if value is not None:
        return str(value), True
    # Spaces go only now, for 1, 234 are two numbers.
    answer = _SPACES.sub(" ", answer).strip()
    answer = re.sub(r" ?([^\w\s\\]) ?| (?=\\)", r"\1", answer)
    return re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", answer), False


@functools.lru_cache(maxsize=1024)
def _parse(answer: str) -> tuple:
    """Readings by math-verify: SymPy expressions, and the text itself as a last resort."""
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of having no alarm
    answer = _POWER.sub(lambda m: f"^{{{m[1].strip('()')}}}", answer)
    # Boxed, all of it is read: of '$1$ or $2$' as it stands, only the last would count.
    answer = answer.replace("\\$", "").replace("$", "")
    return tuple(math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=None))


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for position in range(start, len(text)):
        character = text[position]
        if text[position - 1] == "\\" and character in "{}":
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return position
    return None
