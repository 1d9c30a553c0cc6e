"""From a field on a grid to a mesh: marching cubes (scikit-image) and surface nets (below)."""

import functools
import itertools
import warnings
from typing import Literal

import numpy as np
import trimesh
from skimage import measure


class NoSurface(ValueError):
    """The field does not cross the level; the message gives its range."""


def extract(
    field_XYZ: np.ndarray,
    bound: float,
    method: Literal["marching_cubes", "surface_nets"] = "marching_cubes",
    level: float = 0.0,
) -> trimesh.Trimesh:
    """The surface where a field that is positive inside equals `level`.

    Args:
      field_XYZ: [X+1, Y+1, Z+1] floating, values at `linspace(-bound, bound)` along each axis.
      bound: half the side of the cube.
      method: 'marching_cubes' has its vertices on edges of the grid; 'surface_nets' one or a few in
        each cell, for a smoother surface of more even triangles (it rounds sharp edges by about
        half a cell).
      level: of the surface.

    Returns:
      A mesh with faces outward, so of positive volume. Vertices are v / R * 2 bound - bound with R
      the true number of cells (§8.1). What the cube cuts off is closed by a flat cap: the mesh is
      always closed.

    Raises:
      NoSurface: no value is above the level, or all are.
      ValueError: the field is not finite or no grid, or the level is not finite.
    """
    field = np.asarray(field_XYZ, np.float32)
    if field.ndim != 3 or min(field.shape) < 2:
        raise ValueError(f"the field must be a grid [X+1, Y+1, Z+1], got {field.shape}")
    if not np.isfinite(field).all():
        bad = int((~np.isfinite(field)).sum())
        raise ValueError(
            f"{bad} of {field.size} values of the field are NaN or infinite; fill them first"
        )
    if not np.isfinite(level):
        raise ValueError(f"the level must be finite, got {level}")
    field = field - np.float32(level)
    low, high = field.min(), field.max()
    if low > 0 or high <= 0:
        raise NoSurface(
            f"no surface at level {level:g}: the field is between {low + level:.4g} and {high + level:.4g}"
        )
    # Values at the level would give vertices at one place, and faces without area.
    field[field == 0] = -1e-6 * high
    inside = (
        np.concatenate(
            [field[[0, -1]].ravel(), field[:, [0, -1]].ravel(), field[:, :, [0, -1]].ravel()]
        )
        > 0
    )
    capped = int(inside.any())
    if capped:  # far outside beyond the border, so the cap is on it
        field = np.pad(field, 1, constant_values=-1e4 * high)
    find = {"marching_cubes": _marching_cubes, "surface_nets": _surface_nets}[method]
    vertices, faces = find(field)
    cells = np.asarray(field.shape) - 1 - 2 * capped
    vertices = np.clip(vertices - capped, 0, cells) / cells * (2 * bound) - bound
    return trimesh.Trimesh(vertices, faces, process=False)


def _marching_cubes(field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # scikit-image 0.26 with NumPy 2.5
        vertices, faces, _, _ = measure.marching_cubes(field, 0.0)
    return vertices.astype(np.float64), faces[:, ::-1].astype(np.int64)  # it faces what is positive


# A corner of a cell is (i, j, k) in {0, 1}³ with number 4i + 2j + k; an edge is the pair of its corners.
_CORNERS = list(itertools.product((0, 1), repeat=3))
_EDGES = [
    (a, b)
    for a, b in itertools.combinations(range(8), 2)
    if sum(x != y for x, y in zip(_CORNERS[a], _CORNERS[b], strict=True)) == 1
]


def _surface_nets(field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Naive surface nets (Gibson 1998), with a vertex for each piece of surface in a cell.

    A vertex is the mean of the crossings of its piece with the cell's edges; each crossed edge of
    the grid joins the vertices of the four cells around it. One vertex for a whole cell would pinch
    the surface where two pieces pass through it; pieces are told apart by `_pieces`.
    """
    inside = field > 0
    shape = np.asarray(field.shape) - 1
    config = np.zeros(shape, np.uint8)
    for number, (i, j, k) in enumerate(_CORNERS):
        config |= (
            inside[i : i + shape[0], j : j + shape[1], k : k + shape[2]].astype(np.uint8) << number
        )
    cells = np.flatnonzero((config > 0) & (config < 255))
    config = config.ravel()[cells]
    at = np.stack(np.unravel_index(cells, shape), axis=1)
    pieces, counts = (
        table[_swapped(config, cells, at, shape).astype(int), config] for table in _pieces()
    )
    first = np.cumsum(counts) - counts
    total = np.zeros((counts.sum(), 3))
    crossings = np.zeros(len(total))
    vertex_of = np.full((len(cells), 12), -1)
    for edge, (a, b) in enumerate(_EDGES):
        crossed = np.flatnonzero(pieces[:, edge] >= 0)
        start, end = (at[crossed] + _CORNERS[corner] for corner in (a, b))
        f, g = (field[tuple(place.T)].astype(np.float64) for place in (start, end))
        vertex = vertex_of[crossed, edge] = first[crossed] + pieces[crossed, edge]
        np.add.at(total, vertex, start + (f / (f - g))[:, None] * (end - start))
        np.add.at(crossings, vertex, 1)
    vertices = total / crossings[:, None]
    return vertices, np.concatenate(
        [_quads(axis, inside, cells, at, shape, vertex_of, vertices) for axis in range(3)]
    )


def _quads(axis, inside, cells, at, shape, vertex_of, vertices) -> np.ndarray:
    """Two triangles for each crossed edge of the grid along an axis, by its four cells."""
    u, v = (axis + 1) % 3, (axis + 2) % 3
    unit = np.eye(3, dtype=np.int64)
    # The crossed edge is edge (0, 0) of the cell above it in u and v; the others are reached from there.
    corners = [
        (np.zeros(3, np.int64), (0, 0)),
        (-unit[u], (1, 0)),
        (-unit[u] - unit[v], (1, 1)),
        (-unit[v], (0, 1)),
    ]
    mine = np.flatnonzero((vertex_of[:, _edge(axis, 0, 0)] >= 0) & (at[:, u] > 0) & (at[:, v] > 0))
    place = at[mine]
    quad = np.empty((len(mine), 4), np.int64)
    for i, (offset, (du, dv)) in enumerate(corners):
        cell = np.searchsorted(cells, np.ravel_multi_index(tuple((place + offset).T), shape))
        quad[:, i] = vertex_of[cell, _edge(axis, du, dv)]
    # From the origin's cell over -u, -u-v, -v the turn is right-handed about the axis: it points
    # from inside, where the edge begins, outward.
    quad = np.where(inside[tuple(place.T)][:, None], quad, quad[:, ::-1])
    p = vertices[quad]
    across = np.linalg.norm(p[:, 0] - p[:, 2], axis=1) > np.linalg.norm(p[:, 1] - p[:, 3], axis=1)
    quad = np.where(across[:, None], np.roll(quad, -1, axis=1), quad)  # along the shorter diagonal
    return np.concatenate([quad[:, [0, 1, 2]], quad[:, [0, 2, 3]]])


def _edge(axis: int, du: int, dv: int) -> int:
    """The number of a cell's edge along an axis, at du, dv in the two axes that follow it."""
    start = [0, 0, 0]
    start[(axis + 1) % 3], start[(axis + 2) % 3] = du, dv
    end = list(start)
    end[axis] = 1
    return _EDGES.index((_CORNERS.index(tuple(start)), _CORNERS.index(tuple(end))))


def _face_corners(axis: int, side: int) -> list[int]:
    """The corners of a cell's face, around it."""
    cycle = []
    for u, v in ((0, 0), (0, 1), (1, 1), (1, 0)):
        corner = [0, 0, 0]
        corner[axis], corner[(axis + 1) % 3], corner[(axis + 2) % 3] = side, u, v
        cycle.append(_CORNERS.index(tuple(corner)))
    return cycle


_FACES = [(axis, side) for axis in range(3) for side in (0, 1)]


def _joined(config: int, apart: bool) -> tuple[list[int], list[list[int]]]:
    """For corners that are inside (bits of config): (piece of each edge or -1, the ambiguous faces' pieces).

    On a face two crossed edges are ends of one line of surface. Where all four are crossed there are
    two lines: around each corner that is inside if `apart`, else around each that is outside.
    """
    bit = [config >> corner & 1 for corner in range(8)]
    piece = [number if bit[a] != bit[b] else -1 for number, (a, b) in enumerate(_EDGES)]
    ambiguous = []
    for face in _FACES:
        cycle = _face_corners(*face)
        sides = [_EDGES.index(tuple(sorted((cycle[i], cycle[(i + 1) % 4])))) for i in range(4)]
        crossed = [side for side in sides if piece[side] >= 0]
        lines = [crossed] if crossed else []
        if len(crossed) == 4:
            around = [i for i in range(4) if bit[cycle[i]] == apart]
            lines = [[sides[i - 1], sides[i]] for i in around]
            ambiguous.append(lines)
        else:
            ambiguous.append([])
        for one, other in lines:
            old, new = piece[one], piece[other]
            piece = [new if p == old else p for p in piece]
    numbers = sorted(set(piece) - {-1})
    piece = [numbers.index(p) if p >= 0 else -1 for p in piece]
    return piece, [[piece[line[0]] for line in lines] for lines in ambiguous]


@functools.cache
def _pieces() -> tuple[np.ndarray, np.ndarray]:
    """([2, 256, 12] the piece of surface that each edge of a cell is crossed by or -1, [2, 256] how many).

    The second half is for cells that are `_swapped`.
    """
    tables = [[_joined(config, apart)[0] for config in range(256)] for apart in (True, False)]
    pieces = np.asarray(tables)
    return pieces, pieces.max(-1) + 1


@functools.cache
def _pinched() -> np.ndarray:
    """[256]: the ambiguous face both of whose lines are of one piece, -1 if none. No cell has two."""
    faces = np.full(256, -1)
    for config in range(256):
        for face, lines in enumerate(_joined(config, True)[1]):
            if len(lines) == 2 and lines[0] == lines[1]:
                faces[config] = face
    return faces


def _swapped(
    config: np.ndarray, cells: np.ndarray, at: np.ndarray, shape: np.ndarray
) -> np.ndarray:
    """Cells that share an ambiguous face with one piece on both sides: the two lines would be one edge
    of four triangles. Both cells then part the face the other way, into two pieces (Wenger 2013)."""
    swapped = np.zeros(len(cells), bool)
    pinched = _pinched()[config]
    for face, (axis, side) in enumerate(_FACES):
        if side:  # each pair is seen from the cell below
            mine = np.flatnonzero((pinched == face) & (at[:, axis] < shape[axis] - 1))
            above = at[mine] + np.eye(3, dtype=np.int64)[axis]
            other = np.searchsorted(cells, np.ravel_multi_index(tuple(above.T), shape))
            both = pinched[other] == face - 1
            swapped[mine[both]] = swapped[other[both]] = True
    return swapped
