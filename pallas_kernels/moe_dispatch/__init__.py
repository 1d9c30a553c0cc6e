"""Mixture of SwiGLU experts: each token goes through the few experts that its router chose.

y_n = sum_k weights_nk down_e(silu(gate_e x_n) * up_e x_n),  e = experts_nk   (MiniMax-01, eq. 1)
"""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.moe_dispatch import pallas, reference, xla
from pallas_kernels.moe_dispatch.routing import Routing, route

__all__ = ["IMPLEMENTATIONS", "Routing", "moe_mlp", "route"]

IMPLEMENTATIONS = {
    "reference": reference.moe_mlp,
    "xla": xla.moe_mlp,
    "pallas": pallas.moe_mlp,
}


def moe_mlp(
    x_ND: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    experts_NK: jax.Array,
    weights_NK: jax.Array,
    *,
    capacity: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The weighted sum of the chosen experts' outputs.

    Args:
      x_ND: `[N, D]`, any float type; products accumulate in float32. N may be 0.
      gate_EDF, up_EDF: `[E, D, F]`; down_EFD: `[E, F, D]`.
      experts_NK: int `[N, K]`, each in [0, E], an expert at most once in a row. E is nowhere: such
        a pair (padding) costs nothing, takes no capacity and adds nothing.
      weights_NK: float `[N, K]`.
      capacity: how many pairs an expert takes, all first choices before second ones and tokens in
        their order (Lepikhin et al. 2021, GShard). The rest adds nothing; weights are not
        normalised again. None: all.
      implementation: 'reference', 'xla', 'pallas' (GPU, TPU), or None for the fastest that serves
        the call.

    Returns:
      y_ND in x's type, with gradients with respect to x, gate, up, down and weights; and kept_NK,
      bool: which pairs an expert computed.

    Raises:
      ValueError: shapes that do not fit, a capacity below 1, unknown implementation, or 'pallas'
        where it cannot serve, with the reason.
    """
    E, D, F = gate_EDF.shape if gate_EDF.ndim == 3 else (0, 0, 0)
    if not E or up_EDF.shape != (E, D, F) or down_EFD.shape != (E, F, D):
        raise ValueError(
            "need gate and up [E, D, F] and down [E, F, D], got "
            f"{gate_EDF.shape}, {up_EDF.shape} and {down_EFD.shape}"
        )
    if x_ND.ndim != 2 or x_ND.shape[1] != D:
        raise ValueError(f"need x [N, {D}], got {x_ND.shape}")
    if experts_NK.ndim != 2 or len(x_ND) != len(experts_NK) or not 1 <= experts_NK.shape[1] <= E:
        raise ValueError(f"need 1 to {E} experts per row of x {x_ND.shape}, got {experts_NK.shape}")
    if weights_NK.shape != experts_NK.shape:
        raise ValueError(f"need one weight per choice {experts_NK.shape}, got {weights_NK.shape}")
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity must be at least 1, got {capacity}")
    operands = x_ND, gate_EDF, up_EDF, down_EFD, experts_NK
    name = dispatch.choose(
        "moe_mlp", implementation, IMPLEMENTATIONS, lambda target: pallas.refusal(target, *operands)
    )
    if len(x_ND) == 0:
        return x_ND, jnp.zeros(experts_NK.shape, bool)
    return IMPLEMENTATIONS[name](*operands, weights_NK, capacity)
