"""The Hopper kernels of lightning attention, interpreted, against the recurrence in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import versions

if jax.__version_info__ < (0, 11):
    pytest.skip("GPU kernels are interpreted by JAX 0.11 or later", allow_module_level=True)

from pallas_kernels.lightning_attention import gpu, gpu_backward

CONTINUES = 1 << 20
LIMIT = 5e-3  # of the largest value: bfloat16 rounds the output alone by up to 3.9e-3


def tiling(splits, stages=2):
    return dict(stages=stages, splits=splits)


def draw(seed, B, T, H):
    """q, k, v, do in bfloat16 and two states in float32."""
    random = np.random.default_rng(seed)
    arrays = [jnp.asarray(random.normal(size=(B, T, H, 128)), jnp.bfloat16) for _ in range(4)]
    states = [random.normal(size=(B, H, 128, 128)).astype(np.float32) for _ in range(2)]
    return arrays, states


def positions_of(starts, T):
    """int32 [T]: the first segment continues what came before the row, others begin at `starts`."""
    t = np.arange(T)
    begin = np.zeros(T, int)
    for start in sorted(starts):
        begin[start:] = start
    return (t - begin + np.where(begin == 0, CONTINUES, 0)).astype(np.int32)


def recurrence(q, k, v, slopes, initial, positions, lengths, do=None, d_final=None):
    """o, final state and, if do is given, dq, dk, dv, d_initial; token by token."""
    q, k, v, do = (None if x is None else np.asarray(x, np.float64) for x in (q, k, v, do))
    B, T, H, K = k.shape
    g = np.exp(-np.asarray(slopes, np.float64))[:, None, None]
    o, dq, dk, dv = (np.zeros((B, T, H, K)) for _ in range(4))
    final, d_initial = (np.zeros((B, H, K, K)) for _ in range(2))
    for b in range(B):
        state = np.zeros((H, K, K)) if initial is None else initial[b].astype(np.float64)
        there = range(T if lengths is None else lengths[b])
        for t in there:
            begins = positions is not None and positions[b, t] == 0
            state = g * state * (not begins) + k[b, t, :, :, None] * v[b, t, :, None, :]
            if q is not None:
                o[b, t] = np.einsum("hk,hkv->hv", q[b, t], state)
            if do is not None:
                dq[b, t] = np.einsum("hv,hkv->hk", do[b, t], state)
        final[b] = state
        if do is None:
            continue
        grad = np.zeros((H, K, K)) if d_final is None else d_final[b].astype(np.float64)
        for t in reversed(there):
            grad = grad + q[b, t, :, :, None] * do[b, t, :, None, :]
            dv[b, t] = np.einsum("hk,hkv->hv", k[b, t], grad)
            dk[b, t] = np.einsum("hv,hkv->hk", v[b, t], grad)
            begins = positions is not None and positions[b, t] == 0
            grad = g * grad * (not begins)
        d_initial[b] = grad
    return (o, final) if do is None else (o, final, dq, dk, dv, d_initial)


def close(got, want, limit=LIMIT):
    got, want = np.asarray(got, np.float64), np.asarray(want)
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= limit * np.abs(want).max()


def close_rows(got, want, limit=1e-2):
    """Each row against its own largest value; rows of zeros exactly."""
    for row, wanted in zip(np.asarray(got, np.float64), want, strict=True):
        assert np.isfinite(row).all()
        assert np.abs(row - wanted).max() <= limit * np.abs(wanted).max()


def forward(*inputs, splits=1, stages=2):
    run = jax.jit(lambda *x: gpu.forward(*x, tiling=tiling(splits, stages), interpret=True))
    return run(*inputs)


def backward(*inputs, splits=1):
    run = jax.jit(lambda *x: gpu_backward.backward(*x, tiling=tiling(splits), interpret=True))
    return run(*inputs)


@pytest.mark.parametrize("splits, stages", [(1, 2), (2, 3)])
@pytest.mark.parametrize("options", ["", "i", "pl", "ipl"])
def test_forward(splits, stages, options):
    T, slopes = 192, jnp.array([0.92, 5e-5])
    (q, k, v, _), (initial, _) = draw(0, 2, T, 2)
    inputs = [q, k, v, slopes, initial if "i" in options else None]
    positions = np.stack([positions_of([5, 70, 71, 150], T), positions_of([64], T)])
    inputs += [positions if "p" in options else None]
    inputs += [np.array([160, 131], np.int32) if "l" in options else None]
    o, final = forward(*inputs, splits=splits, stages=stages)
    want_o, want_final = recurrence(*inputs)
    assert o.dtype == jnp.bfloat16 and final.dtype == jnp.float32
    for h in range(2):  # the heads' sizes differ by their slopes
        close(o[:, :, h], want_o[:, :, h])
        close(final[:, h], want_final[:, h])


@pytest.mark.parametrize("splits, options", [(1, "ipl"), (2, "ipl"), (1, "")])
def test_backward(splits, options):
    T, slopes = 192, jnp.array([0.3, 5e-5])
    (q, k, v, do), (initial, d_final) = draw(1, 2, T, 2)
    inputs = [q, k, v, slopes, initial if "i" in options else None]
    positions = np.stack([positions_of([5, 70, 71, 150], T), positions_of([64], T)])
    inputs += [positions if "p" in options else None]
    inputs += [np.array([160, 131], np.int32) if "l" in options else None]
    inputs += [do, d_final if "i" in options else None]
    got = backward(*inputs, splits=splits)
    wanted = recurrence(*inputs)[2:]
    for x, want, axis in zip(got, wanted, (2, 2, 2, 1), strict=True):
        for h in range(2):
            close(np.take(np.asarray(x, np.float32), h, axis), np.take(want, h, axis))


def test_a_boundary_at_every_position():
    T, slopes = 17 * 64, jnp.array([0.02])
    (q, k, v, do), (initial, d_final) = draw(2, 2, T, 1)
    starts = [[64 * c + 16 * row + c + far for c in range(16) for far in (0, 32)] for row in (0, 1)]
    starts = [[start for start in row if start] for row in starts]
    assert {start % 64 for row in starts for start in row} | {0} == set(range(64))
    boundaries = [(b, t + at) for b, row in enumerate(starts) for t in row for at in (-1, 0)]
    positions = np.stack([positions_of(row, T) for row in starts])
    inputs = q, k, v, slopes, initial, positions, None
    want = recurrence(*inputs, do, d_final)
    got = *forward(*inputs), *backward(*inputs, do, d_final)
    for n, (x, wanted) in enumerate(zip(got, want, strict=True)):
        close(x, wanted)
        for b, t in boundaries:
            if n not in (1, 5):  # the tokens at a boundary, each against its own size
                close(x[b, t], wanted[b, t], 1.5e-2)


def test_every_length():
    T, slopes = 128, jnp.array([0.02])
    lengths = np.array([0, 1, 2, 63, 64, 65, 127, 128], np.int32)
    B = len(lengths)
    (q, k, v, do), (initial, d_final) = draw(3, B, T, 1)
    # the tokens past the end must not matter, whatever they are
    k = k.at[1, 1:].set(1e30)
    do = do.at[1, 1:].set(1e30)
    inputs = q, k, v, slopes, initial, None, lengths
    want = recurrence(*inputs, do, d_final)
    got = *forward(*inputs), *backward(*inputs, do, d_final)
    for x, wanted in zip(got, want, strict=True):
        close_rows(x, wanted)


def test_segments_of_one_token():
    T, slopes = 64, jnp.array([0.5])
    (q, k, v, do), (initial, d_final) = draw(4, 1, T, 1)
    positions = positions_of(range(1, T), T)[None]
    inputs = q, k, v, slopes, initial, positions, None
    want = recurrence(*inputs, do, d_final)
    got = *forward(*inputs, splits=2), *backward(*inputs, do, d_final, splits=2)
    for x, wanted in zip(got, want, strict=True):
        close(x, wanted, 8e-3)  # one product rounded, and the output


@pytest.mark.parametrize("splits", [1, 2])
def test_final_state(splits):
    T, slopes = 192, jnp.array([0.05])
    (_, k, v, _), (initial, _) = draw(5, 2, T, 1)
    positions = np.stack([positions_of([70], T), positions_of([], T)])
    lengths = np.array([100, 192], np.int32)
    inputs = k, v, slopes, initial, positions, lengths
    run = jax.jit(lambda *x: gpu.final_state(*x, tiling=tiling(splits), interpret=True))
    close(run(*inputs), recurrence(None, *inputs)[1])


def test_no_races(monkeypatch):
    """The interpreter follows who waited for whom before each access to shared memory."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
    from jax.experimental.pallas import mosaic_gpu as plgpu

    params = plgpu.InterpretGPUParams(detect_races=True)
    monkeypatch.setattr(versions, "gpu_interpreter", lambda interpret: params)
    T, slopes = 320, jnp.array([0.05])
    (q, k, v, do), (initial, d_final) = draw(6, 1, T, 1)
    positions = positions_of([70], T)[None]
    inputs = q, k, v, slopes, initial, positions, np.array([300], np.int32)
    jax.block_until_ready(forward(*inputs))
    assert not interpret_pallas_call.get_races().races_found
    jax.block_until_ready(backward(*inputs, do, d_final, splits=2))
    assert not interpret_pallas_call.get_races().races_found


def test_refuses_what_is_no_multiple_of_a_chunk():
    (q, k, v, _), _ = draw(7, 1, 60, 1)
    with pytest.raises(ValueError, match="multiple of 64"):
        gpu.forward(q, k, v, jnp.ones(1), None, None, None, tiling=tiling(1), interpret=True)
