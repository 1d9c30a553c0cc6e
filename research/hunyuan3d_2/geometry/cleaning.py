"""Meshes out: small pieces and degenerate faces away, fewer faces, and files."""

import os
import pathlib

import numpy as np
import scipy.sparse
import trimesh

from research.hunyuan3d_2.geometry import solids, topology

FACES = 40_000
_SUFFIXES = (".glb", ".obj", ".stl", ".ply")


def clean(mesh: trimesh.Trimesh, faces: int | None = FACES) -> trimesh.Trimesh:
    """What an extracted surface needs before it is used: the three functions below, in order."""
    mesh = drop_degenerate(drop_small(mesh))
    return mesh if faces is None else decimate(mesh, faces)


def drop_small(mesh: trimesh.Trimesh, fraction: float = 0.005) -> trimesh.Trimesh:
    """Without bodies of fewer faces than `fraction` of the largest body's."""
    vertices, faces = _arrays(mesh)
    count, label = topology.components(faces)
    sizes = np.bincount(label, minlength=count)
    return _mesh(vertices, faces[(sizes >= fraction * sizes.max(initial=0))[label]])


def drop_degenerate(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """Vertices within 1e-6 of the longest side are welded, and faces that are thereby none dropped.

    A closed mesh stays closed.
    """
    vertices, faces = _arrays(mesh)
    size = np.ptp(vertices[np.unique(faces)], axis=0).max() if len(faces) else 0
    return _mesh(*topology.weld(vertices, faces, 1e-6 * size)) if size > 0 else mesh


def decimate(mesh: trimesh.Trimesh, faces: int) -> trimesh.Trimesh:
    """About `faces` faces, by edge collapse in the order of quadric error.

    They may be more where the surface would fold over itself: thin parts keep a few hundred faces. Geometry
    alone: colours and UVs have no meaning on the new vertices. A closed mesh stays closed, and
    one with two faces at each edge nearly always stays so too. Raises ValueError for fewer than 4
    faces, the least that bound a solid.
    """
    if faces < 4:
        raise ValueError(f"a closed mesh has at least 4 faces; cannot decimate to {faces}")
    if len(mesh.faces) <= faces:
        return mesh
    vertices, before = _arrays(mesh)
    size = np.ptp(vertices[np.unique(before)], axis=0).max()
    if not size > 0:
        return mesh
    vertices, after = solids.simplify(vertices / size, before, faces)
    if not (topology.edges(before).faces > 2).any():
        vertices, after = _without_pinches(vertices, after)
    return _mesh(vertices * size, after)


def save(mesh: trimesh.Trimesh, path: str | os.PathLike) -> pathlib.Path:
    """Writes a GLB, OBJ, STL or PLY, by the suffix; the directory is made if there is none.

    All are written y up as the mesh stands (GLB's own convention), as one mesh. A GLB has one
    material: the mesh's own, or a grey matt one, tinted by the vertex colours if there are any.
    Raises ValueError for another suffix or an empty mesh.
    """
    path = pathlib.Path(path)
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"{path}: the name must end in one of {', '.join(_SUFFIXES)}")
    if not len(mesh.faces):
        raise ValueError(f"the mesh is empty; {path} is not written")
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".glb":
        if mesh.visual.kind != "texture":
            mesh = _with_material(mesh)
        trimesh.Scene({"mesh": mesh}).export(path, file_type="glb", include_normals=True)
    else:
        mesh.export(path, file_type=suffix[1:])
    return path


def _without_pinches(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges at four faces, which edge collapse leaves now and then where a wall is thin, drawn together to points.

    Where that would change the shape, all stays as it is.
    """
    table, joined = topology.edges(faces), faces
    for _ in range(20):  # a few edges, and seldom new ones
        ends = table.ends[table.faces > 2]
        if not len(ends):
            break
        graph = scipy.sparse.csr_array((np.ones(len(ends)), ends.T), (len(vertices),) * 2)
        label = scipy.sparse.csgraph.connected_components(graph, directed=False)[1]
        joined = np.unique(label, return_index=True)[1][label][joined]
        joined = joined[(joined != np.roll(joined, 1, axis=1)).all(1)]
        joined = topology.without_repeats(joined)
        table = topology.edges(joined)
    before, after = (
        topology.volumes(vertices, f, 1, np.zeros(len(f), int))[0] for f in (faces, joined)
    )
    sound = (table.faces == 2).all() and abs(after - before) <= 1e-3 * abs(before)
    return vertices, joined if sound else faces


def _with_material(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    coloured = mesh.visual.kind in ("vertex", "face")
    material = trimesh.visual.material.PBRMaterial(
        name="surface",
        baseColorFactor=[255, 255, 255, 255] if coloured else [200, 200, 200, 255],
        metallicFactor=0.0,
        roughnessFactor=0.8,
    )
    visual = trimesh.visual.TextureVisuals(material=material)
    if coloured:
        visual.vertex_attributes["color"] = np.asarray(mesh.visual.vertex_colors, np.uint8)
    return trimesh.Trimesh(mesh.vertices, mesh.faces, visual=visual, process=False)


def _arrays(mesh: trimesh.Trimesh) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces, np.int64)


def _mesh(vertices: np.ndarray, faces: np.ndarray) -> trimesh.Trimesh:
    return trimesh.Trimesh(*topology.compact(vertices, faces), process=False)
