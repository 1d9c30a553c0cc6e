"""The part of a SwiGLU between its matmuls, and its gradient. Any leading axes, all float32."""

import jax
import jax.numpy as jnp


def hidden(gate_F: jax.Array, up_F: jax.Array) -> jax.Array:
    """silu(gate) * up (Shazeer 2020)."""
    return jax.nn.silu(gate_F.astype(jnp.float32)) * up_F.astype(jnp.float32)


def pull(gate_F, up_F, weight, pulled_F):
    """Gradients of weight * down(hidden), where pulled is its output's cotangent times down^T.

    Returns d_gate, d_up, d_weight and weight * hidden, which d_down is made of.
    """
    gate_F, up_F = gate_F.astype(jnp.float32), up_F.astype(jnp.float32)
    sigmoid_F = jax.nn.sigmoid(gate_F)
    silu_F = gate_F * sigmoid_F
    hidden_F = silu_F * up_F
    d_hidden_F = weight[..., None] * pulled_F
    d_silu_F = sigmoid_F * (1 + gate_F - silu_F)
    return (
        d_hidden_F * up_F * d_silu_F,
        d_hidden_F * silu_F,
        jnp.sum(pulled_F * hidden_F, axis=-1),
        weight[..., None] * hidden_F,
    )
