"""One token from logits: the settings of sampling, and the draw itself.

A draw is the inverse of the cumulative distribution at one uniform number, so a token depends on its
own row's logits and number alone, whatever is batched beside it.
"""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 128  # tokens whose cumulative sum is one small matmul


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when a sequence ends.

    temperature 0 is greedy. Of the tokens that are not suppressed, `top_k` keeps the k likeliest,
    `top_p` the likeliest of these up to that share of their probability, `min_p` those at least
    that fraction as likely as the first; ties at a border are kept. Defaults keep all.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] = ()
    suppress_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or positive, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1], got {self.min_p}")


class Policy(flax.struct.PyTreeNode):
    """`Sampling` on the device: numbers may change from call to call without a recompilation."""

    numbers: jax.Array  # float32: temperature, top_p, min_p
    counts: jax.Array  # int32: top_k, tokens after which a sequence is cut
    masks_2V: jax.Array  # bool: ids that stop, ids that are suppressed
    greedy: bool = flax.struct.field(pytree_node=False)
    sorts: bool = flax.struct.field(pytree_node=False)  # top-k or top-p: needs the logits sorted
    truncates: bool = flax.struct.field(pytree_node=False)  # some tokens may be excluded

    temperature = property(lambda self: self.numbers[0])
    top_p = property(lambda self: self.numbers[1])
    min_p = property(lambda self: self.numbers[2])
    top_k = property(lambda self: self.counts[0])
    limit = property(lambda self: self.counts[1])
    stops_V = property(lambda self: self.masks_2V[0])
    suppressed_V = property(lambda self: self.masks_2V[1])

    @classmethod
    def of(cls, sampling: Sampling, vocab_size: int) -> "Policy":
        """Raises ValueError if an id is outside the vocabulary or no token is left."""
        masks_2V = np.zeros((2, vocab_size), bool)
        for mask_V, name in zip(masks_2V, ("stop_ids", "suppress_ids"), strict=True):
            ids = list(getattr(sampling, name))
            if not all(0 <= i < vocab_size for i in ids):
                raise ValueError(f"{name} {ids} must lie in the vocabulary [0, {vocab_size})")
            mask_V[ids] = True
        suppresses = bool(masks_2V[1].any())
        if suppresses and masks_2V[1].all():
            raise ValueError("suppress_ids leaves no token of the vocabulary")
        top_k = min(sampling.top_k or vocab_size, vocab_size)
        sorts = top_k < vocab_size or sampling.top_p < 1
        return cls(
            numbers=np.asarray([sampling.temperature, sampling.top_p, sampling.min_p], np.float32),
            counts=np.asarray([top_k, sampling.max_new_tokens], np.int32),
            masks_2V=masks_2V,
            greedy=sampling.temperature == 0,
            sorts=sorts,
            truncates=sorts or sampling.min_p > 0 or suppresses,
        )


def draw(logits_BV, uniform_B, policy: Policy) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One token per row.

    Args:
      logits_BV: float32 logits, before temperature.
      uniform_B: float32 in [0, 1); unused when greedy.

    Returns:
      (token_B int32, logprob_B, truncated_logprob_B): log-probabilities of the token under
      softmax(logits / temperature) over the whole vocabulary, and over what the policy kept.
      Greedy reports the first at temperature 1, and 0 for the second.
    """
    if policy.greedy:
        kept_BV = jnp.where(policy.suppressed_V, -jnp.inf, logits_BV)
        token_B = jnp.argmax(kept_BV, axis=1).astype(jnp.int32)
        logprob_B = _at(logits_BV, token_B) - jax.nn.logsumexp(logits_BV, axis=1)
        return token_B, logprob_B, jnp.zeros_like(logprob_B)
    scaled_BV = logits_BV / policy.temperature
    shifted_BV = scaled_BV - jnp.max(scaled_BV, axis=1, keepdims=True)
    weights_BV = jnp.exp(shifted_BV)
    total_B = jnp.sum(weights_BV, axis=1)
    if not policy.truncates:
        token_B = invert_cdf(weights_BV, uniform_B * total_B)[0]
        logprob_B = _at(shifted_BV, token_B) - jnp.log(total_B)
        return token_B, logprob_B, logprob_B
    kept_BV = jnp.where(keep(shifted_BV, policy), weights_BV, 0.0)
    kept_B = jnp.sum(kept_BV, axis=1)
    token_B = invert_cdf(kept_BV, uniform_B * kept_B)[0]
    shifted_B = _at(shifted_BV, token_B)
    return token_B, shifted_B - jnp.log(total_B), shifted_B - jnp.log(kept_B)


def keep(logits_BV, policy: Policy) -> jax.Array:
    """Which tokens the policy leaves, bool `[B, V]`; logits are after temperature."""
    logits_BV = jnp.where(policy.suppressed_V, -jnp.inf, logits_BV)
    top_B1 = jnp.max(logits_BV, axis=1, keepdims=True)
    least_B1 = jnp.maximum(top_B1 + jnp.log(policy.min_p), jnp.finfo(jnp.float32).min)
    if policy.sorts:
        sorted_BV = -jnp.sort(-logits_BV, axis=1)
        weights_BV = jnp.exp(sorted_BV - top_B1)
        weights_BV = jnp.where(jnp.arange(logits_BV.shape[1]) < policy.top_k, weights_BV, 0.0)
        before_BV = jnp.cumsum(weights_BV, axis=1) - weights_BV
        total_B1 = jnp.sum(weights_BV, axis=1, keepdims=True)
        inside_BV = (weights_BV > 0) & (before_BV < policy.top_p * total_B1)
        last_B1 = jnp.min(jnp.where(inside_BV, sorted_BV, jnp.inf), axis=1, keepdims=True)
        least_B1 = jnp.maximum(least_B1, last_B1)
    return logits_BV >= least_B1


def invert_cdf(weights_BV, target_B) -> tuple[jax.Array, jax.Array]:
    """First index whose cumulative weight passes `target_B` (in [0, total)), never one of weight 0.

    Also returns what is left of the target before that index. Vocabularies of many blocks are
    searched block by block: first for the block, then within it.
    """
    B, V = weights_BV.shape
    if V > 2 * BLOCK:
        blocks = jnp.pad(weights_BV, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
        block_B, target_B = invert_cdf(jnp.sum(blocks, axis=2), target_B)
        inside = jnp.take_along_axis(blocks, block_B[:, None, None], axis=1)[:, 0]
        index_B, target_B = invert_cdf(inside, target_B)
        return block_B * BLOCK + index_B, target_B
    cumulative_BV = jnp.matmul(
        weights_BV, jnp.triu(jnp.ones((V, V), jnp.float32)), precision=jax.lax.Precision.HIGHEST
    )
    index_V = jnp.arange(V, dtype=jnp.int32)
    positive_BV = weights_BV > 0
    passes_BV = positive_BV & (cumulative_BV > target_B[:, None])
    last_B = jnp.max(jnp.where(positive_BV, index_V, 0), axis=1)  # if rounding lets none pass
    index_B = jnp.minimum(jnp.min(jnp.where(passes_BV, index_V, V), axis=1), last_B)
    before_BV = jnp.where(index_V < index_B[:, None], cumulative_BV, 0.0)
    return index_B, target_B - jnp.max(before_BV, axis=1)


def uniform(key_B2, count_B) -> jax.Array:
    """One number in [0, 1) per row, float32 `[B]`: threefry-2x32 of its raw key and token index.

    The bits are those of `jax.random.fold_in(key, count)`, but JAX's own rounds are a loop on CPUs,
    slower than a small model's layer; these are one fused expression. (Salmon et al. 2011)
    """
    k = (key_B2[:, 0], key_B2[:, 1])
    keys = (*k, k[0] ^ k[1] ^ np.uint32(0x1BD11BDA))
    x, y = k[0], k[1] + count_B.astype(jnp.uint32)
    for group in range(5):
        for r in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = ((y << r) | (y >> (32 - r))) ^ x
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + np.uint32(group + 1)
    return (x >> 8).astype(jnp.float32) * 2.0**-24


def _at(x_BV, index_B):
    return jnp.take_along_axis(x_BV, index_B[:, None], axis=1)[:, 0]
