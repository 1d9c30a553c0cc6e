"""From tokens to their experts' rows and back, whatever computes the experts.

Backward needs no scatter: the gradient of a gather by a permutation is the gather by its inverse,
and those of the weights are grouped matmuls. It keeps what gate and up gave, a row for each pair.
"""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.manual_axes import same_axes
from pallas_kernels.moe_dispatch import routing


class Experts(Protocol):
    """Grouped SwiGLU over rows that are sorted by expert. Hashable.

    multiple: an expert's rows begin at multiples of it. Shape suffixes as in `routing`.
    """

    multiple: int

    def forward(self, x_ND, gate_EDF, up_EDF, down_EFD, tokens_R, counts_E, *, keep):
        """out_RD and, if `keep`, (gate_RF, up_RF), else (). Rows that hold no pair: anything."""

    def backward(
        self,
        x_ND,
        gate_EDF,
        up_EDF,
        down_EFD,
        weights_R,
        gate_RF,
        up_RF,
        d_y_ND,
        tokens_R,
        counts_E,
    ):
        """d_x_RD, d_weight_R, d_gate_EDF, d_up_EDF, d_down_EFD; equations in `_backward`."""


def moe_mlp(
    x_ND, gate_EDF, up_EDF, down_EFD, experts_NK, weights_NK, capacity, experts: Experts
):  # fmt: skip
    # Under shard_map all operands vary over the same axes from here on: loops want carries of one
    # type, and the gradient of a weight that does not vary is then summed by the cast's transpose.
    x_ND, gate_EDF, up_EDF, down_EFD, experts_NK, weights_NK = same_axes(
        x_ND, gate_EDF, up_EDF, down_EFD, experts_NK, weights_NK.astype(jnp.float32)
    )
    grouping = routing.group(experts_NK, gate_EDF.shape[0], capacity, experts.multiple)
    y_ND = _moe_mlp(x_ND, gate_EDF, up_EDF, down_EFD, weights_NK, grouping, experts)
    return y_ND, grouping.kept_NK


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _moe_mlp(x_ND, gate_EDF, up_EDF, down_EFD, weights_NK, grouping, experts):
    return _forward(x_ND, gate_EDF, up_EDF, down_EFD, weights_NK, grouping, experts, False)[0]


def _forward(x_ND, gate_EDF, up_EDF, down_EFD, weights_NK, grouping, experts, keep=True):
    out_RD, kept = _one_at_a_time(functools.partial(experts.forward, keep=keep))(
        x_ND, gate_EDF, up_EDF, down_EFD, grouping.tokens_R, grouping.counts_E
    )
    out_NKD = out_RD.at[grouping.rows_NK].get(mode="fill", fill_value=0)  # 0 where dropped
    y_ND = jnp.sum(weights_NK[:, :, None] * out_NKD, axis=1).astype(x_ND.dtype)
    return y_ND, (x_ND, gate_EDF, up_EDF, down_EFD, weights_NK, grouping, kept)


def _backward(experts, residuals, d_y_ND):
    """With g, u what gate and up gave, a = silu(g) u, and t = d_y down^T of a pair of weight w:

    d_w = t . a;  d_a = w t;  d_g = d_a u silu'(g);  d_u = d_a silu(g);
    d_x = sum_k d_g gate^T + d_u up^T;  d_gate = x^T d_g;  d_up = x^T d_u;  d_down = (w a)^T d_y.
    """
    x_ND, gate_EDF, up_EDF, down_EFD, weights_NK, grouping, kept = residuals
    weights_R = weights_NK.T.reshape(-1).at[grouping.pairs_R].get(mode="fill", fill_value=0)
    d_x_RD, d_weight_R, d_gate_EDF, d_up_EDF, d_down_EFD = _one_at_a_time(experts.backward)(
        x_ND, gate_EDF, up_EDF, down_EFD, weights_R, *kept, d_y_ND, grouping.tokens_R, grouping.counts_E
    )  # fmt: skip
    d_x_NKD = d_x_RD.at[grouping.rows_NK].get(mode="fill", fill_value=0)
    d_x_ND = jnp.sum(d_x_NKD, axis=1, dtype=jnp.float32).astype(x_ND.dtype)
    d_weights_NK = d_weight_R.at[grouping.rows_NK].get(mode="fill", fill_value=0)
    return d_x_ND, d_gate_EDF, d_up_EDF, d_down_EFD, d_weights_NK, None


_moe_mlp.defvjp(_forward, _backward)


def _one_at_a_time(function):
    """Under vmap, one call for each element of the batch.

    Grouped matmuls have no rule for it, and loops would all run as long as the longest.
    """

    @jax.custom_batching.sequential_vmap
    def call(*operands):
        return function(*operands)

    return call
