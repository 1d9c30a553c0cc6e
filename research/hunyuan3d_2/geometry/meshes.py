"""Meshes in: reading, checking, repairing and normalising.

A mesh is a `trimesh.Trimesh` (process=False), y up, right-handed, in the units of its file until
`normalize`. What the rest of the package needs of one is that it bounds a solid: that it is
*closed* (see topology.py), so that its signed distance has an exact sign. `repair` makes it so and
says what it did; where it cannot, MeshError says why.
"""

import dataclasses
import os
import pathlib

import igl
import numpy as np
import trimesh

from research.hunyuan3d_2.geometry import solids, topology

MAX_FACES = 1_000_000
HALF_SIDE = 0.9999  # §2.1: half the longest side of a normalised mesh
GREY = 190  # of what has no colours

_WELD = 1e-6  # of the longest side: vertices nearer than this are one
_HOLE = 0.15  # of the longest side: holes with a rim not longer than this are filled
SUFFIXES = (".glb", ".gltf", ".obj", ".stl", ".ply", ".off")


class MeshError(ValueError):
    """A mesh that cannot be used; the message says what is wrong with it and what to do."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check` finds, after vertices at one place are welded."""

    vertices: int  # as they stand in the mesh
    faces: int
    bodies: int  # faces that share an edge are of one body
    longest_side: (
        float  # of the bounding box, in the mesh's units; vertices that are not finite left out
    )
    nonfinite_vertices: int
    degenerate_faces: int  # without area, or with a vertex that is not finite
    boundary_edges: int  # at one face
    nonmanifold_edges: int  # at three faces or more
    closed: bool
    has_uv: bool

    @property
    def watertight(self) -> bool:
        """Closed, with exactly two faces at each edge."""
        return self.closed and not self.nonmanifold_edges


@dataclasses.dataclass(frozen=True)
class Transform:
    """normalised = (original - centre) / scale."""

    centre: np.ndarray  # float64 [3]
    scale: float

    def undo(self, points_N3: np.ndarray) -> np.ndarray:
        return points_N3 * self.scale + self.centre


def read(path: str | os.PathLike) -> trimesh.Trimesh:
    """All triangles of a GLB, GLTF, OBJ, STL, PLY or OFF file as one mesh, with its colours and UVs.

    Points and lines are left out. Parts that are coloured in different ways (by textures or materials, at
    vertices, not at all) are all given colours at their vertices.

    Raises FileNotFoundError, or MeshError for a file that cannot be read or holds no faces.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix.lower() not in SUFFIXES:
        raise MeshError(
            f"{path}: not a format that can be read; convert it to one of {', '.join(SUFFIXES)}"
        )
    try:
        scene = trimesh.load_scene(path, process=False)
        parts = {n: p for n, p in scene.geometry.items() if isinstance(p, trimesh.Trimesh)}
        scene.delete_geometry(set(scene.geometry) - set(parts))
        for part in parts.values():
            _show_colours(part)
        if len({part.visual.kind for part in parts.values()}) > 1:
            for part in parts.values():
                part.visual = _at_vertices(part)
        mesh = scene.to_mesh()
    except Exception as error:  # the readers raise whatever they stumble over
        raise MeshError(
            f"{path} cannot be read ({type(error).__name__}: {error}); export it anew"
        ) from error
    if not len(mesh.faces):
        raise MeshError(
            f"{path} holds no faces (a point cloud, lines, or nothing); export it as triangles"
        )
    return mesh


def vertex_colours(mesh: trimesh.Trimesh) -> np.ndarray:
    """The mesh's own colours, or those of its texture or material, or grey, at the vertices; uint8 RGBA [V, 4]."""
    visual = mesh.visual
    if visual.kind == "texture":
        visual = visual.to_color()  # of a single colour where there are no UVs
    grey = np.array([GREY, GREY, GREY, 255], np.uint8)
    colours = grey if visual.kind is None else np.asarray(visual.vertex_colors)
    return np.broadcast_to(colours, (len(mesh.vertices), 4))


def check(mesh: trimesh.Trimesh) -> Report:
    """What is unusual in a mesh. Changes nothing, and raises nothing however bad the mesh is."""
    vertices, faces = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces, np.int64)
    finite = np.isfinite(vertices).all(1)
    sound = faces[finite[faces].all(1)]
    longest = _longest(vertices, sound)
    if 0 < longest < np.inf:
        scaled, welded = topology.weld(vertices / longest, sound, _WELD)
    else:
        scaled, welded = vertices, sound[:0]
    table = topology.edges(welded)
    flat = topology.areas(scaled, welded) <= 1e-14
    return Report(
        vertices=len(vertices),
        faces=len(faces),
        bodies=topology.components(welded, table)[0],
        longest_side=longest,
        nonfinite_vertices=int((~finite).sum()),
        degenerate_faces=int(len(faces) - len(welded) + flat.sum()),
        boundary_edges=int((table.faces == 1).sum()),
        nonmanifold_edges=int((table.faces > 2).sum()),
        closed=bool(len(welded)) and not table.flow.any(),
        has_uv=getattr(mesh.visual, "uv", None) is not None,
    )


def normalize(mesh: trimesh.Trimesh) -> tuple[trimesh.Trimesh, Transform]:
    """The mesh with its bounding box centred at 0 and its longest side 2 * 0.9999 (§2.1).

    Colours, UVs and materials stay; vertices of no face do not count. Raises MeshError for a mesh
    that is empty, without extent or not finite.
    """
    if not len(mesh.faces):
        raise MeshError("the mesh is empty: it has no faces")
    vertices = np.asarray(mesh.vertices, np.float64)
    used = vertices[np.unique(mesh.faces)]
    if not np.isfinite(used).all():
        raise MeshError(
            "the mesh has vertices that are NaN or infinite; `repair` drops their faces"
        )
    low, high = used.min(0), used.max(0)
    scale = float((high - low).max() / 2 / HALF_SIDE)
    if not (scale > 0 and np.isfinite(scale)):
        raise MeshError(f"the mesh's extent is {scale}: it is a point, or too large for numbers")
    transform = Transform(low + (high - low) / 2, scale)
    scaled = mesh.copy()
    scaled.vertices = (vertices - transform.centre) / scale
    return scaled, transform


def repair(mesh: trimesh.Trimesh, max_faces: int = MAX_FACES) -> tuple[trimesh.Trimesh, list[str]]:
    """The solid that a mesh bounds, or nearly bounds, and what was done to it, in words.

    Faces at vertices that are not finite, without area or repeated are dropped; vertices at one
    place are welded; above `max_faces` the mesh is simplified; windings are made to agree and to
    face outward, but a closed surface inside another and wound inward is a cavity and stays one;
    bodies that overlap are united; small holes are filled. A body that is open nevertheless
    encloses nothing: it becomes a thin shell, while closed bodies beside it keep their surface
    (§8.3). Edges at three faces or more are harmless to all of this and stay.

    Returns geometry alone, in the units of `mesh`, without colours or UVs. Raises MeshError if
    there is nothing to work on.
    """
    vertices, faces = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces, np.int64)
    if not len(faces):
        raise MeshError("the mesh is empty: it has no faces")
    done: list[str] = []
    sound = np.isfinite(vertices).all(1)[faces].all(1)
    if not sound.any():
        raise MeshError("every face has a vertex that is NaN or infinite; export the mesh anew")
    if not sound.all():
        done.append(f"faces with vertices that are NaN or infinite, dropped: {(~sound).sum()}")
    vertices, faces = topology.compact(vertices, faces[sound])
    size = _longest(vertices, faces)
    if not (size > 0 and np.isfinite(size)):
        raise MeshError(f"the mesh's extent is {size}: it is a point, or too large for numbers")
    centre = vertices.min(0)
    vertices, faces = _cleaned((vertices - centre) / size, faces, done)
    if len(faces) > max_faces:
        done.append(f"faces more than {max_faces}, simplified: {len(faces)}")
        vertices, faces = topology.weld(*solids.simplify(vertices, faces, max_faces), _WELD)
    vertices, faces = _solid(vertices, faces, done)
    return trimesh.Trimesh(vertices * size + centre, faces, process=False), done


def _at_vertices(part: trimesh.Trimesh) -> trimesh.visual.ColorVisuals:
    return trimesh.visual.ColorVisuals(part, vertex_colors=vertex_colours(part))


def _show_colours(part: trimesh.Trimesh) -> None:
    """Vertex colours beside a plain material are what is seen, but trimesh joins only the materials."""
    colours = getattr(part.visual, "vertex_attributes", {}).get("color")
    if colours is not None and part.visual.uv is None:
        part.visual = trimesh.visual.ColorVisuals(part, vertex_colors=colours)


def _cleaned(
    vertices: np.ndarray, faces: np.ndarray, done: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Welded, without degenerate and repeated faces; the longest side is 1."""
    before = len(faces)
    vertices, faces = topology.weld(vertices, faces, _WELD)
    if len(faces) < before:
        done.append(f"faces without area, dropped: {before - len(faces)}")
    # Faces that are flat but have three corners stay: they close the surface, and do no harm.
    if topology.areas(vertices, faces).sum() <= 1e-9:
        raise MeshError("the mesh has no area: its faces are points or lines")
    before = len(faces)
    faces = topology.without_repeats(faces)
    if len(faces) < before:
        done.append(f"faces that repeat or cancel others, dropped: {before - len(faces)}")
    return vertices, faces


def _solid(
    vertices: np.ndarray, faces: np.ndarray, done: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Closed bodies outward and united, open ones as shells."""
    table = topology.edges(faces)
    if table.flow.any():
        turned = np.asarray(igl.bfs_orient(faces)[0], np.int64)
        if not np.array_equal(turned, faces):
            done.append("neighbouring faces wound differently, made to agree")
            faces, table = turned, topology.edges(turned)
        if table.flow.any():
            vertices, faces, filled = solids.fill_holes(vertices, faces, table, _HOLE)
            if filled:
                done.append(f"small holes, filled: {filled}")
                table = topology.edges(faces)
    count, label = topology.components(faces, table)
    leaks = topology.leaking(faces, table, count, label)
    opened, closed = faces[leaks[label]], faces[~leaks[label]]
    closed, flipped = solids.outward(vertices, closed)
    if flipped:
        done.append(f"bodies inside out, turned: {flipped}")
    if leaks.any():
        done.append(f"open surfaces, made into shells: {leaks.sum()}")
        shell_vertices, shell = solids.thicken(vertices, opened)
        closed = np.concatenate([closed, shell + len(vertices)])
        vertices = np.concatenate([vertices, shell_vertices])
    vertices, faces = topology.compact(vertices, closed)
    united = solids.united(vertices, faces)
    if united is not None:
        done.append("bodies that overlap or touch, united")
        vertices, faces = united
    return vertices, faces


def _longest(vertices: np.ndarray, faces: np.ndarray) -> float:
    used = vertices[np.unique(faces)]
    with np.errstate(over="ignore"):
        return float(np.ptp(used, axis=0).max()) if len(used) else 0.0
