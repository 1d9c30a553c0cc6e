"""Views of a mesh to learn from: what `hunyuan3d_2.condition.prepare` makes of a photograph, rendered."""

import numpy as np
import trimesh

from research.hunyuan3d_2.render import cameras, shading

FILL = 0.85  # of the image, the silhouette's longer side: as images are prepared
ELEVATION = (-20.0, 45.0)  # degrees


def views(mesh: trimesh.Trimesh, count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Lit views on a transparent ground, uint8 RGBA `[count, size, size, 4]`, straight alpha.

    The first four are, in the order of the ids that multi-view models know, front, left, back and right, level. The
    others are drawn: azimuth anywhere, elevation from -20 to 45 degrees. The light comes from a drawn direction.
    Every silhouette is centred, its longer side 85 % of the image.

    Raises ValueError for a mesh that cannot be rendered, or counts that are not positive.
    """
    if count < 1 or size < 1:
        raise ValueError(f"count and size must be positive, got {count} and {size}")
    azimuth = rng.uniform(0, 360, count)
    elevation = rng.uniform(*ELEVATION, count)
    named = list(cameras.NAMED_VIEWS.values())[:count]
    azimuth[: len(named)], elevation[: len(named)] = named, 0
    light = np.stack(
        [rng.uniform(-1, 1, count), rng.uniform(0.2, 1, count), rng.uniform(0.3, 1, count)], 1
    )
    return shading.render(mesh, azimuth, elevation, size, key_light=light, fill=FILL)
