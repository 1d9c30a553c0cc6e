"""The Pallas kernels behind the op's signature: what is common to TPU (tpu.py) and GPU (gpu.py).

The kernels know a token's segment by one number, its position inside it; they compare it with the
token's index in its chunk. Tokens of a row's first segment, which continue the initial state, get
2^20 more than that, so that no chunk holds their segment's beginning.

Tilings: "lightning_forward", "lightning_backward" and "lightning_state" of `tilings.TILINGS[chip]`,
of one "chunk", tokens, to a multiple of which sequences are padded. "programs" of the first: how
many (row, head) pairs fill the device; with fewer, rows are cut into spans (`splits.py`).
"""

import functools
import importlib

import jax
import jax.numpy as jnp

from pallas_kernels import chips, tilings
from pallas_kernels.lightning_attention import splits

MIN_SPAN = 1024  # tokens that are worth a span of their own


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


def lightning_attention(
    q, k, v, slopes_H, initial, segment_ids, lengths, block, *, num_splits=0, axis_name=None
):
    del block  # the kernels have their own
    target = chips.current()
    own = tiling(target, "forward")
    B, T, H, _ = q.shape
    # One program per row and block of heads; a device with room for more takes spans of the rows.
    spans = num_splits or min(round(own.get("programs", 0) / (B * H)), T // MIN_SPAN)
    spans = max(1, min(spans, T))
    positions = splits.positions_of(segment_ids, axis_name)
    lengths = splits.part_lengths(lengths, T, axis_name)
    padding = -T % (own["chunk"] * spans)
    if padding:
        if lengths is None:
            lengths = jnp.full_like(slopes_H, T, jnp.int32, (B,))
        q, k, v, positions = (_pad(x, padding) for x in (q, k, v, positions))
    o, final = _attend(q, k, v, slopes_H, initial, positions, lengths, target, spans, axis_name)
    return o[:, :T], final


def _pad(x, count):
    if x is None:
        return None
    return jnp.pad(x, ((0, 0), (0, count)) + ((0, 0),) * (x.ndim - 2))


def tiling(target, kernel):
    return tilings.TILINGS[target.chip.name][f"lightning_{kernel}"]


def kernels(target, kernel, function):
    """A function of the platform's modules with the target's tiling."""
    module = target.chip.platform + ("_backward" if function == "backward" else "")
    module = importlib.import_module(f"{__package__}.{module}")
    own = tiling(target, kernel)
    return functools.partial(getattr(module, function), tiling=own, interpret=target.interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _attend(q, k, v, slopes_H, initial, positions, lengths, target, spans, axis_name):
    inputs = q, k, v, slopes_H, initial, positions, lengths
    return _forward(*inputs, target, spans, axis_name)[0]


def _forward(q, k, v, slopes_H, initial, positions, lengths, target, spans, axis_name):
    """(o, final state), and what the kernels took: spans as rows, and their entering states."""
    shape = q.shape
    lengths = splits.row_lengths(lengths, spans, shape[1] // spans)
    q, k, v, positions = (splits.rows(x, spans) for x in (q, k, v, positions))
    if spans > 1 or axis_name is not None:
        local = kernels(target, "state", "final_state")(k, v, slopes_H, None, positions, lengths)
        f = splits.decays(slopes_H, positions, lengths, q.shape[:2])[2]
        initial = splits.chain(f, local, initial, spans, axis_name)
    taken = q, k, v, slopes_H, initial, positions, lengths
    o, final = kernels(target, "forward", "forward")(*taken)
    return (o.reshape(shape), final.reshape(shape[0], spans, *final.shape[1:])[:, -1]), taken


def _save(*inputs_and_static):
    *inputs, target, spans, axis_name = inputs_and_static
    given = inputs[4] is not None
    inputs = [None if x is None else x.value for x in inputs]
    outputs, taken = _forward(*inputs, target, spans, axis_name)
    return outputs, (taken, () if given else None)


def _pull(target, spans, axis_name, saved, cotangents):
    (q, k, v, slopes_H, entering, positions, lengths), given = saved
    d_o, d_final = (
        None if isinstance(x, jax.custom_derivatives.SymbolicZero) else x for x in cotangents
    )
    d_o = jnp.zeros_like(q) if d_o is None else d_o.astype(q.dtype).reshape(q.shape)
    if spans > 1 or axis_name is not None:
        entry, _, f = splits.decays(slopes_H, positions, lengths, q.shape[:2])
        seen = splits.weighted(entry, q, d_o)
        d_final = splits.chain(f, seen, d_final, spans, axis_name, reverse=True)
    taken = q, k, v, slopes_H, entering, positions, lengths, d_o, d_final
    *gradients, d_entering = kernels(target, "backward", "backward")(*taken)
    shape = (-1, spans * q.shape[1], *q.shape[2:])
    gradients = [x.reshape(shape) for x in gradients]
    d_initial = None
    if given is not None:
        d_initial = d_entering.reshape(-1, spans, *d_entering.shape[1:])[:, 0]
        if axis_name is not None:
            d_initial = jnp.where(jax.lax.axis_index(axis_name) == 0, d_initial, 0)
    return *gradients, None, d_initial, None, None


_attend.defvjp(_save, _pull, symbolic_zeros=True)
