"""DINOv2 in the Hugging Face format, in and out.

    model, params = hf.load("dinov2-giant")                       # a local directory
    tokens = model.apply({"params": params}, dinov2.preprocess(image, model.config.image_size))
    hf.save("my-tower", model, params)

Two generations of names are read: the published one (`attention.attention.query`, `mlp.weights_in`, which has gate
and up in one) and that of newer transformers (`attention.q_proj`, `mlp.gate_proj`, `mlp.up_proj`). The published one
is written; both generations of the library read it. A tower inside a larger checkpoint is read by its prefix
(`from_tensors`).
"""

import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from research.vision.vit import ViT, ViTConfig

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_ARCHITECTURE = "Dinov2Model"
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)")
# Newer name → (published name, which of how many parts along its first axis).
_NEWER = {
    "attention.q_proj": ("attention.attention.query", None),
    "attention.k_proj": ("attention.attention.key", None),
    "attention.v_proj": ("attention.attention.value", None),
    "attention.o_proj": ("attention.output.dense", None),
    "mlp.gate_proj": ("mlp.weights_in", 0),
    "mlp.up_proj": ("mlp.weights_in", 1),
    "mlp.down_proj": ("mlp.weights_out", None),
}
_MASK = "embeddings.mask_token"  # for its own training; carries nothing here


def load(directory: str | pathlib.Path, *, dtype: str = "float32") -> tuple[ViT, dict[str, Any]]:
    """The tower of a directory with config.json and model.safetensors (or shards and an index).

    Args:
      dtype: of parameters and activations.

    Raises:
      FileNotFoundError: the directory or one of its files.
      ValueError: another architecture, an unknown setting, or tensors that are missing, unexpected or of another
        shape, by name.
    """
    directory = pathlib.Path(directory)
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"no {directory / CONFIG}: not a directory of a published model")
    try:
        config = read_config(json.loads((directory / CONFIG).read_text()))
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from error
    config = ViTConfig(**vars(config) | {"dtype": dtype, "param_dtype": dtype})
    try:
        return ViT(config), from_tensors(config, _read(directory))
    except (ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{directory}: {error}") from error


def save(directory: str | pathlib.Path, model: ViT, params: Mapping[str, Any]) -> None:
    """Writes a directory that `load` and transformers read.

    Raises ValueError for parameters that are not the model's.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(x) for name, x in to_tensors(model.config, params)}
    tensors[_MASK] = np.zeros((1, model.config.hidden_size), tensors["layernorm.weight"].dtype)
    safetensors.numpy.save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(write_config(model.config), indent=2) + "\n")


def read_config(content: Mapping[str, Any]) -> ViTConfig:
    """config.json's content as a ViTConfig; raises ValueError for what is not a DINOv2 that the tower can be."""
    architecture = (content.get("architectures") or [None])[0]
    if architecture not in (None, _ARCHITECTURE) or content.get("model_type", "dinov2") != "dinov2":
        raise ValueError(
            f"{architecture or content.get('model_type')} is not supported; {_ARCHITECTURE} is"
        )
    fixed = {"hidden_act": "gelu", "num_channels": 3}
    for name, value in fixed.items():
        if content.get(name, value) != value:
            raise ValueError(f"{name}={content[name]!r} is not supported; {value!r} is")
    hidden = content.get("hidden_size", 768)
    mlp_size = int(hidden * content.get("mlp_ratio", 4))
    swiglu = content.get("use_swiglu_ffn", False)
    return ViTConfig(
        hidden_size=hidden,
        num_layers=content.get("num_hidden_layers", 12),
        num_heads=content.get("num_attention_heads", 12),
        mlp_size=_swiglu_size(mlp_size) if swiglu else mlp_size,
        mlp="swiglu" if swiglu else "gelu",
        patch_size=content.get("patch_size", 14),
        image_size=content.get("image_size", 224),
        layer_scale=float(content.get("layerscale_value", 1.0)),
        norm_eps=float(content.get("layer_norm_eps", 1e-6)),
        qkv_bias=content.get("qkv_bias", True),
    )


def write_config(config: ViTConfig) -> dict[str, Any]:
    """The inverse of `read_config`; raises ValueError for an MLP size that the format cannot say."""
    swiglu, size = config.mlp == "swiglu", config.mlp_size
    sizes = {
        _swiglu_size(r * config.hidden_size) if swiglu else r * config.hidden_size: r
        for r in range(1, 17)
    }
    ratio = sizes.get(size)
    if ratio is None:
        raise ValueError(
            f"mlp_size={size} is that of no whole mlp_ratio of hidden_size={config.hidden_size}"
        )
    return {
        "architectures": [_ARCHITECTURE], "model_type": "dinov2", "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads, "mlp_ratio": ratio,
        "hidden_act": "gelu", "use_swiglu_ffn": swiglu, "patch_size": config.patch_size, "num_channels": 3,
        "image_size": config.image_size, "layerscale_value": config.layer_scale, "layer_norm_eps": config.norm_eps,
        "qkv_bias": config.qkv_bias, "torch_dtype": config.param_dtype,
    }  # fmt: skip


def from_tensors(config: ViTConfig, tensors: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The parameters of the tower from a checkpoint's tensors whose names begin with `prefix`.

    Raises ValueError that names what is missing, unexpected, or of another shape.
    """
    own = {name[len(prefix) :]: x for name, x in tensors.items() if name.startswith(prefix)}
    own.pop(_MASK, None)
    found, problems = {}, []
    for name, x in own.items():
        published, part = _published(name)
        found.setdefault(published, {})[part] = np.asarray(x)
    tensors = {
        name: np.concatenate([parts[i] for i in sorted(parts)])
        if None not in parts
        else parts[None]
        for name, parts in found.items()
    }
    want = {name: shape for name, shape, *_ in _table(config)}
    problems += [
        f"{prefix}{name} {list(shape)} is missing"
        for name, shape in want.items()
        if name not in tensors
    ]
    for name, x in tensors.items():
        if name not in want:
            given = [n for n in own if _published(n)[0] == name]
            problems.append(f"{prefix}{given[0]} is unexpected")
        elif x.shape != want[name]:
            problems.append(
                f"{prefix}{name} is {list(x.shape)}, the tower means {list(want[name])}"
            )
    if problems:
        more = f"\n  ... and {len(problems) - 12} more" if len(problems) > 12 else ""
        lines = "".join(f"\n  {problem}" for problem in problems[:12])
        raise ValueError(f"the tensors are not those of a DINOv2 of this size:{lines}{more}")
    dtype = jnp.dtype(config.param_dtype)
    shapes = flax.traverse_util.flatten_dict(_shapes(config), sep="/")
    arrays = {path: np.empty(leaf.shape, dtype) for path, leaf in shapes.items()}
    for name, _, path, layer, put, _ in _table(config):
        target = arrays[path] if layer is None else arrays[path][layer]
        put(target, tensors[name])
    params = {path: jnp.asarray(x) for path, x in arrays.items()}
    return flax.traverse_util.unflatten_dict(params, sep="/")


def to_tensors(config: ViTConfig, params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The parameters under their published names; raises ValueError if they are not the tower's."""
    flat, wanted = (
        flax.traverse_util.flatten_dict(dict(tree), sep="/") for tree in (params, _shapes(config))
    )
    have, want = ({path: x.shape for path, x in tree.items()} for tree in (flat, wanted))
    problems = [path for path in have | want if have.get(path) != want.get(path)]
    if problems:
        raise ValueError(f"these are not the tower's parameters: {', '.join(problems[:8])}")
    arrays = {path: np.asarray(x) for path, x in flat.items()}
    for name, shape, path, layer, _, get in _table(config):
        yield name, get(arrays[path] if layer is None else arrays[path][layer]).reshape(shape)


def _read(directory: pathlib.Path) -> dict[str, np.ndarray]:
    files = [WEIGHTS]
    if (directory / INDEX).is_file():
        files = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))
    tensors = {}
    for file in files:
        if not (directory / file).is_file():
            raise FileNotFoundError(
                f"there is no {directory / file}; complete the download (safetensors are read)"
            )
        with safetensors.safe_open(
            directory / file, framework="flax"
        ) as opened:  # of which NumPy lacks bfloat16
            with jax.default_device(jax.devices("cpu")[0]):
                tensors |= {name: np.asarray(opened.get_tensor(name)) for name in opened.keys()}
    return tensors


def _published(name: str) -> tuple[str, int | None]:
    """A name of either generation as the published one, and which part of that tensor it is (None: all of it)."""
    match = _LAYER.fullmatch(name)
    if match:
        stem, _, kind = match[2].rpartition(".")
        if stem in _NEWER:
            older, part = _NEWER[stem]
            return f"encoder.layer.{match[1]}.{older}.{kind}", part
    return name, None


def _swiglu_size(mlp_size: int) -> int:
    """Two thirds, so that three matrices cost what two did, as a multiple of 8."""
    return (int(mlp_size * 2 / 3) + 7) // 8 * 8


def _shapes(config: ViTConfig) -> dict[str, Any]:
    image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    return jax.eval_shape(ViT(config).init, jax.random.key(0), image)["params"]


Row = tuple[str, tuple[int, ...], str, int | None, Callable, Callable]


def _table(config: ViTConfig) -> Iterator[Row]:
    """Per stored tensor: name, shape, path of our parameter, layer, how to put it there, and how to get it back."""
    c, D, F = config, config.hidden_size, config.mlp_size
    heads = (c.num_heads, D // c.num_heads)

    def whole(name, shape, path, layer=None, ours=None, turned=False):
        def put(target, x):
            target[...] = (x.T if turned else x).reshape(target.shape)

        def get(x):
            return x.reshape(shape[::-1]).T if turned else x

        return name, shape, path, layer, put, get

    def part(name, shape, path, layer, index):
        """One of q, k and v: an index into the axis after the inputs'."""
        bias = len(shape) == 1

        def put(target, x):
            (target[index] if bias else target[:, index])[...] = (x if bias else x.T).reshape(
                *x.shape[1:], *heads
            )

        def get(x):
            return x[index] if bias else x[:, index].reshape(D, -1).T

        return name, shape, path, layer, put, get

    def convolution(name, shape, path):
        def put(target, x):
            target[...] = x.transpose(2, 3, 1, 0)

        return name, shape, path, None, put, lambda x: x.transpose(3, 2, 0, 1)

    yield whole("embeddings.cls_token", (1, 1, D), "class_token")
    yield whole("embeddings.position_embeddings", (1, c.num_tokens, D), "positions")
    projection = "embeddings.patch_embeddings.projection"
    yield convolution(f"{projection}.weight", (D, 3, c.patch_size, c.patch_size), "patches/kernel")
    yield whole(f"{projection}.bias", (D,), "patches/bias")
    yield whole("layernorm.weight", (D,), "norm/scale")
    yield whole("layernorm.bias", (D,), "norm/bias")
    for i in range(c.num_layers):
        stored, ours = f"encoder.layer.{i}", "layers"
        for n in (1, 2):
            yield whole(f"{stored}.norm{n}.weight", (D,), f"{ours}/norm{n}/scale", i)
            yield whole(f"{stored}.norm{n}.bias", (D,), f"{ours}/norm{n}/bias", i)
            yield whole(f"{stored}.layer_scale{n}.lambda1", (D,), f"{ours}/scale{n}", i)
        for index, name in enumerate(("query", "key", "value")):
            yield part(
                f"{stored}.attention.attention.{name}.weight",
                (D, D),
                f"{ours}/qkv/kernel",
                i,
                index,
            )
            if c.qkv_bias:
                yield part(
                    f"{stored}.attention.attention.{name}.bias", (D,), f"{ours}/qkv/bias", i, index
                )
        matrices = [("attention.output.dense", (D, D), "out")]
        if c.mlp == "swiglu":
            matrices += [
                ("mlp.weights_in", (2 * F, D), "gate_up"),
                ("mlp.weights_out", (D, F), "down"),
            ]
        else:
            matrices += [("mlp.fc1", (F, D), "up"), ("mlp.fc2", (D, F), "down")]
        for name, shape, path in matrices:
            yield whole(f"{stored}.{name}.weight", shape, f"{ours}/{path}/kernel", i, turned=True)
            yield whole(f"{stored}.{name}.bias", shape[:1], f"{ours}/{path}/bias", i)
