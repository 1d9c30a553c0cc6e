"""What the TPU and GPU kernels share: paddings, tilings, and what they refuse."""

import functools

import jax.numpy as jnp

from pallas_kernels import chips
from pallas_kernels.tilings import TILINGS
from pallas_kernels.token_logprobs import gpu, tpu
from pallas_kernels.token_logprobs.vocabulary import Part, Rows, Scores, scores


def token_logprobs(hidden_ND, head_DV, labels_N, temperature, axis_name=None) -> Scores:
    target = chips.current()
    forward, backward = (_tpu_forward, _tpu_backward)
    if target.chip.platform == "gpu":
        forward, backward = (_gpu_forward, _gpu_backward)
    part = Part(functools.partial(forward, target), functools.partial(backward, target))
    return scores(part, hidden_ND, head_DV, labels_N, temperature, axis_name)


def refusal(target: chips.Target, hidden_ND, head_DV) -> str | None:
    """Why the kernels cannot do this on that chip; None if they can."""
    known = ("bfloat16", "float32") if target.chip.platform == "tpu" else ("bfloat16",)
    if hidden_ND.dtype != head_DV.dtype or hidden_ND.dtype.name not in known:
        return (
            f"hidden states and head must both be {' or '.join(known)}, "
            f"got {hidden_ND.dtype} and {head_DV.dtype}"
        )
    D = hidden_ND.shape[1]
    if D % 128:
        return f"the hidden size {D} is no multiple of 128"
    if target.chip.platform == "tpu":
        if not all(
            _tiling(target.chip, name, 128, 128, D, hidden_ND.dtype.itemsize)
            for name in ("forward", "backward")
        ):
            return f"tiles of hidden size {D} do not fit the VMEM of a {target.chip.name}"
    return None


def _gpu_forward(target, hidden_ND, head_DV, labels_N, temperature):
    outputs = gpu.forward(
        *_padded(hidden_ND, head_DV, labels_N, gpu.ROWS, gpu.COLUMNS),
        scale=1 / temperature,
        columns=head_DV.shape[1],
        tiling=TILINGS[target.chip.name]["token_logprobs"],
        interpret=target.interpret,
    )
    return tuple(x[: len(labels_N)] for x in outputs)


def _gpu_backward(target, hidden_ND, head_DV, labels_N, rows, temperature):
    d_hidden_ND, d_head_DV = gpu.backward(
        *_padded(hidden_ND, head_DV, labels_N, gpu.ROWS, gpu.COLUMNS, rows),
        scale=1 / temperature,
        tiling=TILINGS[target.chip.name]["token_logprobs"],
        interpret=target.interpret,
    )
    return d_hidden_ND[: len(labels_N)], d_head_DV[:, : head_DV.shape[1]]


def _tpu_forward(target, hidden_ND, head_DV, labels_N, temperature):
    outputs = _tpu(target, "forward", temperature, hidden_ND, head_DV, labels_N)
    return tuple(x[: len(labels_N)] for x in outputs)


def _tpu_backward(target, hidden_ND, head_DV, labels_N, rows, temperature):
    d_hidden_ND, d_head_DV = _tpu(
        target, "backward", temperature, hidden_ND, head_DV, labels_N, rows
    )
    return d_hidden_ND[: len(labels_N)], d_head_DV[:, : head_DV.shape[1]]


def _tpu(target, name, temperature, hidden_ND, head_DV, labels_N, rows=()):
    (N, D), V = hidden_ND.shape, head_DV.shape[1]
    tiling = _tiling(target.chip, name, N, V, D, head_DV.dtype.itemsize)
    return getattr(tpu, name)(
        *_padded(
            hidden_ND,
            head_DV,
            labels_N,
            max(tiling["rows"], tiling.get("hidden_rows", 1)),
            128,
            rows,
        ),
        scale=1 / temperature,
        **({"columns": V} if name == "forward" else {}),
        tiling=tiling,
        vmem=_vmem(target.chip),
        interpret=target.interpret,
    )


def _tiling(chip, name, N, V, D, itemsize):
    """The chip's, made smaller for few rows, a small vocabulary, or hidden states that are wider.

    None where not even the smallest tiles fit.
    """
    tiling = dict(TILINGS[chip.name][f"token_logprobs_{name}"])
    tiling["columns"] = min(tiling["columns"], _round_up(V, 128))
    sizes = [x for x in ("rows", "columns", "hidden_rows") if x in tiling]
    while tpu.vmem_bytes(name, D, itemsize, **tiling) > 0.72 * _vmem(chip):
        largest = max(sizes, key=tiling.get)
        if tiling[largest] == 128:
            return None
        tiling[largest] = _round_up(tiling[largest] // 2, 128)
    # As many tiles, of rows as equal as they can be; one kernel's a multiple of the other's.
    rows = max(tiling[x] for x in sizes if x != "columns")
    even = -(-N // -(-N // rows))
    even = _round_up(even, tpu.PART if even > tpu.PART else 128)
    for x in sizes:
        if x != "columns":
            tiling[x] = (
                even
                if tiling[x] == rows
                else next(n for n in range(min(tiling[x], even), 0, -128) if even % n == 0)
            )
    return tiling


def _vmem(chip):
    """What a kernel asks for: a little less than there is."""
    return chip.vmem * 15 // 16


def _padded(hidden_ND, head_DV, labels_N, multiple, least, rows=()):
    """With rows of zeros up to whole tiles, and columns up to a multiple of 128 and to `least`."""
    V = head_DV.shape[1]
    more, wider = -len(labels_N) % multiple, max(_round_up(V, 128), least) - V
    hidden_ND = jnp.pad(hidden_ND, ((0, more), (0, 0)))
    head_DV = jnp.pad(head_DV, ((0, 0), (0, wider)))
    labels_N, *rows = (jnp.pad(x, (0, more)) for x in (labels_N, *rows))
    return hidden_ND, head_DV, labels_N, *([Rows(*rows)] if rows else [])


def _round_up(size, multiple):
    return -(-size // multiple) * multiple
