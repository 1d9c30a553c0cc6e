"""TPU: JAX's splash attention, with causal masks by block and segment ids.

Blocks above the diagonal are skipped. Blocks that lie in other segments are not: their scores are
computed and masked.
"""

import jax

LANES = 128


def forward(q_BTNGK, k_BTNK, v_BTNK, segment_ids, *, tiling, interpret):
    """y `[B, T, N, G, K]`, with gradients; T a multiple of 128.

    tiling: queries and keys of a block, keys of one product in it, and `dq_bytes`: how much the
    partial sums of dq may take. The backward kernel that computes all gradients at once writes one
    for each block of keys; where they are larger, dq gets a kernel of its own.
    """
    B, T, N, G, K = q_BTNGK.shape
    kernel = _kernel(T, N * G, K, q_BTNGK.dtype.itemsize, B, tuple(tiling.items()), interpret)
    # Splash attention has no scale: q is rounded once more, in its own type.
    q = (q_BTNGK * K**-0.5).astype(q_BTNGK.dtype).reshape(B, T, N * G, K).swapaxes(1, 2)
    k, v = (x.swapaxes(1, 2) for x in (k_BTNK, v_BTNK))
    ids = None if segment_ids is None else _splash().SegmentIds(segment_ids, segment_ids)
    y_BHTK = jax.vmap(kernel)(q, k, v, ids)
    return y_BHTK.swapaxes(1, 2).reshape(q_BTNGK.shape)


def _kernel(T, H, K, itemsize, B, tiling, interpret):
    tiling, splash = dict(tiling), _splash()
    queries, keys = (_divisor(T, tiling[name]) for name in ("queries", "keys"))
    part = _divisor(keys, tiling["part"])
    fused = B * T // keys * H * T * K * itemsize <= tiling["dq_bytes"]
    blocks = splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=part,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=part,
        use_fused_bwd_kernel=fused,
        **({} if fused else dict(block_q_dq=queries, block_kv_dq=part)),
    )
    masks = splash.MultiHeadMask([splash.CausalMask((T, T))] * H)
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha_single_device(masks, block_sizes=blocks, interpret=interpret)


def _divisor(size, most):
    """The largest multiple of 128 that divides `size` and is not above `most`."""
    return next(x for x in range(min(most, size) // LANES * LANES, 0, -LANES) if size % x == 0)


def _splash():
    from jax.experimental.pallas.ops.tpu import splash_attention

    return splash_attention
