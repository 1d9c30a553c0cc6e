"""Batches that grow in the course of a run, without a second program.

A ramp is a tuple of (tokens, rows): from so many tokens seen on, the global batch has so many rows.
Tokens count rows * seq_len, padding included, so that a step's rows follow from its number alone and
a resumed run needs no memory of them.
"""

import math

import numpy as np

Ramp = tuple[tuple[int, int], ...]


def check(ramp: Ramp, batch_size: int) -> None:
    """Raises ValueError for a ramp that is none, or does not end in batches of `batch_size` rows."""
    if not ramp:
        return
    tokens, rows = zip(*ramp, strict=True)
    if tokens[0] != 0 or any(b <= a for a, b in zip(tokens, tokens[1:], strict=False)):
        raise ValueError(f"batch_ramp {ramp} must begin at 0 tokens and go on at increasing numbers")
    if min(rows) < 1 or max(rows) != batch_size:
        raise ValueError(
            f"batch_ramp {ramp} must have rows from 1 up to data.batch_size={batch_size}, which is "
            "the largest batch"
        )


class Schedule:
    """The ramp in steps, for rows of `seq_len` tokens; without a ramp, constant batches."""

    def __init__(self, ramp: Ramp, batch_size: int, seq_len: int):
        check(ramp, batch_size)
        self._seq_len = seq_len
        phases = [(0, 0, ramp[0][1] if ramp else batch_size)]  # (first step, tokens before it, rows)
        for tokens, rows in ramp[1:]:
            step, seen, before = phases[-1]
            steps = max(0, -(-(tokens - seen) // (before * seq_len)))
            phases.append((step + steps, seen + steps * before * seq_len, rows))
        self._phases = phases

    @property
    def unit(self) -> int:
        """Rows of which every batch is a multiple."""
        return math.gcd(*(rows for _, _, rows in self._phases))

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes in rows, in their order."""
        return tuple(rows for _, _, rows in self._phases)

    def rows(self, step: int) -> int:
        """Rows of the global batch of step 0, 1, …"""
        return self._phase(step)[2]

    def tokens(self, step: int) -> int:
        """Tokens seen before a step."""
        first, seen, rows = self._phase(step)
        return seen + (step - first) * rows * self._seq_len

    def steps(self, tokens: int) -> int:
        """The first step before which at least so many tokens are seen."""
        first, seen, rows = [p for p in self._phases if p[1] < max(tokens, 1)][-1]
        return first + max(0, -(-(tokens - seen) // (rows * self._seq_len)))

    def _phase(self, step: int) -> tuple[int, int, int]:
        return [phase for phase in self._phases if phase[0] <= step][-1]


def lay_out(
    batch: dict[str, np.ndarray], shards: int, rows: int, micro_rows: int
) -> dict[str, np.ndarray]:
    """A batch padded to `rows`, each of `shards` equal parts for itself, with 'num_micro'.

    Every part begins with its share of the batch, in micro-batches of `micro_rows`, of which
    'num_micro' int32 [shards] are to be computed (see `core.step.data_parallel`).
    """

    def pad(x: np.ndarray) -> np.ndarray:
        x = x.reshape(shards, -1, *x.shape[1:])
        missing = rows // shards - x.shape[1]
        x = np.pad(x, [(0, 0), (0, missing), *((0, 0) for _ in x.shape[2:])])
        return x.reshape(rows, *x.shape[2:])

    (held,) = {len(x) for x in batch.values()}
    laid = {name: pad(x) for name, x in batch.items()}
    num_micro = np.full(shards, held // shards // micro_rows, np.int32)
    return laid | {"num_micro": num_micro}
