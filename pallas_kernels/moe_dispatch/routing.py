"""Which experts a token goes to, which pairs an expert's capacity leaves out, and where each lies.

Shape suffixes: N tokens, K choices of a token, E experts, P = N K pairs of a token and a choice,
R rows that hold pairs, G groups of devices that hold all experts together. A pair's number is
k N + n: in that order all first choices come before all second ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Routing(NamedTuple):
    """A token's experts, best first, and their weights.

    experts_NK int32; weights_NK float32, summing to 1; probs_NE float32, softmax over all experts.
    """

    experts_NK: jax.Array
    weights_NK: jax.Array
    probs_NE: jax.Array


def route(logits_NE: jax.Array, top_k: int) -> Routing:
    """The `top_k` experts of each token and the softmax over their logits (MiniMax-01, eq. 1).

    That softmax equals the full one renormalised over the chosen experts. All is float32; of equal
    logits the lower expert is chosen. Weights and probabilities have gradients with respect to the
    logits, the choice has none.

    Raises:
      ValueError: `top_k` is not in [1, E].
    """
    if logits_NE.ndim != 2 or not 1 <= top_k <= logits_NE.shape[1]:
        raise ValueError(f"need logits [N, E] and 1 <= top_k <= E, got {logits_NE.shape}, {top_k}")
    logits_NE = logits_NE.astype(jnp.float32)
    _, experts_NK = jax.lax.top_k(jax.lax.stop_gradient(logits_NE), top_k)
    # A masked sum and not a gather, whose gradient would be a scatter.
    experts_E = jnp.arange(logits_NE.shape[1], dtype=jnp.int32)
    chosen_NKE = experts_NK[:, :, None] == experts_E
    logits_NK = jnp.sum(jnp.where(chosen_NKE, logits_NE[:, None, :], 0.0), axis=2)
    return Routing(experts_NK, jax.nn.softmax(logits_NK), jax.nn.softmax(logits_NE))


class Grouping(NamedTuple):
    """Where the kept pairs lie when sorted by expert: in rows R, group after group.

    A group starts at a multiple of some number of rows; what is left over between groups and after
    the last one holds no pair.

    pairs_R int32: the pair in each row, P where there is none. rows_NK int32: the row of each
    pair, at least R where it is dropped. counts_E int32: kept pairs of an expert.
    """

    pairs_R: jax.Array
    rows_NK: jax.Array
    counts_E: jax.Array

    @property
    def tokens_R(self) -> jax.Array:
        """int32: the token of each row's pair, N where there is none."""
        num_tokens = len(self.rows_NK)
        empty_R = self.pairs_R == self.rows_NK.size
        return jnp.where(empty_R, num_tokens, self.pairs_R % num_tokens)

    @property
    def kept_NK(self) -> jax.Array:
        """bool: whether the pair is at an expert at all."""
        return self.rows_NK < self.pairs_R.size


def group(
    experts_NK: jax.Array, num_experts: int, capacity: int | None = None, multiple: int = 1
) -> Grouping:
    """Sorts pairs by expert, of which each takes its first `capacity` pairs (None: all).

    First choices go before second ones and tokens in their order (Lepikhin et al. 2021). A pair
    with expert `num_experts` goes nowhere. Groups start at multiples of `multiple` rows.
    Deterministic: no two sort keys are equal.
    """
    num_tokens, top_k = experts_NK.shape
    size = num_tokens * top_k
    if (num_experts + 1) * size >= 2**31:
        raise ValueError(f"{size} pairs and {num_experts} experts overflow the int32 sort keys")
    num_rows = round_up(size + min(num_experts, size) * (multiple - 1), multiple)
    sorted_P = jnp.arange(size, dtype=jnp.int32)
    keys_P = jnp.sort(experts_NK.T.reshape(size).astype(jnp.int32) * size + sorted_P)
    experts_P, pairs_P = keys_P // size, keys_P % size
    # The sorted order is the order of priority: an expert keeps the first part of its pairs.
    bounds_E = jnp.arange(num_experts + 1, dtype=jnp.int32)
    starts_E = jnp.sum(experts_P[:, None] < bounds_E, axis=0, dtype=jnp.int32)
    counts_E = jnp.diff(starts_E)
    if capacity is not None:
        counts_E = jnp.minimum(counts_E, capacity)
    firsts_E = group_starts(counts_E, multiple)
    # The group of those that go nowhere is as empty as what exceeds a capacity.
    rank_P = sorted_P - starts_E[experts_P]
    kept_P = rank_P < jnp.append(counts_E, 0)[experts_P]
    rows_P = jnp.where(kept_P, jnp.append(firsts_E, 0)[experts_P] + rank_P, num_rows + sorted_P)
    pairs_R = jnp.full((num_rows,), size, jnp.int32)
    pairs_R = pairs_R.at[rows_P].set(pairs_P, mode="drop", unique_indices=True)
    rows_P = jnp.zeros_like(rows_P).at[pairs_P].set(rows_P, unique_indices=True)
    return Grouping(pairs_R, rows_P.reshape(top_k, num_tokens).T, counts_E)


def group_starts(counts_E: jax.Array, multiple: int) -> jax.Array:
    """The first row of each group, int32 [E]."""
    extents_E = round_up(counts_E, multiple)
    return jnp.cumsum(extents_E) - extents_E


def round_up(x, multiple: int):
    return -(-x // multiple) * multiple


def global_keep(counts_GE: jax.Array, capacity: int) -> jax.Array:
    """How many of its own pairs each group keeps when capacity is shared, int32 [G, E].

    The global router of MiniMax-01, section 2.1: the groups' counts are gathered before dispatch,
    and an expert's pairs are ranked over all groups, group by group. A pair is kept if its rank
    is below G * capacity, wherever its group's own share ends. So only
    sum_e max(0, sum_g counts - G capacity) pairs are dropped, never more than the
    sum_ge max(0, counts - capacity) of groups that keep to themselves.

    `global_slot` says where a kept pair is served.
    """
    total = counts_GE.shape[0] * capacity
    return jnp.clip(total - global_offsets(counts_GE), 0, counts_GE)


def global_offsets(counts_GE: jax.Array) -> jax.Array:
    """The global rank of each group's first pair of an expert, int32 [G, E]."""
    return jnp.cumsum(counts_GE, axis=0, dtype=jnp.int32) - counts_GE


def global_slot(rank: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array]:
    """The replica (0 .. G-1) and the slot (0 .. capacity-1) that serve a pair of that global rank.

    Ranks below G * capacity fill each slot of each replica at most once.
    """
    return rank // capacity, rank % capacity
