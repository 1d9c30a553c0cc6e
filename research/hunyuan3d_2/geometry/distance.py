"""Signed distance to a mesh: libigl's closest points, and the sign by winding number."""

import igl
import numpy as np
import trimesh


def signed_distance(mesh: trimesh.Trimesh, points_N3: np.ndarray) -> np.ndarray:
    """Distance to the surface, positive inside; float32 [N], exact to rounding.

    Inside is where the generalised winding number exceeds 1/2 (§2.5): exact for a closed mesh whose
    faces point outward (`meshes.repair` makes it so), a best guess for an open one. Raises ValueError
    for points or meshes that are empty, misshapen or not finite.
    """
    vertices, faces, points = _arrays(mesh, points_N3)
    squared = igl.point_mesh_squared_distance(points, vertices, faces)[0]
    inside = igl.fast_winding_number(vertices, faces, points) > 0.5
    distance = np.sqrt(squared)
    return np.where(inside, distance, -distance).astype(np.float32)


def winding_number(mesh: trimesh.Trimesh, points_N3: np.ndarray) -> np.ndarray:
    """How often the surface winds around each point; float64 [N].

    1 inside and 0 outside of a closed mesh, fractions near an open one. To about 1e-2: faces far
    from a point are summed up (Barill et al. 2018).
    """
    vertices, faces, points = _arrays(mesh, points_N3)
    return igl.fast_winding_number(vertices, faces, points)


def _arrays(
    mesh: trimesh.Trimesh, points_N3: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # libigl reads what it is given: a wrong shape or a NaN would end the process or never return.
    points = np.ascontiguousarray(points_N3, np.float64)
    vertices = np.ascontiguousarray(mesh.vertices, np.float64)
    if points.ndim != 2 or points.shape[1] != 3 or not len(points):
        raise ValueError(f"points must be [N, 3] with N > 0, got {points.shape}")
    if not len(mesh.faces):
        raise ValueError("the mesh is empty: there is no distance to it")
    if not np.isfinite(points).all() or not np.isfinite(vertices).all():
        raise ValueError("points and vertices must be finite; see meshes.repair")
    return vertices, np.ascontiguousarray(mesh.faces, np.int64), points
