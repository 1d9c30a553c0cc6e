"""Operands of one op inside `jax.shard_map` agree on the mesh axes over which they vary."""

import jax


def same_axes(*operands, but: str | None = None):
    """Operands (None is allowed) varying over every axis, except `but`, over which any of them does.

    An op's custom gradient then sees one type; the gradient of an operand that the caller holds
    unvarying is summed over those axes outside the op. Elsewhere, and with check_vma=False, nothing.
    """
    axes = [set() if x is None else jax.typeof(x).manual_axis_type.varying for x in operands]
    every = frozenset().union(*axes) - {but}
    return [
        jax.lax.pcast(x, tuple(every - own), to="varying") if every - own else x
        for x, own in zip(operands, axes, strict=True)
    ]
