"""Farthest point sampling against its definition, one point at a time in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.hunyuan3d_2.geometry.fps import farthest_points


def by_definition(points: np.ndarray, count: int, start: int) -> list[int]:
    chosen = [start]
    nearest = np.full(len(points), np.inf)
    while len(chosen) < count:
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(-1))
        chosen.append(int(np.argmax(nearest)))  # the first of equals
    return chosen


def test_equals_the_definition_ties_included():
    # On a lattice of integers float32 is exact, and almost every choice is among equals.
    lattice = np.array(list(itertools.product(range(6), repeat=3)), np.float32)
    rng = np.random.default_rng(0)
    clouds = np.stack([rng.permutation(lattice) for _ in range(3)])
    starts = np.array([0, 7, 215])
    got = farthest_points(jnp.asarray(clouds), 64, jnp.asarray(starts))
    assert got.dtype == jnp.int32 and got.shape == (3, 64)
    want = [by_definition(cloud, 64, start) for cloud, start in zip(clouds, starts, strict=True)]
    np.testing.assert_array_equal(got, want)


def test_on_real_points_each_choice_is_farthest_to_rounding():
    points = np.random.default_rng(1).standard_normal((2, 500, 3)).astype(np.float32)
    got = np.asarray(farthest_points(jnp.asarray(points), 100, jnp.array([3, 4])))
    for cloud, chosen in zip(points.astype(np.float64), got, strict=True):
        assert len(set(chosen)) == 100
        distance = np.linalg.norm(cloud[:, None] - cloud[chosen][None], axis=-1)
        for k in range(1, 100):
            nearest = distance[:, :k].min(1)
            assert nearest[chosen[k]] >= nearest.max() - 1e-6


def test_every_point_once_when_all_are_asked_for():
    points = jax.random.normal(jax.random.key(0), (1, 37, 3))
    got = farthest_points(points, 37, jnp.array([36]))
    assert got[0, 0] == 36
    assert sorted(got[0].tolist()) == list(range(37))


def test_one_program_for_each_count():
    points = jnp.zeros((2, 50, 3))
    before = farthest_points._cache_size()
    for start in range(4):
        farthest_points(points, 5, jnp.array([start, start]))
    assert farthest_points._cache_size() == before + 1


def test_repeated_points_do_no_harm():
    got = farthest_points(jnp.zeros((1, 8, 3)), 4, jnp.array([5]))
    assert got.tolist()[0][0] == 5 and all(0 <= i < 8 for i in got[0].tolist())


@pytest.mark.parametrize(
    ("points", "count", "starts"),
    [((1, 4, 3), 5, 1), ((1, 4, 3), 0, 1), ((4, 3), 2, 1), ((1, 4, 3), 2, 2)],
)
def test_what_cannot_be_is_an_error(points, count, starts):
    with pytest.raises(ValueError, match="points"):
        farthest_points(jnp.zeros(points), count, jnp.zeros(starts, jnp.int32))
