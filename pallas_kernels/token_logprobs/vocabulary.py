"""Scores, and their gradients, from what each part of a vocabulary gives; one part may be all of it.

With z the logits of a part d, a part gives its lse_d = log sum exp z, the label's logit if the label
is its own, and the entropy H_d of its own softmax. Of the whole vocabulary, w_d = exp(lse_d - lse):

    lse = log sum_d exp lse_d     logprob = z[label] - lse     entropy = sum_d w_d (H_d - log w_d)

and with a, b, c the cotangents of logprob, entropy and lse, p = exp(z - lse),

    d z = a onehot(label) + p (c - a - b (z - lse + entropy))

needs nothing of another part but lse and entropy.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.manual_axes import same_axes


class Scores(NamedTuple):
    """float32 `[N]`, in nats."""

    logprob: jax.Array
    entropy: jax.Array
    lse: jax.Array


class Rows(NamedTuple):
    """What the gradient of a row's logits is made of, float32 `[N]` each:

    d z = label onehot + p (mass - slope (z - lse)),  p = exp(z - lse).
    """

    lse: jax.Array
    label: jax.Array
    mass: jax.Array
    slope: jax.Array


class Part(NamedTuple):
    """An implementation for one part of the vocabulary. A label of another part is -1.

    forward(hidden_ND, head_DV, labels_N, temperature) -> lse_N, label logit (else 0) and entropy_N;
    backward(hidden_ND, head_DV, labels_N, rows, temperature) -> d_hidden_ND, float32 where it is
    kept so, and d_head_DV.
    """

    forward: Callable
    backward: Callable


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4, 5))
def scores(part, hidden_ND, head_DV, labels_N, temperature, axis_name=None):
    """`Scores` by a `Part`, the parts being those of the devices along `axis_name`, in order."""
    return _forward(part, hidden_ND, head_DV, labels_N, temperature, axis_name)[0]


def _forward(part, hidden_ND, head_DV, labels_N, temperature, axis_name):
    own_N = _own(labels_N, head_DV, axis_name)
    operands = same_axes(hidden_ND, head_DV, own_N)
    lse_N, label_N, entropy_N = part.forward(*operands, temperature)
    if axis_name is not None:
        top_N = jax.lax.pmax(lse_N, axis_name)
        whole_N = top_N + jnp.log(jax.lax.psum(jnp.exp(lse_N - top_N), axis_name))
        rest_N = whole_N - lse_N  # -log of the part's share
        entropy_N = jax.lax.psum(jnp.exp(-rest_N) * (entropy_N + rest_N), axis_name)
        lse_N, label_N = whole_N, jax.lax.psum(label_N, axis_name)
    saved = hidden_ND, head_DV, labels_N, lse_N, entropy_N
    return Scores(label_N - lse_N, entropy_N, lse_N), saved


def _backward(part, temperature, axis_name, saved, cotangents):
    hidden_ND, head_DV, labels_N, lse_N, entropy_N = saved
    d_logprob_N, d_entropy_N, d_lse_N = cotangents
    mass_N = d_lse_N - d_logprob_N - d_entropy_N * entropy_N
    hidden, head, own_N, *rows = same_axes(
        hidden_ND, head_DV, _own(labels_N, head_DV, axis_name),
        lse_N, d_logprob_N, mass_N, d_entropy_N,
    )  # fmt: skip
    d_hidden_ND, d_head_DV = part.backward(hidden, head, own_N, Rows(*rows), temperature)
    # Hidden states that are one for the axis get the sum; those typed as each device's own their part.
    if axis_name is not None and axis_name not in _varying(hidden_ND):
        d_hidden_ND = jax.lax.psum(d_hidden_ND, axis_name)
    return d_hidden_ND.astype(hidden_ND.dtype), d_head_DV.astype(head_DV.dtype), None


scores.defvjp(_forward, _backward)


def _own(labels_N, head_DV, axis_name):
    """The labels as columns of this device's part of the head, -1 where they are none."""
    if axis_name is None:
        return labels_N
    V = head_DV.shape[1]
    own_N = labels_N - jax.lax.axis_index(axis_name) * V
    return jnp.where((own_N >= 0) & (own_N < V), own_N, -1)


def _varying(x):
    return jax.typeof(x).manual_axis_type.varying
