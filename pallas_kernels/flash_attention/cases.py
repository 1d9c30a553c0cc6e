"""MiniMax-Text-01's softmax layers: 64 heads, 8 of keys and values, 128 wide, bfloat16.

The kernels are JAX's and cuDNN's: compiled to show that they serve these shapes, without gates.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import GPUS, TPUS, Case, Numeric, worst_error
from pallas_kernels.flash_attention import flash_attention

N, G, K = 8, 8, 128


def _build(T, packed, chip, implementation="pallas"):
    of = jax.ShapeDtypeStruct
    q_BTNGK, k_BTNK = (of((1, T, *x, K), jnp.bfloat16) for x in ((N, G), (N,)))
    ids = (of((1, T), jnp.int32),) if packed else ()

    def function(q, k, v, dy, segment_ids=None):
        call = functools.partial(
            flash_attention, segment_ids=segment_ids, implementation=implementation
        )
        y, pull = jax.vjp(call, q, k, v)
        return y, pull(dy)

    return function, (q_BTNGK, k_BTNK, k_BTNK, q_BTNGK, *ids)


def _xla(T, packed, chip):
    return {"XLA": _build(T, packed, chip, "xla")[0]}


def _sample(T, packed, key, chip):
    """Normal values; four segments."""
    _, (*arrays, last) = _build(T, packed, chip)
    arrays = arrays if packed else [*arrays, last]
    keys = jax.random.split(key, len(arrays))
    values = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, arrays, strict=True)]
    return *values, *([jnp.arange(T, dtype=jnp.int32)[None] * 4 // T] if packed else [])


def _case(name, T, packed, targets):
    # Products with half of the scores: two forward, five backward.
    flops = 7 * N * G * T * T * K
    return Case(
        "flash_attention",
        name,
        targets,
        build=functools.partial(_build, T, packed),
        flops=flops,
        bytes=2 * T * K * (4 * N * G + 4 * N),
        read=False,
        sample=functools.partial(_sample, T, packed),
        rivals=functools.partial(_xla, T, packed),
    )


CASES = [
    _case("forward and backward 8k", 8192, False, (*TPUS, *GPUS)),
    _case("forward and backward 8k, packed", 8192, True, (*TPUS, *GPUS)),
]


def _error(dtype):
    """Of y and its gradients, two segments in 200 tokens."""
    rng, (n, g, T) = np.random.default_rng(0), (1, 2, 200)
    q = jnp.asarray(rng.normal(size=(1, T, n, g, K)), dtype)
    k, v = (jnp.asarray(x, dtype) for x in rng.normal(size=(2, 1, T, n, K)))
    dy = jnp.asarray(rng.normal(size=q.shape), dtype)
    ids = np.arange(T)[None] // 77

    def both(q, k, v, dy):
        call = functools.partial(
            flash_attention, segment_ids=jnp.asarray(ids), implementation="pallas"
        )
        y, pull = jax.vjp(call, q, k, v)
        return y, *pull(dy)

    got = jax.jit(both)(q, k, v, dy)
    q, k, v, dy = (np.asarray(x, np.float64) for x in (q, k, v, dy))
    sees = np.tril(ids[0][:, None] == ids[0])
    scores = np.where(sees, np.einsum("btngk,bsnk->bngts", q, k) / np.sqrt(K), -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    y = np.einsum("bngts,bsnk->btngk", p, v)
    dp = np.einsum("btngk,bsnk->bngts", dy, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(K)
    dq = np.einsum("bngts,bsnk->btngk", ds, k)
    dk = np.einsum("bngts,btngk->bsnk", ds, q)
    dv = np.einsum("bngts,btngk->bsnk", p, dy)
    return worst_error(got, (y, dq, dk, dv))


NUMERICS = [
    # Splash attention takes scaled queries, rounded once more; then p and ds are, as everywhere.
    Numeric("flash_attention", dtype, ("v5p",), functools.partial(_error, dtype), limit)
    for dtype, limit in (("bfloat16", 1.5e-2), ("float32", 1e-5))
]
