"""Portable and dropless at the cost of the chosen experts: pairs sorted by expert, matmuls grouped.

The grouped matmuls are `ragged_dot` on accelerators (`ragged.py`). On CPUs that computes every
expert for every row, so there loops go over the experts that have rows (`blocks.py`).
"""

import functools
from typing import NamedTuple

import jax

from pallas_kernels.moe_dispatch import blocks, permute, ragged


def moe_mlp(x_ND, gate_EDF, up_EDF, down_EFD, experts_NK, weights_NK, capacity):
    experts = ByPlatform(blocks.block_sizes(experts_NK.size, gate_EDF.shape[0]))
    return permute.moe_mlp(
        x_ND, gate_EDF, up_EDF, down_EFD, experts_NK, weights_NK, capacity, experts
    )


class ByPlatform(NamedTuple):
    """`permute.Experts` for the machine that this is compiled for; sizes: rows of CPUs' blocks."""

    sizes: tuple[int, ...]

    @property
    def multiple(self):
        return self.sizes[-1]

    def forward(self, *operands, keep):
        return jax.lax.platform_dependent(
            *operands,
            cpu=functools.partial(blocks.forward, sizes=self.sizes, keep=keep),
            default=functools.partial(ragged.forward, multiple=self.multiple, keep=keep),
        )

    def backward(self, *operands):
        return jax.lax.platform_dependent(
            *operands,
            cpu=functools.partial(blocks.backward, sizes=self.sizes),
            default=functools.partial(ragged.backward, multiple=self.multiple),
        )
