"""The plain definition: every expert computes every token, gradients by autodiff."""

import jax
import jax.numpy as jnp


def moe_mlp(x_ND, gate_EDF, up_EDF, down_EFD, experts_NK, weights_NK, capacity):
    num_experts = gate_EDF.shape[0]
    kept_NK = keep(experts_NK, num_experts, capacity)
    weights_NK = weights_NK.astype(jnp.float32)
    y_ND = jnp.zeros(x_ND.shape, jnp.float32)
    for e in range(num_experts):
        gate_NF = jnp.matmul(x_ND, gate_EDF[e], preferred_element_type=jnp.float32)
        up_NF = jnp.matmul(x_ND, up_EDF[e], preferred_element_type=jnp.float32)
        hidden_NF = (jax.nn.silu(gate_NF) * up_NF).astype(x_ND.dtype)
        out_ND = jnp.matmul(hidden_NF, down_EFD[e], preferred_element_type=jnp.float32)
        here_NK = kept_NK & (experts_NK == e)
        weight_N1 = jnp.sum(jnp.where(here_NK, weights_NK, 0.0), axis=1, keepdims=True)
        # A token that is not here must not see what overflowed here: 0 * inf.
        y_ND += jnp.where(jnp.any(here_NK, axis=1, keepdims=True), weight_N1 * out_ND, 0.0)
    return y_ND.astype(x_ND.dtype), kept_NK


def keep(experts_NK, num_experts, capacity):
    """Which pairs an expert takes: the first `capacity` in the order (choice, token)."""
    num_tokens, top_k = experts_NK.shape
    experts_P = experts_NK.T.reshape(-1)
    kept_P = experts_P < num_experts
    if capacity is not None:
        taken_PE = experts_P[:, None] == jnp.arange(num_experts)
        rank_PE = jnp.cumsum(taken_PE, axis=0) - 1
        kept_P &= jnp.any(taken_PE & (rank_PE < capacity), axis=1)
    return kept_P.reshape(top_k, num_tokens).T
