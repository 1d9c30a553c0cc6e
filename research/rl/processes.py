"""What the processes of one run tell each other, and what of a global array is a process's own."""

import pickle
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """The picklable `value` of every process, in their order, on all of them."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data))).ravel()
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)  # few shapes to compile for
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def local(tree: Any) -> Any:
    """Arrays that every process holds whole, as arrays of this process alone."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: x.addressable_data(0), tree)


def local_rows(x: jax.Array) -> np.ndarray:
    """The rows of an array split by rows that this process holds, in their order, on the host."""
    pieces = sorted(x.addressable_shards, key=lambda piece: piece.index[0].start or 0)
    return np.concatenate([np.asarray(piece.data) for piece in pieces])
