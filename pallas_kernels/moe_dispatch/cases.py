"""MiniMax-Text-01's layer: D = 6144, F = 9216, 32 experts, 2 per token, bfloat16.

Groups are those of routing by chance: counts of a multinomial draw, the same in schedules and samples.
Rows computed in vain count as time, not as work.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import chips
from pallas_kernels.case import GPUS, TPUS, Case, Numeric, Schedule, worst_error
from pallas_kernels.moe_dispatch import moe_mlp, pallas, ragged, routing
from pallas_kernels.tilings import TILINGS

D, F, E, K = 6144, 9216, 32, 2
WEIGHT = E * D * F * 2  # bytes of gate, of up or of down


def _kernels(chip):
    return pallas._kernels(chips.CHIPS[chip].platform)


def _multiple(chip, pairs):
    return _kernels(chip).multiple(pairs, E, jnp.bfloat16)


def _rows(chip, pairs):
    """Rows that hold so many pairs, as `routing.group` makes them; on a GPU no more than the groups'.

    There all of a result is then defined, and `bench` can compare tilings.
    """
    multiple = _multiple(chip, pairs)
    if chips.CHIPS[chip].platform == "gpu":
        return int(routing.round_up(_counts(pairs), multiple).sum())
    return routing.round_up(pairs + E * (multiple - 1), multiple)


def _counts(pairs):
    return np.random.default_rng(0).multinomial(pairs, np.full(E, 1 / E)).astype(np.int32)


def _array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


# The grouped matmuls alone. kernel -> (function's name, how it is called, M, N, matrices, outputs)
def _matmul(kernel, pairs, chip):
    """The function and its arguments, the last of which are the counts."""
    kernels, R = _kernels(chip), _rows(chip, pairs)
    name = kernel.removesuffix("_transposed")
    fixed = dict(
        multiple=_multiple(chip, pairs),
        tiling=kernels.tilings(chip, pairs, E)[name],
        interpret=chips.current().interpret,
    )
    counts = _array(E, dtype=jnp.int32)
    if kernel == "gmm_swiglu":
        function = functools.partial(kernels.gmm_swiglu, keep=False, **fixed)
        return function, (_array(R, D), _array(E, D, F), _array(E, D, F), counts)
    function = functools.partial(getattr(kernels, name), out_dtype=jnp.bfloat16, **fixed)
    if kernel == "tgmm":
        return function, (_array(R, D), _array(R, F), counts)
    if kernel == "gmm_transposed":
        function = functools.partial(function, transposed=True)
        return function, (_array(R, F), _array(E, D, F), counts)
    return function, (_array(R, F), _array(E, F, D), counts)


def _sample(kernel, pairs, key, chip):
    """Normal values and zeros in padding."""
    _, (*arrays, _) = _matmul(kernel, pairs, chip)
    counts, multiple = _counts(pairs), _multiple(chip, pairs)
    starts = np.asarray(routing.group_starts(counts, multiple))
    held = np.zeros(_rows(chip, pairs), bool)
    for start, count in zip(starts, counts, strict=True):
        held[start : start + count] = True
    values = []
    for array, own in zip(arrays, jax.random.split(key, len(arrays)), strict=True):
        value = jax.random.normal(own, array.shape, array.dtype)
        if array.ndim == 2:
            value = jnp.where(held[:, None], value, 0).astype(array.dtype)
        else:
            value = value / np.sqrt(array.shape[1]).astype(array.dtype)
        values.append(value)
    return *values, jnp.asarray(counts)


def _ragged(kernel, pairs, chip):
    """The same by `jax.lax.ragged_dot`."""
    multiple = _multiple(chip, pairs)

    def function(*operands):
        *arrays, counts_E = operands
        sizes_E = routing.round_up(counts_E, multiple)
        if kernel == "tgmm":
            return ragged._over_rows(*arrays, sizes_E, jnp.bfloat16)
        transposed = kernel == "gmm_transposed"
        products = [ragged._by_expert(arrays[0], w, sizes_E, transposed) for w in arrays[1:]]
        if kernel == "gmm_swiglu":
            products = [jax.nn.silu(products[0]) * products[1]]
        return products[0].astype(jnp.bfloat16)

    return {"ragged_dot": function}


def _candidates(kernel, chip):
    """Tilings that `bench` tries: other widths, and on GPUs depths, bands, and without clusters."""
    name = f"moe_dispatch.{kernel.removesuffix('_transposed')}"
    table = TILINGS[chip][name]
    if chips.CHIPS[chip].platform == "tpu":
        others = [dict(columns=256), dict(columns=1024), dict(block=128), dict(block=512)]
        if kernel == "tgmm":
            others = [dict(rows_out=m, columns_out=n) for m in (1536, 3072) for n in (512, 1024)]
        return {name: [table | other for other in others if table | other != table]}
    others = [dict(cluster=1), dict(stages=4, places=2), dict(stages=3, places=4)]
    others += [dict(stages=3, places=2)] + [dict(band=b) for b in (4, 16) if "band" in table]
    if kernel != "gmm_swiglu":  # whose two sums fill the registers at 128 columns
        others += [dict(block_columns=128, stages=6, places=2)]
    return {name: [table | other for other in others if table | other != table]}


def _matmul_case(kernel, size, tokens, gate):
    pairs = tokens * K
    matrices = 2 if kernel == "gmm_swiglu" else 1
    return Case(
        "moe_dispatch",
        f"{kernel} {size}",
        TPUS + GPUS,
        build=functools.partial(_matmul, kernel, pairs),
        flops=2 * pairs * D * F * matrices,
        bytes=WEIGHT * matrices + 2 * pairs * (D + F),
        gate=gate,
        schedule=lambda chip: dict([_schedule(kernel, pairs, chip)]),
        measured={"h200": 0.65 if kernel == "tgmm" else 0.75},
        sample=functools.partial(_sample, kernel, pairs),
        candidates=functools.partial(_candidates, kernel),
        rivals=functools.partial(_ragged, kernel, pairs),
    )


# The layer.
def _layer(tokens, gradient, chip):
    def forward(x_ND, gate_EDF, up_EDF, down_EFD, weights_NK, experts_NK):
        return moe_mlp(
            x_ND, gate_EDF, up_EDF, down_EFD, experts_NK, weights_NK, implementation="pallas"
        )[0]

    def backward(*operands):
        *operands, d_y_ND = operands
        y_ND, pull = jax.vjp(lambda *own: forward(*own, operands[-1]), *operands[:-1])
        return y_ND, pull(d_y_ND)

    matrices = _array(E, D, F), _array(E, D, F), _array(E, F, D)
    choices = _array(tokens, K, dtype=jnp.float32), _array(tokens, K, dtype=jnp.int32)
    operands = _array(tokens, D), *matrices, *choices
    return (backward, (*operands, _array(tokens, D))) if gradient else (forward, operands)


def _layer_sample(tokens, gradient, key, chip):
    keys = jax.random.split(key, 7)
    x_ND, d_y_ND = (jax.random.normal(k, (tokens, D), jnp.bfloat16) for k in keys[:2])
    matrices = [
        jax.random.normal(k, shape, jnp.bfloat16) / np.sqrt(shape[1]).astype(jnp.bfloat16)
        for k, shape in zip(keys[2:5], ((E, D, F), (E, D, F), (E, F, D)), strict=True)
    ]
    logits_NE = jax.random.normal(keys[5], (tokens, E))
    weights_NK, experts_NK = jax.lax.top_k(jax.nn.softmax(logits_NE), K)
    operands = x_ND, *matrices, weights_NK, experts_NK.astype(jnp.int32)
    return (*operands, d_y_ND) if gradient else operands


def _layer_rivals(tokens, gradient, chip):
    def xla(x_ND, gate_EDF, up_EDF, down_EFD, weights_NK, experts_NK, d_y_ND=None):
        def forward(*own):
            *own, weights_NK = own
            return moe_mlp(*own, experts_NK, weights_NK, implementation="xla")[0]

        operands = x_ND, gate_EDF, up_EDF, down_EFD, weights_NK
        if d_y_ND is None:
            return forward(*operands)
        y_ND, pull = jax.vjp(forward, *operands)
        return y_ND, pull(d_y_ND)

    def dense(x_ND, gate_EDF, up_EDF, down_EFD, *_):
        """As many operations without routing: every token through as many columns."""
        gate_DF, up_DF, down_FD = gate_EDF[:K], up_EDF[:K], down_EFD[:K]
        return sum(
            (jax.nn.silu(x_ND @ gate) * (x_ND @ up)) @ down
            for gate, up, down in zip(gate_DF, up_DF, down_FD, strict=True)
        )

    return {"xla": xla} if gradient else {"xla": xla, "dense": dense}


def _layer_case(size, tokens, gradient, gate):
    pairs, passes = tokens * K, 3 if gradient else 1
    # Of two calls of one shape the compiler writes one schedule.
    calls = [("gmm_swiglu", False, 1), ("gmm", False, 1)]
    if gradient:
        calls += [
            (kernel, back, 2 - back) for kernel in ("gmm_transposed", "tgmm") for back in (0, 1)
        ]
    return Case(
        "moe_dispatch",
        f"layer {size}, {'forward and backward' if gradient else 'forward'}",
        TPUS + GPUS,
        build=functools.partial(_layer, tokens, gradient),
        flops=6 * pairs * D * F * passes,
        bytes=3 * WEIGHT * passes + 2 * tokens * D * (4 if gradient else 2),
        gate=gate,
        schedule=lambda chip: dict(
            _schedule(kernel, pairs, chip, gradient, swapped, count)
            for kernel, swapped, count in calls
        ),
        measured={"h200": 0.65},
        sample=functools.partial(_layer_sample, tokens, gradient),
        rivals=functools.partial(_layer_rivals, tokens, gradient),
    )


# How often the parts of the TPU kernels run.
def _schedule(kernel, pairs, chip, keep=False, swapped=False, calls=1):
    """(kernel's name, Schedule). swapped: with the widths of `down` in place of those of `gate`."""
    from pallas_kernels.moe_dispatch import tpu, tpu_wgrad

    tiling = tpu.tilings(chip, pairs, E)[kernel.removesuffix("_transposed")]
    multiple, R = _multiple(chip, pairs), _rows(chip, pairs)
    extents = routing.round_up(_counts(pairs), multiple)
    if kernel == "tgmm":
        M, N = (F, D) if swapped else (D, F)
        fitted = tpu_wgrad.fit(R, M, N, 2, 2, tiling)
        return f"moe_tgmm_{M}x{N}", _wgrad_schedule(M, N, fitted, extents, tiling["whole"], calls)
    M, N = (D, F) if kernel == "gmm_swiglu" or swapped else (F, D)
    matrices, outputs = (2, 3 if keep else 1) if kernel == "gmm_swiglu" else (1, 1)
    out_width = 4 if kernel == "gmm_transposed" and keep and not swapped else 2
    rows, columns, cores = tpu.fit(R, M, N, 2, matrices, outputs * [out_width], multiple, tiling)
    left = np.concatenate([np.minimum(rows, np.arange(n, 0, -rows)) for n in extents])
    items, regions = len(left), []
    for size in tpu.sizes(multiple, rows, tiling["block"]):  # whether there is one, and how many
        regions += [float(np.mean(left >= size)), float(np.mean(left // size))]
        left = left % size
    moved = cores * items * rows * M * 2 + matrices * items * M * N * 2
    moved += outputs * int(extents.sum()) * N * out_width
    steps = items * N // columns // cores
    name = "moe_swiglu" if kernel == "gmm_swiglu" else f"moe_{kernel}"
    return f"{name}_{M}x{N}", Schedule(regions, steps=steps, calls=calls, bytes=moved)


def _wgrad_schedule(M, N, fitted, extents, whole, calls):
    """Zeros; x^T filled a block at a time, a product for each number of blocks; or several parts."""
    rows, out_M, out_N, cores = fitted
    blocks, each, tiles_N = -(-extents // 128), rows // 128, N // out_N
    parts = int(-(-extents.max() // rows))
    # Blocks in each part of each expert.
    run = np.clip(blocks[:, None] - np.arange(parts) * each, 0, each)
    share = lambda which: float(np.mean(which))  # noqa: E731
    regions = [share(blocks == 0) / parts]
    if whole:
        one = float(parts == 1)
        regions += [one / tiles_N] + [one * share(run > b) / tiles_N for b in range(each)]
        regions += [one * share(run == b + 1) for b in range(each)]
    if whole and parts == 1:
        regions += [0.0] * 7
        moved = E * rows * 2 * (M + N * (M // out_M))
    else:
        some, full = share(run > 0), share(run == each)
        regions += [some, 1 / parts, full, some - full, some - full]
        regions += [share(np.where(run < each, run, 0)), 1 / parts]
        moved = int(np.sum(run > 0)) * rows * 2 * (M * (N // out_N) + N * (M // out_M))
    steps = E * (M // out_M // cores) * tiles_N * parts
    return Schedule(regions, steps=steps, calls=calls, bytes=moved + E * M * N * 2)


_FULL = {"v5p": 0.85, "v6e": 0.85, "tpu7x": 0.70}
# At 512 rows per expert the rounding of rows to the depth of the matrix unit alone costs 0.89 (128
# deep: v5p) and 0.80 (256 deep).
_WGRAD = {"v5p": 0.82, "v6e": 0.85, "tpu7x": 0.70}
_BACKWARD = {"v5p": 0.85, "v6e": 0.80, "tpu7x": 0.75}
CASES = [
    _matmul_case("gmm", "8k", 8192, _FULL),
    _matmul_case("gmm_transposed", "8k", 8192, _FULL),
    _matmul_case("gmm_swiglu", "8k", 8192, _FULL),
    _matmul_case("tgmm", "8k", 8192, _WGRAD),
    _matmul_case("gmm_swiglu", "128k", 131072, _FULL),
    _matmul_case("tgmm", "128k", 131072, _WGRAD),
    _layer_case("8k", 8192, True, _BACKWARD),
    _layer_case("64 tokens", 64, False, _FULL),
]


# Numerics: the layer and all its gradients, pair by pair in float64.
def _definition(x, gate, up, down, experts, weights, capacity, d_y):
    taken = np.zeros(len(gate), int)
    y, *grads = (np.zeros(z.shape) for z in (x, x, gate, up, down, weights))
    d_x, d_gate, d_up, d_down, d_weights = grads
    for k in range(experts.shape[1]):  # first choices before second ones
        for n, e in enumerate(experts[:, k]):
            if e >= len(gate) or taken[e] >= capacity:
                continue
            taken[e] += 1
            w, g, u = weights[n, k], x[n] @ gate[e], x[n] @ up[e]
            sigmoid = 1 / (1 + np.exp(-g))
            hidden, pulled = g * sigmoid * u, down[e] @ d_y[n]
            y[n] += w * hidden @ down[e]
            d_weights[n, k] = pulled @ hidden
            d_g = w * pulled * u * sigmoid * (1 + g * (1 - sigmoid))
            d_u = w * pulled * g * sigmoid
            d_x[n] += gate[e] @ d_g + up[e] @ d_u
            d_gate[e] += np.outer(x[n], d_g)
            d_up[e] += np.outer(x[n], d_u)
            d_down[e] += np.outer(w * hidden, d_y[n])
    return y, *grads


def _error(dtype, capacity, skew):
    """Of 300 tokens and 6 experts, of which the fifth has no rows; a tenth is padding."""
    rng = np.random.default_rng(0)
    tokens, width, hidden, experts = 300, 256, 384, 6
    logits = rng.normal(size=(tokens, experts)) - skew * np.arange(experts)
    logits[:, 4] = -np.inf
    chosen = np.argsort(-logits, axis=1)[:, :K].astype(np.int32)
    chosen[rng.random(tokens) < 0.1] = experts
    shapes = (experts, width, hidden), (experts, width, hidden), (experts, hidden, width)
    arrays = [rng.normal(size=(tokens, width)), *(rng.normal(size=s) / s[1] ** 0.5 for s in shapes)]
    narrow = [jnp.asarray(z, dtype) for z in arrays]
    arrays = [np.asarray(z, np.float64) for z in narrow]
    weights, d_y = rng.dirichlet(np.ones(K), size=tokens), rng.normal(size=(tokens, width))
    d_y_ND = jnp.asarray(d_y, dtype)
    want = _definition(*arrays, chosen, weights, capacity or tokens, np.asarray(d_y_ND, np.float64))

    @jax.jit
    def run(d_y_ND, *own):
        def forward(*own):
            *own, weights_NK = own
            return moe_mlp(*own, chosen, weights_NK, capacity=capacity, implementation="pallas")[0]

        y_ND, pull = jax.vjp(forward, *own)
        return y_ND, *pull(d_y_ND)

    got = run(d_y_ND, *narrow, jnp.asarray(weights, jnp.float32))
    return worst_error(got, want)


# In bfloat16 what gate, up and hidden gave is rounded in between, in every implementation.
NUMERICS = [
    Numeric("moe_dispatch", "layer and gradients, bfloat16", ("v6e", "h200"),
            functools.partial(_error, jnp.bfloat16, None, 0.3), 1.2e-2),
    Numeric("moe_dispatch", "layer and gradients, uneven and capacity 100, bfloat16", ("v6e", "h200"),
            functools.partial(_error, jnp.bfloat16, 100, 2.0), 1.2e-2),
    Numeric("moe_dispatch", "layer and gradients, float32", ("v6e",),
            functools.partial(_error, jnp.float32, None, 0.3), 1e-5),
]  # fmt: skip
