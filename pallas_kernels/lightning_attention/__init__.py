"""Linear attention with a decay per head, the sequence mixer of MiniMax-01 (section 2.2).

With decay e^(-s) of a head, and its state S, a [K, V] matrix:

    S_t = e^(-s) S_(t-1) + k_t v_t^T          o_t = q_t^T S_t          (the current token counts)

There is neither a softmax nor a scale. |S| grows like 1/s, so the output needs a norm.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import choose
from pallas_kernels.lightning_attention import pallas, reference, splits, xla
from pallas_kernels.lightning_attention.prefill import prefill as prefill
from pallas_kernels.manual_axes import same_axes

IMPLEMENTATIONS = {
    "reference": reference.lightning_attention,
    "xla": xla.lightning_attention,
    "pallas": pallas.lightning_attention,
}
BLOCKS = {"cpu": 64}  # tokens per block that measured fastest; elsewhere
DEFAULT_BLOCK = 256  # the paper's


def lightning_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHV: jax.Array,
    slopes_H: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    lengths: jax.Array | None = None,
    axis_name: str | None = None,
    block: int = 0,
    num_splits: int = 0,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Outputs of all tokens and the state after the last: o_i = sum_(j<=i) e^(-s(i-j)) (q_i.k_j) v_j.

    Splitting a sequence anywhere, with the first part's final state as the second's initial one,
    gives what the whole gives, in values and gradients; so do parts of one sequence on several
    devices, whose states add up with their decays (section 3.2.2).

    Args:
      q_BTHK, k_BTHK: `[B, T, H, K]`, bfloat16 or float32; T at least 1.
      v_BTHV: `[B, T, H, V]`.
      slopes_H: float32 `[H]`, s >= 0, may be traced; gets no gradient.
      initial_state: float32 `[B, H, K, V]`, the state of what comes before token 0; None is zero.
        Tokens of the first segment continue it, later segments do not see it.
      segment_ids: int `[B, T]`, equal ids contiguous; the state starts from zero where the id
        changes, at any token.
      lengths: int `[B]`, 0 to T: tokens that are there, of rows padded on the right (with finite
        values). Outputs of padding are zero, and it neither enters nor decays the final state.
      axis_name: inside `jax.shard_map`, the mesh axis whose devices hold consecutive parts of the
        sequences, of T tokens each (LASP+). q, k, v and segment_ids are this device's part, lengths
        count all tokens, the initial state is read on the first device, and each device returns
        the state after its own part.
      block: tokens per block of XLA's chunked form, which changes speed and rounding only; 0 lets
        the op choose. The Pallas kernels have their own.
      num_splits: spans of each row that the Pallas kernels take at once, for rows and heads too few
        to fill the device; 0 lets the op choose.
      implementation: 'reference', 'xla', 'pallas' (TPU and GPU, heads of 128; the GPU's takes
        bfloat16 alone), or None for the fastest.

    Returns:
      o `[B, T, H, V]` in q's dtype, and the final state, float32 `[B, H, K, V]`, of the last token's
      segment. Both have gradients to q, k, v and initial_state. States, decays and sums are float32
      whatever the inputs are; bfloat16 inputs are multiplied as bfloat16.

    Raises:
      ValueError: shapes or dtypes that do not fit, a negative block, an unknown implementation, or
        'pallas' for what it cannot serve.
    """
    B, T, H, K = _shape(q_BTHK, 4, "q")
    V = _shape(v_BTHV, 4, "v")[3]
    if k_BTHK.shape != q_BTHK.shape or v_BTHV.shape[:3] != (B, T, H) or T == 0:
        raise ValueError(
            "need q and k [B, T, H, K] and v [B, T, H, V] with T > 0, got "
            f"{q_BTHK.shape}, {k_BTHK.shape} and {v_BTHV.shape}"
        )
    _need("slopes", slopes_H, (H,), jnp.floating)
    if initial_state is not None:
        _need("initial_state", initial_state, (B, H, K, V), jnp.floating)
    if segment_ids is not None:
        _need("segment_ids", segment_ids, (B, T), jnp.integer)
    if lengths is not None:
        _need("lengths", lengths, (B,), jnp.integer)
    if block < 0 or num_splits < 0:
        numbers = f"{block} and {num_splits}"
        raise ValueError(f"block and num_splits must be positive, or 0 to choose, got {numbers}")
    refusal = functools.partial(pallas.refusal, q=q_BTHK, k=k_BTHK, v=v_BTHV)
    implementation = choose("lightning_attention", implementation, IMPLEMENTATIONS, refusal)
    block = min(T, block or BLOCKS.get(jax.default_backend(), DEFAULT_BLOCK))
    dtypes = {x.dtype for x in (q_BTHK, k_BTHK, v_BTHV)}
    dtype = jnp.bfloat16 if dtypes == {jnp.dtype(jnp.bfloat16)} else jnp.float32
    inputs = [x.astype(dtype) for x in (q_BTHK, k_BTHK, v_BTHV)]
    inputs.append(jax.lax.stop_gradient(slopes_H).astype(jnp.float32))
    inputs.append(None if initial_state is None else initial_state.astype(jnp.float32))
    inputs = same_axes(*inputs, segment_ids, lengths)
    attend = functools.partial(IMPLEMENTATIONS[implementation], block=block)
    if implementation == "pallas":
        attend = functools.partial(attend, num_splits=num_splits, axis_name=axis_name)
    elif axis_name is not None:
        attend = functools.partial(splits.over_devices, attend, axis_name=axis_name)
    o_BTHV, final_state = attend(*inputs)
    return o_BTHV.astype(q_BTHK.dtype), final_state


def step(q_BHK, k_BHK, v_BHV, slopes_H, state_BHKV) -> tuple[jax.Array, jax.Array]:
    """One token of every row, as in decoding: the output `[B, H, V]` in q's dtype, the new state.

    The state is float32 `[B, H, K, V]`; at small slopes a narrower one loses what it remembers.
    There is no kernel: for 64 rows of 64 heads, compiled for v5p, v6e and tpu7x with the state
    donated, XLA makes this one fusion that moves 1.02 times the bytes of the states and tokens.
    """
    if state_BHKV.dtype != jnp.float32:
        raise ValueError(f"the state must be float32, got {state_BHKV.dtype}")
    q, k, v = (x.astype(jnp.float32) for x in (q_BHK, k_BHK, v_BHV))
    decay_H11 = jnp.exp(-slopes_H.astype(jnp.float32))[:, None, None]
    state_BHKV = decay_H11 * state_BHKV + k[..., None] * v[..., None, :]
    return jnp.sum(q[..., None] * state_BHKV, axis=2).astype(q_BHK.dtype), state_BHKV


def _shape(x, ndim, name):
    if x.ndim != ndim or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be a float array with {ndim} axes, got {x.dtype} {x.shape}")
    return x.shape


def _need(name, x, shape, kind):
    if x.shape != shape or not jnp.issubdtype(x.dtype, kind):
        raise ValueError(f"{name} must be {kind.__name__} {shape}, got {x.dtype} {x.shape}")
