"""Procedural shapes: closed solids, functions of their arguments, with splits that share nothing."""

import numpy as np
import pytest

from research.hunyuan3d_2.data import families
from research.hunyuan3d_2.data.families import FAMILIES, HELD_OUT, make, parameters
from research.hunyuan3d_2.geometry import meshes, queries
from research.hunyuan3d_2.geometry.distance import winding_number

CASES = [(name, split) for split in ("train", "heldout") for name in families.names(split)]


@pytest.mark.parametrize(("family", "split"), CASES)
def test_shapes_are_normalised_solids_with_an_exact_sign(family, split):
    for index in range(2):
        shape = make(family, index, split)
        report = meshes.check(shape)
        assert report.watertight and report.bodies == 1 and report.degenerate_faces == 0
        assert 0.02 < shape.volume < 8
        np.testing.assert_allclose(shape.bounds.mean(0), 0, atol=1e-9)
        assert np.ptp(shape.bounds, axis=0).max() == pytest.approx(2 * 0.9999)
        # Nothing overlaps itself: the surface winds once around what is inside, and not at all elsewhere.
        winds = winding_number(shape, queries.volume(200, np.random.default_rng(0)))
        assert np.minimum(np.abs(winds), np.abs(winds - 1)).max() < 0.1
        colours = shape.visual.vertex_colors
        assert colours.shape == (len(shape.vertices), 4) and (colours[:, 3] == 255).all()


def test_the_splits_share_no_parameters_and_one_family_is_held_out_whole():
    with pytest.raises(ValueError, match="held out"):
        make(HELD_OUT, 0, "train")
    assert families.names("heldout") == tuple(FAMILIES)
    assert set(FAMILIES) - set(families.names("train")) == {HELD_OUT}
    for name in families.names("train"):
        drawn = {
            split: [parameters(name, i, split) for i in range(200)]
            for split in ("train", "heldout")
        }
        for key in FAMILIES[name].ranges:
            train, heldout = ([p[key] for p in drawn[split]] for split in ("train", "heldout"))
            assert max(train) < min(heldout) or max(heldout) < min(train), (name, key)
            assert len(set(train)) > 1


def test_a_shape_is_a_function_of_family_index_and_split():
    first, again, other = make("csg", 3), make("csg", 3), make("csg", 4)
    np.testing.assert_array_equal(first.vertices, again.vertices)
    np.testing.assert_array_equal(first.faces, again.faces)
    np.testing.assert_array_equal(first.visual.vertex_colors, again.visual.vertex_colors)
    assert len(first.vertices) != len(other.vertices)
    draws = [str(parameters(name, i, split)) for name, split in CASES for i in range(50)]
    assert len(set(draws)) == len(draws)


def test_a_solid_is_the_same_whichever_way_its_faces_look():
    points = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1.0]])
    faces = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    for turned in (faces, faces[:, ::-1]):
        assert families._solid(points, turned).volume() == pytest.approx(1 / 6)


def test_colours_show_patterns():
    points = make("extrusion", 0).vertices
    several = [
        len(np.unique(families._colours(points, np.random.default_rng(i)), axis=0))
        for i in range(30)
    ]
    assert 1 in several and 2 in several and max(several) > 20  # plain, stripes or checks, noise


def test_what_is_not_there_is_an_error_that_names_what_is():
    with pytest.raises(ValueError, match="no family 'cube'; there are superquadric"):
        make("cube", 0)
    with pytest.raises(ValueError, match="split must be"):
        make("csg", 0, "test")
