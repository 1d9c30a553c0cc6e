"""Many sequences in one row, each continuing its own state: what a server does with its prompts."""

import jax
import jax.numpy as jnp

from pallas_kernels import chips
from pallas_kernels.dispatch import choose
from pallas_kernels.lightning_attention import pallas, xla

ALIGNMENT = 128  # tokens; where sequences begin


def prefill(
    q_THK: jax.Array,
    k_THK: jax.Array,
    v_THV: jax.Array,
    slopes_H: jax.Array,
    states_RHKV: jax.Array,
    lengths_R: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Outputs of R sequences packed into T tokens, and the state of each after its last token.

    Sequence r has lengths_R[r] tokens and begins where the one before ends, rounded up to a multiple
    of ALIGNMENT; T is such a multiple, not less than all of them need.

    Args:
      q_THK, k_THK, v_THV: `[T, H, K]` and `[T, H, V]`, bfloat16 or float32; finite in the gaps.
      slopes_H: float32 `[H]`.
      states_RHKV: float32, the state that each sequence continues.
      lengths_R: int, 0 or more.
      implementation: 'xla', 'pallas' (on TPU, without gradients), or None for the fastest.

    Returns:
      o `[T, H, V]` in q's dtype, zero in the gaps, and states like states_RHKV, that of a sequence
      without tokens as it was.

    Raises:
      ValueError: T that is no such multiple, other shapes or dtypes that do not fit, an unknown
        implementation, or 'pallas' for what it cannot serve.
    """
    T, H, K = q_THK.shape
    R, V = states_RHKV.shape[0], v_THV.shape[-1]
    shapes = k_THK.shape, v_THV.shape[:2], states_RHKV.shape, slopes_H.shape, lengths_R.shape
    if T % ALIGNMENT or shapes != ((T, H, K), (T, H), (R, H, K, V), (H,), (R,)):
        raise ValueError(
            f"need q, k [T, H, K], v [T, H, V] with T a multiple of {ALIGNMENT}, slopes [H], states "
            f"[R, H, K, V] and lengths [R], got {q_THK.shape} and {shapes}"
        )
    if states_RHKV.dtype != jnp.float32 or not jnp.issubdtype(lengths_R.dtype, jnp.integer):
        raise ValueError(
            f"need float32 states and int lengths, got {states_RHKV.dtype} and {lengths_R.dtype}"
        )
    dtypes = {x.dtype for x in (q_THK, k_THK, v_THV)}
    dtype = jnp.bfloat16 if dtypes == {jnp.dtype(jnp.bfloat16)} else jnp.float32
    q, k, v = (x.astype(dtype)[None] for x in (q_THK, k_THK, v_THV))

    def refusal(target):
        if target.chip.platform != "tpu":
            return "the kernels have a state per packed sequence on TPU alone"
        return pallas.refusal(target, q, k, v)

    implementation = choose(
        "lightning_attention.prefill", implementation, ("xla", "pallas"), refusal
    )
    attend = _pallas if implementation == "pallas" else _xla
    slopes_H = jax.lax.stop_gradient(slopes_H).astype(jnp.float32)
    o, states = attend(q, k, v, slopes_H, states_RHKV, lengths_R.astype(jnp.int32))
    states = jnp.where(lengths_R[:, None, None, None] > 0, states, states_RHKV)
    return o[0].astype(q_THK.dtype), states


def chunks_of(lengths_R, T, C):
    """Sequence and number of tokens, int32 `[T / C]`, of every C tokens; of none (R - 1, 0)."""
    sizes_R = -(-lengths_R // ALIGNMENT) * (ALIGNMENT // C)
    ends_R = jnp.cumsum(sizes_R)
    chunk_N = jnp.arange(T // C)
    rows_N = jnp.searchsorted(ends_R, chunk_N, side="right", method="compare_all")
    rows_N = jnp.minimum(rows_N, len(lengths_R) - 1).astype(jnp.int32)
    before_N = (chunk_N - (ends_R - sizes_R)[rows_N]) * C
    return rows_N, jnp.clip(lengths_R[rows_N] - before_N, 0, C).astype(jnp.int32)


def _pallas(q, k, v, slopes_H, states, lengths):
    target = chips.current()
    C = pallas.tiling(target, "forward")["chunk"]
    forward = pallas.kernels(target, "forward", "forward")
    rows = chunks_of(lengths, q.shape[1], C)
    return forward(q, k, v, slopes_H, states, None, None, rows=rows)


def _xla(q, k, v, slopes_H, states, lengths):
    """One chunk after the other, its sequence's state in and out."""

    def chunk(states, xs):
        row, count, *qkv = xs
        inputs = *(x[None] for x in qkv), slopes_H, states[row][None], None, count[None]
        o, state = xla.lightning_attention(*inputs, ALIGNMENT)
        return states.at[row].set(state[0]), o[0]

    tokens = [x.reshape(-1, ALIGNMENT, *x.shape[2:]) for x in (q, k, v)]
    states, o = jax.lax.scan(chunk, states, (*chunks_of(lengths, q.shape[1], ALIGNMENT), *tokens))
    return o.reshape(v.shape), states
