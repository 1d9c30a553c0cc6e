"""The experts by grouped matmuls that know the accelerator: `tpu.py`, `gpu.py`.

Both offer, of rows sorted by expert whose groups begin at multiples of `multiple`,

    gmm(x_RM, w_EMN, counts_E, *, multiple, transposed, out_dtype, tiling, interpret) -> [R, N]
    gmm_swiglu(x_RD, gate_EDF, up_EDF, counts_E, *, multiple, keep, tiling, interpret)
        -> hidden_RF, (gate_RF, up_RF) or ()
    tgmm(x_RM, y_RN, counts_E, *, multiple, out_dtype, tiling, interpret) -> [E, M, N]
    multiple(num_pairs, num_experts, dtype) -> int
    tilings(chip, num_pairs, num_experts) -> {"gmm": …, "gmm_swiglu": …, "tgmm": …}
    refusal(num_pairs, gate_EDF) -> why not, or None

The rows of a group beyond its count are zeros in x and come out as zeros; rows between groups (none
where groups end at multiples) and after the last one are neither read into a result nor written.

d_x adds two products in float32 outside of the kernel: one rounding, as everywhere.
"""

import importlib
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels import chips
from pallas_kernels.moe_dispatch import permute, swiglu

DTYPES = (jnp.bfloat16, jnp.float32)


def refusal(target: chips.Target, x_ND, gate_EDF, up_EDF, down_EFD, experts_NK) -> str | None:
    """Why the kernels cannot serve this call on that target; None if they can."""
    dtypes = {str(x.dtype) for x in (x_ND, gate_EDF, up_EDF, down_EFD)}
    if len(dtypes) > 1 or x_ND.dtype not in DTYPES:
        return f"x and weights must all be bfloat16 or all float32, not {sorted(dtypes)}"
    return _kernels(target.chip.platform).refusal(experts_NK.size, gate_EDF)


def moe_mlp(x_ND, gate_EDF, up_EDF, down_EFD, experts_NK, weights_NK, capacity):
    target = chips.current()
    kernels = _kernels(target.chip.platform)
    multiple = kernels.multiple(experts_NK.size, gate_EDF.shape[0], x_ND.dtype)
    experts = Grouped(target.chip.name, target.interpret, experts_NK.size, multiple)
    return permute.moe_mlp(
        x_ND, gate_EDF, up_EDF, down_EFD, experts_NK, weights_NK, capacity, experts
    )


class Grouped(NamedTuple):
    """`permute.Experts` by the kernels of one chip."""

    chip: str
    interpret: bool
    num_pairs: int
    multiple: int

    def forward(self, x_ND, gate_EDF, up_EDF, down_EFD, tokens_R, counts_E, *, keep):
        gmm, gmm_swiglu, _ = self._bound(gate_EDF)
        x_RD = _rows(x_ND, tokens_R)
        hidden_RF, kept = gmm_swiglu(x_RD, gate_EDF, up_EDF, counts_E, keep=keep)
        return gmm(hidden_RF, down_EFD, counts_E, out_dtype=x_ND.dtype), kept

    def backward(
        self, x_ND, gate_EDF, up_EDF, down_EFD, weights_R, gate_RF, up_RF, d_y_ND, tokens_R, counts_E
    ):  # fmt: skip
        dtype = x_ND.dtype
        gmm, _, tgmm = self._bound(gate_EDF)
        x_RD, d_y_RD = _rows(x_ND, tokens_R), _rows(d_y_ND, tokens_R)
        pulled_RF = gmm(d_y_RD, down_EFD, counts_E, transposed=True, out_dtype=dtype)
        d_gate_RF, d_up_RF, d_weight_R, weighted_RF = swiglu.pull(
            gate_RF, up_RF, weights_R, pulled_RF.astype(jnp.float32)
        )
        d_gate_RF, d_up_RF = d_gate_RF.astype(dtype), d_up_RF.astype(dtype)
        d_x_RD = sum(
            gmm(d_RF, w_EDF, counts_E, transposed=True, out_dtype=jnp.float32)
            for d_RF, w_EDF in ((d_gate_RF, gate_EDF), (d_up_RF, up_EDF))
        )
        return (
            d_x_RD.astype(dtype),
            d_weight_R,
            tgmm(x_RD, d_gate_RF, counts_E, out_dtype=gate_EDF.dtype),
            tgmm(x_RD, d_up_RF, counts_E, out_dtype=up_EDF.dtype),
            tgmm(weighted_RF.astype(dtype), d_y_RD, counts_E, out_dtype=down_EFD.dtype),
        )

    def _bound(self, gate_EDF):
        """gmm, gmm_swiglu and tgmm with what does not depend on their operands."""
        kernels = _kernels(chips.CHIPS[self.chip].platform)
        tilings = kernels.tilings(self.chip, self.num_pairs, gate_EDF.shape[0])

        def bind(name):
            fixed = dict(multiple=self.multiple, tiling=tilings[name], interpret=self.interpret)
            return lambda *operands, **given: getattr(kernels, name)(*operands, **fixed, **given)

        return bind("gmm"), bind("gmm_swiglu"), bind("tgmm")


def _kernels(platform):
    # Imported where it is used: the other platform's part of JAX may not be installed.
    return importlib.import_module(f"pallas_kernels.moe_dispatch.{platform}")


def _rows(x_ND, tokens_R):
    """The token of each row, zeros where a row holds no pair."""
    return x_ND.at[tokens_R].get(mode="fill", fill_value=0)
