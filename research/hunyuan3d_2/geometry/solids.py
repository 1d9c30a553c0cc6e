"""From triangles to solids: outward faces, unions, filled holes, and a thickness for open surfaces.

All arrays as in topology.py; lengths are in units of the mesh's longest side.
"""

from collections.abc import Iterator

import fast_simplification
import igl
import manifold3d
import numpy as np
from scipy import ndimage

from research.hunyuan3d_2.geometry import isosurface, topology

_CELL = 1 / 128  # of the grid on which a shell is made; a shell is two cells thick
_POINTS = 1 << 18  # that cover faces, at once
# How fast the error that is allowed rises while edges are collapsed. Slowly is close to the order of the
# errors, and thin parts stay, but it ends with faces left; then faster.
_PACES = (3, 4, 5, 6, 7)


def outward(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, int]:
    """Closed bodies turned to positive volume, but for those inside another: they are cavities.

    Returns the faces and how many bodies were turned.
    """
    count, label = topology.components(faces)
    volumes = topology.volumes(vertices, faces, count, label)
    flip = np.zeros(count, bool)
    if volumes.sum() < 0:  # all inside out, cavities too
        flip[:] = True
    for body in np.flatnonzero(np.where(flip, -volumes, volumes) < 0):
        others = faces[label != body]
        at = vertices[faces[label == body][0, :1]]
        if not len(others) or abs(igl.fast_winding_number(vertices, others, at)[0]) < 0.5:
            flip[body] ^= True
    return np.where(flip[label][:, None], faces[:, ::-1], faces), int(flip.sum())


def united(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The union of closed bodies, since surface inside a solid is not its boundary.

    A body and the cavities in it are one solid. None if there is nothing to unite: one solid, or none that
    overlap or touch; or if a cavity is in no body, or a solid is not a manifold.
    """
    count, label = topology.components(faces)
    volumes = topology.volumes(vertices, faces, count, label)
    low, high = _boxes(vertices, faces, label, count)
    if not _touch(low[volumes > 0], high[volumes > 0]):
        return None
    solid = _solids(vertices, faces, label, volumes, low, high)
    if (solid < 0).any():
        return None
    manifolds = []
    for body in np.unique(solid):
        v, f = topology.compact(vertices, faces[solid[label] == body])
        manifolds.append(manifold3d.Manifold(manifold3d.Mesh64(v, f.astype(np.uint64))))
        if manifolds[-1].status() != manifold3d.Error.NoError:
            return None
    union = manifold3d.Manifold.batch_boolean(manifolds, manifold3d.OpType.Add)
    apart = sum(manifold.surface_area() for manifold in manifolds)
    if apart - union.surface_area() <= 1e-9 * apart:
        return None
    mesh = union.to_mesh64()
    return np.asarray(mesh.vert_properties[:, :3], np.float64), np.asarray(mesh.tri_verts, np.int64)


def fill_holes(
    vertices: np.ndarray, faces: np.ndarray, table: topology.Edges, longest_rim: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """Closes each hole whose rim is one loop not longer than `longest_rim`, by a fan from its middle.

    Neighbouring faces must be wound alike. Returns (vertices, faces, how many were filled).
    """
    halves = topology.half_edges(faces)
    rim = halves[(table.faces == 1)[table.of_half]]
    start, passes = np.unique(rim[:, 0], return_counts=True)
    after = dict(
        rim[np.isin(rim[:, 0], start[passes == 1])].tolist()
    )  # where the way is not clear, none
    fans, middles = [], []
    while after:
        first, at = after.popitem()
        loop = [first]
        while at in after:
            loop.append(at)
            at = after.pop(at)
        points = vertices[loop]
        length = np.linalg.norm(points - np.roll(points, 1, axis=0), axis=1).sum()
        if at != first or len(loop) < 3 or length > longest_rim:
            continue
        middle = len(vertices) + len(middles)
        middles.append(points.mean(0))
        fans.append(np.stack([np.roll(loop, -1), loop, np.full(len(loop), middle)], axis=1))
    if not fans:
        return vertices, faces, 0
    return np.concatenate([vertices, middles]), np.concatenate([faces, *fans]), len(fans)


def thicken(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The closed shell of all points within 1/128 of the longest side of an open surface.

    This is the level set ε - |d| = 0 of §8.3, for surfaces that have no inside of their own.
    """
    vertices, faces = topology.compact(vertices, faces)
    low = vertices.min(0) - 4 * _CELL
    cells = int(np.ceil((np.ptp(vertices, axis=0).max() + 8 * _CELL) / _CELL))
    near = np.zeros((cells + 1,) * 3, bool)
    for points in _cover(vertices, faces):
        near[tuple(np.round((points - low) / _CELL).astype(np.int64).T)] = True
    near = ndimage.binary_dilation(near, np.ones((3, 3, 3), bool), iterations=3)
    at = np.argwhere(near)
    squared = igl.point_mesh_squared_distance(at * _CELL + low, vertices, faces)[0]
    field = np.full(near.shape, -_CELL, np.float32)
    field[near] = np.maximum(_CELL - np.sqrt(squared), -_CELL)
    shell = isosurface.extract(field, cells * _CELL / 2, "surface_nets")
    return np.asarray(shell.vertices) + cells * _CELL / 2 + low, np.asarray(shell.faces, np.int64)


def simplify(vertices: np.ndarray, faces: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """About `count` faces by collapsing edges at the least quadric error. Keeps closed what is closed."""
    for pace in _PACES:
        if len(faces) <= count:
            break
        found = fast_simplification.simplify(vertices, faces, target_count=count, agg=pace)
        vertices, faces = np.asarray(found[0], np.float64), np.asarray(found[1], np.int64)
    return vertices, faces


def _cover(vertices: np.ndarray, faces: np.ndarray) -> Iterator[np.ndarray]:
    """Points on the faces, [N, 3] at a time; none of the faces' points is further than a cell from all."""
    corners = vertices[faces]
    sides = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2).max(1)
    for steps in np.unique(np.ceil(sides / _CELL).astype(np.int64)):
        i, j = np.divmod(np.arange((steps + 1) ** 2), steps + 1)
        weights = np.stack([i, j, steps - i - j], axis=1)[i + j <= steps] / max(steps, 1)
        alike = corners[np.ceil(sides / _CELL) == steps]
        at_once = max(1, _POINTS // len(weights))
        for i in range(0, len(alike), at_once):
            yield (weights @ alike[i : i + at_once]).reshape(-1, 3)


def _boxes(
    vertices: np.ndarray, faces: np.ndarray, label: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The corners, [count, 3] each, of the bodies' bounding boxes."""
    low, high = np.full((count, 3), np.inf), np.full((count, 3), -np.inf)
    np.minimum.at(low, np.repeat(label, 3), vertices[faces].reshape(-1, 3))
    np.maximum.at(high, np.repeat(label, 3), vertices[faces].reshape(-1, 3))
    return low, high


def _touch(low: np.ndarray, high: np.ndarray) -> bool:
    """Whether any two boxes overlap."""
    order = np.argsort(low[:, 0])
    low, high = low[order], high[order]
    for i in range(len(low) - 1):
        near = slice(i + 1, np.searchsorted(low[:, 0], high[i, 0], side="right"))
        if ((low[near] <= high[i]) & (high[near] >= low[i])).all(1).any():
            return True
    return False


def _solids(
    vertices: np.ndarray,
    faces: np.ndarray,
    label: np.ndarray,
    volumes: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> np.ndarray:
    """[count]: for a body its own number, for a cavity that of the smallest body that holds it; -1 if none does."""
    solid = np.where(volumes > 0, np.arange(len(volumes)), -1)
    for body in np.argsort(volumes):
        held = (solid < 0) & (low >= low[body]).all(1) & (high <= high[body]).all(1)
        if volumes[body] <= 0 or not held.any():
            continue
        corners = held[label]
        inside = igl.fast_winding_number(
            vertices, faces[label == body], vertices[faces[corners].ravel()]
        )
        held[np.repeat(label[corners], 3)[inside < 0.5]] = False
        solid[held] = body
    return solid
