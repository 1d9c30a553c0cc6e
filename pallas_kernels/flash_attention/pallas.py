"""What the accelerators' kernels share: which one runs, paddings, and what is refused."""

import jax
import jax.numpy as jnp

from pallas_kernels import chips
from pallas_kernels.flash_attention import gpu, tpu
from pallas_kernels.tilings import TILINGS


def flash_attention(q_BTNGK, k_BTNK, v_BTNK, segment_ids):
    target, T = chips.current(), q_BTNGK.shape[1]
    is_tpu = target.chip.platform == "tpu"
    # Padding comes last, so no token sees it; a multiple of 8 for cuDNN, which wants even lengths.
    more = -T % (tpu.LANES if is_tpu else 8)
    q, k, v, ids = (
        x if x is None or not more else jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))
        for x in (q_BTNGK, k_BTNK, v_BTNK, segment_ids)
    )
    if is_tpu:
        tiling = TILINGS[target.chip.name]["flash_attention"]
        y = tpu.forward(q, k, v, ids, tiling=tiling, interpret=target.interpret)
    else:
        y = gpu.forward(q, k, v, ids)
    return y[:, :T]


def refusal(target: chips.Target, q_BTNGK: jax.Array, segment_ids) -> str | None:
    """Why the kernels cannot do this on that chip; None if they can."""
    if jax.typeof(q_BTNGK).manual_axis_type.varying:
        return "JAX's attention kernels run in shard_map only with check_vma=False"
    if target.chip.platform == "gpu":
        if target.interpret:
            return "cuDNN's attention has no interpreter"
        return gpu.refusal(q_BTNGK, segment_ids)
    if q_BTNGK.dtype not in (jnp.bfloat16, jnp.float32):
        return f"splash attention takes bfloat16 and float32, not {q_BTNGK.dtype}"
    if q_BTNGK.shape[-1] % tpu.LANES:
        return (
            f"splash attention takes head sizes that are multiples of 128, not {q_BTNGK.shape[-1]}"
        )
    return None
