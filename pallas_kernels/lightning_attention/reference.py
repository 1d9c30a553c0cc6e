"""The plain definition: the recurrence, one token at a time, gradients by autodiff."""

import jax
import jax.numpy as jnp


def lightning_attention(q, k, v, slopes_H, initial_state, segment_ids, lengths, block):
    del block
    B, T, H, K = q.shape
    decay_H11 = jnp.exp(-slopes_H)[:, None, None]
    state_BHKV = jnp.full_like(q, 0, jnp.float32, (B, H, K, v.shape[-1]))
    if initial_state is not None:
        state_BHKV += initial_state
    real_BT = jnp.ones((B, T), bool) if lengths is None else jnp.arange(T) < lengths[:, None]
    resets_BT = jnp.zeros((B, T), bool)
    if segment_ids is not None:
        resets_BT = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0

    def token(state_BHKV, xs):
        q_BHK, k_BHK, v_BHV, resets_B, real_B = xs
        resets, real = resets_B[:, None, None, None], real_B[:, None, None, None]
        added_BHKV = k_BHK[..., None].astype(jnp.float32) * v_BHV[..., None, :]
        new_BHKV = jnp.where(resets, 0.0, decay_H11 * state_BHKV) + added_BHKV
        o_BHV = jnp.einsum("bhk,bhkv->bhv", q_BHK, new_BHKV)
        return jnp.where(real, new_BHKV, state_BHKV), jnp.where(real[:, :, 0], o_BHV, 0.0)

    xs = [jnp.moveaxis(x, 1, 0) for x in (q, k, v, resets_BT, real_BT)]
    state_BHKV, o = jax.lax.scan(token, state_BHKV, xs)
    return jnp.moveaxis(o, 0, 1).astype(q.dtype), state_BHKV
