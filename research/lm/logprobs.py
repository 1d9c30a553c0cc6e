"""Scores tokens under a decoder: what likelihoods, policy ratios and KL penalties are made of."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import token_logprobs as op
from research.lm.decoder import Decoder, head_kernel
from research.lm.moe import RouterStats


class Scores(NamedTuple):
    """float32 in nats: at t, log p(tokens[t] | before) and the entropy of that distribution.

    Both are 0 at the first token of each segment and at padding (segment 0).
    """

    logprobs_BT: jax.Array
    entropy_BT: jax.Array
    router: RouterStats | None  # of all layers, with a leading [L]; None without experts


def token_logprobs(
    model: Decoder,
    params,
    tokens_BT: jax.Array,
    positions=None,
    segment_ids=None,
    temperature: float = 1.0,
    jitter_key: jax.Array | None = None,
) -> Scores:
    """Log-probability of every token given those before it in its segment.

    Args:
      tokens_BT: int `[B, T]`; `positions` and `segment_ids` as for the decoder.
      temperature: divides the logits, as when the tokens were sampled.
      jitter_key: of the router's jitter (`moe.jitter`); None: none.
    """
    B, T = tokens_BT.shape
    hidden_BTD, collected = model.apply(
        {"params": params},
        tokens_BT,
        positions,
        segment_ids,
        return_hidden=True,
        mutable=["router"],
        rngs=None if jitter_key is None else {"router": jitter_key},
    )
    next_BT = jnp.roll(tokens_BT, -1, axis=1)  # a whole row is scored: its last entry is dropped
    scores = op.token_logprobs(
        hidden_BTD.reshape(B * T, -1),
        head_kernel(params, model.config).astype(hidden_BTD.dtype),
        next_BT.reshape(-1),
        temperature=temperature,
        implementation=model.config.implementation,
    )
    follows_BT = jnp.broadcast_to(jnp.arange(T) > 0, (B, T))
    if segment_ids is not None:
        same = segment_ids[:, 1:] == segment_ids[:, :-1]
        follows_BT &= jnp.pad(same, ((0, 0), (1, 0))) & (segment_ids > 0)
    logprobs_BT, entropy_BT = (
        jnp.where(follows_BT, jnp.roll(x.reshape(B, T), 1, axis=1), 0.0)
        for x in (scores.logprob, scores.entropy)
    )
    stats = collected["router"]["stats"][0] if model.config.moe else None
    return Scores(logprobs_BT, entropy_BT, stats)
