"""Every task's answers, worked out again from the tokens alone, in NumPy."""

import collections
import dataclasses

import jax
import numpy as np
import pytest

from research.minimax_01 import retrieval
from research.minimax_01.retrieval import (
    COMMON,
    COUNT,
    CommonWord,
    Counting,
    Language,
    Mixture,
    Needles,
    Recall,
    Tracking,
    Words,
)

WORDS = Words(keys=12, values=8, fillers=10)
SIZE = 32


def drawn(task, split="test", seed=0, size=SIZE):
    def draw(key):
        return retrieval.batch(task, key, size)

    return jax.tree.map(np.asarray, jax.jit(draw)(retrieval.stream(split, seed)))


def is_key(token):
    return WORDS.first_key <= token < WORDS.first_value


def is_value(token):
    return WORDS.first_value <= token < WORDS.first_filler


def pairs_of(body):
    """What follows each key, by key; a key that follows a key is what follows."""
    table, at = {}, 0
    while at < len(body):
        if is_key(body[at]):
            assert int(body[at]) not in table
            table[int(body[at])] = int(body[at + 1])
            at += 1
        at += 1
    return table


def solve(task, tokens):
    """The answers, in order, by reading the tokens."""
    if isinstance(task, Recall):
        table = dict(zip(tokens[: 2 * task.pairs : 2], tokens[1 : 2 * task.pairs : 2], strict=True))
        assert len(table) == task.pairs
        return [table[k] for k in tokens[2 * task.pairs :]]
    if isinstance(task, Needles):
        cut = len(tokens) - task.queries * task.value_length
        body, tail = tokens[:cut], tokens[cut:].reshape(task.queries, task.value_length)
        assert sum(map(is_key, body)) == task.needles == len(pairs_of(body))
        answers = []
        for question in tail:
            (at,) = np.flatnonzero(body == question[0])
            value = body[at + 1 : at + 1 + task.value_length]
            assert (question[1:] == value[:-1]).all() and all(map(is_value, value))
            answers.extend(value)
        return answers
    if isinstance(task, Tracking):
        table, name = pairs_of(tokens[:-1]), int(tokens[-1])
        assert len(table) == task.chains * (task.hops + 1)
        steps = 0
        while not is_value(name):
            name, steps = table[name], steps + 1
        assert steps == task.hops + 1
        return [name]
    if isinstance(task, Counting):
        assert tokens[-2] == COUNT and is_key(tokens[-1])
        assert sum(map(is_key, tokens[:-2])) == (tokens[:-2] == tokens[-1]).sum()
        return [WORDS.first_value + (tokens[:-2] == tokens[-1]).sum() - 1]
    assert isinstance(task, CommonWord) and tokens[-1] == COMMON
    (first, most), (_, second) = collections.Counter(tokens[:-1].tolist()).most_common(2)
    assert most > second
    return [first]


TASKS = [
    Recall(),
    Recall(pairs=1, queries=3, keys=4, values=2),
    Needles(40, WORDS),
    Needles(41, WORDS, needles=5, queries=3),
    Needles(50, WORDS, needles=3, queries=2, value_length=4),
    Needles(37, WORDS, needles=12, queries=12, depth=0.5),
    Tracking(40, WORDS),
    Tracking(41, WORDS, chains=3, hops=2),
    Tracking(8, WORDS, chains=1, hops=0),
    Counting(30, WORDS),
    CommonWord(50, WORDS),
]


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_answers(task):
    example = drawn(task)
    assert example.tokens.shape == example.targets.shape == (SIZE, task.length)
    assert example.tokens.dtype == example.targets.dtype == np.int32
    assert example.weights.dtype == np.float32
    assert example.tokens.min() >= 0 and example.tokens.max() < task.vocab_size
    for tokens, targets, weights in zip(*example, strict=True):
        assert set(weights) <= {0.0, 1.0}
        assert targets[weights == 1].tolist() == [int(a) for a in solve(task, tokens)]
    assert len({row.tobytes() for row in example.tokens}) > SIZE // 8


@pytest.mark.parametrize(
    "task", [Recall(), Needles(40, WORDS, needles=4), Counting(30, WORDS)], ids=str
)
def test_answers_are_spread(task):
    """No answer is so frequent that naming it always would pay."""
    example = drawn(task, size=512)
    answers = example.targets[example.weights == 1]
    counts = np.unique(answers, return_counts=True)[1]
    choices = task.values if isinstance(task, Recall) else 8
    assert len(counts) == choices and counts.max() < 1.6 * answers.size / choices


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("value_length", [1, 3])
def test_depth(depth, value_length):
    """The needle asked for stands where it was ordered, however many others there are."""
    task = Needles(64, WORDS, needles=8, queries=2, value_length=value_length, depth=depth)
    example = drawn(task)
    body = task.length - 2 * value_length
    for tokens in example.tokens:
        at = round(depth * (body - 1 - value_length))
        assert tokens[at] == tokens[body]
        assert len(solve(task, tokens)) == 2 * value_length
    assert (
        depth < 1 or (example.tokens[:, body - 1 - value_length] == example.tokens[:, body]).all()
    )


def test_any_depth_without_one():
    example = drawn(Needles(24, WORDS), size=512)
    at = np.argmax((example.tokens >= 3) & (example.tokens < WORDS.first_value), axis=1)
    assert set(at) == set(range(22))


def test_splits_share_nothing():
    """Training, validation and evaluation draw different sequences; a split and seed draw the same ones again."""
    seen = {}
    for split in ("train", "validation", "test"):
        for seed in (0, 1):
            seen[split, seed] = {row.tobytes() for row in drawn(Recall(), split, seed).tokens}
            again = drawn(Recall(), split, seed).tokens
            assert {row.tobytes() for row in again} == seen[split, seed]
    sets = list(seen.values())
    assert len(set.union(*sets)) == sum(map(len, sets)) == SIZE * 6


LANGUAGE = Language(length=128, vocab=12, classes=20, zipf=1.2, block=16, repeat=0.3)


def test_language_without_copies_is_the_chain():
    """Steps have the stated ranks' frequencies in the order of the pair's class, and the stated entropy."""
    task = dataclasses.replace(LANGUAGE, repeat=0.0)
    example = drawn(task, size=256)
    assert (example.tokens[:, 1:] == example.targets[:, :-1]).all()
    assert (example.weights == (np.arange(128) >= 1)).all()
    classes, orders = retrieval._language_tables(task)
    rank = np.argsort(orders, axis=1)  # class, symbol → its place in the order
    a, b, c = example.tokens[:, :-1], example.tokens[:, 1:], example.targets[:, 1:]
    counts = np.bincount(rank[classes[a, b], c].ravel(), minlength=12)
    expected = counts.sum() * task.probabilities
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
    surprise = -np.log(task.probabilities[rank[classes[a, b], c]])
    assert surprise.mean() == pytest.approx(
        task.entropy, abs=5 * surprise.std() / surprise.size**0.5
    )


def test_language_s_blocks_repeat():
    """The stated share of blocks are copies of earlier ones; without the option hardly any is."""
    shares = []
    for task in (LANGUAGE, dataclasses.replace(LANGUAGE, repeat=0.0)):
        blocks = drawn(task, size=256).tokens.reshape(256, 8, 16)
        same = (blocks[:, :, None] == blocks[:, None]).all(-1)
        shares.append(np.tril(same, -1).any(-1)[:, 1:].mean())
    assert shares[0] == pytest.approx(0.3, abs=5 * (0.21 / (256 * 7)) ** 0.5)
    assert shares[1] < 0.001


def test_mixture():
    tasks = (Needles(20, WORDS), Tracking(30, WORDS), Counting(24, WORDS))
    mixture = Mixture(tasks)
    assert (mixture.length, mixture.vocab_size) == (30, WORDS.vocab_size)
    example = drawn(mixture, size=12)
    assert example.tokens.shape == (12, 30)
    for i, task in enumerate(tasks):
        for tokens, targets, weights in zip(*(x[4 * i : 4 * i + 4] for x in example), strict=True):
            assert not tokens[task.length :].any() and not weights[task.length :].any()
            answers = solve(task, tokens[: task.length])
            assert targets[weights == 1].tolist() == [int(a) for a in answers]
    with pytest.raises(ValueError, match="no equal shares for 3 tasks"):
        retrieval.batch(mixture, retrieval.stream("test"), 10)


def test_the_suite():
    suite = retrieval.ruler(64, WORDS)
    assert len(suite) == 6
    for task in suite.values():
        assert task.length == 64
        example = drawn(task, size=4)
        for tokens, targets, weights in zip(*example, strict=True):
            assert targets[weights == 1].tolist() == [int(a) for a in solve(task, tokens)]
    assert len(retrieval.suite_mixture([32, 64], WORDS).tasks) == 12


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Recall(pairs=30), "30 distinct keys of 24"),
        (lambda: Needles(40, WORDS, needles=13), "12 keys"),
        (lambda: Needles(40, WORDS, queries=2), "2 queries of 1 needles"),
        (lambda: Needles(10, WORDS, needles=6), "6 needles do not fit in 10"),
        (lambda: Needles(40, WORDS, depth=1.5), "depth must be within 0 and 1, got 1.5"),
        (lambda: Tracking(40, WORDS, chains=5, hops=2), "need 15 variables, there are 12"),
        (lambda: Tracking(9, WORDS, chains=2, hops=1), "4 assignments do not fit in 9"),
        (lambda: Counting(30, WORDS, most=9), "cannot count to 9 in 30"),
        (lambda: CommonWord(50, WORDS, share=0.1), "a share of 0.1 is not the largest"),
        (lambda: Language(length=100), "length 100 is not a multiple of block 16"),
        (lambda: Mixture(()), "needs tasks"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
