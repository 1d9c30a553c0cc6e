"""Synthetic sequences with checkable answers: recall, needles, tracking, counting, and a language of known entropy.

A task makes an example of uniform numbers, on the device: tokens, the target of each position, and weights that are 1
where an answer is due. Answers are functions of the tokens before them, and can be worked out from an example alone.
Drawing is by split: no key of one split is a key of another, and models of all seeds are evaluated on the same draws.

    Recall      the multi-query associative recall of the MQAR kind (Arora et al. 2023)
    Needles     passkey and needle in a haystack, with one key or many, one query or many, at a chosen depth
    Tracking    variables assigned to each other (RULER, Hsieh et al. 2024, section 3)
    Counting    how often a word occurs        CommonWord   which word occurs most (RULER, the same)
    Language    a second-order Markov chain with Zipfian steps, parts of which are repeated later
    Mixture     several tasks, in fixed shares of every batch
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Split = Literal["train", "validation", "test"]
_SPLITS = ("train", "validation", "test")

PAD, COUNT, COMMON = (
    0,
    1,
    2,
)  # padding; the questions 'how often is …' and 'which word is most common'
_SPECIAL = 3


class Example(NamedTuple):
    """`targets[t]` is due after reading tokens 0 … t, where `weights[t]` is 1. int32, int32, float32 `[T]`."""

    tokens: jax.Array
    targets: jax.Array
    weights: jax.Array


class Task(Protocol):
    """`length`: tokens of an example."""

    @property
    def length(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def example(self, noise: "Noise") -> Example:
        """One example; traceable, with static shapes."""


class Noise:
    """Uniform numbers, handed out in order: all that is random in an example.

    One array for a whole batch of many tasks, because on a CPU every call of a generator is a large program.
    """

    def __init__(self, uniform_U: jax.Array | None):
        self.uniform_U = uniform_U  # None: only count
        self.used = 0

    def uniform(self, count: int) -> jax.Array:
        start, self.used = self.used, self.used + count
        return jnp.zeros(count) if self.uniform_U is None else self.uniform_U[start : self.used]

    def integers(self, count: int, below: int | jax.Array) -> jax.Array:
        return jnp.minimum((self.uniform(count) * below).astype(jnp.int32), below - 1)

    def permutation(self, size: int) -> jax.Array:
        return jnp.argsort(self.uniform(size))


def stream(split: Split, seed: int | jax.Array = 0) -> jax.Array:
    """The key from which a split's batches are drawn. Keys of different splits or seeds share no descendants."""
    return jax.random.fold_in(jax.random.key(20250114 + _SPLITS.index(split)), seed)


def batch(task: Task, key: jax.Array, size: int) -> Example:
    """`size` independent examples, stacked; a mixture's tasks one after the other, padded on the right.

    Raises ValueError for a size that has no equal shares for all tasks.
    """
    parts = task.tasks if isinstance(task, Mixture) else (task,)
    if size % len(parts):
        raise ValueError(f"a batch of {size} has no equal shares for {len(parts)} tasks")
    share = size // len(parts)
    uniform_BU = jax.random.uniform(key, (size, max(map(_numbers, parts))))
    drawn = [
        jax.vmap(lambda u, part=part: part.example(Noise(u)))(
            uniform_BU[i * share : (i + 1) * share]
        )
        for i, part in enumerate(parts)
    ]

    def joined(*arrays):
        pads = [((0, 0), (0, task.length - x.shape[1])) for x in arrays]
        return jnp.concatenate([jnp.pad(x, p) for x, p in zip(arrays, pads, strict=True)])

    return jax.tree.map(joined, *drawn)


@functools.cache
def _numbers(task: Task) -> int:
    """How many uniform numbers an example takes."""
    noise = Noise(None)
    jax.eval_shape(lambda: task.example(noise))
    return noise.used


@dataclasses.dataclass(frozen=True)
class Recall:
    """`pairs` keys, each followed by its value; then `queries` of these keys, the target of each its value.

    Keys are distinct, values need not be. Tokens: keys, then values.
    """

    pairs: int = 16
    queries: int = 48
    keys: int = 24
    values: int = 24

    def __post_init__(self):
        if self.pairs > self.keys:
            raise ValueError(f"{self.pairs} distinct keys of {self.keys}")

    @property
    def length(self) -> int:
        return 2 * self.pairs + self.queries

    @property
    def vocab_size(self) -> int:
        return self.keys + self.values

    def example(self, noise: Noise) -> Example:
        keys = noise.permutation(self.keys)[: self.pairs]
        values = self.keys + noise.integers(self.pairs, self.values)
        asked = noise.integers(self.queries, self.pairs)
        body = jnp.stack([keys, values], axis=1).reshape(-1)
        return _with_questions(body, keys[asked], values[asked])


@dataclasses.dataclass(frozen=True)
class Words:
    """The vocabulary that the tasks of a suite share: special tokens, keys, values and filler, in this order."""

    keys: int = 16
    values: int = 16
    fillers: int = 16

    @property
    def vocab_size(self) -> int:
        return _SPECIAL + self.keys + self.values + self.fillers

    @property
    def first_key(self) -> int:
        return _SPECIAL

    @property
    def first_value(self) -> int:
        return _SPECIAL + self.keys

    @property
    def first_filler(self) -> int:
        return _SPECIAL + self.keys + self.values


@dataclasses.dataclass(frozen=True)
class _InWords:
    """`length`: tokens of an example, questions included."""

    length: int = 64
    words: Words = Words()

    @property
    def vocab_size(self) -> int:
        return self.words.vocab_size


@dataclasses.dataclass(frozen=True)
class Needles(_InWords):
    """`needles` distinct keys in random filler, each followed by its value; `queries` of them are asked at the end.

    value_length: tokens of a value (a passkey has several); a question is its key and, for all but the last token of
      the answer, that token.
    depth: where the first key asked for stands: 0 the beginning, 1 right before the questions; None: anywhere.
    """

    needles: int = 1
    queries: int = 1
    value_length: int = 1
    depth: float | None = None

    def __post_init__(self):
        if not 1 <= self.queries <= self.needles <= self.words.keys:
            raise ValueError(
                f"{self.queries} queries of {self.needles} needles with {self.words.keys} keys"
            )
        if self._slots < self.needles:
            raise ValueError(f"{self.needles} needles do not fit in {self.length} tokens")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"depth must be within 0 and 1, got {self.depth}")

    @property
    def _width(self) -> int:
        return 1 + self.value_length

    @property
    def _body(self) -> int:
        return self.length - self.queries * self.value_length

    @property
    def _slots(self) -> int:
        return (self._body - self.value_length) // self._width

    def example(self, noise: Noise) -> Example:
        w, count = self.words, self.needles
        body = _fillers(noise, self._body, w)
        keys = w.first_key + noise.permutation(w.keys)[:count]
        values = w.first_value + noise.integers(count * self.value_length, w.values)
        values = values.reshape(count, self.value_length)
        if self.depth is None:
            starts = _starts(noise, self._body, self._width, count)
        else:
            at = round(self.depth * (self._body - self._width))
            starts = _starts(noise, self._body, self._width, count, at)
        pairs = jnp.concatenate([keys[:, None], values], axis=1)
        body = body.at[starts[:, None] + jnp.arange(self._width)].set(pairs)
        asked = pairs[: self.queries, :-1]
        return _with_questions(body, asked.reshape(-1), values[: self.queries].reshape(-1))


@dataclasses.dataclass(frozen=True)
class Tracking(_InWords):
    """`chains` variables get a value each, and are then assigned to others, `hops` times in a row.

    An assignment is two tokens in the filler: a new variable, then the value or the variable that it takes over; those
    of a chain stand in order, the chains mixed. The question is the last variable of a chain, the answer its value.
    """

    chains: int = 2
    hops: int = 1

    def __post_init__(self):
        if self.chains < 1 or self.hops < 0 or self._assignments > self.words.keys:
            raise ValueError(
                f"{self.chains} chains of {self.hops} hops need {self._assignments} variables, "
                f"there are {self.words.keys}"
            )
        if (self.length - 2) // 2 < self._assignments:
            raise ValueError(f"{self._assignments} assignments do not fit in {self.length} tokens")

    @property
    def _assignments(self) -> int:
        return self.chains * (self.hops + 1)

    def example(self, noise: Noise) -> Example:
        w = self.words
        count, links = self.length - 1, self.hops + 1
        body = _fillers(noise, count, w)
        variables = w.first_key + noise.permutation(w.keys)[: self._assignments]
        variables = variables.reshape(self.chains, links)
        values = w.first_value + noise.integers(self.chains, w.values)[:, None]
        sources = jnp.concatenate([values, variables[:, :-1]], axis=1)
        starts = _starts(noise, count, 2, self._assignments).reshape(self.chains, links)
        starts = jnp.sort(starts, axis=1)  # a variable is assigned before it is read
        body = body.at[starts].set(variables).at[starts + 1].set(sources)
        return _with_questions(body, variables[0, -1:], values[0])


@dataclasses.dataclass(frozen=True)
class Counting(_InWords):
    """One of the words occurs 1 to `most` times; the answer to COUNT, word is the value of that number less one."""

    most: int = 8

    def __post_init__(self):
        if not 1 <= self.most <= min(self.words.values, self.length - 2):
            raise ValueError(f"cannot count to {self.most} in {self.length} tokens")

    def example(self, noise: Noise) -> Example:
        w, size = self.words, self.length - 2
        number = 1 + noise.integers(1, self.most)[0]
        word = w.first_key + noise.integers(1, w.keys)[0]
        body = jnp.where(noise.permutation(size) < number, word, _fillers(noise, size, w))
        body = jnp.append(body, COUNT)
        return _with_questions(body, word[None], (w.first_value + number - 1)[None])


@dataclasses.dataclass(frozen=True)
class CommonWord(_InWords):
    """Filler in which one word has `share` of the places and the others equal parts of the rest; COMMON asks for it."""

    share: float = 0.25

    def __post_init__(self):
        size = self.length - 1
        if round(self.share * size) <= -(-(size - round(self.share * size)) // (self._others)):
            raise ValueError(f"a share of {self.share} is not the largest in {self.length} tokens")

    @property
    def _others(self) -> int:
        return self.words.fillers - 1

    def example(self, noise: Noise) -> Example:
        w, size = self.words, self.length - 1
        common = round(self.share * size)
        ranks = noise.permutation(size)
        which = jnp.where(ranks < common, 0, 1 + (ranks - common) % self._others)
        names = w.first_filler + noise.permutation(w.fillers)
        return _with_questions(names[which], jnp.array([COMMON]), names[:1])


@dataclasses.dataclass(frozen=True)
class Language:
    """A second-order Markov chain over `vocab` symbols whose steps follow Zipf's law, with repeated blocks.

    A pair of symbols belongs to one of `classes`, each of which orders the symbols differently; the next symbol is
    the r-th of that order with probability ~ r^-zipf. So a new symbol has `entropy` nats at least, whatever came
    before, and what there is to learn grows with `classes` (of vocab^2 pairs). Of the blocks of `block` symbols, a
    share `repeat` are copies of an earlier one, which can only be foretold by looking back. All positions count but
    the first.
    """

    length: int = 256
    vocab: int = 64
    classes: int = 512
    zipf: float = 1.5
    block: int = 16
    repeat: float = 0.25
    seed: int = 0  # of the language, not of what is said in it

    def __post_init__(self):
        if self.length % self.block:
            raise ValueError(f"length {self.length} is not a multiple of block {self.block}")

    @property
    def vocab_size(self) -> int:
        return self.vocab

    @property
    def probabilities(self) -> np.ndarray:
        """Of the ranks, float64 `[vocab]`."""
        weights = np.arange(1, self.vocab + 1) ** -float(self.zipf)
        return weights / weights.sum()

    @property
    def entropy(self) -> float:
        """Nats of a symbol given all before it, where it is no copy."""
        p = self.probabilities
        return float(-(p * np.log(p)).sum())

    def example(self, noise: Noise) -> Example:
        class_VV, order_CV = map(jnp.asarray, _language_tables(self))
        size = self.length + 1
        cdf = jnp.asarray(np.cumsum(self.probabilities), jnp.float32)
        ranks_T = jnp.sum(noise.uniform(size)[:, None] >= cdf[:-1], axis=1)

        def say(past, rank):
            symbol = order_CV[class_VV[past], rank]
            return (past[1], symbol), symbol

        start = noise.integers(2, self.vocab)
        _, symbols_T = jax.lax.scan(say, (start[0], start[1]), ranks_T)
        count = self.length // self.block
        copied = (noise.uniform(count) < self.repeat).at[0].set(False)
        # The source of a copy is any earlier block that is none itself: the r-th of them.
        before = jnp.cumsum(~copied) - ~copied
        chosen = (noise.uniform(count) * before).astype(jnp.int32)
        source = jnp.argmax(~copied & (before == chosen[:, None]), axis=1)
        source = jnp.where(copied, source, jnp.arange(count))
        said = symbols_T[:-1].reshape(count, self.block)[source].reshape(-1)
        said = jnp.append(said, symbols_T[-1]).astype(jnp.int32)
        weights = (jnp.arange(self.length) >= 1).astype(jnp.float32)
        return Example(said[:-1], said[1:], weights)


@functools.cache
def _language_tables(language: Language) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(language.seed)
    classes = rng.integers(0, language.classes, (language.vocab, language.vocab), np.int32)
    orders = rng.permuted(np.tile(np.arange(language.vocab), (language.classes, 1)), axis=1)
    return classes, orders.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Equal shares of every batch from each of `tasks`."""

    tasks: tuple[Task, ...]

    def __post_init__(self):
        if not self.tasks:
            raise ValueError("a mixture needs tasks")

    @property
    def length(self) -> int:
        return max(task.length for task in self.tasks)

    @property
    def vocab_size(self) -> int:
        return max(task.vocab_size for task in self.tasks)


def ruler(length: int, words: Words = Words()) -> dict[str, Task]:
    """A suite in the manner of RULER's thirteen tasks (Hsieh et al. 2024, Table 2), all answers of one token."""
    return {
        "single": Needles(length, words),
        "multi-key": Needles(length, words, needles=4),
        "multi-query": Needles(length, words, needles=4, queries=4),
        "tracking": Tracking(length, words),
        "counting": Counting(length, words),
        "common": CommonWord(length, words),
    }


def suite_mixture(lengths: Sequence[int], words: Words = Words()) -> Mixture:
    """The suite's tasks at each of the lengths."""
    return Mixture(tuple(task for n in lengths for task in ruler(n, words).values()))


def _with_questions(body: jax.Array, asked: jax.Array, answers: jax.Array) -> Example:
    """The body, then tokens `asked`, whose targets are `answers`."""
    start, length = body.shape[0], body.shape[0] + asked.shape[0]
    tokens = jnp.concatenate([body, asked]).astype(jnp.int32)
    targets = jnp.zeros(length, jnp.int32).at[start:].set(answers.astype(jnp.int32))
    return Example(tokens, targets, (jnp.arange(length) >= start).astype(jnp.float32))


def _fillers(noise: Noise, size: int, words: Words) -> jax.Array:
    return words.first_filler + noise.integers(size, words.fillers)


def _starts(noise: Noise, size: int, width: int, count: int, first: int | None = None):
    """Where `count` spans of `width` tokens start in `size`, apart from each other; one at `first` if given."""
    if first is None:
        slots = (size - width + 1) // width
        offset = noise.integers(1, width)[0]
        return offset + width * noise.permutation(slots)[:count]
    offset = first % width
    order = noise.permutation((size - offset) // width)
    order = jnp.where(order == first // width, order[0], order).at[0].set(first // width)
    return offset + width * order[:count]
