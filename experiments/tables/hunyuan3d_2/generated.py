"""How well shapes made from images are the shapes in the images: scores, and what they are held against."""

import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import trimesh
from PIL import Image

from research.hunyuan3d_2.geometry import isosurface, surface
from research.hunyuan3d_2.geometry.distance import signed_distance
from research.hunyuan3d_2.render import cameras, shading
from research.hunyuan3d_2.render.rasterize import rasterize
from research.hunyuan3d_2.vae.evaluation import iou

FRONT = 0  # of a shape's views, the condition that is scored
F_DISTANCE, F_POINTS = 0.05, 2048  # a shape is 2 long
SILHOUETTE, EXTENT = 64, 1.05  # pixels, and half of what the image shows
_TILE, _GAP = 104, 4

Pools = Mapping[str, np.ndarray]


def mesh_of(shape: Pools) -> trimesh.Trimesh:
    return trimesh.Trimesh(shape["vertices"], shape["faces"], process=False)


def others(families: Sequence[str], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of N shapes another one, int [N] twice: any, and one of its own family.

    Each is a cycle through all of them in a drawn order (through each family), so no shape is its own and each is used
    once. Only a family of one shape has to stand for itself.
    """
    rng, families = np.random.default_rng([seed, 11]), np.asarray(families)

    def cycle(index):
        order = rng.permutation(index)
        return order, np.roll(order, 1)

    anyone, relative = np.empty(len(families), int), np.empty(len(families), int)
    order, other = cycle(np.arange(len(families)))
    anyone[order] = other
    for family in np.unique(families):
        order, other = cycle(np.flatnonzero(families == family))
        relative[order] = other
    return anyone, relative


def nearest(known: Sequence[Pools], asked: Sequence[Pools]) -> np.ndarray:
    """The index of the known shape whose front view has the nearest silhouette, int [asked].

    Nearest in the mean squared difference of alpha: colours are drawn anew for every shape and say nothing of it.
    """
    alpha_KP, alpha_AP = (
        np.stack([shape["views"][FRONT, ..., 3].ravel() for shape in shapes]).astype(np.float32)
        for shapes in (known, asked)
    )
    squares_K = np.square(alpha_KP).sum(axis=1)
    return np.argmin(squares_K - 2 * alpha_AP @ alpha_KP.T, axis=1)


def v_iou(mesh: trimesh.Trimesh, points_Q4: np.ndarray) -> float:
    """Of a mesh with points and distances of another shape."""
    return iou(points_Q4[:, 3] > 0, signed_distance(mesh, points_Q4[:, :3]) > 0)


def extracted(field_XYZ: np.ndarray, bound: float) -> trimesh.Trimesh | None:
    """The surface of a field; None if it has none."""
    try:
        return isosurface.extract(field_XYZ, bound)
    except isosurface.NoSurface:
        return None


def f_score(made: trimesh.Trimesh | None, truth: trimesh.Trimesh, seed: int) -> float:
    """The harmonic mean of the shares of either surface that is within 0.05 of the other; 0 for no surface."""
    if made is None:
        return 0.0
    rng = np.random.default_rng([seed, 12])
    precision, recall = (
        np.mean(np.abs(signed_distance(other, _points(mesh, rng))) < F_DISTANCE)
        for mesh, other in ((made, truth), (truth, made))
    )
    return 2 * precision * recall / max(precision + recall, 1e-9)


def _points(mesh: trimesh.Trimesh, rng: np.random.Generator) -> np.ndarray:
    return surface.sample_uniform(mesh, F_POINTS, rng)[:, :3]


def silhouette_iou(made: trimesh.Trimesh | None, truth: trimesh.Trimesh) -> float:
    """Of the two from the front, in one frame; 0 for no surface."""
    if made is None:
        return 0.0
    return iou(*(_silhouette(mesh) for mesh in (truth, made)))


def _silhouette(mesh: trimesh.Trimesh) -> np.ndarray:
    clip = cameras.project(mesh.vertices, [0.0], [0.0], half_extent=EXTENT)
    return rasterize(clip, np.asarray(mesh.faces, np.int32), SILHOUETTE).faces_VHW[0] > 0


def picture(
    path: pathlib.Path, rows: Sequence[tuple[np.ndarray, Sequence[trimesh.Trimesh | None]]]
) -> None:
    """Writes a PNG: each row an image, uint8 [S, S, 4], and meshes seen from the front, above and aside; two rows
    stand beside each other."""
    tiles = [[_fitted(image), *map(_render, meshes)] for image, meshes in rows]
    pairs = [sum(tiles[i : i + 2], []) for i in range(0, len(tiles), 2)]
    step, columns = _TILE + _GAP, max(map(len, pairs))
    sheet = np.full((len(pairs) * step, columns * step, 3), 255, np.uint8)
    for i, pair in enumerate(pairs):
        for j, tile in enumerate(pair):
            sheet[i * step :, j * step :][:_TILE, :_TILE] = tile
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path, optimize=True)


def _fitted(image_SS4: np.ndarray) -> np.ndarray:
    image = Image.fromarray(shading.on_white(image_SS4))
    return np.asarray(image.resize((_TILE, _TILE), Image.Resampling.BILINEAR))


def _render(mesh: trimesh.Trimesh | None) -> np.ndarray:
    if mesh is None:
        return np.full((_TILE, _TILE, 3), 255, np.uint8)
    return shading.on_white(shading.render(mesh, [30.0], [20.0], _TILE)[0])
