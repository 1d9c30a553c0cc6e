"""Packing loses nothing, mixes nothing and wastes little."""

import time

import numpy as np
import pytest

from research.lm import packing


def random_lengths(rng, row_length):
    kind = rng.integers(3)
    size = int(rng.integers(1, 200))
    if kind == 0:
        return rng.integers(1, row_length + 1, size)
    if kind == 1:  # many short ones, a few long ones
        return np.minimum(1 + rng.geometric(4 / row_length, size), row_length)
    return rng.choice([1, row_length // 2, row_length // 2 + 1, row_length], size)


@pytest.mark.parametrize("seed", range(30))
def test_every_token_has_one_place(seed):
    rng = np.random.default_rng(seed)
    row_length = int(rng.integers(2, 65))
    lengths = random_lengths(rng, row_length)
    row, offset, num_rows = packing.pack(lengths, row_length)
    taken = np.zeros((num_rows, row_length), int)
    for r, o, n in zip(row, offset, lengths, strict=True):
        assert o + n <= row_length
        taken[r, o : o + n] += 1
    assert taken.max() == 1  # no overlap
    assert taken.sum() == lengths.sum()  # nothing lost
    assert (taken.sum(1) > 0).all()  # no empty row
    assert (np.diff(taken, axis=1) <= 0).all()  # no hole inside a row
    # No two rows could have been one: the fullest row with room was taken each time.
    left = np.sort(row_length - taken.sum(1))[::-1]
    if num_rows > 1:
        assert left[0] + left[1] < row_length


def best_number_of_rows(lengths, row_length):
    """The optimum by exhaustive search, for few sequences."""
    lengths = sorted(lengths, reverse=True)
    best = len(lengths)

    def place(index, rows):
        nonlocal best
        if len(rows) >= best:
            return
        if index == len(lengths):
            best = len(rows)
            return
        for i in range(len(rows)):
            if rows[i] + lengths[index] <= row_length and rows[i] not in rows[:i]:
                place(index + 1, rows[:i] + [rows[i] + lengths[index]] + rows[i + 1 :])
        place(index + 1, rows + [lengths[index]])

    place(0, [])
    return best


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_at_most_one_more_than_the_optimum(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 13, 9)
    best = best_number_of_rows(lengths.tolist(), 12)
    assert packing.pack(lengths, 12).num_rows <= best + 1


def test_rows_are_nearly_full():
    """Response-like lengths: 2,000 sequences of mean about 130 tokens in rows of 512."""
    lengths = np.clip(np.random.default_rng(0).lognormal(4.6, 0.7, 2000), 8, 512).astype(int)
    _, _, num_rows = packing.pack(lengths, 512)
    fewest = -(-lengths.sum() // 512)
    assert num_rows <= fewest + 1


def test_a_known_packing():
    """6 → row 0; 5 → row 1; 4 fits row 0 best (4 left) and not row 1's 5; 3 → row 1, 2 → row 1."""
    row, offset, num_rows = packing.pack([3, 6, 2, 5, 4], 10)
    assert num_rows == 2
    assert row.tolist() == [1, 0, 1, 1, 0]
    assert offset.tolist() == [5, 0, 8, 0, 6]


def test_sequences_come_back_from_their_segments():
    rng = np.random.default_rng(1)
    lengths = random_lengths(rng, 40)
    sequences = [
        {
            "tokens": rng.integers(0, 1000, n).astype(np.int32),
            "advantages": rng.normal(size=n).astype(np.float32),
        }
        for n in lengths
    ]
    batch = packing.pack_sequences(sequences, 40, rows=300)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "tokens": ((300, 40), "int32"),
        "advantages": ((300, 40), "float32"),
        "segment_ids": ((300, 40), "int32"),
        "positions": ((300, 40), "int32"),
    }
    found = []
    for r in range(300):
        ids = batch["segment_ids"][r]
        assert (np.diff(ids[ids > 0]) >= 0).all() and sorted(set(ids) - {0}) == list(
            range(1, ids.max() + 1)
        )
        for s in range(1, ids.max() + 1):
            here = ids == s
            assert batch["positions"][r][here].tolist() == list(range(here.sum()))
            found.append((batch["tokens"][r][here].tolist(), batch["advantages"][r][here].tolist()))
    given = [(s["tokens"].tolist(), s["advantages"].tolist()) for s in sequences]
    assert sorted(found) == sorted(given)
    for key, values in batch.items():
        assert not values[batch["segment_ids"] == 0].any(), key


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="sequence 1 has length 9"):
        packing.pack([3, 9], 8)
    with pytest.raises(ValueError, match="sequence 0 has length 0"):
        packing.pack([0], 8)
    with pytest.raises(ValueError, match="empty"):
        packing.pack_sequences([], 8)
    ones = {"tokens": np.ones(8, np.int32)}
    with pytest.raises(ValueError, match="need 2 rows of 8, only 1"):
        packing.pack_sequences([ones, ones], 8, rows=1)
    with pytest.raises(ValueError, match="'tokens' and 'logprobs'"):
        packing.pack_sequences([ones | {"logprobs": np.ones(7)}], 8)


def test_it_keeps_up_with_sampling():
    """More than a million tokens per second, for short sequences with six entries per token."""
    rng = np.random.default_rng(0)
    sequences = [
        {f"k{i}": np.ones(n, np.float32) for i in range(6)} for n in rng.integers(10, 30, 4096)
    ]
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        batch = packing.pack_sequences(sequences, 128)
        best = max(best, batch["k0"].sum() / (time.perf_counter() - start))
    assert best > 1e6
