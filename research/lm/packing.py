"""Packs sequences of any length into rows of one length, on the host, with few padded tokens.

For batches that are whole before training starts (rollouts). Streams of examples are packed by
`research.core.data`. Packed sequences are told apart by `segment_ids` (1, 2, … in each row, 0 for
padding) and have `positions` counted from 0, so a decoder treats each one as if it were alone.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Assignment(NamedTuple):
    """Where each of N sequences lies: int64 [N] `row` and `offset` in the row, and rows used."""

    row: np.ndarray
    offset: np.ndarray
    num_rows: int


def pack(lengths: Sequence[int] | np.ndarray, row_length: int) -> Assignment:
    """Best-fit decreasing: longest first, each into the fullest row that still has room.

    It uses at most 11/9 · OPT + 4 rows (Johnson et al. 1974, "Worst-case performance bounds for
    simple one-dimensional packing algorithms"), mostly OPT or OPT + 1. Deterministic: ties go in
    input order.

    Args:
      lengths: ints [N], each between 1 and `row_length`.

    Raises ValueError for a length outside of that, naming the sequence.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.ndim != 1:
        raise ValueError(f"lengths must be one-dimensional, got shape {lengths.shape}")
    wrong = np.flatnonzero((lengths < 1) | (lengths > row_length))
    if wrong.size:
        raise ValueError(
            f"sequence {wrong[0]} has length {lengths[wrong[0]]}; rows of {row_length} tokens take "
            "lengths from 1 to that: truncate it or leave it out"
        )
    order = np.argsort(-lengths, kind="stable")
    rows = [0] * len(lengths)
    offsets = [0] * len(lengths)
    open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]  # by tokens left
    sizes = 0  # bit n is set while open_rows[n] has rows: finds the best fit without a search
    num_rows = 0
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = sizes >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[left].pop()
            if not open_rows[left]:
                sizes ^= 1 << left
        else:
            left, row = row_length, num_rows
            num_rows += 1
        rows[index], offsets[index] = row, row_length - left
        left -= length
        if left:
            open_rows[left].append(row)
            sizes |= 1 << left
    return Assignment(np.asarray(rows, np.int64), np.asarray(offsets, np.int64), num_rows)


def pack_sequences(
    sequences: Sequence[Mapping[str, np.ndarray]],
    row_length: int,
    rows: int | None = None,
    *,
    assignment: Assignment | None = None,
) -> dict[str, np.ndarray]:
    """Rows [rows, row_length] of every key of `sequences`, plus 'segment_ids' and 'positions'.

    All arrays of a sequence are one-dimensional and of its length; dtypes are kept. Positions
    without a sequence are 0. `rows` pads with empty rows (None: as many as are used);
    `assignment` takes the place of `pack`, e.g. to lay rows out by device.

    Raises ValueError if there is no sequence, if arrays disagree, or if `rows` are not enough.
    """
    if not sequences:
        raise ValueError("nothing to pack: the list of sequences is empty")
    keys = list(sequences[0])
    lengths = np.asarray([len(sequence[keys[0]]) for sequence in sequences], np.int64)
    if assignment is None:
        assignment = pack(lengths, row_length)
    rows = assignment.num_rows if rows is None else rows
    if assignment.num_rows > rows:
        raise ValueError(
            f"{len(sequences)} sequences of {lengths.sum()} tokens need {assignment.num_rows} rows "
            f"of {row_length}, only {rows} are given; allow more rows or longer ones"
        )
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    targets = np.repeat(assignment.row * row_length + assignment.offset, lengths) + positions

    def lay(values: np.ndarray) -> np.ndarray:
        out = np.zeros(rows * row_length, values.dtype)
        out[targets] = values
        return out.reshape(rows, row_length)

    packed = {}
    for key in keys:
        values = np.concatenate([np.asarray(sequence[key]) for sequence in sequences])
        if len(values) != lengths.sum():
            raise ValueError(
                f"the arrays {keys[0]!r} and {key!r} of a sequence differ in length; all arrays of "
                "a sequence hold one entry per token"
            )
        packed[key] = lay(values)
    packed["segment_ids"] = lay(np.repeat(_segments(assignment), lengths).astype(np.int32))
    packed["positions"] = lay(positions.astype(np.int32))
    return packed


def _segments(assignment: Assignment) -> np.ndarray:
    """1, 2, … in the order in which sequences stand in their row."""
    order = np.lexsort((assignment.offset, assignment.row))
    sorted_rows = assignment.row[order]
    first = np.searchsorted(sorted_rows, sorted_rows)  # where each row begins in the order
    segments = np.empty(len(order), np.int64)
    segments[order] = np.arange(len(order)) - first + 1
    return segments
