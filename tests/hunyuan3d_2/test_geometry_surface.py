"""Distances, surface samples and query points, against closed forms."""

import numpy as np
import pytest
import trimesh
from scipy import stats

from research.hunyuan3d_2.geometry import queries, surface
from research.hunyuan3d_2.geometry.distance import signed_distance, winding_number

BOX = trimesh.creation.box()  # side 1 about 0


def rng():
    return np.random.default_rng(0)


def box_distance(points: np.ndarray) -> np.ndarray:
    """Signed distance to the box of side 1, positive inside."""
    q = np.abs(points) - 0.5
    return -(np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(1), 0))


def test_distance_to_a_box_is_exact_and_positive_inside():
    points = rng().uniform(-1, 1, (5000, 3))
    got = signed_distance(BOX, points)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, box_distance(points), atol=1e-6)
    assert signed_distance(BOX, np.zeros((1, 3)))[0] == 0.5


def test_distance_to_a_sphere():
    ball = trimesh.creation.icosphere(4)
    points = rng().uniform(-1.2, 1.2, (2000, 3))
    sagitta = 1 - np.linalg.norm(ball.triangles_center, axis=1).min()
    error = signed_distance(ball, points) - (1 - np.linalg.norm(points, axis=1))
    assert -sagitta * 1.01 <= error.min() and error.max() <= 1e-6


def test_a_cavity_is_outside_and_an_open_mesh_winds_in_fractions():
    hole = BOX.copy()
    hole.apply_scale(0.5)
    hole.invert()
    hollow = trimesh.util.concatenate([BOX, hole])
    at = np.array([[0, 0, 0], [0.4, 0, 0], [2, 0, 0.0]])
    np.testing.assert_allclose(signed_distance(hollow, at), [-0.25, 0.1, -1.5], atol=1e-6)
    np.testing.assert_allclose(winding_number(BOX, at), [1, 1, 0], atol=1e-2)
    without_top = trimesh.Trimesh(
        BOX.vertices, BOX.faces[BOX.face_normals[:, 2] < 0.5], process=False
    )
    np.testing.assert_allclose(winding_number(without_top, at[:1]), [5 / 6], atol=1e-2)


@pytest.mark.parametrize("points", [np.zeros((0, 3)), np.zeros(3), np.full((1, 3), np.nan)])
def test_points_that_cannot_be_are_an_error(points):
    with pytest.raises(ValueError, match="points"):
        signed_distance(BOX, points)


def test_uniform_points_lie_on_the_surface_evenly_with_unit_normals():
    stretched = trimesh.creation.box((1, 2, 3))  # areas of pairs of sides: 12, 6, 4
    cloud = surface.sample_uniform(stretched, 20_000, rng())
    assert cloud.dtype == np.float32 and cloud.shape == (20_000, 7) and not cloud[:, 6].any()
    half = np.array([0.5, 1, 1.5])
    axis = np.abs(cloud[:, 3:6]).argmax(1)
    np.testing.assert_array_equal(np.abs(cloud[:, 3:6]), np.eye(3)[axis])
    rows = np.arange(len(cloud))
    np.testing.assert_allclose(cloud[rows, axis], half[axis] * cloud[rows, 3 + axis], atol=1e-6)
    observed = np.bincount(axis)
    assert stats.chisquare(observed, 20_000 * np.array([12, 6, 4]) / 22).pvalue > 1e-3
    on_top = cloud[cloud[:, 5] == 1]
    for i in (0, 1):
        assert stats.kstest(on_top[:, i] / half[i] / 2 + 0.5, "uniform").pvalue > 1e-3


def on_edges(cloud: np.ndarray) -> float:
    """The share of points on an edge of the box, where two coordinates are ±1/2."""
    return ((np.abs(np.abs(cloud[:, :3]) - 0.5) < 1e-6).sum(1) >= 2).mean()


def on_rims(cloud: np.ndarray) -> float:
    """The share of points at the top or bottom of a cylinder of height 1."""
    return (np.abs(np.abs(cloud[:, 2]) - 0.5) < 1e-6).mean()


def test_sharp_points_lie_on_edges_with_the_mean_of_both_normals():
    cloud = surface.sample_sharp(BOX, 5000, rng())
    assert on_edges(cloud) == 1 and (cloud[:, 6] == 1).all()
    edge = np.abs(np.abs(cloud[:, :3]) - 0.5) < 1e-6
    want = np.where(edge, np.sign(cloud[:, :3]), 0) / np.sqrt(2)
    plain = edge.sum(1) == 2  # not at a corner
    np.testing.assert_allclose(cloud[plain, 3:6], want[plain], atol=1e-6)
    counts = np.bincount((edge[plain] * [4, 2, 1]).sum(1), minlength=8)[[3, 5, 6]]
    assert stats.chisquare(counts).pvalue > 1e-3  # edges are drawn by length


def test_the_official_rule_has_the_defects_that_were_measured():
    """§2.1: 42 % of a cube's samples on diagonals of its faces, 9 % of a 64-gon cylinder's on its rims."""
    assert 1 - on_edges(surface.sample_sharp(BOX, 20_000, rng(), "official")) == pytest.approx(
        0.42, abs=0.01
    )
    cylinder = trimesh.creation.cylinder(radius=1, height=1, sections=64)
    assert on_rims(surface.sample_sharp(cylinder, 20_000, rng(), "official")) == pytest.approx(
        0.09, abs=0.01
    )
    assert on_rims(surface.sample_sharp(cylinder, 2000, rng())) == 1


@pytest.mark.parametrize("rule", ["dihedral", "official"])
def test_a_smooth_mesh_falls_back_to_uniform_points(rule):
    ball = trimesh.creation.icosphere(4)
    cloud = surface.sample_sharp(ball, 100, rng(), rule)
    assert cloud.shape == (100, 7) and not cloud[:, 6].any()
    np.testing.assert_allclose(np.linalg.norm(cloud[:, :3], axis=1), 1, atol=2e-3)


def test_the_angle_decides_and_borders_are_edges():
    prism = trimesh.creation.cylinder(radius=1, height=1, sections=12)  # sides differ by 30 degrees
    assert on_rims(surface.sample_sharp(prism, 1000, rng(), angle=35)) == 1
    assert on_rims(surface.sample_sharp(prism, 1000, rng(), angle=25)) < 0.7
    sheet = trimesh.Trimesh(
        [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]], process=False
    )
    cloud = surface.sample_sharp(sheet, 500, rng())
    border = ((np.abs(cloud[:, :2]) < 1e-6) | (np.abs(cloud[:, :2] - 1) < 1e-6)).any(1)
    assert border.all()  # and not on the diagonal
    np.testing.assert_array_equal(cloud[:, 3:6], np.tile([0, 0, 1], (500, 1)))


def test_a_mesh_without_area_is_an_error():
    line = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2]], process=False)
    with pytest.raises(ValueError, match="no area"):
        surface.sample_uniform(line, 5, rng())


def test_query_points_are_spread_as_the_paper_says():
    far = queries.volume(20_000, rng())
    assert far.dtype == np.float32 and np.abs(far).max() <= 1.05
    for i in range(3):
        assert stats.kstest(far[:, i], "uniform", (-1.05, 2.1)).pvalue > 1e-3
    origin = np.zeros((12_000, 7), np.float32)
    near = queries.near_uniform(origin, rng())
    assert near.dtype == np.float32 and np.abs(near).max() <= 0.25
    np.testing.assert_allclose(near[:6000].std(0), 0.005, rtol=0.05)
    np.testing.assert_allclose(near[6000:].std(0), 0.05, rtol=0.05)
    sharp = queries.near_sharp(origin, rng()).reshape(6, 2000, 3)
    np.testing.assert_allclose(sharp.std((1, 2)), [0.001, 0.003, 0.06, 0.01, 0.02, 0.04], rtol=0.05)


def test_points_are_a_function_of_the_generator():
    for sample in (surface.sample_uniform, surface.sample_sharp):
        np.testing.assert_array_equal(sample(BOX, 50, rng()), sample(BOX, 50, rng()))
        assert (sample(BOX, 50, rng()) != sample(BOX, 50, np.random.default_rng(1))).any()
