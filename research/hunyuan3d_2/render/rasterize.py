"""Triangles to pixels: for every pixel of every view the nearest face, and where in it the pixel's centre lies.

A face can only cover pixels in its bounding box. These candidates, of all faces and views, are laid out in one long
list, tested against the three edges, and reduced to each pixel's nearest by a scatter-min: small and large faces
cost what they cover, and shapes are fixed but for the list's length, which is padded. Both implementations, JAX for
accelerators and NumPy for CPUs (where scatters are slow in XLA), take the same steps.

Shape suffixes: V views, N vertices, F faces, H and W pixels, C candidates.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Semantics = Literal["float", "official"]
_CHUNK_FACES = 4096  # JAX: faces of every view that are looked at side by side
_CHUNK_NUMPY = (
    1 << 17
)  # NumPy: candidates looked at side by side, small enough to stay in the cache
_MOST_CANDIDATES = 1 << 24  # JAX: in one list; beyond, views are taken apart
_NO_FACE = np.iinfo(np.int32).max
_NOTHING = np.uint64(0xFFFFFFFFFFFFFFFF)
# Of the squared bounding box: what float32 may lose in an edge's equation. A centre on the edge of two faces is
# then inside at least one of them: no cracks.
_SLACK = 1e-6


class Raster(NamedTuple):
    """What is seen in each pixel.

    faces_VHW: int32, 1 for the first face; 0 where there is none.
    weights_VHW3: float32, the weights of the face's corners (perspective-corrected barycentric coordinates); 0 where
      there is none.
    depth_VHW: float32, z / w at the pixel's centre; inf where there is no face.
    """

    faces_VHW: np.ndarray
    weights_VHW3: np.ndarray
    depth_VHW: np.ndarray

    def interpolate(self, values_NK, faces_F3) -> np.ndarray:
        """The vertices' values at the pixels, float32 `[V, H, W, K]`; 0 where there is no face."""
        values, corners = (
            np.asarray(values_NK, np.float32),
            np.asarray(faces_F3)[self.faces_VHW - 1],
        )
        return np.einsum("vhwc,vhwck->vhwk", self.weights_VHW3, values[corners])


def rasterize(
    clip_VN4,
    faces_F3,
    size: int | tuple[int, int],
    *,
    semantics: Semantics = "float",
    implementation: Literal["jax", "numpy"] | None = None,
) -> Raster:
    """The nearest face of every pixel, in all views at once.

    A vertex's place is (ndc / 2 + 1/2) (W - 1) + 1/2, its rows likewise: -1 and 1 are the centres of the outermost
    pixels. A pixel is covered if its centre is in or on the triangle, seen from either side; of several, the one of
    least depth wins, then the one of the lowest number. Triangles that touch the plane of the eye (w <= 0) or that
    are seen edge-on are left out; nothing else is clipped.

    Args:
      clip_VN4: clip coordinates, as `cameras.project` makes them.
      faces_F3: int, indices of corners.
      size: pixels, of a square or (height, width).
      semantics: 'official' compares depths as the released rasteriser does, as whole numbers of 2^-18 of the depth
        range (z / w from -1 to 1), and keeps faces however thin; 'float' compares them as they are.
      implementation: None takes NumPy on CPUs, and JAX elsewhere.

    Raises:
      ValueError: shapes that do not fit, indices that name no vertex, coordinates that are not finite.
    """
    clip, faces = np.asarray(clip_VN4, np.float32), np.asarray(faces_F3)
    height, width = (size, size) if isinstance(size, int) else size
    if clip.ndim != 3 or clip.shape[-1] != 4 or faces.ndim != 2 or faces.shape[-1] != 3:
        raise ValueError(
            f"needs clip [V, N, 4] and faces [F, 3], got {clip.shape} and {faces.shape}"
        )
    if height < 1 or width < 1:
        raise ValueError(f"an image cannot have {height} x {width} pixels")
    if faces.size and (faces.min() < 0 or faces.max() >= clip.shape[1]):
        raise ValueError(
            f"faces name vertices {faces.min()} to {faces.max()}; there are {clip.shape[1]}"
        )
    if not np.isfinite(clip).all():
        raise ValueError("clip coordinates must be finite")
    if semantics not in ("float", "official"):
        raise ValueError(f"semantics must be 'float' or 'official', not {semantics!r}")
    if implementation is None:
        implementation = "numpy" if jax.default_backend() == "cpu" else "jax"
    faces = faces.astype(np.int32)
    run = {"jax": _jax, "numpy": _numpy}[implementation]
    return Raster(*run(clip, faces, height, width, semantics == "official"))


# What both implementations compute; `xp` is numpy or jax.numpy.


def _screen(xp, clip, height: int, width: int):
    """Place in pixels, z / w and w of clip coordinates `[..., 4]`."""
    w = clip[..., 3]
    safe = xp.where(w > 0, w, 1)
    x = (clip[..., 0] / safe * 0.5 + 0.5) * (width - 1) + 0.5
    y = (clip[..., 1] / safe * 0.5 + 0.5) * (height - 1) + 0.5
    return x, y, clip[..., 2] / safe, w


def _setup(xp, clip_VN4, faces_F3, height: int, width: int, official: bool):
    """Per face and view: ints (first column, first row, columns, candidates) and the equations of weights and depth.

    An equation is value, step along x, step along y, at the centre of the box's first pixel: so float32 has all its
    digits where they are needed.
    """
    screen = _screen(xp, clip_VN4, height, width)
    (x0, y0, z0, wa), (x1, y1, z1, wb), (x2, y2, z2, wc) = (
        [v[:, faces_F3[:, corner]] for v in screen] for corner in range(3)
    )
    least = lambda a, b, c: xp.minimum(a, xp.minimum(b, c))  # noqa: E731
    most = lambda a, b, c: xp.maximum(a, xp.maximum(b, c))  # noqa: E731
    left_x, right_x, top_y, bottom_y = (
        least(x0, x1, x2),
        most(x0, x1, x2),
        least(y0, y1, y2),
        most(y0, y1, y2),
    )
    pixel = lambda v, end: xp.clip(v, 0, end).astype(xp.int32)  # noqa: E731
    left, right = pixel(xp.ceil(left_x - 0.5), width), pixel(xp.floor(right_x + 0.5), width)
    top, bottom = pixel(xp.ceil(top_y - 0.5), height), pixel(xp.floor(bottom_y + 0.5), height)
    x, y = left.astype(xp.float32) + 0.5, top.astype(xp.float32) + 0.5
    x0, x1, x2, y0, y1, y2 = x0 - x, x1 - x, x2 - x, y0 - y, y1 - y, y2 - y
    area = (x1 - x0) * (y2 - y0) - (y1 - y0) * (x2 - x0)
    extent = xp.maximum(right_x - left_x, bottom_y - top_y)
    slack = xp.zeros_like(area) if official else _SLACK * extent * extent
    drawn = (least(wa, wb, wc) > 0) & (xp.abs(area) > slack)
    scale = 1 / xp.where(drawn, area, 1)
    # The weight of a corner: the area that the centre spans with the other two, as a share.
    w0, w0x, w0y = (x1 * y2 - y1 * x2) * scale, (y1 - y2) * scale, (x2 - x1) * scale
    w1, w1x, w1y = (x2 * y0 - y2 * x0) * scale, (y2 - y0) * scale, (x0 - x2) * scale
    w2, w2x, w2y = (x0 * y1 - y0 * x1) * scale, (y0 - y1) * scale, (x1 - x0) * scale
    limit = -slack * xp.abs(scale)
    columns = xp.maximum(right - left, 0)
    count = xp.where(drawn, columns * xp.maximum(bottom - top, 0), 0)
    ints = (left, top, columns, count)
    return ints, (w0, w0x, w0y, w1, w1x, w1y, w2, w2x, w2y, limit, z0, z1 - z0, z2 - z0)


def _cover(xp, equations, column, row, official: bool):
    """Whether candidates are covered, and their depth to compare: float32, or whole numbers in it."""
    w0, w0x, w0y, w1, w1x, w1y, w2, w2x, w2y, limit, z0, z1, z2 = equations
    a, b = column.astype(xp.float32), row.astype(xp.float32)
    b0, b1, b2 = w0 + a * w0x + b * w0y, w1 + a * w1x + b * w1y, w2 + a * w2x + b * w2y
    inside = (b0 >= limit) & (b1 >= limit) & (b2 >= limit)
    depth = z0 + b1 * z1 + b2 * z2  # exactly z0 where all three are the same: ties stay ties
    if official:  # below 2^24: exact
        depth = xp.floor((depth * xp.float32(0.49999) + xp.float32(0.5)) * xp.float32(2**18))
    return inside, depth


def _weights(xp, corners, row, column, height: int, width: int):
    """Perspective-corrected weights `[..., 3]` and z / w at pixels of faces with clip coordinates `[..., 3, 4]`."""
    x, y, z, w = _screen(xp, corners, height, width)
    x, y = (
        x - (column.astype(xp.float32) + 0.5)[..., None],
        y - (row.astype(xp.float32) + 0.5)[..., None],
    )
    (x0, x1, x2), (y0, y1, y2), (z0, z1, z2) = (
        tuple(v[..., i] for i in range(3)) for v in (x, y, z)
    )
    area = (x1 - x0) * (y2 - y0) - (y1 - y0) * (x2 - x0)
    scale = 1 / xp.where(area == 0, 1, area)
    b0, b1, b2 = (
        (x1 * y2 - y1 * x2) * scale,
        (x2 * y0 - y2 * x0) * scale,
        (x0 * y1 - y0 * x1) * scale,
    )
    weights = xp.stack([b0, b1, b2], -1) / xp.where(w > 0, w, 1)
    total = weights[..., :1] + weights[..., 1:2] + weights[..., 2:]
    return weights / xp.where(total == 0, 1, total), z0 + b1 * (z1 - z0) + b2 * (z2 - z0)


# NumPy.


def _numpy(clip_VN4, faces_F3, height, width, official):
    V = len(clip_VN4)
    seen = np.zeros((V, height, width), np.int32)
    weights, depth = np.zeros((*seen.shape, 3), np.float32), np.full(seen.shape, np.inf, np.float32)
    for view, clip_N4 in enumerate(clip_VN4):  # one at a time stays in the cache
        nearest = _numpy_view(clip_N4[None], faces_F3, height, width, official)
        pixel = np.flatnonzero(nearest != _NOTHING)
        face = (nearest[pixel] & np.uint64(0xFFFFFFFF)).astype(np.int32)
        row, column = np.divmod(pixel, width)
        seen[view].reshape(-1)[pixel] = face + 1
        w, z = _weights(np, clip_N4[faces_F3[face]], row, column, height, width)
        weights[view].reshape(-1, 3)[pixel], depth[view].reshape(-1)[pixel] = w, z
    return seen, weights, depth


def _numpy_view(clip_1N4, faces_F3, height, width, official):
    """Per pixel the least of (depth, face), as one number: uint64 `[H W]`, _NOTHING where there is no face."""
    nearest_P = np.full(height * width, _NOTHING)
    with np.errstate(over="ignore", invalid="ignore"):
        ints, equations = _setup(np, clip_1N4, faces_F3, height, width, official)
    count = ints[3][0]
    kept = np.flatnonzero(count)
    ends = np.cumsum(count[kept])
    left, top, columns = (v[0][kept] for v in ints[:3])
    table = np.stack([v[0][kept] for v in equations], 1)
    first = 0
    while first < len(kept):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _CHUNK_NUMPY, side="right")))
        face = np.repeat(np.arange(first, last), np.diff(ends[first:last], prepend=before))
        local = np.arange(before, ends[last - 1]) - (ends[face] - count[kept[face]])
        row, column = np.divmod(local.astype(np.int32), columns[face])
        inside, depth = _cover(np, table[face].T, column, row, official)
        face, row, column = face[inside], row[inside], column[inside]
        pixel = (top[face] + row) * width + left[face] + column
        key = (_ordered(depth[inside]).astype(np.uint64) << np.uint64(32)) | kept[face].astype(
            np.uint64
        )
        np.minimum.at(nearest_P, pixel, key)
        first = last
    return nearest_P


def _ordered(x):
    """uint32 in the order of the float32."""
    bits = (x + np.float32(0)).view(np.uint32)  # -0 becomes 0
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


# JAX.


def _jax(clip_VN4, faces_F3, height, width, official):
    V, N = clip_VN4.shape[:2]
    used, chunk = len(faces_F3), min(_CHUNK_FACES, _bucket(len(faces_F3)))
    clip = np.zeros(
        (V, _bucket(N + 1), 4), np.float32
    )  # padding has w = 0: such faces are not drawn
    clip[:, :N] = clip_VN4
    faces = np.full((-(-_bucket(used) // chunk) * chunk, 3), N, np.int32)
    faces[:used] = faces_F3
    chunks = -(-used // chunk)
    most = int(_most_candidates(clip, faces, chunks, chunk, height, width, official))
    if most > _MOST_CANDIDATES and V > 1:
        halves = [
            _jax(part, faces_F3, height, width, official) for part in np.array_split(clip_VN4, 2)
        ]
        return tuple(np.concatenate(pair) for pair in zip(*halves, strict=True))
    found = _nearest(clip, faces, chunks, chunk, _bucket(most), height, width, official)
    return tuple(np.asarray(x) for x in found)


def _bucket(count: int) -> int:
    """The least of 64, 96, 128, 192, 256, ... that is not less: few shapes, so few compilations."""
    power = max(64, 1 << (count - 1).bit_length())
    return 3 * power // 4 if 64 < count <= 3 * power // 4 else power


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _most_candidates(
    clip_VN4, faces_F3, chunks, chunk: int, height: int, width: int, official: bool
):
    """Candidates of the chunk of faces that has most."""

    def look(i, most):
        faces = jax.lax.dynamic_slice_in_dim(faces_F3, i * chunk, chunk)
        (_, _, _, count), _ = _setup(jnp, clip_VN4, faces, height, width, official)
        return jnp.maximum(most, count.sum())

    return jax.lax.fori_loop(0, chunks, look, jnp.int32(0))


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))
def _nearest(
    clip_VN4, faces_F3, chunks, chunk: int, C: int, height: int, width: int, official: bool
):
    V, P = len(clip_VN4), len(clip_VN4) * height * width

    def draw(i, nearest):
        depth_P, face_P = nearest
        faces = jax.lax.dynamic_slice_in_dim(faces_F3, i * chunk, chunk)
        ints, equations = _setup(jnp, clip_VN4, faces, height, width, official)
        left, top, columns, count = (v.reshape(-1) for v in ints)
        ends = jnp.cumsum(count)
        item_C = jnp.repeat(jnp.arange(V * chunk), count, total_repeat_length=C)
        local_C = jnp.arange(C) - (ends - count)[item_C]
        row, column = jnp.divmod(local_C, jnp.maximum(columns, 1)[item_C])
        table = jnp.stack([v.reshape(-1) for v in equations], 1)
        inside, depth_C = _cover(jnp, table[item_C].T, column, row, official)
        inside &= jnp.arange(C) < ends[-1]
        pixel = (item_C // chunk * height + top[item_C] + row) * width + left[item_C] + column
        pixel = jnp.where(inside, pixel, P)  # dropped
        lower_P = depth_P.at[pixel].min(depth_C, mode="drop")
        wins = depth_C == lower_P.at[pixel].get(mode="clip")
        face_C = jnp.where(wins, i * chunk + item_C % chunk, _NO_FACE)
        new_P = jnp.full(P, _NO_FACE, jnp.int32).at[pixel].min(face_C, mode="drop")
        return lower_P, jnp.where(lower_P < depth_P, new_P, jnp.minimum(face_P, new_P))

    start = jnp.full(P, jnp.inf), jnp.full(P, _NO_FACE, jnp.int32)
    _, face_P = jax.lax.fori_loop(0, chunks, draw, start)
    seen = jnp.where(face_P == _NO_FACE, 0, face_P + 1).reshape(V, height, width)
    row, column = jnp.arange(height)[:, None], jnp.arange(width)
    corners = clip_VN4[jnp.arange(V)[:, None, None, None], faces_F3[jnp.maximum(seen - 1, 0)]]
    weights, depth = _weights(jnp, corners, row, column, height, width)
    return seen, jnp.where((seen > 0)[..., None], weights, 0), jnp.where(seen > 0, depth, jnp.inf)
