"""The plain definition: all logits at once, gradients by autodiff."""

import jax
import jax.numpy as jnp

from pallas_kernels.token_logprobs.vocabulary import Scores


def token_logprobs(hidden_ND, head_DV, labels_N, temperature, axis_name=None) -> Scores:
    if axis_name is not None:
        raise ValueError("implementation 'reference' needs the whole vocabulary on each device")
    logits_NV = jnp.matmul(hidden_ND, head_DV, preferred_element_type=jnp.float32) / temperature
    logprobs_NV = jax.nn.log_softmax(logits_NV)
    entropy_N = -jnp.sum(jnp.exp(logprobs_NV) * logprobs_NV, axis=1)
    logprob_N = jnp.take_along_axis(logprobs_NV, labels_N[:, None], axis=1)[:, 0]
    return Scores(logprob_N, entropy_N, jax.nn.logsumexp(logits_NV, axis=1))
