"""Log-probability and entropy of given tokens from hidden states, without the [N, V] logits.

z = hidden @ head / temperature;  logprob = z[label] - logsumexp(z);  entropy = -sum p log p.
"""

import jax

from pallas_kernels.token_logprobs import reference, xla

IMPLEMENTATIONS = {"reference": reference.token_logprobs, "xla": xla.token_logprobs}


def token_logprobs(
    hidden_ND: jax.Array,
    head_DV: jax.Array,
    labels_N: jax.Array,
    *,
    temperature: float = 1.0,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Scores `labels` under softmax(hidden @ head / temperature).

    Args:
      hidden_ND: `[N, D]`, any float type; the product accumulates in float32.
      head_DV: `[D, V]`.
      labels_N: int `[N]`, each in [0, V).
      temperature: a positive Python float.
      implementation: 'reference', 'xla', or None for the fastest.

    Returns:
      float32 log-probabilities `[N]` and entropies `[N]`, in nats. Both have gradients with respect
      to hidden and head.

    Raises:
      ValueError: shapes that do not fit, temperature that is not positive, unknown implementation.
    """
    if hidden_ND.ndim != 2 or head_DV.ndim != 2 or hidden_ND.shape[1] != head_DV.shape[0]:
        raise ValueError(
            f"need hidden [N, D] and head [D, V], got {hidden_ND.shape} and {head_DV.shape}"
        )
    if labels_N.shape != hidden_ND.shape[:1]:
        raise ValueError(f"need one label per row of hidden {hidden_ND.shape}, got {labels_N.shape}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    implementation = implementation or "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} is none of {sorted(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[implementation](hidden_ND, head_DV, labels_N, temperature)
