"""VAE checkpoints: the released directories and bundles, in and out, and runs of this codebase.

A released directory holds `config.yaml` (the class's arguments under `params`) and
`model[.fp16].safetensors`, whose tensors have PyTorch's layout (out x in) and names, as
`transformer.resblocks.0.attn.c_qkv.weight`; the packed projections are head-major there as here. Most
hold the decoder alone. A diffusion model's bundle holds everything, with the VAE's tensors under `vae.`
and its arguments under `vae` in config.yaml. A run's directory holds `model/vae.json` beside
`checkpoints/`.
"""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
import yaml
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from research.core import checkpoint, config
from research.hunyuan3d_2.vae import model
from research.hunyuan3d_2.vae.config import POINT_FEATURES, VAEConfig

CONFIG, WEIGHTS = "config.yaml", ("model.fp16.safetensors", "model.safetensors")
TARGET = "hy3dgen.shapegen.models.ShapeVAE"
BUNDLED = "vae"
_DESCRIPTION = pathlib.Path("model") / "vae.json"
_ENCODER = ("encoder.", "pre_kl.")  # tensors that only a checkpoint with the encoder has

# Argument of the class -> our field. Those that are left out there have the class's defaults.
_FIELDS = {
    "num_latents": "num_tokens",
    "embed_dim": "latent_dim",
    "width": "width",
    "heads": "heads",
    "num_encoder_layers": "encoder_layers",
    "num_decoder_layers": "decoder_layers",
    "num_freqs": "num_freqs",
    "pc_size": "uniform_points",
    "pc_sharpedge_size": "sharp_points",
    "downsample_ratio": "downsample_ratio",
    "geo_decoder_downsample_ratio": "field_downsample",
    "geo_decoder_mlp_expand_ratio": "field_mlp_ratio",
    "geo_decoder_ln_post": "field_ln_post",
    "scale_factor": "scale_factor",
}
_DEFAULTS = {
    "num_encoder_layers": 8, "num_freqs": 8, "pc_size": 5120, "pc_sharpedge_size": 5120,
    "downsample_ratio": 20, "geo_decoder_downsample_ratio": 1, "geo_decoder_mlp_expand_ratio": 4,
    "geo_decoder_ln_post": True, "scale_factor": 1.0,
}  # fmt: skip
# Arguments of which one value is built here -> (the class's default, that value).
_FIXED = {"include_pi": (True, False), "qkv_bias": (True, False), "qk_norm": (False, True)}
_FIXED_ENCODER = {"point_feats": (3, POINT_FEATURES), "use_ln_post": (True, True)}
_IGNORED = {"label_type", "drop_path_rate", "ckpt_path"}  # they change nothing in the forward pass


def describe(workdir: str | os.PathLike, vae: VAEConfig) -> None:
    """Writes what `load` needs, beside the parameters, into a run's directory."""
    path = pathlib.Path(workdir) / _DESCRIPTION
    path.parent.mkdir(parents=True, exist_ok=True)
    config.save(path, vae)


def load(
    source: str | os.PathLike, step: int | Literal["best"] | None = None
) -> tuple[VAEConfig, dict[str, Any]]:
    """(configuration, float32 parameters on the host) of a released directory, a bundle or a run.

    `step` chooses a run's checkpoint: a step, 'best', or None for the newest. Released weights may be
    float16, float32 or bfloat16, and with the encoder or without.

    Raises ValueError for what is no VAE or another architecture, naming tensors that are missing, not
    expected or of another shape; FileNotFoundError for no weights (.ckpt files are not read: they are
    pickles, which can run code).
    """
    directory = pathlib.Path(source)
    if (directory / _DESCRIPTION).is_file():
        vae = config.load(directory / _DESCRIPTION, VAEConfig)
        return vae, checkpoint.load_params(directory, step)
    if not (directory / CONFIG).is_file():
        raise ValueError(
            f"{directory} is no VAE: it has neither {_DESCRIPTION} (a run of this codebase) nor {CONFIG} "
            "(a released directory)"
        )
    if step is not None:
        raise ValueError(f"{directory} is a released directory, which has no checkpoint {step!r}")
    try:
        entry = yaml.safe_load((directory / CONFIG).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{directory / CONFIG} is not YAML: {error}") from None
    prefix = ""
    if isinstance(entry, Mapping) and BUNDLED in entry:
        entry, prefix = entry[BUNDLED], f"{BUNDLED}."
    if not isinstance(entry, Mapping) or not isinstance(entry.get("params"), Mapping):
        raise ValueError(f"{directory / CONFIG} has no `params` of a VAE")
    weights = _weights(directory)
    try:
        with safe_open(weights, framework="numpy") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]
            encoder = any(name.removeprefix(prefix).startswith(_ENCODER) for name in names)
            vae = from_arguments(entry["params"], encoder=encoder)
            tensors = {name.removeprefix(prefix): file.get_slice(name) for name in names}
            return vae, _from_tensors(vae, tensors, encoder, str(weights))
    except SafetensorError as error:
        raise ValueError(f"{weights} is damaged: {error}; complete the download") from None


def save(
    directory: str | os.PathLike,
    vae: VAEConfig,
    params: Mapping[str, Any],
    dtype: Literal["float16", "float32"] = "float16",
) -> None:
    """Writes a released directory: config.yaml and model.fp16.safetensors (or model.safetensors).

    Without the encoder if `params` have none. Raises ValueError for parameters that float16 cannot hold,
    and for learned queries, which no released model has.
    """
    if vae.queries != "fps":
        raise ValueError(f"released checkpoints have no queries={vae.queries!r}")
    tensors = {}
    for name, value in to_tensors(params).items():
        with np.errstate(over="ignore"):  # said below
            tensors[name] = np.ascontiguousarray(value.astype(dtype))
        if not np.isfinite(tensors[name]).all():
            raise ValueError(f"{name} is not finite in {dtype}; save it as float32")
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = directory / WEIGHTS[dtype == "float32"]
    temporary = weights.with_name(f"{weights.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, weights)
    entry = {"target": TARGET, "params": to_arguments(vae, encoder="pre_kl" in params)}
    (directory / CONFIG).write_text(yaml.safe_dump(entry, sort_keys=False))


def to_tensors(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Parameters -> tensors under their released names, float32, in PyTorch's layout."""
    flat = flatten_dict(jax.device_get(dict(params)))
    return {
        _name(path): np.asarray(x).T if path[-1] == "kernel" else np.asarray(x)
        for path, x in flat.items()
    }


def shapes(vae: VAEConfig, encoder: bool = True) -> dict[str, Any]:
    """The parameters as jax.ShapeDtypeStructs, with the encoder or without; nothing is computed."""
    tree = dict(jax.eval_shape(lambda key: model.init(vae, key), jax.random.key(0)))
    return tree if encoder else {k: v for k, v in tree.items() if k not in ("encoder", "pre_kl")}


def tensor_shapes(vae: VAEConfig, encoder: bool = True) -> dict[str, tuple[int, ...]]:
    """Released name -> shape in PyTorch's layout."""
    flat = flatten_dict(shapes(vae, encoder))
    return {
        _name(path): leaf.shape[::-1] if path[-1] == "kernel" else leaf.shape
        for path, leaf in flat.items()
    }


def count_parameters(vae: VAEConfig, encoder: bool = True) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(vae, encoder)))


def from_arguments(arguments: Mapping[str, Any], encoder: bool) -> VAEConfig:
    """The configuration that the class's `arguments` describe; ValueError if it is not built here."""
    fixed = _FIXED | (_FIXED_ENCODER if encoder else {})
    unknown = set(arguments) - set(_FIELDS) - set(_FIXED) - set(_FIXED_ENCODER) - _IGNORED
    if unknown:
        raise ValueError(f"a VAE has no argument {', '.join(sorted(unknown))}")
    missing = set(_FIELDS) - set(_DEFAULTS) - set(arguments)
    if missing:
        raise ValueError(f"the VAE's arguments lack {', '.join(sorted(missing))}")
    for name, (default, value) in fixed.items():
        if arguments.get(name, default) != value:
            raise ValueError(
                f"a VAE with {name}={arguments.get(name, default)} is not built here, only {value}"
            )
    values = _DEFAULTS | dict(arguments)
    return config.from_config_dict(
        VAEConfig, {ours: values[name] for name, ours in _FIELDS.items()}
    )


def to_arguments(vae: VAEConfig, encoder: bool) -> dict[str, Any]:
    """`from_arguments` backwards."""
    only_encoder = {"num_encoder_layers", "pc_size", "pc_sharpedge_size", "downsample_ratio"}
    arguments = {
        name: getattr(vae, ours)
        for name, ours in _FIELDS.items()
        if encoder or name not in only_encoder
    }
    fixed = _FIXED | (_FIXED_ENCODER if encoder else {})
    return arguments | {name: value for name, (_, value) in fixed.items()}


def _name(path: tuple[str, ...]) -> str:
    """('resblocks_0', 'attn', 'q_norm', 'scale') -> 'resblocks.0.attn.attention.q_norm.weight'."""
    *modules, leaf = path
    name = ".".join(re.sub(r"^resblocks_", "resblocks.", module) for module in modules)
    name = re.sub(r"attn\.([qk]_norm)$", r"attn.attention.\1", name)
    return f"{name}.{ {'kernel': 'weight', 'scale': 'weight'}.get(leaf, leaf) }"


def _weights(directory: pathlib.Path) -> pathlib.Path:
    for name in WEIGHTS:
        if (directory / name).is_file():
            return directory / name
    pickles = sorted(path.name for path in directory.glob("*.ckpt"))
    hint = (
        f"; {pickles[0]} is a pickle, which is not read: take the .safetensors" if pickles else ""
    )
    raise FileNotFoundError(f"{directory} holds neither {' nor '.join(WEIGHTS)}{hint}")


def _from_tensors(vae: VAEConfig, tensors: Mapping[str, Any], encoder: bool, where: str):
    """Parameters from lazily read tensors, one at a time."""
    expected = {
        _name(path): (path, leaf) for path, leaf in flatten_dict(shapes(vae, encoder)).items()
    }
    wrong = {
        "missing": sorted(set(expected) - set(tensors)),
        "not expected": sorted(set(tensors) - set(expected)),
    }
    flat, misshapen = {}, []
    for name in expected.keys() & tensors.keys():
        path, leaf = expected[name]
        kernel = path[-1] == "kernel"
        shape = tuple(tensors[name].get_shape())
        if shape != (leaf.shape[::-1] if kernel else leaf.shape):
            wanted = "x".join(map(str, leaf.shape[::-1] if kernel else leaf.shape))
            misshapen.append(f"{name} is {'x'.join(map(str, shape))}, not {wanted}")
        flat[path] = name
    wrong["of another shape"] = sorted(misshapen)
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
        for kind, names in wrong.items()
        if names
    ]
    if problems:
        raise ValueError(f"{where} does not fit its configuration. Tensors {'; '.join(problems)}")
    for path, name in flat.items():
        value = np.asarray(tensors[name][:]).astype(np.float32)
        flat[path] = np.ascontiguousarray(value.T) if path[-1] == "kernel" else value
    return unflatten_dict(flat)
