"""Rows exchanged between eight devices, against a loop over senders and receivers in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.moe_dispatch import exchange

G, R, D = 8, 12, 3
MESH = jax.make_mesh((G,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))


def oracle(x, counts, rows):
    """(buffers, the rows again after the way back, how many stay) for x [G, R, D], counts [G, G]."""
    buffers, back = np.zeros((G, rows, D)), np.zeros_like(x)
    stay, filled = np.zeros(G, int), np.zeros(G, int)
    for sender in range(G):
        row = 0
        for receiver in range(G):
            for _ in range(counts[sender, receiver]):
                if filled[receiver] < rows:
                    buffers[receiver, filled[receiver]] = back[sender, row] = x[sender, row]
                    filled[receiver] += 1
                else:
                    stay[sender] += 1
                row += 1
    return buffers, back, stay


def random_counts(rng, most=R):
    """How many rows go from each device to each, at most R and not all of R."""
    return np.stack(
        [np.bincount(rng.integers(0, G, rng.integers(0, most)), minlength=G) for _ in range(G)]
    )


COUNTS = {
    "random": random_counts(np.random.default_rng(0)),
    "more random": random_counts(np.random.default_rng(1), 5),
    "none": np.zeros((G, G), int),
    "all to one": np.eye(G, dtype=int)[[3] * G] * R,
    "each to itself": np.eye(G, dtype=int) * R,
    "each to the next": np.roll(np.eye(G, dtype=int), 1, axis=1) * 7,
}


@functools.cache
def compiled(rows, check_vma):
    """(x, counts, dy, dz) -> buffers, rows after the way back, how many stay, and the gradients

    of sum(buffers dy) with respect to x and of sum(back dz) with respect to buffers.
    """

    def one(x, counts, dy, dz):
        x, counts, dy, dz = (a[0] for a in (x, counts, dy, dz))
        route, stay = exchange.plan(counts, rows, "expert")
        y, pull = jax.vjp(lambda x: exchange.send(x, route, rows, "expert"), x)
        z, pull_back = jax.vjp(lambda y: exchange.send_back(y, route, R, "expert"), y)
        outputs = y, z, stay, *pull(dy), *pull_back(dz)
        return tuple(a[None] for a in outputs)

    spec = jax.P("expert")
    return jax.jit(
        jax.shard_map(
            one, mesh=MESH, in_specs=(spec,) * 4, out_specs=(spec,) * 5, check_vma=check_vma
        )
    )


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("rows", [G * R, 15])
@pytest.mark.parametrize("name", list(COUNTS))
def test_rows_arrive_return_and_are_counted(name, rows, check_vma):
    counts, rng = COUNTS[name], np.random.default_rng(2)
    x, dz = rng.normal(size=(2, G, R, D)).astype(np.float32)
    dy = rng.normal(size=(G, rows, D)).astype(np.float32)
    arrays = [jnp.asarray(a) for a in (x, counts, dy, dz)]
    y, z, stay, dx, dy_back = (np.asarray(a) for a in compiled(rows, check_vma)(*arrays))
    buffers, back, left = oracle(x, counts, rows)
    np.testing.assert_array_equal(y, buffers)
    np.testing.assert_array_equal(z, back)
    np.testing.assert_array_equal(stay, left)
    assert rows == 15 or not left.any()
    # Each is a permutation with zeros, so the gradient of one is what the other does.
    np.testing.assert_array_equal(dy_back, oracle(dz, counts, rows)[0])
    assert np.vdot(dx, x) == pytest.approx(np.vdot(dy, y), rel=1e-5, abs=1e-5)
    np.testing.assert_array_equal(dx[back == 0], 0)


def test_the_real_collective_is_in_the_program_where_a_platform_has_it():
    def one(x, counts):
        route, _ = exchange.plan(counts[0], 15, "expert")
        return exchange.send(x[0], route, 15, "expert")[None]

    spec = jax.P("expert")
    f = jax.jit(jax.shard_map(one, mesh=MESH, in_specs=(spec, spec), out_specs=spec))
    traced = f.trace(jnp.zeros((G, R, D)), jnp.zeros((G, G), jnp.int32))
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda", "tpu")}
    assert "ragged_all_to_all" not in texts["cpu"]
    assert "ragged_all_to_all" in texts["cuda"] and "ragged_all_to_all" in texts["tpu"]
