"""Causal softmax attention with grouped queries, within the segments of a packed row.

y_i = sum_j p_ij v_j,   p_i = softmax over j <= i of one segment of q_i . k_j / sqrt(K)
"""

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import choose
from pallas_kernels.flash_attention import pallas, reference, xla
from pallas_kernels.manual_axes import same_axes

IMPLEMENTATIONS = {
    "reference": reference.flash_attention,
    "xla": xla.flash_attention,
    "pallas": pallas.flash_attention,
}


def flash_attention(
    q_BTNGK: jax.Array,
    k_BTNK: jax.Array,
    v_BTNK: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of every token to itself and the earlier ones of its segment.

    Args:
      q_BTNGK: `[B, T, N, G, K]`, G queries for each of N key-value heads; bfloat16 or float32.
      k_BTNK, v_BTNK: `[B, T, N, K]`, in q's dtype.
      segment_ids: int `[B, T]`, equal ids contiguous; padding is a segment like any other. None is
        one segment.
      implementation: 'reference', 'xla', 'pallas' (JAX's splash attention on TPUs, cuDNN on GPUs), or
        None for the fastest.

    Returns:
      y `[B, T, N, G, K]` in q's dtype, with gradients to q, k and v. The softmax and all sums are
      float32. Memory grows with T squared up to a length at which that is faster, then with T.

    Raises:
      ValueError: shapes or dtypes that do not fit, unknown implementation, or one that cannot do this,
        with the reason.
    """
    if q_BTNGK.ndim != 5 or 0 in q_BTNGK.shape:
        raise ValueError(f"q must be [B, T, N, G, K] and not empty, got {q_BTNGK.shape}")
    B, T, N, _, K = q_BTNGK.shape
    for name, x in (("k", k_BTNK), ("v", v_BTNK)):
        if x.shape != (B, T, N, K) or x.dtype != q_BTNGK.dtype:
            raise ValueError(
                f"{name} must be {q_BTNGK.dtype} {(B, T, N, K)} for q {q_BTNGK.shape}, "
                f"got {x.dtype} {x.shape}"
            )
    if not jnp.issubdtype(q_BTNGK.dtype, jnp.floating):
        raise ValueError(f"q, k and v must be float arrays, got {q_BTNGK.dtype}")
    if segment_ids is not None and (
        segment_ids.shape != (B, T) or not jnp.issubdtype(segment_ids.dtype, jnp.integer)
    ):
        raise ValueError(
            f"segment_ids must be integer {(B, T)}, got {segment_ids.dtype} {segment_ids.shape}"
        )
    q_BTNGK, k_BTNK, v_BTNK, segment_ids = same_axes(q_BTNGK, k_BTNK, v_BTNK, segment_ids)
    implementation = choose(
        "flash_attention",
        implementation,
        IMPLEMENTATIONS,
        lambda target: pallas.refusal(target, q_BTNGK, segment_ids),
    )
    return IMPLEMENTATIONS[implementation](q_BTNGK, k_BTNK, v_BTNK, segment_ids)
