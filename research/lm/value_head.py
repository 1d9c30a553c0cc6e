"""A value of every token: a decoder's hidden states under one linear map to a number."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.lm.decoder import Decoder
from research.lm.moe import RouterStats


def init(params: Any, hidden_size: int) -> dict[str, Any]:
    """A value model on a decoder's own parameters (not copied; its output head is left out): 0 for every token."""
    trunk = {name: part for name, part in params.items() if name != "head"}
    value = {"kernel": np.zeros(hidden_size, np.float32), "bias": np.zeros((), np.float32)}
    return {"decoder": trunk, "value": value}


def token_values(
    model: Decoder, params: Any, tokens_BT: jax.Array, positions=None, segment_ids=None
) -> jax.Array:
    """V of what stands before each token in its segment, [B, T] float32.

    So it lies beside the token's log-probability, and has not seen the token. 0 at the first token of a segment and at
    padding (segment 0).
    """
    values_BT, _ = outputs(model, params, tokens_BT, positions, segment_ids)
    follows_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]) > 0, tokens_BT.shape)
    if segment_ids is not None:
        same = segment_ids[:, 1:] == segment_ids[:, :-1]
        follows_BT &= jnp.pad(same, ((0, 0), (1, 0))) & (segment_ids > 0)
    return jnp.where(follows_BT, jnp.roll(values_BT, 1, axis=1), 0.0)


def outputs(
    model: Decoder, params: Any, tokens_BT: jax.Array, positions=None, segment_ids=None
) -> tuple[jax.Array, RouterStats | None]:
    """The head's number at each token, which it has seen, [B, T] float32 (anything at padding); router statistics."""
    c = model.config
    # The decoder declares its output head even where it is not used; the compiler drops this one.
    unused = {"kernel": jnp.zeros((c.hidden_size, c.vocab_size), c.dtype)}
    hidden_BTD, collected = model.apply(
        {"params": {"head": unused} | params["decoder"]},
        tokens_BT,
        positions,
        segment_ids,
        return_hidden=True,
        mutable=["router"],
    )
    head = params["value"]
    values_BT = hidden_BTD.astype(jnp.float32) @ head["kernel"] + head["bias"]
    return values_BT, collected["router"]["stats"][0] if c.moe else None
