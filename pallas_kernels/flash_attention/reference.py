"""The plain definition: all scores at once, gradients by autodiff."""

import jax
import jax.numpy as jnp


def flash_attention(q_BTNGK, k_BTNK, v_BTNK, segment_ids):
    T, K = q_BTNGK.shape[1], q_BTNGK.shape[-1]
    scores = jnp.einsum("btngk,bsnk->bngts", q_BTNGK, k_BTNK, preferred_element_type=jnp.float32)
    sees_BTS = jnp.tril(jnp.ones((1, T, T), bool))
    if segment_ids is not None:
        sees_BTS &= segment_ids[:, :, None] == segment_ids[:, None, :]
    p_BNGTS = jax.nn.softmax(jnp.where(sees_BTS[:, None, None], scores * K**-0.5, -jnp.inf))
    y_BTNGK = jnp.einsum("bngts,bsnk->btngk", p_BNGTS, v_BTNK, preferred_element_type=jnp.float32)
    return y_BTNGK.astype(q_BTNGK.dtype)
