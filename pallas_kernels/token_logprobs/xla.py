"""Portable and lean: a scan over chunks of tokens; backward computes each chunk's logits again.

Memory beyond the operands is one [chunk, V] block at a time and a float32 [D, V] gradient.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.token_logprobs.vocabulary import Part, Scores, scores

CHUNK = 1024  # tokens: enough rows to keep a matmul unit busy; 0.6 GB of logits at V = 152k


def token_logprobs(
    hidden_ND, head_DV, labels_N, temperature, axis_name=None, chunk=CHUNK
) -> Scores:
    part = Part(functools.partial(_forward, chunk), functools.partial(_backward, chunk))
    return scores(part, hidden_ND, head_DV, labels_N, temperature, axis_name)


def _forward(chunk, hidden_ND, head_DV, labels_N, temperature):
    def score(_, xs):
        hidden_CD, labels_C = xs
        logits_CV = _logits(hidden_CD, head_DV, temperature)
        top_C1 = jnp.max(logits_CV, axis=1, keepdims=True)
        shifted_CV = logits_CV - top_C1
        exp_CV = jnp.exp(shifted_CV)
        sum_C = jnp.sum(exp_CV, axis=1)
        entropy_C = jnp.log(sum_C) - jnp.sum(exp_CV * shifted_CV, axis=1) / sum_C
        label_C = jnp.take_along_axis(logits_CV, jnp.maximum(labels_C, 0)[:, None], axis=1)[:, 0]
        label_C = jnp.where(labels_C < 0, 0.0, label_C)
        return None, (top_C1[:, 0] + jnp.log(sum_C), label_C, entropy_C)

    chunks = _chunked((hidden_ND, labels_N), chunk)
    _, outputs = jax.lax.scan(score, None, chunks)
    return tuple(x.reshape(-1)[: labels_N.size] for x in outputs)


def _backward(chunk, hidden_ND, head_DV, labels_N, rows, temperature):
    def pull(d_head_DV, xs):
        hidden_CD, labels_C1, lse_C1, d_label_C1, mass_C1, slope_C1 = xs
        logprobs_CV = _logits(hidden_CD, head_DV, temperature) - lse_C1
        is_label = jax.lax.broadcasted_iota(jnp.int32, logprobs_CV.shape, 1) == labels_C1
        d_logits_CV = jnp.exp(logprobs_CV) * (mass_C1 - slope_C1 * logprobs_CV)
        d_logits_CV += jnp.where(is_label, d_label_C1, 0.0)
        d_logits_CV = (d_logits_CV / temperature).astype(hidden_ND.dtype)
        d_head_DV += jnp.matmul(hidden_CD.T, d_logits_CV, preferred_element_type=jnp.float32)
        d_hidden_CD = jnp.matmul(d_logits_CV, head_DV.T, preferred_element_type=jnp.float32)
        return d_head_DV, d_hidden_CD

    columns = (x[:, None] for x in (labels_N, *rows))
    zero_DV = jnp.zeros_like(head_DV, dtype=jnp.float32)
    d_head_DV, d_hidden = jax.lax.scan(pull, zero_DV, _chunked((hidden_ND, *columns), chunk))
    return d_hidden.reshape(-1, hidden_ND.shape[1])[: labels_N.size], d_head_DV


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
