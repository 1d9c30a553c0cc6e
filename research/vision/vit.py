"""A vision transformer (Dosovitskiy et al. 2021) with what DINOv2 adds: layer scale, SwiGLU, positions for any size.

Shape suffixes: B batch, H and W pixels, P patches of a row or column, T tokens (class token, then patches row by
row), D hidden, N heads, K head size, F MLP size.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """What a tower is.

    image_size: pixels of the square images that the table of positions is for; other multiples of the patch size
      have it interpolated.
    mlp: 'gelu' (exact) or 'swiglu' of mlp_size hidden units.
    layer_scale: the initial factor on each residual branch.
    unroll: layers per iteration of the loop over layers: 1 compiles fastest, all of them run fastest on a CPU.
    remat: recompute the layers' activations in the backward pass.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    mlp: Literal["gelu", "swiglu"] = "gelu"
    patch_size: int = 14
    image_size: int = 518
    layer_scale: float = 1.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    qkv_bias: bool = True
    unroll: int = 1
    remat: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        for name in (
            "hidden_size",
            "num_layers",
            "num_heads",
            "mlp_size",
            "patch_size",
            "image_size",
            "unroll",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}"
            )

    @property
    def grid(self) -> int:
        """Patches in a row."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Of an image of image_size: patches and the class token."""
        return self.grid**2 + 1


class ViT(nn.Module):
    """Normalised pixels `[B, H, W, 3]` → tokens `[B, T, D]` after the last norm, the class token first.

    Raises ValueError for images whose sides are no multiples of the patch size.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, pixels_BHW3):
        c = self.config
        B, H, W, channels = pixels_BHW3.shape
        if channels != 3 or H % c.patch_size or W % c.patch_size:
            raise ValueError(
                f"needs [B, H, W, 3] with H and W multiples of {c.patch_size}, got {pixels_BHW3.shape}"
            )
        normal = nn.initializers.truncated_normal(c.init_std)
        patches = nn.Conv(
            c.hidden_size, (c.patch_size,) * 2, (c.patch_size,) * 2, padding="VALID", kernel_init=normal,
            dtype=c.dtype, param_dtype=c.param_dtype, name="patches",
        )(pixels_BHW3)  # fmt: skip
        class_token = self.param("class_token", normal, (c.hidden_size,), c.param_dtype)
        positions_TD = self.param("positions", normal, (c.num_tokens, c.hidden_size), c.param_dtype)
        first = jnp.broadcast_to(class_token.astype(c.dtype), (B, 1, c.hidden_size))
        x_BTD = jnp.concatenate([first, patches.reshape(B, -1, c.hidden_size)], axis=1)
        x_BTD += resize_positions(positions_TD, H // c.patch_size, W // c.patch_size).astype(
            c.dtype
        )
        layer = nn.remat(Layer, prevent_cse=False) if c.remat else Layer
        layers = nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=c.num_layers,
            unroll=min(c.unroll, c.num_layers),
        )  # fmt: skip
        x_BTD, _ = layers(c, name="layers")(x_BTD, None)
        return _norm(c, "norm")(x_BTD)


class Layer(nn.Module):
    """x += s1 attention(norm(x)); x += s2 mlp(norm(x)), as a step of `nn.scan`."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x_BTD, _):
        c = self.config
        scale = lambda name: self.param(  # noqa: E731
            name, nn.initializers.constant(c.layer_scale), (c.hidden_size,), c.param_dtype
        ).astype(c.dtype)
        x_BTD += scale("scale1") * self._attention(_norm(c, "norm1")(x_BTD))
        x_BTD += scale("scale2") * self._mlp(_norm(c, "norm2")(x_BTD))
        return x_BTD, None

    def _attention(self, x_BTD):
        c = self.config
        qkv_BT3NK = self._dense((3, c.num_heads, c.hidden_size // c.num_heads), "qkv", c.qkv_bias)(
            x_BTD
        )
        y_BTNK = jax.nn.dot_product_attention(*(qkv_BT3NK[:, :, i] for i in range(3)))
        return self._dense((c.hidden_size,), "out")(y_BTNK.reshape(x_BTD.shape))

    def _mlp(self, x_BTD):
        c = self.config
        if c.mlp == "swiglu":
            gate_up_BT2F = self._dense((2, c.mlp_size), "gate_up")(x_BTD)
            hidden_BTF = jax.nn.silu(gate_up_BT2F[:, :, 0]) * gate_up_BT2F[:, :, 1]
        else:
            hidden_BTF = jax.nn.gelu(self._dense((c.mlp_size,), "up")(x_BTD), approximate=False)
        return self._dense((c.hidden_size,), "down")(hidden_BTF)

    def _dense(self, features: tuple[int, ...], name: str, bias: bool = True) -> nn.DenseGeneral:
        c = self.config
        return nn.DenseGeneral(
            features, use_bias=bias, dtype=c.dtype, param_dtype=c.param_dtype, name=name,
            kernel_init=nn.initializers.truncated_normal(c.init_std),
        )  # fmt: skip


def _norm(c: ViTConfig, name: str) -> nn.LayerNorm:
    # Not the fast variance: E[x^2] - E[x]^2 loses digits where the mean is large.
    return nn.LayerNorm(
        c.norm_eps, use_fast_variance=False, dtype=c.dtype, param_dtype=c.param_dtype, name=name
    )


def resize_positions(positions_TD, rows: int, columns: int) -> jax.Array:
    """The table of positions, class token first, for `rows` x `columns` patches: bicubic, float32 `[T, D]`."""
    grid = round((len(positions_TD) - 1) ** 0.5)
    if (rows, columns) == (grid, grid):
        return positions_TD
    table = positions_TD[1:].astype(jnp.float32).reshape(grid, grid, -1)
    table = jnp.einsum("rp,cq,pqd->rcd", _bicubic(rows, grid), _bicubic(columns, grid), table)
    return jnp.concatenate(
        [positions_TD[:1].astype(jnp.float32), table.reshape(rows * columns, -1)]
    )


def _bicubic(new: int, old: int) -> np.ndarray:
    """Weights `[new, old]` that resample `old` values, pixels' centres aligned, edges repeated.

    Keys' kernel with a = -0.75 and no antialiasing, as the towers' tables were always interpolated; JAX's has -0.5.
    """
    a = -0.75
    place = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        index = np.floor(place).astype(int) + tap
        t = np.abs(place - index)
        near, far = ((a + 2) * t - (a + 3)) * t * t + 1, (((t - 5) * t + 8) * t - 4) * a
        np.add.at(weights, (np.arange(new), index.clip(0, old - 1)), np.where(t <= 1, near, far))
    return weights.astype(np.float32)
