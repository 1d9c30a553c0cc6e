"""MiniMax-Text-01's head: V = 200064, D = 6144; 8192 tokens in bfloat16.

The work of scores with gradients is that of four matmuls: logits twice, since they are not kept, and
one for each gradient.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import chips
from pallas_kernels.case import GPUS, TPUS, Case, Numeric, Schedule, worst_error
from pallas_kernels.tilings import TILINGS
from pallas_kernels.token_logprobs import Scores, token_logprobs, tpu

N, D, V = 8192, 6144, 200064
SHARDS = 8  # of the vocabulary, in the case of one device's part


def _arguments(columns):
    of = jax.ShapeDtypeStruct
    return of((N, D), jnp.bfloat16), of((D, columns), jnp.bfloat16), of((N,), jnp.int32)


def _forward(columns, chip):
    return functools.partial(token_logprobs, implementation="pallas"), _arguments(columns)


def _training(columns, chip, implementation="pallas"):
    def function(hidden_ND, head_DV, labels_N):
        call = functools.partial(token_logprobs, implementation=implementation)
        scores, pull = jax.vjp(lambda h, w: call(h, w, labels_N), hidden_ND, head_DV)
        return scores, pull(Scores(*(jnp.ones_like(x) for x in scores)))

    return function, _arguments(columns)


def _xla(columns, chip):
    return {"XLA": functools.partial(token_logprobs, implementation="xla")}


def _xla_training(columns, chip):
    return {"XLA": _training(columns, chip, "xla")[0]}


def _sample(columns, key, chip):
    hidden_ND, head_DV, labels_N = _arguments(columns)
    a, b, c = jax.random.split(key, 3)
    return (
        jax.random.normal(a, hidden_ND.shape, hidden_ND.dtype),
        jax.random.normal(b, head_DV.shape, head_DV.dtype) / np.sqrt(D).astype(head_DV.dtype),
        jax.random.randint(c, labels_N.shape, 0, columns),
    )


def _candidates(chip):
    if chip not in GPUS:
        return {}
    table = TILINGS[chip]["token_logprobs"]
    return {"token_logprobs": [table | dict(band=band) for band in (8, 16, 32)]}


def _tiled(rows, columns, width):
    """Weights of the regions of `tpu._by_tile` per step: all tiles', or whole ones' and the last's."""
    tiles, parts = -(-width // columns), rows // tpu.PART
    if width % columns == 0:
        return (1, parts)
    return (1 - 1 / tiles, parts * (1 - 1 / tiles), 1 / tiles, parts / tiles)


def _schedule(width, chip, training=False):
    """First and last tiles of a row or column have regions; bytes: what each tile reads again."""
    t = TILINGS[chip]["token_logprobs_forward"]
    rows, columns = t["rows"], t["columns"]
    tiles = -(-width // columns)
    # Under a gradient the compiler names it so.
    name = "jvp_token_logprobs_forward_" if training else "token_logprobs_forward"
    found = {
        name: Schedule(
            # The end of a row lies within the region of its last tile.
            regions=(1 / tiles, *_tiled(rows, columns, width)),
            bytes=2 * D * (N + width * N // rows),
        )
    }
    if training:
        t = TILINGS[chip]["token_logprobs_backward"]
        rows, columns, down = t["rows"], t["columns"], t["hidden_rows"]
        every = -(-width // columns)
        parts = -(-every // (t["part_bytes"] // (2 * N * columns)))
        tiles = -(-every // parts)
        dz = 2 * N * tiles * columns
        found["token_logprobs_d_head"] = Schedule(
            regions=(rows / N, rows / N, *([1] if width % columns else [])),  # 1: a part of a tile
            calls=parts,
            bytes=2 * D * (2 * N * tiles + 2 * tiles * columns) + dz,
        )
        found["token_logprobs_d_hidden"] = Schedule(
            regions=(1 / tiles, *_tiled(down, columns, width)),
            calls=parts,
            bytes=2 * D * (N // down * tiles * columns + 2 * N) + dz,
        )
    return found


def _case(name, width, training):
    matmuls = 4 if training else 1
    return Case(
        "token_logprobs",
        name,
        TPUS + GPUS,
        build=functools.partial(_training if training else _forward, width),
        flops=2 * matmuls * N * D * width,
        bytes=2 * (N * D + D * width) * (2 if training else 1),
        gate=dict(v5p=0.75, v6e=0.75, tpu7x=0.7),
        schedule=functools.partial(_schedule, width, training=training),
        measured={"h200": 0.75},
        sample=functools.partial(_sample, width),
        candidates=_candidates,
        rivals=functools.partial(_xla_training if training else _xla, width),
    )


CASES = [
    _case("forward 8k", V, False),
    _case("forward and backward 8k", V, True),
    _case(f"forward and backward 8k, 1/{SHARDS} of the vocabulary", V // SHARDS, True),
]


def _error(dtype, wanted):
    """Of values (`wanted` 0) or gradients (1), with two tiles and columns that fill no lane tile."""
    return _errors(dtype, chips.current())[wanted]


@functools.cache
def _errors(dtype, target):
    """Both, which one run of what `target` is has."""
    del target
    rng, (n, d, v), temperature = np.random.default_rng(0), (40, 128, 600), 0.7
    hidden = jnp.asarray(rng.normal(size=(n, d)), dtype)
    head = jnp.asarray(2 * rng.normal(size=(d, v)) / np.sqrt(d), dtype)
    labels, cotangents = rng.integers(0, v, n), rng.normal(size=(3, n))
    labels[-1] = v - 1

    @jax.jit
    def run(hidden, head, labels, cotangents):
        scores, pull = jax.vjp(
            lambda h, w: token_logprobs(
                h, w, labels, temperature=temperature, implementation="pallas"
            ),
            hidden,
            head,
        )
        return scores, pull(Scores(*cotangents))

    got = run(hidden, head, jnp.asarray(labels), tuple(jnp.float32(x) for x in cotangents))
    h, w = (np.asarray(x, np.float64) for x in (hidden, head))
    z = h @ w / temperature
    top = z.max(1, keepdims=True)
    lse = top + np.log(np.exp(z - top).sum(1, keepdims=True))
    logp, onehot = z - lse, np.eye(v)[labels]
    entropy = -(np.exp(logp) * logp).sum(1, keepdims=True)
    a, b, c = cotangents[:, :, None]
    dz = a * (onehot - np.exp(logp)) - b * np.exp(logp) * (logp + entropy) + c * np.exp(logp)
    values = (logp * onehot).sum(1), entropy[:, 0], lse[:, 0]
    gradients = dz @ w.T / temperature, h.T @ dz / temperature
    return worst_error(got[0], values), worst_error(got[1], gradients)


NUMERICS = [
    Numeric(
        "token_logprobs", f"{name}, {dtype}", chips_, functools.partial(_error, dtype, i), limit
    )
    for dtype, chips_, limits in (
        ("bfloat16", ("v5p", "h200"), (1e-5, 8e-3)),
        ("float32", ("v5p",), (1e-5, 1e-5)),
    )
    for i, (name, limit) in enumerate(zip(("scores", "gradients"), limits, strict=True))
]
