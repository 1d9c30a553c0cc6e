"""Knights and knaves: knights only tell the truth, knaves only lie; who is what?

Each person makes one statement about the others or the whole company, and exactly one assignment
fits all of them: all 2^n are tried, as the bits of one integer. Difficulty is the number of people.
"""

import functools
import operator
import random
import re
from collections.abc import Sequence

from research.tasks.base import GeneratedTask, Problem, Unparsed

NAMES = (
    "Ada Ben Cleo Dan Eve Finn Gus Hana Ivo Jane Kurt Lea Milo Nora Otis Pia Quinn Rosa Sven Tess"
).split()

# A statement, as nested tuples:
#   ('is', person, is_knight)   ('and' | 'or' | 'iff' | 'if', s, s)   ('not', an 'and' or 'or')
#   ('exactly' | 'at least' | 'at most', count)      of all the people, how many are knights
Statement = tuple

_KINDS = ("is", "not", "and", "or", "iff", "if", "exactly", "at least", "at most")
# All that a terse question or answer is made of.
WORDS = (*NAMES, *(str(n) for n in range(11)), "knight", "knave", ":", ".", "?",
         "not", "and", "or", "iff", "if", "exactly", "at", "least", "most")  # fmt: skip
_MAX_CHARACTERS = 1000
_WORD = re.compile(r"[a-z]+|[0-9]+")
_PUNCTUATION = re.compile(r"[\s,.;:()\[\]{}\"'*=&|→-]*")  # what may stand between words
_ROLES = {"knight": True, "knights": True, "knave": False, "knaves": False}
_EVERYONE = ("all", "everyone", "everybody")
_FILLERS = frozenset("is are a an and the both all of them us while also".split())


class Knights(GeneratedTask):
    """Companies of `min_difficulty` to `max_difficulty` people.

    kinds: of statements that are made, among those of `Statement`.
    terse: questions and answers of few words, each between spaces, and the first names of the list in their order: for
      small models with a vocabulary of words (`WORDS`).
    data: 'names', 'kinds' (whether each is a knight) and 'statements'. Two problems that differ in
    names alone are the same problem, so both are on one side of the split.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        test_size: int = 512,
        train_size: int = 0,
        min_difficulty: int = 2,
        max_difficulty: int = 7,
        kinds: Sequence[str] = _KINDS,
        terse: bool = False,
    ):
        super().__init__(
            "knights", (2, 10), min_difficulty, max_difficulty, seed, test_size, train_size
        )
        unknown = [kind for kind in kinds if kind not in _KINDS]
        if unknown or not kinds:
            raise ValueError(f"kinds={kinds}: there are {', '.join(_KINDS)}")
        self.kinds, self.terse = tuple(kinds), terse

    def draw(self, rng: random.Random, difficulty: int) -> list[Statement]:
        return [
            _draw_statement(rng, speaker, difficulty, self.kinds) for speaker in range(difficulty)
        ]

    def canonical_problem(self, drawn: list[Statement]) -> str:
        return f"knights: {drawn}"

    def build(
        self, drawn: list[Statement], id: str, difficulty: int, rng: random.Random
    ) -> Problem | None:
        found = solutions(drawn)
        if len(found) != 1:
            return None
        kinds = found[0]
        data = {"kinds": kinds, "statements": drawn}
        if self.terse:
            names = NAMES[:difficulty]
            says = " . ".join(
                f"{n} : {_terse(s, names)}" for n, s in zip(names, drawn, strict=True)
            )
            answer = " ".join(f"{n} {_role(kind)}" for n, kind in zip(names, kinds, strict=True))
            return Problem(id, f"{says} ?", answer, difficulty, data | {"names": names})
        names = rng.sample(NAMES, difficulty)
        says = " ".join(
            f'{n} says: "{_text(s, names)}."' for n, s in zip(names, drawn, strict=True)
        )
        question = (
            "On an island everyone is either a knight, who always tells the truth, or a knave, who "
            f"always lies. You meet {_listing(names)}. {says} Who is what? Answer with 'NAME is a "
            "knight' or 'NAME is a knave' for each of them, separated by commas."
        )
        return Problem(id, question, _assignment(names, kinds), difficulty, data | {"names": names})

    def verify(self, problem: Problem, answer: str) -> bool:
        return parse_assignment(answer, problem.data["names"]) == problem.data["kinds"]

    def canonical(self, problem: Problem, answer: str) -> str:
        names = problem.data["names"]
        return _assignment(names, parse_assignment(answer, names))


def solutions(statements: list[Statement]) -> list[tuple[bool, ...]]:
    """Every assignment (is person i a knight?) under which knights alone tell the truth."""
    people = len(statements)
    fits = (1 << (1 << people)) - 1
    for speaker, statement in enumerate(statements):
        fits &= ~(_is_knight(speaker, people) ^ _truth(statement, people))
    return [
        tuple(bool(world >> person & 1) for person in range(people))
        for world in range(1 << people)
        if fits >> world & 1
    ]


def parse_assignment(answer: str, names: list[str]) -> tuple[bool, ...]:
    """Reads who is a knight, in the order of `names`.

    Takes names before what they are ('Ada is a knight, Ben and Cleo are knaves', 'Ada: knight;
    Ben = knave', '{"Ada": "knight", ...}', 'all are knaves') or after it ('Knights: Ada. Knaves:
    Ben, Cleo', 'knights: none; knaves: Ada, Ben'), in any case, over any number of lines.

    Raises Unparsed for anything else: other words (so 'Ada is not a knight'), somebody left out,
    or somebody called both.
    """
    if len(answer) > _MAX_CHARACTERS:
        raise Unparsed(f"an answer of {len(answer)} characters")
    text = answer.strip().lower()
    strange = _PUNCTUATION.sub("", _WORD.sub("", text))
    if strange:
        raise Unparsed(f"{answer[:60]!r}: cannot read {strange[:10]!r}")
    people = {name.lower(): name for name in names}
    kinds: dict[str, bool] = {}
    waiting: list[str] = []  # names whose role is yet to come
    role: bool | None = None  # in 'Knights: ...', the role of the names that follow
    for word in _WORD.findall(text):
        named = [people[word]] if word in people else []
        if word in _EVERYONE and not waiting:
            named = names
        if named and role is None:
            waiting.extend(named)
        elif named:
            _assign(kinds, named, role)
        elif word in _ROLES and waiting:
            _assign(kinds, waiting, _ROLES[word])
            waiting = []
        elif word in _ROLES and (role is not None or not kinds):
            role = _ROLES[word]
        elif word in _ROLES:
            raise Unparsed(f"{answer[:60]!r}: {word!r} says nothing of anybody")
        elif word not in _FILLERS and not word.isdigit() and (word != "none" or role is None):
            raise Unparsed(f"{answer[:60]!r}: cannot read {word!r}")
    missing = [name for name in names if name not in kinds]
    if missing or waiting:
        raise Unparsed(f"{answer[:60]!r} does not say what {(missing or waiting)[0]} is")
    return tuple(kinds[name] for name in names)


def _assign(kinds: dict[str, bool], names: list[str], role: bool) -> None:
    for name in names:
        if kinds.setdefault(name, role) != role:
            raise Unparsed(f"{name} cannot be both a knight and a knave")


def _draw_statement(
    rng: random.Random, speaker: int, people: int, kinds: Sequence[str]
) -> Statement:
    kind = rng.choice(kinds)
    if kind == "is":
        other = rng.choice([p for p in range(people) if p != speaker])
        return ("is", other, rng.random() < 0.5)
    if kind == "not":
        return ("not", _draw_pair(rng, rng.choice(("and", "or")), people))
    if kind in ("and", "or", "iff", "if"):
        return _draw_pair(rng, kind, people)
    low, high = {"exactly": (0, people), "at least": (1, people), "at most": (0, people - 1)}[kind]
    return (kind, rng.randint(low, high))


def _draw_pair(rng: random.Random, kind: str, people: int) -> Statement:
    first, second = rng.sample(range(people), 2)
    if kind != "if":
        first, second = sorted((first, second))  # the others mean the same either way round
    # Of 'both alike' and 'both different' there is one wording each.
    role = True if kind == "iff" else rng.random() < 0.5
    return (kind, ("is", first, role), ("is", second, rng.random() < 0.5))


@functools.cache
def _is_knight(person: int, people: int) -> int:
    """Bit w is set if `person` is a knight in world w, that is, if bit `person` of w is set."""
    return sum(1 << world for world in range(1 << people) if world >> person & 1)


def _truth(statement: Statement, people: int) -> int:
    """Bit w is set if the statement is true in world w."""
    everywhere = (1 << (1 << people)) - 1
    match statement:
        case ("is", person, True):
            return _is_knight(person, people)
        case ("is", person, False):
            return everywhere ^ _is_knight(person, people)
        case ("not", inner):
            return everywhere ^ _truth(inner, people)
        case ("and", a, b):
            return _truth(a, people) & _truth(b, people)
        case ("or", a, b):
            return _truth(a, people) | _truth(b, people)
        case ("iff", a, b):
            return everywhere ^ _truth(a, people) ^ _truth(b, people)
        case ("if", a, b):
            return (everywhere ^ _truth(a, people)) | _truth(b, people)
        case (kind, count):
            return _count(kind, count, people)
    raise ValueError(f"{statement} is not a statement")


@functools.cache
def _count(kind: str, count: int, people: int) -> int:
    compare = {"exactly": operator.eq, "at least": operator.ge, "at most": operator.le}[kind]
    return sum(1 << world for world in range(1 << people) if compare(world.bit_count(), count))


def _text(statement: Statement, names: list[str]) -> str:
    match statement:
        case ("is", person, knight):
            return f"{names[person]} is a {'knight' if knight else 'knave'}"
        case ("not", ("and", a, b)):
            return f"it is not true that both {_text(a, names)} and {_text(b, names)}"
        case ("not", ("or", a, b)):
            return f"it is neither true that {_text(a, names)} nor that {_text(b, names)}"
        case ("and", a, b):
            return f"{_text(a, names)} and {_text(b, names)}"
        case ("or", a, b):
            return f"{_text(a, names)} or {_text(b, names)}, or both"
        case ("iff", a, b):
            return f"{_text(a, names)} if and only if {_text(b, names)}"
        case ("if", a, b):
            return f"if {_text(a, names)}, then {_text(b, names)}"
        case (kind, count):
            return f"{kind} {count} of us {'is a knight' if count == 1 else 'are knights'}"
    raise ValueError(f"{statement} is not a statement")


def _terse(statement: Statement, names: list[str]) -> str:
    match statement:
        case ("is", person, knight):
            return f"{names[person]} {_role(knight)}"
        case ("not", (kind, a, b)):
            return f"not {_terse((kind, a, b), names)}"
        case ("and" | "or" | "iff" | "if" as kind, a, b):
            return f"{kind} {_terse(a, names)} {_terse(b, names)}"
        case (kind, count):
            return f"{kind} {count}"
    raise ValueError(f"{statement} is not a statement")


def _role(kind: bool) -> str:
    return "knight" if kind else "knave"


def _assignment(names: list[str], kinds: tuple[bool, ...]) -> str:
    return ", ".join(f"{name} is a {_role(kind)}" for name, kind in zip(names, kinds, strict=True))


def _listing(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
