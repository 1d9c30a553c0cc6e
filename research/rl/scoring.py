"""Numbers for every token of packed rows, from a model: log-probabilities, values."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from research.core import sharding

SCORED = ("tokens", "segment_ids", "positions", "num_micro")  # what scoring reads of a minibatch


def scorer(
    function: Callable[[Any, dict[str, jax.Array]], jax.Array], mesh: Mesh, micro_rows: int
) -> Callable[[Any, dict[str, jax.Array]], jax.Array]:
    """`score(params, minibatch) -> [rows, T]` float32, over the micro-batches that hold anything.

    `function(params, rows)` does so for a few rows with 'tokens', 'segment_ids' and 'positions'.
    """

    def score(params, batch):
        num_micro, batch = batch["num_micro"], {k: v for k, v in batch.items() if k != "num_micro"}
        rows, length = batch["tokens"].shape

        def one(i, out):
            part = {
                k: lax.dynamic_slice_in_dim(v, i * micro_rows, micro_rows) for k, v in batch.items()
            }
            return lax.dynamic_update_slice_in_dim(
                out, function(params, part), i * micro_rows, axis=0
            )

        start = lax.pcast(jnp.zeros((rows, length), jnp.float32), "data", to="varying")
        return lax.fori_loop(0, num_micro[0], one, start)

    split, whole = PartitionSpec("data"), PartitionSpec()
    program = jax.jit(jax.shard_map(score, mesh=mesh, in_specs=(whole, split), out_specs=split))

    def place_and_score(params, batch):
        inputs = {name: batch[name] for name in SCORED}
        return program(sharding.place(params, sharding.replicated(mesh)), inputs)

    return place_and_score
