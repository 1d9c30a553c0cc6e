"""A mesh turning on itself, as an animation or a sheet of views."""

import pathlib

import numpy as np
import trimesh
from PIL import Image

from research.hunyuan3d_2.render import shading

ELEVATION = 15.0
_SHEET = (2, 4)  # rows and columns of a PNG


def frames(mesh: trimesh.Trimesh, count: int, size: int) -> np.ndarray:
    """Views from azimuth 0 on, evenly around, uint8 RGBA `[count, size, size, 4]`. Raises: see `shading.surface`."""
    azimuth = np.arange(count) * (360 / count)
    return shading.render(mesh, azimuth, np.full(count, ELEVATION), size)


def save(
    mesh: trimesh.Trimesh, path: str | pathlib.Path, *, size: int = 256, count: int = 36
) -> None:
    """Writes a GIF of `count` views (three seconds a turn, for ever) or a PNG of eight, by the path's suffix.

    Raises ValueError for another suffix, or a mesh that cannot be rendered.
    """
    path = pathlib.Path(path)
    check(path)
    if path.suffix.lower() == ".png":
        rows, columns = _SHEET
        sheet = frames(mesh, rows * columns, size).reshape(rows, columns, size, size, 4)
        Image.fromarray(sheet.swapaxes(1, 2).reshape(rows * size, columns * size, 4)).save(path)
        return
    images = [Image.fromarray(frame) for frame in shading.on_white(frames(mesh, count, size))]
    images[0].save(path, save_all=True, append_images=images[1:], duration=3000 // count, loop=0)


def check(path: str | pathlib.Path) -> None:
    """Raises ValueError for a path that `save` cannot write to."""
    if pathlib.Path(path).suffix.lower() not in (".gif", ".png"):
        raise ValueError(
            f"{path}: a turntable is a .gif (animated) or a .png (a sheet of eight views)"
        )
