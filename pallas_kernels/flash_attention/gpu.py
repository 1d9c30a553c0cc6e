"""GPU: cuDNN's flash attention, as JAX offers it.

Segments go in as a mask: [B, 1, T, T] in q's type, added to the scores. cuDNN can take the offsets of
segments instead, and skip what lies between them, but JAX does not offer that publicly, and it needs
the largest number of segments, which nothing here knows. So long packed rows are refused.
"""

import jax
import jax.numpy as jnp

MASK_BYTES = 1 << 30  # at most


def refusal(q_BTNGK, segment_ids) -> str | None:
    B, T, *_, K = q_BTNGK.shape
    if q_BTNGK.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN's attention takes bfloat16 and float16, not {q_BTNGK.dtype}"
    if K % 8 or K > 128:
        return f"cuDNN's attention takes head sizes up to 128 that are multiples of 8, not {K}"
    if segment_ids is not None and 2 * B * T * T > MASK_BYTES:
        return f"a mask of segments of {B} rows of {T} tokens would take {2 * B * T * T >> 20} MiB"
    return None


def forward(q_BTNGK, k_BTNK, v_BTNK, segment_ids):
    """y `[B, T, N, G, K]`, with gradients."""
    B, T, N, G, K = q_BTNGK.shape
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    y = jax.nn.dot_product_attention(
        q_BTNGK.reshape(B, T, N * G, K),
        k_BTNK,
        v_BTNK,
        mask=mask,
        scale=K**-0.5,
        is_causal=True,
        implementation="cudnn",
    )
    return y.reshape(q_BTNGK.shape)
