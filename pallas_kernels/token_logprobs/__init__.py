"""Log-probability, entropy and log-normaliser from hidden states, without the [N, V] logits.

z = hidden @ head / temperature;  lse = logsumexp(z);  logprob = z[label] - lse;
entropy = -sum p log p,  p = exp(z - lse).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import choose
from pallas_kernels.manual_axes import same_axes
from pallas_kernels.token_logprobs import pallas, reference, xla
from pallas_kernels.token_logprobs.vocabulary import Scores

__all__ = ["IMPLEMENTATIONS", "Scores", "token_logprobs"]

IMPLEMENTATIONS = {
    "reference": reference.token_logprobs,
    "xla": xla.token_logprobs,
    "pallas": pallas.token_logprobs,
}


def token_logprobs(
    hidden_ND: jax.Array,
    head_DV: jax.Array,
    labels_N: jax.Array,
    *,
    temperature: float = 1.0,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> Scores:
    """Scores `labels` under softmax(hidden @ head / temperature).

    Args:
      hidden_ND: `[N, D]`, any float type; the product accumulates in float32. N may be 0.
      head_DV: `[D, V]`; with `axis_name` this device's V columns of a vocabulary of V times the axis.
      labels_N: int `[N]`, each in the whole vocabulary.
      temperature: a positive Python float.
      axis_name: the axis of `jax.shard_map` over which the vocabulary lies, in order. Hidden states
        and labels are then the same on its devices, and so are the scores and their cotangents.
      implementation: 'reference', 'xla', 'pallas', or None for the fastest.

    Returns:
      `Scores` (logprob, entropy, lse), float32 `[N]` in nats. All have gradients with respect to
      hidden (of the whole vocabulary, on every device) and head (of this device's columns).

    Raises:
      ValueError: shapes that do not fit, temperature that is not positive, unknown implementation, or
        one that cannot do this, with the reason.
    """
    if hidden_ND.ndim != 2 or head_DV.ndim != 2 or hidden_ND.shape[1] != head_DV.shape[0]:
        raise ValueError(
            f"need hidden [N, D] and head [D, V], got {hidden_ND.shape} and {head_DV.shape}"
        )
    if labels_N.shape != hidden_ND.shape[:1]:
        raise ValueError(
            f"need one label per row of hidden {hidden_ND.shape}, got {labels_N.shape}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    implementation = choose(
        "token_logprobs",
        implementation,
        IMPLEMENTATIONS,
        lambda target: pallas.refusal(target, hidden_ND, head_DV),
    )
    if not len(labels_N):
        return Scores(*(jnp.sum(hidden_ND, axis=1, dtype=jnp.float32) for _ in Scores._fields))
    hidden_ND, head_DV, labels_N = same_axes(hidden_ND, head_DV, labels_N, but=axis_name)
    return IMPLEMENTATIONS[implementation](hidden_ND, head_DV, labels_N, temperature, axis_name)
