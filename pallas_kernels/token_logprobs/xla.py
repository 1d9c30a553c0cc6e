"""Portable and lean: a scan over chunks of tokens; backward computes each chunk's logits again.

Memory beyond the operands is one [chunk, V] block at a time and a float32 [D, V] gradient.
"""

import functools

import jax
import jax.numpy as jnp

CHUNK = 1024  # tokens: enough rows to keep a matmul unit busy; 0.6 GB of logits at V = 152k


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def token_logprobs(hidden_ND, head_DV, labels_N, temperature, chunk=CHUNK):
    return _forward(hidden_ND, head_DV, labels_N, temperature, chunk)[0]


def _forward(hidden_ND, head_DV, labels_N, temperature, chunk):
    def score(_, xs):
        hidden_CD, labels_C = xs
        logits_CV = _logits(hidden_CD, head_DV, temperature)
        top_C1 = jnp.max(logits_CV, axis=1, keepdims=True)
        shifted_CV = logits_CV - top_C1
        exp_CV = jnp.exp(shifted_CV)
        sum_C = jnp.sum(exp_CV, axis=1)
        entropy_C = jnp.log(sum_C) - jnp.sum(exp_CV * shifted_CV, axis=1) / sum_C
        label_C = jnp.take_along_axis(shifted_CV, labels_C[:, None], axis=1)[:, 0]
        return None, (label_C - jnp.log(sum_C), entropy_C, top_C1[:, 0] + jnp.log(sum_C))

    chunks = _chunked((hidden_ND, labels_N), chunk)
    _, outputs = jax.lax.scan(score, None, chunks)
    logprobs_N, entropy_N, lse_N = (x.reshape(-1)[: labels_N.size] for x in outputs)
    return (logprobs_N, entropy_N), (hidden_ND, head_DV, labels_N, entropy_N, lse_N)


def _backward(temperature, chunk, residuals, cotangents):
    """d logprob/dz = onehot(label) - p;  d entropy/dz = -p (log p + entropy);  z the logits."""
    hidden_ND, head_DV, labels_N, entropy_N, lse_N = residuals

    def pull(d_head_DV, xs):
        hidden_CD, labels_C, entropy_C, lse_C, d_logprob_C, d_entropy_C = xs
        logprobs_CV = _logits(hidden_CD, head_DV, temperature) - lse_C[:, None]
        d_logprob_C1, d_entropy_C1 = d_logprob_C[:, None], d_entropy_C[:, None]
        pulled = d_logprob_C1 + d_entropy_C1 * (logprobs_CV + entropy_C[:, None])
        is_label = jax.lax.broadcasted_iota(jnp.int32, logprobs_CV.shape, 1) == labels_C[:, None]
        d_logits_CV = jnp.where(is_label, d_logprob_C1, 0.0) - jnp.exp(logprobs_CV) * pulled
        d_logits_CV = (d_logits_CV / temperature).astype(hidden_ND.dtype)
        d_head_DV += jnp.matmul(hidden_CD.T, d_logits_CV, preferred_element_type=jnp.float32)
        return d_head_DV, jnp.matmul(d_logits_CV, head_DV.T)

    chunks = _chunked((hidden_ND, labels_N, entropy_N, lse_N, *cotangents), chunk)
    zero_DV = jnp.zeros_like(head_DV, dtype=jnp.float32)
    d_head_DV, d_hidden = jax.lax.scan(pull, zero_DV, chunks)
    d_hidden_ND = d_hidden.reshape(-1, hidden_ND.shape[1])[: labels_N.size]
    return d_hidden_ND.astype(hidden_ND.dtype), d_head_DV.astype(head_DV.dtype), None


token_logprobs.defvjp(_forward, _backward)


def _logits(hidden_CD, head_DV, temperature):
    return jnp.matmul(hidden_CD, head_DV, preferred_element_type=jnp.float32) / temperature


def _chunked(arrays, chunk):
    """Arrays `[N, ...]` as `[chunks, rows, ...]`, padded with zeros."""
    size = arrays[0].shape[0]
    rows = min(chunk, size)
    count = -(-size // rows)

    def split(x):
        x = jnp.pad(x, [(0, count * rows - size)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(count, rows, *x.shape[1:])

    return tuple(split(x) for x in arrays)
