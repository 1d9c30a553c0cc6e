"""The TPU kernels of lightning_attention, interpreted, against the recurrence in float64 NumPy.

    S_t = e^(-s) S_(t-1) + k_t v_t^T      o_t = q_t^T S_t      (S from zero where a segment begins)

and its adjoint, token by token. Chunks are of 16 tokens here, so that short sequences have many.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import chips, tilings
from pallas_kernels import lightning_attention as op

CHUNK = 16
SLOPES = np.float32([0.92, 4e-3, 5e-5])


@pytest.fixture(autouse=True)
def small_chunks_on_a_v5p(monkeypatch):
    small = dict(chunk=CHUNK, heads=3, ahead=2, cores=1)
    for kernel in ("forward", "state", "backward"):
        monkeypatch.setitem(tilings.TILINGS["v5p"], f"lightning_{kernel}", small)
    with chips.target("v5p", interpret=True):
        yield


def example(B, T, H=3, dtype=jnp.float32, states=True, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v, d_o = (jnp.asarray(rng.normal(size=(B, T, H, 128)), dtype) for _ in range(4))
    shape = (2, B, H, 128, 128)
    initial, d_final = jnp.asarray(rng.normal(size=shape), jnp.float32) if states else (None, None)
    return (q, k, v, initial), (d_o, d_final)


def recurrence(inputs, cotangents, slopes=SLOPES, segments=None, lengths=None):
    """[o, final], [dq, dk, dv, d_initial] in float64."""
    q, k, v, initial = (None if x is None else np.float64(x) for x in inputs)
    B, T, H, K = q.shape
    d_o, d_final = (None if x is None else np.float64(x) for x in cotangents)
    decay = np.exp(-np.float64(slopes))[:, None, None]
    segments = np.zeros((B, T)) if segments is None else segments
    real = np.arange(T) < (np.full(B, T) if lengths is None else lengths)[:, None]
    same = np.diff(segments, axis=1, prepend=segments[:, :1]) == 0
    S = np.zeros((B, H, K, K)) if initial is None else initial.copy()
    G = np.zeros_like(S) if d_final is None else d_final.copy()
    o, (dq, dk, dv), states = np.zeros_like(q), np.zeros((3, *q.shape)), []
    for t in range(T):
        there = real[:, t, None, None, None]
        new = decay * S * same[:, t, None, None, None] + k[:, t, ..., None] * v[:, t, ..., None, :]
        S = np.where(there, new, S)
        states.append(S)
        o[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], S) * there[..., 0]
    for t in reversed(range(T)):
        there = real[:, t, None, None, None]
        after = G + there * q[:, t, ..., None] * d_o[:, t, ..., None, :]
        dq[:, t] = np.einsum("bhv,bhkv->bhk", d_o[:, t], states[t]) * there[..., 0]
        dk[:, t] = np.einsum("bhkv,bhv->bhk", after, v[:, t]) * there[..., 0]
        dv[:, t] = np.einsum("bhkv,bhk->bhv", after, k[:, t]) * there[..., 0]
        G = np.where(there, decay * after * same[:, t, None, None, None], G)
    return [o, S], [dq, dk, dv, G]


def attend(q, k, v, initial, slopes=SLOPES, **kwargs):
    return op.lightning_attention(
        *(q, k, v, jnp.asarray(slopes)), initial_state=initial, implementation="pallas", **kwargs
    )


@functools.partial(jax.jit, static_argnames="num_splits")
def both(inputs, cotangents, slopes, segments, lengths, num_splits=0):
    f = functools.partial(attend, slopes=slopes, segment_ids=segments, lengths=lengths)
    (o, final), pull = jax.vjp(functools.partial(f, num_splits=num_splits), *inputs)
    d_o, d_final = cotangents
    return (o, final), pull((d_o, jnp.zeros_like(final) if d_final is None else d_final))


NAMES = ("o", "final", "dq", "dk", "dv", "d initial")


def compare(example, segments=None, lengths=None, slopes=SLOPES, rtol=3e-6, num_splits=0):
    got = both(*example, slopes, segments, lengths, num_splits)
    close(got, recurrence(*example, slopes, segments, lengths), rtol)


def close(got, want, rtol=3e-6):
    """Largest error of each output and gradient over its own largest value."""
    errors = {}
    for name, x, y in zip(NAMES, (*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        if x is not None:
            errors[name] = np.abs(np.float64(x) - y).max() / np.abs(y).max()
    assert max(errors.values()) < rtol, errors


@pytest.mark.parametrize("T, states", [(1, True), (16, False), (41, True)])
def test_values_and_gradients(T, states):
    compare(example(2, T, states=states))


def test_a_boundary_at_every_position_of_a_chunk():
    T = 3 * CHUNK
    starts = np.arange(CHUNK - 1, 2 * CHUNK + 1)
    segments = np.int32(np.arange(T) >= starts[:, None])
    compare(example(len(starts), T, H=1), segments, slopes=SLOPES[1:2])


def test_segments_and_lengths():
    """Segments of one token, many in a chunk, over many chunks; lengths of zero, one, whole chunks."""
    T = 50
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 9, (7, T)), axis=1).astype(np.int32)
    segments[1] = np.arange(T)
    segments[2] = 3
    segments[3, :17], segments[3, 17:] = np.arange(17), 20
    lengths = np.int32([T, 30, 0, 1, 16, 17, 33])
    for given in ((segments, lengths), (segments, None), (None, lengths)):
        compare(example(7, T), *given)
    o, _ = attend(*example(7, T)[0], segment_ids=segments, lengths=lengths)
    assert not np.asarray(o)[np.arange(T) >= lengths[:, None]].any()


PACKED = np.sort(np.random.default_rng(1).integers(0, 7, (4, 96)), axis=1).astype(np.int32)
PACKED[0], PACKED[1, :50], PACKED[1, 50:] = 5, 1, 2  # one segment; two, the second over many spans
PACKED_LENGTHS = np.int32([96, 96, 37, 0])


def test_splits_of_the_sequence_are_the_whole():
    compare(example(4, 96), PACKED, PACKED_LENGTHS, num_splits=3)
    compare(example(1, 50, states=False), num_splits=2)


@pytest.mark.parametrize("implementation, check_vma", [("pallas", False), ("xla", True)])
def test_parts_of_the_sequence_on_several_devices(implementation, check_vma):
    """Values and gradients, segments that end with a device's part or go on, lengths of all parts."""
    devices = 3
    (q, k, v, initial), (d_o, d_final) = example(4, 96)
    mesh = jax.make_mesh((devices,), ("cp",), axis_types=(jax.sharding.AxisType.Auto,))
    part, each = jax.P(None, "cp"), jax.P("cp")

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(part, part, part, each, part, jax.P(), part, each),
        out_specs=(part, each, (part, part, part, each)),
        check_vma=check_vma,
    )
    def local(q, k, v, initial, segments, lengths, d_o, d_final):
        def f(q, k, v, initial):
            return op.lightning_attention(
                *(q, k, v, jnp.asarray(SLOPES)),
                initial_state=initial[0],
                segment_ids=segments,
                lengths=lengths,
                axis_name="cp",
                implementation=implementation,
            )

        (o, final), pull = jax.vjp(f, q, k, v, initial)
        return o, final[None], pull((d_o, d_final[0]))

    # what later devices are given as initial state is not read
    initials = jnp.stack([initial, initial + 1, initial + 2])
    d_finals = jnp.stack([jnp.zeros_like(d_final), jnp.zeros_like(d_final), d_final])
    for segments, lengths in ((PACKED, PACKED_LENGTHS), (np.zeros_like(PACKED), None)):
        full = np.int32([96] * 4) if lengths is None else lengths
        o, finals, grads = local(q, k, v, initials, segments, full, d_o, d_finals)
        d_initial = grads[3]
        assert not d_initial[1:].any()
        got = (o, finals[-1]), (*grads[:3], d_initial[0])
        want = recurrence((q, k, v, initial), (d_o, d_final), segments=segments, lengths=lengths)
        close(got, want)
