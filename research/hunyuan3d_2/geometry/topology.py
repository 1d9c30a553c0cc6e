"""Triangles as arrays: vertices float64 [V, 3] and faces int64 [F, 3], and how they hang together.

A set of faces is *closed* if each edge is passed as often one way as the other: then its winding
number is a whole number everywhere off the surface. That is weaker than watertight (two faces at
each edge) and all that a signed distance needs. Welding and edge collapse keep it.
"""

import dataclasses

import numpy as np
import scipy.sparse
import scipy.spatial


@dataclasses.dataclass(frozen=True)
class Edges:
    """The undirected edges of faces. Half edge h is that from corner h % 3 of face h // 3 to the next."""

    ends: np.ndarray  # int64 [E, 2], the lower vertex first
    faces: np.ndarray  # int64 [E], how many there are at each
    flow: np.ndarray  # int64 [E], passes upwards minus downwards; 0 everywhere: closed
    of_half: np.ndarray  # int64 [3F], the edge of each half edge


def half_edges(faces_F3: np.ndarray) -> np.ndarray:
    """[3F, 2], from and to."""
    return np.stack([faces_F3, np.roll(faces_F3, -1, axis=1)], axis=-1).reshape(-1, 2)


def edges(faces_F3: np.ndarray) -> Edges:
    halves = half_edges(faces_F3)
    base = int(faces_F3.max(initial=0)) + 1
    keys = halves.min(1) * base + halves.max(1)
    unique, of_half, counts = np.unique(keys, return_inverse=True, return_counts=True)
    up = np.where(halves[:, 0] < halves[:, 1], 1.0, -1.0)
    flow = np.bincount(of_half, up, len(unique)).astype(np.int64)
    return Edges(np.stack(np.divmod(unique, base), axis=-1), counts, flow, of_half)


def components(faces_F3: np.ndarray, table: Edges | None = None) -> tuple[int, np.ndarray]:
    """(how many bodies, which one each face is of); faces that share an edge are of one body."""
    if not len(faces_F3):
        return 0, np.zeros(0, np.int32)
    table = table or edges(faces_F3)
    face = np.arange(3 * len(faces_F3)) // 3
    shape = (len(faces_F3), len(table.ends))
    at = scipy.sparse.csr_array((np.ones(len(face), bool), (face, table.of_half)), shape)
    graph = scipy.sparse.block_array([[None, at], [at.T, None]], format="csr")
    count, label = scipy.sparse.csgraph.connected_components(graph, directed=False)
    return count, label[: len(faces_F3)]


def leaking(faces_F3: np.ndarray, table: Edges, count: int, label_F: np.ndarray) -> np.ndarray:
    """bool [count]: the bodies that are not closed."""
    leaks = np.zeros(count, bool)
    leaks[np.repeat(label_F, 3)[table.flow[table.of_half] != 0]] = True
    return leaks


def compact(vertices_V3: np.ndarray, faces_F3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without vertices that are of no face."""
    used, index = np.unique(faces_F3, return_inverse=True)
    return vertices_V3[used], index.reshape(faces_F3.shape)


def weld(
    vertices_V3: np.ndarray, faces_F3: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """One vertex for all that are within `tolerance` of each other, and no face that has a vertex twice.

    Vertices are put in the cells of a grid, and cells that touch are one: those further apart than four
    times the tolerance stay apart, unless others lie between.
    """
    vertices, faces = compact(vertices_V3, faces_F3)
    if not len(faces):
        return vertices, faces
    cells = np.round((vertices - vertices.min(0)) / tolerance).astype(np.int64)
    cells, first, index = np.unique(cells, axis=0, return_index=True, return_inverse=True)
    touching = scipy.spatial.cKDTree(cells).query_pairs(1.5, p=np.inf, output_type="ndarray")
    graph = scipy.sparse.csr_array((np.ones(len(touching)), touching.T), (len(cells),) * 2)
    label = scipy.sparse.csgraph.connected_components(graph, directed=False)[1]
    vertices = vertices[first[np.unique(label, return_index=True)[1]]]
    faces = label.astype(np.int64)[index.reshape(-1)][faces]
    return compact(vertices, faces[(faces != np.roll(faces, 1, axis=1)).all(1)])


def crosses(vertices_V3: np.ndarray, faces_F3: np.ndarray) -> np.ndarray:
    """[F, 3]: outward normals, as long as twice the area."""
    a, b, c = (vertices_V3[faces_F3[:, i]] for i in range(3))
    return np.cross(b - a, c - a)


def areas(vertices_V3: np.ndarray, faces_F3: np.ndarray) -> np.ndarray:
    return np.linalg.norm(crosses(vertices_V3, faces_F3), axis=1) / 2


def volumes(
    vertices_V3: np.ndarray, faces_F3: np.ndarray, count: int, label_F: np.ndarray
) -> np.ndarray:
    """[count]: the signed volume of each closed body."""
    a, b, c = (vertices_V3[faces_F3[:, i]] for i in range(3))
    return np.bincount(label_F, np.einsum("fi,fi->f", a, np.cross(b, c)) / 6, count)


def without_repeats(faces_F3: np.ndarray) -> np.ndarray:
    """One face where several have the same three corners.

    If as many are turned one way as the other they bound nothing. In a body that is closed without
    them they are a wall inside it (or a fin) and go; elsewhere they are the two sides of a sheet,
    of which one is kept.
    """
    corners = np.sort(faces_F3, axis=1)
    unique, group, counts = np.unique(corners, axis=0, return_inverse=True, return_counts=True)
    if len(unique) == len(faces_F3):
        return faces_F3
    group = group.reshape(-1)
    first = np.argmin(faces_F3, axis=1)[:, None]
    turned = np.take_along_axis(faces_F3, (first + np.arange(3)) % 3, axis=1)
    even = turned[:, 1] < turned[:, 2]
    net = np.bincount(group, np.where(even, 1.0, -1.0), len(unique))
    # Of each group the first face that is turned as most of its group are.
    rank = np.where(np.where(net[group] >= 0, even, ~even), 0, 1)
    order = np.lexsort((np.arange(len(group)), rank, group))
    starts = np.searchsorted(group[order], np.arange(len(unique)))
    kept = np.sort(order[starts])
    walls = net[group[kept]] == 0
    if not walls.any():
        return faces_F3[kept]
    faces = faces_F3[kept]
    count, label = components(faces)
    rest = edges(faces[~walls])
    leaks = leaking(faces[~walls], rest, count, label[~walls])
    solid = np.bincount(label[~walls], minlength=count).astype(bool) & ~leaks
    return faces[~(walls & solid[label])]
