"""Surfaces of fields: in the right place, the right way out, and closed."""

import numpy as np
import pytest
import trimesh

from research.hunyuan3d_2.geometry.isosurface import NoSurface, extract

METHODS = ["marching_cubes", "surface_nets"]


def grid(cells: int, bound: float) -> np.ndarray:
    line = np.linspace(-bound, bound, cells + 1)
    return np.stack(np.meshgrid(line, line, line, indexing="ij"), axis=-1)


def ball(cells: int, bound: float = 1.01, radius: float = 0.5, centre=(0, 0, 0)) -> np.ndarray:
    return radius - np.linalg.norm(grid(cells, bound) - centre, axis=-1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cells", [20, 47])
def test_a_sphere_is_where_it_should_be(method, cells):
    """§8.1, §8.5: a division by R + 1 would move the centre by 1.01 / (R + 1)."""
    found = extract(ball(cells), 1.01, method)
    h = 2 * 1.01 / cells
    np.testing.assert_allclose(found.bounds.mean(0), 0, atol=1e-6)
    assert np.abs(np.linalg.norm(found.vertices, axis=1) - 0.5).max() < h**2
    assert found.is_watertight and found.is_winding_consistent
    assert found.volume == pytest.approx(4 / 3 * np.pi / 8, abs=np.pi * h**2) and found.volume > 0
    moved = extract(ball(cells, centre=(0.3, -0.2, 0.1)), 1.01, method)
    np.testing.assert_allclose(moved.bounds.mean(0), (0.3, -0.2, 0.1), atol=h**2)


@pytest.mark.parametrize("method", METHODS)
def test_any_field_gives_a_watertight_mesh(method):
    """Noise has every configuration of a cell, and crosses the border of the cube."""
    for seed in range(4):
        field = np.random.default_rng(seed).standard_normal((9, 10, 11))
        found = extract(field, 1.0, method)
        counts = np.unique(np.sort(found.edges, axis=1), axis=0, return_counts=True)[1]
        assert set(counts) == {2} and found.is_winding_consistent
        np.testing.assert_array_equal(found.bounds, [[-1] * 3, [1] * 3])
        # The share of nodes inside, of which marching cubes makes less: corners that stand alone.
        assert 0.2 < found.volume / 8 < 0.6


@pytest.mark.parametrize("method", METHODS)
def test_faces_look_away_from_what_is_inside(method):
    field = np.full((3, 3, 3), -1.0)
    field[1, 1, 1] = 1.0
    found = extract(field, 1.0, method)
    assert found.volume > 0
    assert (np.einsum("fi,fi->f", found.face_normals, found.triangles_center) > 0).all()
    hollow = extract(-field, 1.0, method)  # the rest of the cube, capped, with a hole in the middle
    assert 8 - hollow.volume == pytest.approx(found.volume, rel=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_axes_keep_their_order_and_their_number_of_cells(method):
    x, y, z = np.meshgrid(
        np.linspace(-2, 2, 41), np.linspace(-2, 2, 33), np.linspace(-2, 2, 25), indexing="ij"
    )
    ellipsoid = extract(1 - (x / 0.6) ** 2 - (y / 1.0) ** 2 - (z / 1.6) ** 2, 2.0, method)
    np.testing.assert_allclose(ellipsoid.bounds[1], [0.6, 1.0, 1.6], atol=0.06)


def test_a_level_moves_the_surface():
    found = extract(ball(40), 1.01, level=0.2)
    np.testing.assert_allclose(np.linalg.norm(found.vertices, axis=1), 0.3, atol=2e-3)


@pytest.mark.parametrize("method", METHODS)
def test_values_exactly_at_the_level_leave_no_holes(method):
    field = 0.5 - np.abs(grid(8, 1.0)).max(-1)  # a cube whose sides are planes of the grid
    found = extract(field, 1.0, method)
    smaller = extract(field - 1e-3, 1.0, method)
    assert found.is_watertight and found.volume == pytest.approx(smaller.volume, rel=0.02)


def test_no_surface_is_said_with_the_range_of_the_field():
    with pytest.raises(NoSurface, match=r"no surface at level 0: the field is between -3 and -2"):
        extract(np.linspace(-3, -2, 27).reshape(3, 3, 3), 1.0)
    with pytest.raises(NoSurface, match=r"no surface at level 5: the field is between 6 and 7"):
        extract(np.linspace(6, 7, 27).reshape(3, 3, 3), 1.0, level=5)
    with pytest.raises(ValueError, match="1 of 27 values of the field are NaN"):
        extract(np.where(np.arange(27) == 4, np.nan, 1.0).reshape(3, 3, 3), 1.0)
    for level in (np.nan, np.inf):
        with pytest.raises(ValueError, match="the level must be finite"):
            extract(ball(8), 1.0, level=level)
    with pytest.raises(ValueError, match="grid"):
        extract(np.zeros((3, 3)), 1.0)


def test_surface_nets_has_more_even_triangles():
    def worst(mesh: trimesh.Trimesh) -> float:
        sides = np.linalg.norm(np.diff(mesh.triangles[:, [0, 1, 2, 0]], axis=1), axis=2)
        return float(np.quantile(sides.min(1) / sides.max(1), 0.01))

    field = ball(30, centre=(0.01, 0.02, 0.03))
    assert worst(extract(field, 1.01, "surface_nets")) > 2 * worst(extract(field, 1.01))
