"""Meshes: sizes inferred, mistakes named."""

import jax
import pytest
from jax.sharding import AxisType

from research.core import mesh


def test_sizes_from_mapping_and_text():
    assert dict(mesh.make({"data": 2, "model": 4}).shape) == {"data": 2, "model": 4}
    assert dict(mesh.make("data=-1").shape) == {"data": len(jax.devices())}
    assert dict(mesh.make("data=-1, model=2").shape) == {"data": 4, "model": 2}
    assert dict(mesh.make("data=-1", jax.devices()[:3]).shape) == {"data": 3}


def test_axes_are_auto_and_a_smaller_mesh_takes_the_first_devices():
    made = mesh.make("data=2")
    assert made.axis_types == (AxisType.Auto,)
    assert list(made.devices.flat) == jax.devices()[:2]


@pytest.mark.parametrize(
    "shape, message",
    [
        ("data=3,model=-1", "8 devices do not divide by 3"),
        ("data=16", "needs 16 devices, there are 8"),
        ("data=-1,model=-1", "at most one"),
        ("data=0", "positive"),
        ("data", "axis=size"),
        ("data=two", "axis=size"),
        ("data=1,data=2", "twice"),
        ({}, "at least one axis"),
    ],
)
def test_mistakes_are_named(shape, message):
    with pytest.raises(ValueError, match=message):
        mesh.make(shape)
