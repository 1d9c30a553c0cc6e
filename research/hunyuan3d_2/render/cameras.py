"""Orthographic cameras around an object (sheet of conventions: Hunyuan3D 2.0, released texture pipeline).

The object is y-up and right-handed and looks along +z. Azimuth 0 sees its front (+z), 90 its left
side (+x), elevation +90 its top; angles are degrees. Before rendering it is centred on its bounding box
and scaled so that twice the largest distance of a vertex from there is 1.15; the image shows [-0.6, 0.6].
"""

import numpy as np

DIAMETER = 1.15
HALF_EXTENT = 0.6
DISTANCE = 1.45
# Tight around the object: what is left of float32 goes to its depth, not to empty space.
NEAR, FAR = 0.45, 2.45

# Azimuths at elevation 0 of the views that multi-view models know by name, in the order of their ids.
NAMED_VIEWS = {"front": 0.0, "left": 90.0, "back": 180.0, "right": 270.0}
# (azimuth, elevation, weight in baking) of the released texture model.
TEXTURE_VIEWS = (
    (0, 0, 1.0), (90, 0, 0.1), (180, 0, 0.5), (270, 0, 0.1), (0, 90, 0.05), (180, -90, 0.05),
)  # fmt: skip
_OFFSETS = {-20: 0, 0: 12, 20: 24, -90: 36, 90: 40}


def rotations(azimuth_V, elevation_V) -> np.ndarray:
    """Rows right, up and back of each camera in object space, float64 `[V, 3, 3]`.

    The right vector comes from the azimuth alone, so that the cameras at the poles are defined: from above, an
    image's top points to the back of an object seen at azimuth 0.
    """
    a, e = np.broadcast_arrays(
        np.deg2rad(np.asarray(azimuth_V, float)), np.deg2rad(np.asarray(elevation_V, float))
    )
    right = np.stack([np.cos(a), np.zeros_like(a), -np.sin(a)], -1)
    back = np.stack([np.cos(e) * np.sin(a), np.sin(e), np.cos(e) * np.cos(a)], -1)
    return np.stack([right, np.cross(back, right), back], -2)


def frame(vertices_N3) -> np.ndarray:
    """The vertices as they are rendered: bounding box at the origin, largest radius 1.15 / 2; float32 `[N, 3]`.

    Raises ValueError for no vertices, coordinates that are not finite, or an object that is one point.
    """
    vertices = np.asarray(vertices_N3, np.float64)
    if not len(vertices) or not np.isfinite(vertices).all():
        raise ValueError(f"cannot render {len(vertices)} vertices that are not all finite, or none")
    vertices = vertices - (vertices.min(0) + vertices.max(0)) / 2
    radius = np.sqrt((vertices**2).sum(-1).max())
    if not radius > 0:
        raise ValueError("cannot render an object whose vertices are all in one place")
    return (vertices * (DIAMETER / 2 / radius)).astype(np.float32)


def project(
    vertices_N3,
    azimuth_V,
    elevation_V,
    *,
    half_extent: float = HALF_EXTENT,
    distance: float = DISTANCE,
    near: float = NEAR,
    far: float = FAR,
) -> np.ndarray:
    """Clip coordinates of the vertices in every view, float32 `[V, N, 4]`.

    x goes right, y *down* (so that row 0 of an image is the object's top), z from -1 at `near` to 1 at `far`; w is 1.
    """
    cameras = rotations(azimuth_V, elevation_V)
    seen = np.einsum("vij,nj->vni", cameras, np.asarray(vertices_N3, np.float64))
    x, y, back = seen[..., 0], seen[..., 1], seen[..., 2]
    depth = (2 * (distance - back) - (near + far)) / (far - near)
    clip = np.stack([x / half_extent, -y / half_extent, depth, np.ones_like(x)], -1)
    return clip.astype(np.float32)


def view_id(azimuth: float, elevation: float) -> int:
    """Number of one of the 44 preset views: 12 azimuths at -20, 0 and 20 degrees, 4 at -90 and 90.

    Raises ValueError for any other view.
    """
    step = 90 if abs(elevation) == 90 else 30
    if elevation not in _OFFSETS or azimuth % step:
        raise ValueError(
            f"azimuth {azimuth}, elevation {elevation} is no preset view: elevations are -20, 0, 20 (azimuths in "
            "steps of 30) and -90, 90 (in steps of 90)"
        )
    return int((azimuth // 30 + 9) % 12) // (step // 30) + _OFFSETS[elevation]
