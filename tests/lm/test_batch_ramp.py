"""Batches that grow: what step has how many rows, and how these are laid out over devices."""

import numpy as np
import pytest

from research.lm import batch_ramp
from research.lm.batch_ramp import Schedule

RAMP = ((0, 4), (100, 8), (101, 6), (500, 16))


@pytest.mark.parametrize(
    "ramp", [(), ((0, 16),), RAMP, ((0, 2), (1, 16))], ids=["none", "constant", "ramp", "at once"]
)
def test_steps_and_tokens_are_those_of_a_count(ramp):
    """Against counting step by step."""
    schedule = Schedule(ramp, batch_size=16, seq_len=5)
    seen, history = 0, []
    for step in range(30):
        rows = [rows for tokens, rows in ramp or ((0, 16),) if tokens <= seen][-1]
        assert (schedule.rows(step), schedule.tokens(step)) == (rows, seen)
        history.append(seen)
        seen += rows * 5
    for tokens in range(history[-1]):
        assert schedule.steps(tokens) == next(i for i, seen in enumerate(history) if seen >= tokens)
    assert schedule.unit == {(): 16, ((0, 16),): 16, RAMP: 2, ((0, 2), (1, 16)): 2}[ramp]


def test_every_device_begins_with_its_share():
    rows = {"tokens": np.arange(1, 9)[:, None] * np.ones(3, int), "noise": np.arange(1, 9)}
    laid = batch_ramp.lay_out(rows, shards=2, rows=16, micro_rows=2)
    assert laid["num_micro"].tolist() == [2, 2] and laid["num_micro"].dtype == np.int32
    assert laid["noise"].tolist() == [1, 2, 3, 4, 0, 0, 0, 0, 5, 6, 7, 8, 0, 0, 0, 0]
    assert laid["tokens"].shape == (16, 3) and (laid["tokens"][:, 1] == laid["noise"]).all()


@pytest.mark.parametrize(
    "ramp, message",
    [
        (((5, 8), (10, 16)), "begin at 0"),
        (((0, 8), (10, 16), (10, 16)), "increasing"),
        (((0, 0), (10, 16)), "from 1"),
        (((0, 8), (10, 12)), "batch_size=16"),
    ],
)
def test_what_is_no_ramp_is_refused(ramp, message):
    with pytest.raises(ValueError, match=message):
        Schedule(ramp, batch_size=16, seq_len=5)
