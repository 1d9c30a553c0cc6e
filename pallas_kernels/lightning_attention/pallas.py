"""The Pallas kernels behind the op's signature: what is common to TPU (tpu.py) and GPU (gpu.py).

The kernels know a token's segment by one number, its position inside it; they compare it with the
token's index in its chunk. Tokens of a row's first segment, which continue the initial state, get
2^20 more than that, so that no chunk holds their segment's beginning.

Tilings: "lightning_forward", "lightning_backward" and "lightning_state" of `tilings.TILINGS[chip]`,
of one "chunk", tokens, to a multiple of which sequences are padded.
"""

import functools
import importlib

import jax
import jax.numpy as jnp

from pallas_kernels import chips, tilings

CONTINUES = 1 << 20


def refusal(target: chips.Target, q, k, v) -> str | None:
    """Why the kernels cannot serve these arrays on that machine; None if they can."""
    K, V = k.shape[-1], v.shape[-1]
    if (K, V) != (128, 128):
        return (
            f"the Pallas kernels have head dimension 128 alone, not keys of {K} and values of {V}"
        )
    dtypes = sorted({x.dtype.name for x in (q, k, v)})
    if target.chip.platform == "gpu" and dtypes != ["bfloat16"]:
        return f"the GPU kernels multiply bfloat16 alone, not {' and '.join(dtypes)}"
    if target.chip.platform == "tpu" and q.shape[0] * q.shape[1] > 1 << 23:
        return "the TPU kernels take up to 2^23 tokens a device, rows times length"
    return None


def lightning_attention(q, k, v, slopes_H, initial_state, segment_ids, lengths, block):
    del block  # the kernels have their own
    target = chips.current()
    chunk = _tiling(target, "forward")["chunk"]
    T = q.shape[1]
    positions = None if segment_ids is None else positions_of(segment_ids)
    padding = -T % chunk
    if padding:
        if lengths is None:
            lengths = jnp.full_like(slopes_H, T, jnp.int32, q.shape[:1])
        q, k, v, positions = (_pad(x, padding) for x in (q, k, v, positions))
    o, final = _attend(q, k, v, slopes_H, initial_state, positions, lengths, target)
    return o[:, :T], final


def positions_of(segment_ids):
    """int32 `[B, T]`: a token's position in its segment, + 2^20 in the row's first."""
    t = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    changes = jnp.pad(changes, ((0, 0), (1, 0)))
    start = jax.lax.cummax(jnp.where(changes, t, 0), axis=1)
    return t - start + jnp.where(start == 0, CONTINUES, 0)


def _pad(x, count):
    if x is None:
        return None
    return jnp.pad(x, ((0, 0), (0, count)) + ((0, 0),) * (x.ndim - 2))


def _tiling(target, kernel):
    return tilings.TILINGS[target.chip.name][f"lightning_{kernel}"]


def _kernels(target, kernel, module=None):
    """A function of tpu.py or gpu.py with the target's tiling."""
    module = importlib.import_module(f"{__package__}.{module or target.chip.platform}")
    tiling = _tiling(target, {"final_state": "state"}.get(kernel, kernel))
    return functools.partial(getattr(module, kernel), tiling=tiling, interpret=target.interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attend(q, k, v, slopes_H, initial, positions, lengths, target):
    return _kernels(target, "forward")(q, k, v, slopes_H, initial, positions, lengths)


def _save(*inputs_and_target):
    *inputs, target = inputs_and_target
    inputs = tuple(None if x is None else x.value for x in inputs)
    return _attend(*inputs, target), inputs


def _pull(target, inputs, cotangents):
    q, k, v, slopes_H, initial, positions, lengths = inputs
    d_o, d_final = (
        None if isinstance(x, jax.custom_derivatives.SymbolicZero) else x for x in cotangents
    )
    if d_o is None:
        d_o = jnp.zeros_like(q)
    backward = _kernels(target, "backward", f"{target.chip.platform}_backward")
    dq, dk, dv, d_initial = backward(*inputs, d_o.astype(q.dtype), d_final)
    return dq, dk, dv, None, None if initial is None else d_initial, None, None


_attend.defvjp(_save, _pull, symbolic_zeros=True)
