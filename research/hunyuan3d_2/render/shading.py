"""Images of a mesh: normal and position maps in the colours of the texture model, and lit colours.

The maps' colours are those measured of the released pipeline (its axes are x, -z, y of the object's); the light
is ours: a little from everywhere, some from the camera, most from one direction.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import trimesh

from research.hunyuan3d_2.geometry import meshes, topology
from research.hunyuan3d_2.render import cameras
from research.hunyuan3d_2.render.rasterize import Raster, rasterize

_SMOOTH = np.cos(
    np.deg2rad(35)
)  # faces that meet at less than this are shaded as one curved surface
_AMBIENT, _HEAD, _KEY = 0.35, 0.3, 0.45
_SAMPLES = 1 << 17  # taken side by side: as many as stay in a cache
KEY_LIGHT = (0.5, 0.7, 0.5)  # to the right, up and back of the camera


class Surface(NamedTuple):
    """A mesh as it is rendered. Corner values are per face and corner, so that sharp edges stay sharp.

    vertices_N3: float32, framed (`cameras.frame`). faces_F3: int32. normals_F33: float32, unit.
    colours_F33: float32 in [0, 1].
    """

    vertices_N3: np.ndarray
    faces_F3: np.ndarray
    normals_F33: np.ndarray
    colours_F33: np.ndarray


def surface(mesh: trimesh.Trimesh) -> Surface:
    """The mesh in its frame, with its vertex or face colours (those of its texture or material at the vertices).

    Vertices of no face are left out. Raises ValueError for a mesh without faces, without extent, or with vertices
    that are not finite.
    """
    if not len(mesh.faces):
        raise ValueError("cannot render a mesh without faces")
    used, faces = topology.compact(np.asarray(mesh.vertices), np.asarray(mesh.faces))
    vertices, faces = cameras.frame(used), faces.astype(np.int32)
    return Surface(vertices, faces, _corner_normals(vertices, faces), _corner_colours(mesh))


def normal_map(raster: Raster, of: Surface) -> np.ndarray:
    """Unit normals in object space as colours ((n_x, -n_z, n_y) + 1) / 2, float32 `[V, H, W, 3]`; white outside."""
    return _paint(raster, (_axes(_unit(_at(raster, of.normals_F33))) + 1) / 2)


def position_map(raster: Raster, of: Surface) -> np.ndarray:
    """Places as colours 1/2 + (x, -z, y) / 1.15 of the framed object, float32 `[V, H, W, 3]`; white outside."""
    return _paint(raster, _axes(_at(raster, of.vertices_N3[of.faces_F3])) / cameras.DIAMETER + 0.5)


def lit(raster: Raster, of: Surface, azimuth_V, elevation_V, key_light_V3=KEY_LIGHT) -> np.ndarray:
    """Colours under light, float32 RGBA `[V, H, W, 4]`; 0 outside.

    `key_light_V3` is a direction in each camera's axes right, up and back. Both sides of a face are lit.
    """
    axes = cameras.rotations(azimuth_V, elevation_V)
    key = _unit(np.broadcast_to(np.asarray(key_light_V3, float), (len(axes), 3)))
    view = np.nonzero(raster.faces_VHW)[0]
    normal = _unit(_at(raster, of.normals_F33))
    back = axes[:, 2].astype(np.float32)[view]
    key = np.einsum("vi,vij->vj", key, axes).astype(np.float32)[view]
    facing = np.einsum("pi,pi->p", normal, back)
    toward = np.einsum("pi,pi->p", normal, key)
    light = (
        _AMBIENT
        + _HEAD * np.abs(facing)
        + _KEY * np.maximum(np.where(facing < 0, -toward, toward), 0)
    )
    colour = np.minimum(_at(raster, of.colours_F33) * light[:, None], 1)
    image = np.zeros((*raster.faces_VHW.shape, 4), np.float32)
    image[raster.faces_VHW > 0] = np.concatenate([colour, np.ones_like(colour[:, :1])], 1)
    return image


def render(
    mesh: trimesh.Trimesh,
    azimuth: Sequence[float],
    elevation: Sequence[float],
    size: int,
    *,
    supersample: int = 2,
    key_light=KEY_LIGHT,
    fill: float | None = None,
) -> np.ndarray:
    """Lit views on a transparent ground, uint8 RGBA `[V, size, size, 4]`, straight (not premultiplied) alpha.

    Args:
      azimuth, elevation: degrees, one of each for a view.
      supersample: rows and columns of samples in a pixel, averaged.
      key_light: see `lit`.
      fill: centre each view on what it shows, with the longer side so large a share of the image; None: the frame is
        that of `cameras`, the same for all views.

    Raises: see `surface`.
    """
    of = surface(mesh)
    clip = cameras.project(of.vertices_N3, azimuth, elevation)
    if fill is not None:
        low, high = clip[..., :2].min(1, keepdims=True), clip[..., :2].max(1, keepdims=True)
        extent = np.maximum((high - low).max(-1, keepdims=True), 1e-6)
        clip[..., :2] = (clip[..., :2] - (low + high) / 2) * (2 * fill / extent)
    key_light = np.broadcast_to(np.asarray(key_light, float), (len(clip), 3))
    azimuth, elevation = np.asarray(azimuth), np.asarray(elevation)
    at_once = max(1, _SAMPLES // (size * supersample) ** 2)
    images = []
    for i in range(0, len(clip), at_once):
        part = slice(i, i + at_once)
        raster = rasterize(clip[part], of.faces_F3, size * supersample)
        samples = lit(raster, of, azimuth[part], elevation[part], key_light[part])
        images.append(_averaged(samples, supersample))
    return np.concatenate(images)


def on_white(image: np.ndarray) -> np.ndarray:
    """uint8 RGB of RGB, or of RGBA with straight alpha laid on white; colours are the last axis."""
    if image.shape[-1] == 3:
        return image
    alpha = image[..., 3:].astype(np.float32) / 255
    return (image[..., :3] * alpha + 255 * (1 - alpha) + 0.5).astype(np.uint8)


def _averaged(samples_VHW4, supersample: int) -> np.ndarray:
    """Premultiplied RGBA samples as pixels with straight alpha, uint8."""
    rows = [
        samples_VHW4[:, i::supersample, j::supersample]
        for i in range(supersample)
        for j in range(supersample)
    ]
    image = sum(rows[1:], rows[0]) * np.float32(1 / len(rows))
    alpha = image[..., 3:]
    image[..., :3] /= np.where(alpha > 0, alpha, 1)
    return (image * 255 + 0.5).astype(np.uint8)


def _at(raster: Raster, values_F3K) -> np.ndarray:
    """Corner values at the pixels that show a face, in the order of np.nonzero, float32 `[P, K]`."""
    found = raster.faces_VHW > 0
    weights, corners = raster.weights_VHW3[found], values_F3K[raster.faces_VHW[found] - 1]
    return sum(
        weights[:, i, None] * corners[:, i] for i in range(3)
    )  # three times as fast as einsum


def _paint(raster: Raster, colours_P3) -> np.ndarray:
    image = np.ones((*raster.faces_VHW.shape, 3), np.float32)
    image[raster.faces_VHW > 0] = colours_P3
    return image


def _axes(vectors_P3) -> np.ndarray:
    return np.stack([vectors_P3[:, 0], -vectors_P3[:, 2], vectors_P3[:, 1]], 1)


def _unit(vectors):
    length = np.sqrt(np.einsum("...i,...i->...", vectors, vectors))[..., None]
    return vectors / np.where(length > 0, length, 1)


def _corner_normals(vertices_N3, faces_F3) -> np.ndarray:
    """At each corner the mean, by area, of the vertex's faces that meet this one at less than 35 degrees."""
    a, b, c = (vertices_N3[faces_F3[:, i]] for i in range(3))
    area = np.cross(b - a, c - a)
    vertex = faces_F3.ravel()
    order = np.argsort(vertex, kind="stable")
    vertex, face = vertex[order], order // 3
    normal = _unit(area)[face]
    total = area[face]
    first = np.arange(len(vertex))
    for apart in range(
        1, len(vertex)
    ):  # corners of one vertex stand together: all pairs, by how far apart
        first = first[first + apart < len(vertex)]
        first = first[vertex[first] == vertex[first + apart]]
        if not len(first):
            break
        near = first[np.einsum("ci,ci->c", normal[first], normal[first + apart]) > _SMOOTH]
        total[near] += area[face[near + apart]]
        total[near + apart] += area[face[near]]
    corners = np.empty_like(total)
    corners[order] = _unit(total)
    return corners.reshape(-1, 3, 3)


def _corner_colours(mesh: trimesh.Trimesh) -> np.ndarray:
    if mesh.visual.kind == "face":
        colours = np.repeat(np.asarray(mesh.visual.face_colors)[:, None], 3, 1)
    else:
        colours = meshes.vertex_colours(mesh)[np.asarray(mesh.faces)]
    return colours[..., :3].astype(np.float32) / 255
