"""Published diffusion transformers, in and out: safetensors files with the names of section 3.1.

A released file bundles three models, told apart by the first part of their tensors' names: `model.` (this package),
`vae.` and `conditioner.` (the image tower). `read_bundle` takes it apart without reading any tensor.

    parts = read_bundle("hunyuan3d-dit-v2-0")          # {'model': {name: Stored}, 'vae': …, 'conditioner': …}
    config, params = from_tensors(parts["model"])
    write_bundle("mine", {"model": to_tensors(config, params), "vae": …})

Only safetensors are read: a pickle (.ckpt) can run any code while it is opened. A run of this codebase holds
`model/dit.json` beside `checkpoints/`; `load` reads both kinds of directory.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from research.core import checkpoint
from research.core import config as configs
from research.hunyuan3d_2.dit import model
from research.hunyuan3d_2.dit.config import PRESETS, DiTConfig
from research.lm.hf import files

PREFIXES = ("model", "vae", "conditioner")
DESCRIPTION = pathlib.Path("model") / "dit.json"
DTYPES = ("float32", "float16", "bfloat16")
_SUFFIX = {"kernel": "weight", "bias": "bias", "scale": "scale"}
_DOUBLE = {"qkv": "attn.qkv", "query_norm": "attn.norm.query_norm", "key_norm": "attn.norm.key_norm",
           "proj": "attn.proj", "mlp_in": "mlp.0", "mlp_out": "mlp.2"}  # fmt: skip
_SINGLE = {"mod": "modulation.lin", "query_norm": "norm.query_norm", "key_norm": "norm.key_norm"}
_TOP = {"final/mod": "final_layer.adaLN_modulation.1", "final/linear": "final_layer.linear"}
_CROSS_TOP = {
    "latent_in": "x_embedder", "time_in/in_layer": "t_embedder.mlp.0", "time_in/out_layer": "t_embedder.mlp.2",
    "final/norm": "final_layer.norm_final", "final/linear": "final_layer.linear",
}  # fmt: skip
_CROSS = {"mlp/in": "mlp.fc1", "mlp/out": "mlp.fc2", "moe/shared/in": "moe.shared_experts.net.0.proj",
          "moe/shared/out": "moe.shared_experts.net.2"}  # fmt: skip
_EXPERT = {"up": "net.0.proj", "down": "net.2"}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a stored tensor lies in the parameters: at `index` of the leading axis (None: it is all of them), and
    turned over if a matrix."""

    name: str
    path: str
    index: int | None
    transposed: bool


def places(config: DiTConfig) -> list[Place]:
    """Every tensor of a published checkpoint of this model."""
    leaves = flax.traverse_util.flatten_dict(model.shapes(config), sep="/")
    return [place for path, leaf in leaves.items() for place in _places(config, path, leaf.shape)]


def to_tensors(
    config: DiTConfig, params: Mapping[str, Any], dtype: str = "float16"
) -> dict[str, np.ndarray]:
    """The parameters as published names and tensors; they may be given as JAX or NumPy arrays.

    Raises ValueError for parameters that are not the model's, and for float16 where it has no room for a value.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    flat = {
        path: np.asarray(leaf)
        for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items()
    }
    expected = flax.traverse_util.flatten_dict(model.shapes(config), sep="/")
    _check_names(
        "parameter",
        {k: v.shape for k, v in expected.items()},
        {k: v.shape for k, v in flat.items()},
    )
    tensors = {}
    for place in places(config):
        array = flat[place.path] if place.index is None else flat[place.path][place.index]
        with np.errstate(over="ignore"):  # said below
            tensor = np.ascontiguousarray(array.T if place.transposed else array).astype(
                jnp.dtype(dtype)
            )
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise ValueError(
                f"{place.name} does not fit into {dtype}: its largest value is {np.abs(array).max():.3g}"
            )
        tensors[place.name] = tensor
    return tensors


def from_tensors(
    tensors: Mapping[str, Any], config: DiTConfig | None = None, dtype: str = "float32"
) -> tuple[DiTConfig, dict]:
    """(config, parameters) of published tensors: NumPy arrays, or `files.Stored` that are read one by one.

    config: what the tensors must be of; None: as their names and shapes say (`infer_config`).
    Raises ValueError for names that are missing or unexpected and for wrong shapes, naming them.
    """
    config = config or infer_config(tensors)
    table = places(config)
    leaves = flax.traverse_util.flatten_dict(model.shapes(config), sep="/")
    expected = {}
    for place in table:
        shape = leaves[place.path].shape[0 if place.index is None else 1 :]
        expected[place.name] = shape[::-1] if place.transposed else shape
    _check_names(
        "tensor", expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    )
    params = {path: np.empty(leaf.shape, jnp.dtype(dtype)) for path, leaf in leaves.items()}
    for place in table:
        tensor = tensors[place.name]
        array = tensor.read() if isinstance(tensor, files.Stored) else np.asarray(tensor)
        params[place.path][... if place.index is None else place.index] = (
            array.T if place.transposed else array
        )
    return config, flax.traverse_util.unflatten_dict(params, sep="/")


def infer_config(tensors: Mapping[str, Any]) -> DiTConfig:
    """The model that published tensors are of; one like a preset generates as many latents as that.

    Raises ValueError if they are of no model that is known.
    """
    shape = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        if "x_embedder.weight" in shape:
            return _like_preset(_infer_cross(shape))
        head = shape["double_blocks.0.img_attn.norm.query_norm.scale"][0]
        hidden, latent = shape["latent_in.weight"]
        config = DiTConfig(
            latent_dim=latent,
            cond_dim=shape["cond_in.weight"][1],
            hidden_size=hidden,
            num_heads=hidden // head,
            mlp_ratio=shape["double_blocks.0.img_mlp.0.weight"][0] // hidden,
            depth=_count(shape, r"double_blocks\.(\d+)\."),
            single_depth=_count(shape, r"single_blocks\.(\d+)\."),
            qkv_bias="double_blocks.0.img_attn.qkv.bias" in shape,
            guidance_embed="guidance_in.in_layer.weight" in shape,
        )
        return _like_preset(config)
    except KeyError as missing:
        some = ", ".join(sorted(shape)[:3]) or "nothing"
        raise ValueError(
            f"no diffusion transformer: there is no tensor {missing}, but {some} …"
        ) from None


def read_bundle(path: str | os.PathLike) -> dict[str, dict[str, files.Stored]]:
    """A file or directory of safetensors as {'model': …, 'vae': …, 'conditioner': …}, those that it has.

    The tensors are known by their headers and read on demand (`.read()`). A file of a transformer alone, without
    prefixes, is {'model': …}. In a directory the file may be called model.safetensors, model.fp16.safetensors, or
    anything if it is the only one.

    Raises FileNotFoundError, and ValueError for damaged files and names of none of the three.
    """
    path = pathlib.Path(path)
    tensors = (
        files.read_header(_single_file(path)) if _single_file(path) else files.list_tensors(path)
    )
    if any(name.startswith(("double_blocks.", "x_embedder.")) for name in tensors):
        return {"model": tensors}
    parts: dict[str, dict[str, files.Stored]] = {}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition(".")
        if prefix not in PREFIXES or not rest:
            raise ValueError(
                f"{path}: the tensor {name!r} belongs to none of {', '.join(p + '.' for p in PREFIXES)}; "
                "it is no bundle of a shape model"
            )
        parts.setdefault(prefix, {})[rest] = tensor
    return parts


def write_bundle(
    directory: str | os.PathLike, parts: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """Writes `directory`/model.safetensors with each part's tensors under its prefix.

    Raises ValueError for a part of another name, and FileExistsError if there is such a file already.
    """
    if unknown := set(parts) - set(PREFIXES):
        raise ValueError(
            f"a bundle has the parts {', '.join(PREFIXES)}, not {', '.join(sorted(unknown))}"
        )
    directory = pathlib.Path(directory)
    if (directory / files.SINGLE).exists():
        raise FileExistsError(f"{directory / files.SINGLE} exists; choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    named = {
        f"{prefix}.{name}": np.asarray(t)
        for prefix, part in parts.items()
        for name, t in part.items()
    }
    specs = [files.Spec(name, tensor.dtype, tensor.shape) for name, tensor in named.items()]
    files.write(directory, [specs], named.values())


@dataclasses.dataclass(frozen=True)
class Description:
    """What a run trains: the transformer, the VAE's directory, the image tower (see `tower.load_tower`), what that
    sees, and the factor by which the transformer's latents are larger than the VAE's."""

    model: DiTConfig
    vae: str
    tower: str
    image_size: int
    views: int
    scale_factor: float


def describe(workdir: str | os.PathLike, description: Description) -> None:
    """Writes what `load_run` needs, beside the parameters, into a run's directory."""
    path = pathlib.Path(workdir) / DESCRIPTION
    path.parent.mkdir(parents=True, exist_ok=True)
    configs.save(path, description)


def is_run(source: str | os.PathLike) -> bool:
    return (pathlib.Path(source) / DESCRIPTION).is_file()


def load_run(
    directory: str | os.PathLike, step: int | Literal["best"] | None = None
) -> tuple[Description, dict[str, Any]]:
    """(description, averaged parameters by part) of a run: 'dit', and 'tower' if that was trained along.

    `step` chooses a checkpoint: None for the newest. Raises ValueError for what is no run, CheckpointError for one
    without a checkpoint.
    """
    if not is_run(directory):
        raise ValueError(f"{directory} is no run of a shape transformer: it has no {DESCRIPTION}")
    description = configs.load(pathlib.Path(directory) / DESCRIPTION, Description)
    return description, checkpoint.load_params(directory, step)


def load(
    source: str | os.PathLike, step: int | Literal["best"] | None = None
) -> tuple[DiTConfig, dict]:
    """(config, parameters) of the transformer of a run, or of a released directory or file.

    Raises what `load_run`, `read_bundle` and `from_tensors` do.
    """
    if is_run(source):
        description, params = load_run(source, step)
        return description.model, params["dit"]
    if step is not None:
        raise ValueError(f"{source} is a released checkpoint, which has no step {step!r}")
    parts = read_bundle(source)
    if "model" not in parts:
        raise ValueError(
            f"{source} has no transformer (model.…), but {', '.join(parts) or 'nothing'}"
        )
    return from_tensors(parts["model"])


def _single_file(path: pathlib.Path) -> pathlib.Path | None:
    """The one file of tensors that `path` stands for; None if it is a directory of several, or of none."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path} is not a .safetensors file; take the release's safetensors variant"
            )
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or directory {path}")
    if (path / files.INDEX).is_file():
        return None
    found = sorted(path.glob("*.safetensors"))
    for name in (files.SINGLE, "model.fp16.safetensors"):
        if path / name in found:
            return path / name
    if len(found) > 1:
        raise ValueError(
            f"{path} has several files of tensors; name one: {', '.join(f.name for f in found)}"
        )
    if not found and (pickles := sorted(path.glob("*.ckpt"))):
        raise FileNotFoundError(
            f"{path} has no safetensors; {pickles[0].name} is a pickle, which is not opened"
        )
    return found[0] if found else None


def _places(config: DiTConfig, path: str, shape: tuple[int, ...]) -> Iterator[Place]:
    module, _, leaf = path.rpartition("/")
    if config.architecture == "cross_attention":
        yield from _cross_places(config, path, module, leaf)
        return
    stack, _, inner = module.partition("/")
    suffix, transposed = _SUFFIX[leaf], leaf == "kernel"
    if stack == "double_blocks":
        stream, _, part = inner.partition("/")
        stream = {"latent": "img", "cond": "txt"}[stream]
        named = f"{stream}_mod.lin" if part == "mod" else f"{stream}_{_DOUBLE[part]}"
    elif stack == "single_blocks":
        named = _SINGLE.get(inner, inner)
    else:
        yield Place(
            f"{_TOP.get(module, module.replace('/', '.'))}.{suffix}", path, None, transposed
        )
        return
    for i in range(shape[0]):
        yield Place(f"{stack}.{i}.{named}.{suffix}", path, i, transposed)


def _cross_places(config: DiTConfig, path: str, module: str, leaf: str) -> Iterator[Place]:
    suffix, transposed = "bias" if leaf == "bias" else "weight", leaf == "kernel"
    if not module.startswith("blocks_"):
        yield Place(f"{_CROSS_TOP[module]}.{suffix}", path, None, transposed)
        return
    block, _, inner = module.partition("/")
    block = block.replace("blocks_", "blocks.")
    if inner == "moe":  # the experts' own arrays, up_kernel and so on
        matrix, _, kind = leaf.partition("_")
        for x in range(config.num_experts):
            name = f"{block}.moe.experts.{x}.{_EXPERT[matrix]}.{_SUFFIX[kind]}"
            yield Place(name, path, x, kind == "kernel")
    else:
        yield Place(
            f"{block}.{_CROSS.get(inner, inner.replace('/', '.'))}.{suffix}", path, None, transposed
        )


def _like_preset(config: DiTConfig) -> DiTConfig:
    same = (
        p for p in PRESETS.values() if dataclasses.replace(config, num_latents=p.num_latents) == p
    )
    return next(same, config)


def _infer_cross(shape: Mapping[str, tuple[int, ...]]) -> DiTConfig:
    hidden, latent = shape["x_embedder.weight"]
    gates = [name for name in shape if name.endswith(".moe.gate.weight")]
    return DiTConfig(
        architecture="cross_attention",
        latent_dim=latent,
        cond_dim=shape["blocks.0.attn2.to_k.weight"][1],
        hidden_size=hidden,
        num_heads=hidden // shape["blocks.0.attn1.q_norm.weight"][0],
        depth=_count(shape, r"blocks\.(\d+)\."),
        single_depth=0,
        moe_depth=len(gates),
        num_experts=shape[gates[0]][0] if gates else 8,
        qkv_bias="blocks.0.attn1.to_q.bias" in shape,
    )


def _count(shape: Mapping[str, Any], pattern: str) -> int:
    """Blocks whose tensors' names begin with this pattern, of which the group is the number."""
    return len({match[1] for name in shape if (match := re.match(pattern, name))})


def _check_names(what: str, expected: Mapping[str, tuple], given: Mapping[str, tuple]) -> None:
    missing, extra = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    wrong = [
        f"{k} is {given[k]}, not {expected[k]}"
        for k in expected
        if k in given and given[k] != expected[k]
    ]
    lines = [
        f"{label} {what}s: {', '.join(names[:5])}"
        + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        for label, names in (("missing", missing), ("unexpected", extra), ("misshapen", wrong))
        if names
    ]
    if lines:
        raise ValueError("these are not the model's: " + "; ".join(lines))
