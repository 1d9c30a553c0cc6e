"""DINOv2 (Oquab et al. 2023): its towers as presets, and the images they are fed."""

import jax
import jax.numpy as jnp
import numpy as np

from research.vision.vit import ViTConfig

PRESETS = {
    "giant": ViTConfig(1536, 40, 24, 4096, mlp="swiglu"),  # 1136.5 M parameters
    "large": ViTConfig(1024, 24, 16, 4096),  # 304.4 M
    "base": ViTConfig(768, 12, 12, 3072),
    "small": ViTConfig(384, 12, 6, 1536),
    # Not published: small enough to be trained along with what it conditions, on a CPU. 0.8 M.
    "tiny": ViTConfig(128, 4, 4, 512, patch_size=8, image_size=64, unroll=4),
}
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet's RGB in [0, 1]
STD = np.array([0.229, 0.224, 0.225], np.float32)


def preprocess(image_BHW3, size: int) -> jax.Array:
    """Square images in [-1, 1] as a tower takes them: `[B, size, size, 3]` float32, normalised as ImageNet.

    Resized by antialiased bilinear interpolation. Raises ValueError for images that are not square.
    """
    B, H, W, channels = image_BHW3.shape
    if H != W or channels != 3:
        raise ValueError(f"needs square RGB images [B, S, S, 3], got {image_BHW3.shape}")
    unit = (jnp.asarray(image_BHW3, jnp.float32) + 1) / 2
    if size != H:
        unit = jax.image.resize(unit, (B, size, size, 3), "linear", antialias=True)
    return (unit - MEAN) / STD
