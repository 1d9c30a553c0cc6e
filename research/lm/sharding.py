"""How a decoder's parameters lie on a mesh: the table beside the model.

Mesh axes: 'data' (rows of the batch), 'fsdp' (rows too, and every large parameter in shares),
'model' (heads, MLP width and vocabulary: tensor parallelism). A mesh may leave out any of them.
'model' must divide num_kv_heads, num_heads, mlp_size and vocab_size; 'fsdp' hidden_size.
"""

from jax.sharding import Mesh, PartitionSpec

from research.core.sharding import Rules

_TABLE: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("embed/embedding", ("model", "fsdp")),
    ("attn/qkv/kernel", (None, "fsdp", "model")),
    ("attn/qkv/bias", (None, "model")),
    ("attn/o/kernel", (None, "model", None, None, "fsdp")),
    ("mlp/(gate|up)/kernel", (None, "fsdp", "model")),
    ("mlp/down/kernel", (None, "model", "fsdp")),
    ("lightning/(qkv|gate)/kernel", (None, "fsdp", "model")),
    ("lightning/norm/scale", (None, "model")),
    ("lightning/o/kernel", (None, "model", None, "fsdp")),
    ("moe/router/kernel", (None, "fsdp")),
    ("moe/(gate|up)/kernel", (None, None, "fsdp", "model")),
    ("moe/down/kernel", (None, None, "model", "fsdp")),
    ("head/kernel", ("fsdp", "model")),
    (".*scale", ()),
)


def rules(mesh: Mesh) -> Rules:
    """The table for the axes that `mesh` has."""
    known = {"data", "fsdp", "model"}
    if not set(mesh.shape) <= known:
        raise ValueError(f"mesh axes must be among {sorted(known)}, got {tuple(mesh.shape)}")
    keep = lambda axis: axis if axis in mesh.shape else None  # noqa: E731
    return tuple((pattern, PartitionSpec(*map(keep, axes))) for pattern, axes in _TABLE)


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes over which a batch's rows are split."""
    axes = tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape)
    if not axes:
        raise ValueError(f"the mesh needs an axis 'data' or 'fsdp', got {tuple(mesh.shape)}")
    return axes
