"""Grouped SwiGLU by `jax.lax.ragged_dot`, whose groups are the experts' rows with their padding.

Rows outside all groups are undefined. Shape suffixes as in `routing`.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.moe_dispatch import routing, swiglu


def forward(x_ND, gate_EDF, up_EDF, down_EFD, tokens_R, counts_E, *, multiple, keep):
    """out_RD and, if `keep`, (gate_RF, up_RF), else ()."""
    dtype = x_ND.dtype
    by_expert = functools.partial(_by_expert, sizes_E=routing.round_up(counts_E, multiple))
    x_RD = x_ND.at[tokens_R].get(mode="fill", fill_value=0)
    gate_RF, up_RF = by_expert(x_RD, gate_EDF), by_expert(x_RD, up_EDF)
    out_RD = by_expert(swiglu.hidden(gate_RF, up_RF).astype(dtype), down_EFD).astype(dtype)
    return out_RD, (gate_RF.astype(dtype), up_RF.astype(dtype)) if keep else ()


def backward(
    x_ND, gate_EDF, up_EDF, down_EFD, weights_R, gate_RF, up_RF, d_y_ND, tokens_R, counts_E, *,
    multiple,
):  # fmt: skip
    """d_x_RD, d_weight_R, d_gate_EDF, d_up_EDF, d_down_EFD; equations in `permute`."""
    dtype = x_ND.dtype
    sizes_E = routing.round_up(counts_E, multiple)
    by_expert = functools.partial(_by_expert, sizes_E=sizes_E, transposed=True)
    over_rows = functools.partial(_over_rows, sizes_E=sizes_E, dtype=gate_EDF.dtype)
    x_RD, d_y_RD = (x.at[tokens_R].get(mode="fill", fill_value=0) for x in (x_ND, d_y_ND))
    d_gate_RF, d_up_RF, d_weight_R, weighted_RF = swiglu.pull(
        gate_RF, up_RF, weights_R, by_expert(d_y_RD, down_EFD)
    )
    d_gate_RF, d_up_RF = d_gate_RF.astype(dtype), d_up_RF.astype(dtype)
    d_x_RD = by_expert(d_gate_RF, gate_EDF) + by_expert(d_up_RF, up_EDF)
    return (
        d_x_RD.astype(dtype),
        d_weight_R,
        over_rows(x_RD, d_gate_RF),
        over_rows(x_RD, d_up_RF),
        over_rows(weighted_RF.astype(dtype), d_y_RD),
    )


def _by_expert(x_RM, w_EMN, sizes_E, transposed=False):
    """x_r @ w_e in float32 for the expert e of the group of row r; or x_r @ w_e^T."""
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transposed else 1,)), ((), ())),
        lhs_ragged_dimensions=(0,),
        rhs_group_dimensions=(0,),
    )
    return jax.lax.ragged_dot_general(
        x_RM, w_EMN, sizes_E, numbers, preferred_element_type=jnp.float32
    )


def _over_rows(x_RM, y_RN, sizes_E, dtype):
    """sum_r x_r^T y_r over the rows of each expert, [E, M, N]; zero for an expert without rows."""
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=(0,),
        rhs_group_dimensions=(),
    )
    total_EMN = jax.lax.ragged_dot_general(
        x_RM, y_RN, sizes_E, numbers, preferred_element_type=jnp.float32
    )
    return total_EMN.astype(dtype)
