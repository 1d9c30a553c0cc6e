"""The plain definition: all logits at once, gradients by autodiff."""

import jax
import jax.numpy as jnp


def token_logprobs(hidden_ND, head_DV, labels_N, temperature):
    logits_NV = jnp.matmul(hidden_ND, head_DV, preferred_element_type=jnp.float32) / temperature
    logprobs_NV = jax.nn.log_softmax(logits_NV)
    entropy_N = -jnp.sum(jnp.exp(logprobs_NV) * logprobs_NV, axis=1)
    return jnp.take_along_axis(logprobs_NV, labels_N[:, None], axis=1)[:, 0], entropy_N
