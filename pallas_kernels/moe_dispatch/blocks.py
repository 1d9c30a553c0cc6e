"""Grouped SwiGLU for CPUs: a loop over the experts that have rows, in it loops over their rows.

An expert's rows begin at a multiple of the smallest block, so that no block touches the rows of
two experts. Most rows go in large blocks and the rest of a group in small ones. An expert's weights
are sliced once, outside of the inner loops. Rows outside all groups come out as zeros.

Shape suffixes: R rows, B rows of a block; the rest as in `routing`.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.moe_dispatch import routing, swiglu


def block_sizes(num_pairs: int, num_experts: int) -> tuple[int, ...]:
    """Rows per block, largest first, each a multiple of the next, for so many pairs in all."""
    mean = num_pairs / num_experts
    if mean >= 512:
        sizes = 256, 32
    elif mean >= 64:
        sizes = 128, 32
    elif mean >= 16:
        sizes = 64, 16
    else:
        sizes = (16, 4) if num_pairs >= 4 else (1,)
    return tuple(size for size in sizes if size <= num_pairs)


def forward(x_ND, gate_EDF, up_EDF, down_EFD, tokens_R, counts_E, *, sizes, keep):
    """out_RD and, if `keep`, (gate_RF, up_RF), else ()."""
    dtype = x_ND.dtype

    def expert(e, over_blocks, outputs):
        gate_DF, up_DF, down_FD = gate_EDF[e], up_EDF[e], down_EFD[e]

        def block(row, size, outputs):
            x_BD = _take(x_ND, tokens_R, row, size)
            gate_BF, up_BF = _dot(x_BD, gate_DF), _dot(x_BD, up_DF)
            hidden_BF = swiglu.hidden(gate_BF, up_BF).astype(dtype)
            blocks = (_dot(hidden_BF, down_FD), gate_BF, up_BF)
            return tuple(_put(out, x, row) for out, x in zip(outputs, blocks, strict=False))

        return over_blocks(block, outputs)

    widths = (x_ND.shape[1],) + 2 * gate_EDF.shape[2:] if keep else x_ND.shape[1:]
    outputs = tuple(_zeros((tokens_R.size, width), dtype, counts_E) for width in widths)
    out_RD, *kept = _over_experts(expert, outputs, counts_E, sizes)
    return out_RD, tuple(kept)


def backward(
    x_ND, gate_EDF, up_EDF, down_EFD, weights_R, gate_RF, up_RF, d_y_ND, tokens_R, counts_E, *,
    sizes,
):  # fmt: skip
    """d_x_RD, d_weight_R, d_gate_EDF, d_up_EDF, d_down_EFD; equations in `permute`."""
    dtype = x_ND.dtype

    def expert(e, over_blocks, outputs):
        gate_DF, up_DF, down_FD = gate_EDF[e], up_EDF[e], down_EFD[e]

        def block(row, size, outputs):
            d_x_RD, d_weight_R, d_gate_EDF, d_up_EDF, d_down_EFD = outputs
            x_BD, d_y_BD = _take(x_ND, tokens_R, row, size), _take(d_y_ND, tokens_R, row, size)
            gate_BF, up_BF, weight_B = (
                jax.lax.dynamic_slice_in_dim(x, row, size) for x in (gate_RF, up_RF, weights_R)
            )
            pulled_BF = _dot(d_y_BD, down_FD.T)
            d_gate_BF, d_up_BF, d_weight_B, weighted_BF = swiglu.pull(
                gate_BF, up_BF, weight_B, pulled_BF
            )
            d_gate_BF, d_up_BF = d_gate_BF.astype(dtype), d_up_BF.astype(dtype)
            d_x_BD = _dot(d_gate_BF, gate_DF.T) + _dot(d_up_BF, up_DF.T)
            return (
                _put(d_x_RD, d_x_BD, row),
                _put(d_weight_R, d_weight_B, row),
                _add(d_gate_EDF, _dot(x_BD.T, d_gate_BF), e),
                _add(d_up_EDF, _dot(x_BD.T, d_up_BF), e),
                _add(d_down_EFD, _dot(weighted_BF.astype(dtype).T, d_y_BD), e),
            )

        return over_blocks(block, outputs)

    R, weights = tokens_R.size, (gate_EDF, up_EDF, down_EFD)
    d_x_RD = _zeros((R, x_ND.shape[1]), dtype, counts_E)
    sums = tuple(
        _zeros(shape, jnp.float32, counts_E) for shape in ((R,), *(x.shape for x in weights))
    )
    d_x_RD, d_weight_R, *sums = _over_experts(expert, (d_x_RD, *sums), counts_E, sizes)
    return d_x_RD, d_weight_R, *(d.astype(x.dtype) for d, x in zip(sums, weights, strict=True))


def _over_experts(expert, carry, counts_E, sizes):
    """`carry = expert(e, over_blocks, carry)` for each expert e that has rows.

    `over_blocks(block, carry)` does `carry = block(row, size, carry)` for blocks of e's rows.
    """
    active_E = jnp.argsort(counts_E == 0)  # stable: those that have rows first, in their order
    starts_E = routing.group_starts(counts_E, sizes[-1])

    def body(i, carry):
        e = active_E[i]

        def over_blocks(block, carry):
            row, left = starts_E[e], routing.round_up(counts_E[e], sizes[-1])
            for size in sizes:
                count = left // size

                def step(j, carry, row=row, size=size):
                    return block(row + j * size, size, carry)

                carry = jax.lax.fori_loop(0, count, step, carry)
                row, left = row + count * size, left - count * size
            return carry

        return expert(e, over_blocks, carry)

    return jax.lax.fori_loop(0, jnp.sum(counts_E > 0), body, carry)


def _take(x_ND, tokens_R, row, size):
    """The rows of x of the block's tokens, zeros where there is none."""
    tokens_B = jax.lax.dynamic_slice_in_dim(tokens_R, row, size)
    return x_ND.at[tokens_B].get(mode="fill", fill_value=0)


def _put(x, block, row):
    return jax.lax.dynamic_update_slice_in_dim(x, block.astype(x.dtype), row, axis=0)


def _add(x_E, y, e):
    """x with y added to x[e]; one pass, in place."""
    start = (e,) + (0,) * y.ndim
    old = jax.lax.dynamic_slice(x_E, start, (1, *y.shape))
    return jax.lax.dynamic_update_slice(x_E, old + y[None], start)


def _dot(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _zeros(shape, dtype, like):
    """Zeros that vary over the mapped axes over which `like` does, as a loop's carry must."""
    return jnp.zeros(shape, dtype) + jnp.zeros_like(like, dtype, shape=())
