"""Points on a surface: uniform ones, and ones on its sharp edges (§2.1).

Both are float32 [count, 7]: position, unit normal, and a flag that is 1 for a point on a sharp edge.
"""

from typing import Literal

import numpy as np
import trimesh

from research.hunyuan3d_2.geometry import topology

_OFFICIAL_COSINE = 0.985


def sample_uniform(mesh: trimesh.Trimesh, count: int, rng: np.random.Generator) -> np.ndarray:
    """Points uniform by area, with the normals of their faces; flag 0. [count, 7] float32.

    Raises ValueError for a mesh without area.
    """
    vertices, faces = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces, np.int64)
    normals = topology.crosses(vertices, faces)
    doubled = np.linalg.norm(normals, axis=1)
    face = _choose(doubled, count, rng, "area")
    corners = vertices[faces[face]]
    u, v = rng.random((2, count, 1))
    root = np.sqrt(u)  # uniform in a triangle (Osada et al. 2002)
    points = (1 - root) * corners[:, 0] + root * ((1 - v) * corners[:, 1] + v * corners[:, 2])
    return _cloud(points, normals[face] / doubled[face, None], 0)


def sample_sharp(
    mesh: trimesh.Trimesh,
    count: int,
    rng: np.random.Generator,
    rule: Literal["dihedral", "official"] = "dihedral",
    angle: float = 20.0,
) -> np.ndarray:
    """Points uniform by length on sharp edges; flag 1. [count, 7] float32.

    'dihedral': edges where the normals of the two faces differ by more than `angle` degrees, and
    edges of one face or of three and more; the normal is the mean of the faces'. Vertices at one
    place must be one (`meshes.repair` welds them).

    'official': edges both of whose ends are sharp, where a vertex is sharp if its normal and that
    of one of its faces have a cosine below 0.985; the normal is between those of the ends. It takes
    diagonals of flat faces for edges, and lines along a fine cylinder: see §2.1.

    A mesh without sharp edges gives uniform points with flag 0.
    """
    if rule not in ("dihedral", "official"):
        raise ValueError(f"rule must be 'dihedral' or 'official', got {rule!r}")
    ends, normals = _dihedral_edges(mesh, angle) if rule == "dihedral" else _official_edges(mesh)
    vertices = np.asarray(mesh.vertices, np.float64)
    lengths = np.linalg.norm(vertices[ends[:, 0]] - vertices[ends[:, 1]], axis=1)
    if not lengths.sum() > 0:
        return sample_uniform(mesh, count, rng)
    edge = _choose(lengths, count, rng, "length")
    t = rng.random((count, 1))
    points = (1 - t) * vertices[ends[edge, 0]] + t * vertices[ends[edge, 1]]
    normal = (1 - t) * normals[edge, 0] + t * normals[edge, 1]
    size = np.linalg.norm(normal, axis=1, keepdims=True)
    normal = np.where(size > 1e-6, normal, normals[edge, 0])  # of two that cancel, the first
    return _cloud(points, normal / np.linalg.norm(normal, axis=1, keepdims=True), 1)


def _dihedral_edges(mesh: trimesh.Trimesh, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Sharp edges as (ends [S, 2], unit normals at the ends [S, 2, 3])."""
    vertices, faces = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces, np.int64)
    normals = topology.crosses(vertices, faces)
    size = np.linalg.norm(normals, axis=1, keepdims=True)
    longest = np.linalg.norm(np.diff(vertices[faces[:, [0, 1, 2, 0]]], axis=1), axis=2).max(1)
    flat = size[:, 0] <= 1e-9 * longest**2  # such a face has no normal, so its edges no angle
    normals = np.where(flat[:, None], 0, normals / np.where(size > 0, size, 1))
    table = topology.edges(faces)
    order = np.argsort(table.of_half, kind="stable")
    face = order // 3  # of the half edges, edge after edge
    first = np.cumsum(table.faces) - table.faces
    one, two = face[first], face[first + table.faces - 1]
    cosine = np.einsum("ei,ei->e", normals[one], normals[two])
    odd = (table.faces != 2) & ~flat[one]
    sharp = odd | ((cosine < np.cos(np.deg2rad(angle))) & ~flat[one] & ~flat[two])
    one, two = normals[one[sharp]], normals[two[sharp]]
    normal = one + two
    size = np.linalg.norm(normal, axis=1, keepdims=True)
    normal = np.where(size > 1e-6, normal / np.maximum(size, 1e-6), one)
    return table.ends[sharp], np.stack([normal, normal], axis=1)


def _official_edges(mesh: trimesh.Trimesh) -> tuple[np.ndarray, np.ndarray]:
    faces = np.asarray(mesh.faces, np.int64)
    at_vertex = np.asarray(mesh.vertex_normals, np.float64)
    at_face = np.asarray(mesh.face_normals, np.float64)
    cosine = np.full(len(mesh.vertices), 1.0)
    np.minimum.at(cosine, faces, np.einsum("fci,fi->fc", at_vertex[faces], at_face))
    sharp = cosine < _OFFICIAL_COSINE
    ends = topology.edges(faces).ends
    ends = ends[sharp[ends].all(1)]
    return ends, at_vertex[ends]


def _choose(weights: np.ndarray, count: int, rng: np.random.Generator, what: str) -> np.ndarray:
    """Indices drawn with probability proportional to the weights."""
    ends = np.cumsum(weights)
    if not (len(ends) and ends[-1] > 0 and np.isfinite(ends[-1])):
        raise ValueError(f"the mesh has no {what} to draw points from; see meshes.check")
    # At most the last one: u * ends[-1] may round up to ends[-1].
    index = np.searchsorted(ends, rng.random(count) * ends[-1], side="right")
    return np.minimum(index, np.flatnonzero(weights)[-1])


def _cloud(points: np.ndarray, normals: np.ndarray, flag: int) -> np.ndarray:
    return np.concatenate([points, normals, np.full((len(points), 1), flag)], axis=1).astype(
        np.float32
    )
