"""Published checkpoints in the Hugging Face format, in and out.

    model, params = hf.load("Qwen2.5-1.5B")          # a local directory
    logits = model.apply({"params": params}, tokens)
    hf.save("my-model", model, params, tokenizer=tokenizer)

A family of checkpoints is one file here with a table of tensor names (`layout.py` explains the
notation); to add one, write its file and list it in LAYOUTS. Tensors stream one by one, straight to
where the mesh wants them (and, if asked, as int8): beside them the host holds little more than the
largest tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from jax.sharding import Mesh

from research.core import sharding
from research.lm import quantize as int8
from research.lm.hf import files, filling, llama, minimax, minimax_text_01, qwen2, qwen3
from research.lm.hf.layout import Block, Layout, Param
from research.lm.tokenizer import Tokenizer

LAYOUTS = {
    module.LAYOUT.name: module.LAYOUT
    for module in (qwen2, qwen3, llama, minimax, minimax_text_01)
}
CONFIG = "config.json"


def load(
    directory: str | os.PathLike,
    *,
    dtype: str | None = None,
    compute_dtype: str = "float32",
    mesh: Mesh | None = None,
    rules: sharding.Rules | None = None,
    quantize: bool = False,
) -> tuple[Any, dict[str, Any]]:
    """The model and its parameters from a local directory.

    Everything is checked against the files' headers before any tensor is read.

    Args:
        directory: holds config.json and model.safetensors, or shards and their index.
        dtype: of the parameters; None keeps them as stored. Training wants 'float32'.
        compute_dtype: of activations (the model's `config.dtype`); logits are float32 always.
        mesh, rules: place every parameter as the sharding rules say; both or neither.
        quantize: large matrices become int8 as they are read (`research.lm.quantize`), to decode
            and score with; they cannot be trained or saved.

    Returns:
        (model, params); `model.config` is the DecoderConfig. For other ways to run it (remat,
        unrolled layers) build a model of `dataclasses.replace(model.config, ...)`.

    Raises:
        NotADirectoryError, FileNotFoundError: the directory, config.json or a file of tensors.
        ValueError: an architecture or setting that is not supported; tensors that are missing,
            unexpected or of another shape; damaged files.
    """
    if (mesh is None) != (rules is None):
        raise ValueError("give both mesh and rules, or neither")
    directory = _directory(directory)
    layout, config = read_config(directory)
    stored = files.list_tensors(directory)
    sizes = layout.sizes(config)
    table = tuple(param.found(sizes, stored) for param in layout.params(config))
    _check_tensors(layout, config, table, stored, directory)

    dtypes = {param.path: np.dtype(dtype or _stored_dtype(param, sizes, stored)) for param in table}
    shapes = _nest(
        {p.path: jax.ShapeDtypeStruct(p.shape(sizes), dtypes[p.path]) for p in table}
    )
    places = {} if mesh is None else _flatten(sharding.tree_shardings(rules, shapes, mesh))
    params = {}
    for param in table:
        read = _read_int8 if quantize and int8.summed(param.path) else _read
        params[param.path] = read(
            param, sizes, stored, dtypes[param.path], places.get(param.path)
        )
    config = dataclasses.replace(
        config, dtype=compute_dtype, param_dtype=str(dtypes[table[0].path])
    )
    return layout.build(config), _nest(params)


def save(
    directory: str | os.PathLike,
    model: Any,
    params: Mapping[str, Any],
    layout: str | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a directory that `load` and transformers read.

    All of it is written beside the target and moved there at the end: a failure leaves what was
    there before. An existing model directory is replaced; any other is refused.

    Args:
        params: arrays of one process (gather those of a multi-process mesh first).
        layout: a name in LAYOUTS; None takes one that can express the model, if possible so that
            all who read it compute the same (a warning is logged for a layout of which that is not so).
        tokenizer: saved along, and its special tokens named in config.json.
        dtype: to convert to: 'float32', 'bfloat16' or 'float16'; None keeps the parameters' own.
        max_shard_bytes: of one safetensors file.

    Raises:
        ValueError: a layout that cannot express the model, or parameters that are not the model's.
        FileExistsError: the directory exists and holds something else than a model.
        OSError: too little disk space (before anything is written).
    """
    directory = pathlib.Path(directory)
    config = model.config
    chosen, content = _choose_layout(layout, config)
    flat = _flatten(params)
    _check_params(chosen.shapes(config), flat)
    _check_target(directory)
    if caveat := chosen.caveat(config):
        logging.getLogger(__name__).warning("layout %r: %s", chosen.name, caveat)
    derived = tuple(chosen.derived(config))
    specs = [
        *_specs(chosen, config, flat, dtype),
        *(files.Spec(one.name, np.dtype(np.float32), one.shape) for one in derived),
    ]
    shards = files.split(specs, max_shard_bytes)
    directory.parent.mkdir(parents=True, exist_ok=True)
    _check_space(directory.parent, sum(spec.nbytes for spec in specs))

    content = {"architectures": [chosen.architecture], "model_type": chosen.name} | content
    content["torch_dtype"] = str(specs[0].dtype)
    for role in ("bos", "eos", "pad"):
        content[f"{role}_token_id"] = getattr(tokenizer, f"{role}_id", None)
    with _replacing(directory) as fresh:
        (fresh / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(fresh)
        arrays = itertools.chain(
            (array for _, array in tensors(model, params, chosen.name)),
            (one.make() for one in derived),
        )
        cast = (a.astype(spec.dtype, copy=False) for spec, a in zip(specs, arrays, strict=True))
        files.write(fresh, shards, cast)


def read_config(directory: str | os.PathLike) -> tuple[Layout, Any]:
    """The layout of a directory and the model's config (errors as in `load`)."""
    path = _directory(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: not a directory of a published model")
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    by_architecture = {layout.architecture: layout for layout in LAYOUTS.values()}
    name = (hf.get("architectures") or [None])[0]
    layout = by_architecture.get(name) if name else LAYOUTS.get(hf.get("model_type"))
    if layout is None:
        raise ValueError(
            f"{path}: architecture {name or hf.get('model_type')!r} is not supported; "
            f"these are: {', '.join(by_architecture)}"
        )
    try:
        return layout, layout.read_config(hf)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def tensors(model: Any, tree: Mapping[str, Any], layout: str) -> Iterator[tuple[str, np.ndarray]]:
    """A tree shaped like the parameters (they, or gradients) as published names and tensors."""
    config, flat = model.config, _flatten(tree)
    sizes = LAYOUTS[layout].sizes(config)
    for param in LAYOUTS[layout].params(config):
        for block in param.blocks(sizes):
            yield block.name, block.outward(_fetch(flat[param.path], block.region))


# Reading.


def _check_tensors(
    layout: Layout,
    config: Any,
    table: tuple[Param, ...],
    stored: Mapping[str, files.Stored],
    directory: pathlib.Path,
) -> None:
    if problems := layout.check(config, stored):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{directory}: {problems[0]}{more}")
    sizes = layout.sizes(config)
    want = {b.name: b.whole for param in table for b in param.blocks(sizes)}
    copies = layout.copies(config)
    problems = [f"{name} {list(shape)} is missing" for name, shape in want.items()
                if name not in stored]
    for name, tensor in stored.items():
        if any(re.search(pattern, name) for pattern in layout.ignored):
            continue
        where = f"{name} in {tensor.file.name}"
        original = copies.get(name)
        shape = want.get(original or name)
        if shape is None:
            problems.append(f"{where} is unexpected")
        elif tensor.shape != shape:
            problems.append(f"{where} is {list(tensor.shape)}, {CONFIG} means {list(shape)}")
        elif tensor.dtype not in files.DTYPES:
            problems.append(f"{where} is {tensor.dtype}, supported are {', '.join(files.DTYPES)}")
        elif original in stored and not _same(tensor, stored[original]):
            problems.append(f"{where} should repeat {original} ({CONFIG} ties them), but differs")
    if problems:
        more = f"\n  ... and {len(problems) - 12} more" if len(problems) > 12 else ""
        lines = "".join(f"\n  {problem}" for problem in problems[:12])
        raise ValueError(
            f"{directory} does not hold the {layout.architecture} that its {CONFIG} describes:"
            f"{lines}{more}"
        )


def _same(a: files.Stored, b: files.Stored) -> bool:
    return a.shape == b.shape and np.array_equal(a.read(), b.read())


def _stored_dtype(param: Param, sizes, stored: Mapping[str, files.Stored]) -> np.dtype:
    return np.result_type(*{files.DTYPES[stored[b.name].dtype] for b in param.blocks(sizes)})


def _read(param: Param, sizes, stored, dtype: np.dtype, place) -> jax.Array:
    """One parameter: every tensor is read once, and copied to the shards that hold some of it."""
    target = filling.Target(param.shape(sizes), dtype, place)
    for block in param.blocks(sizes):
        if target.wants(block.region):
            target.put(block.region, _piece(block, stored))
    return target.finished()


def _read_int8(param: Param, sizes, stored, dtype: np.dtype, place) -> int8.Quantized:
    """The same as int8: a tensor has all that its output channels sum over, so each goes alone."""
    axes = int8.summed(param.path)
    shape = param.shape(sizes)
    values = filling.Target(shape, np.dtype(np.int8), place)
    scale = filling.Target(
        [1 if axis in axes else n for axis, n in enumerate(shape)],
        np.dtype(np.float32),
        None if place is None else int8.scale_sharding(place, axes),
    )
    for block in param.blocks(sizes):
        region = tuple(slice(0, 1) if a in axes else s for a, s in enumerate(block.region))
        if values.wants(block.region) or scale.wants(region):
            piece = int8.quantize_array(_piece(block, stored).astype(dtype, copy=False), axes)
            values.put(block.region, np.asarray(piece.values))
            scale.put(region, np.asarray(piece.scale))
    return int8.Quantized(values.finished(), scale.finished())


def _piece(block: Block, stored: Mapping[str, files.Stored]) -> np.ndarray:
    return block.inward(stored[block.name].part(block.offset, block.shape).read())


def _directory(directory: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(directory)
    if not path.is_dir():
        raise NotADirectoryError(
            f"{path} is not a directory. Models are read from local directories: download one "
            "first, for example with `hf download ORGANISATION/MODEL --local-dir DIRECTORY`"
        )
    return path


# Writing.


def _choose_layout(name: str | None, config: Any) -> tuple[Layout, dict[str, Any]]:
    if name is not None and name not in LAYOUTS:
        raise ValueError(f"no layout {name!r}; there are {', '.join(LAYOUTS)}")
    refusals = []
    those_without_first = sorted(LAYOUTS.values(), key=lambda layout: bool(layout.caveat(config)))
    for layout in [LAYOUTS[name]] if name else those_without_first:
        try:
            return layout, layout.write_config(config)
        except ValueError as error:
            refusals.append(str(error))
    raise ValueError("; ".join(refusals))


def _check_params(shapes: Mapping[str, tuple[int, ...]], flat: Mapping[str, Any]) -> None:
    problems = [f"{path} is missing" for path in shapes if path not in flat]
    for path, leaf in flat.items():
        if isinstance(leaf, int8.Quantized):
            problems.append(f"{path} is int8, which no layout here can say")
        elif path not in shapes:
            problems.append(f"{path} is unexpected")
        elif tuple(leaf.shape) != shapes[path]:
            problems.append(f"{path} is {tuple(leaf.shape)}, the model's is {shapes[path]}")
        elif isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            problems.append(f"{path} is spread over several processes; gather it first")
    if problems:
        raise ValueError("these are not the model's parameters: " + "; ".join(problems[:8]))


def _specs(layout: Layout, config: Any, flat, dtype: str | None) -> Iterator[files.Spec]:
    sizes = layout.sizes(config)
    for param in layout.params(config):
        kind = np.dtype(dtype or flat[param.path].dtype)
        if kind not in files.DTYPES.values():
            raise ValueError(f"{param.path}: cannot save {kind}; give dtype='float32' or another")
        for block in param.blocks(sizes):
            yield files.Spec(block.name, kind, block.shape)


def _fetch(array: Any, region: tuple[slice, ...]) -> np.ndarray:
    """A region on the host. Sliced on its devices first: one layer at a time comes over."""
    if isinstance(array, jax.Array):
        starts = [s.start for s in region]
        return np.asarray(jax.lax.dynamic_slice(array, starts, [s.stop - s.start for s in region]))
    return np.asarray(array)[region]


def _check_target(directory: pathlib.Path) -> None:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    is_model = directory.is_dir() and not any(path.is_dir() for path in directory.iterdir())
    if not is_model or "architectures" not in _json_or_empty(directory / CONFIG):
        raise FileExistsError(f"{directory} exists and is not a saved model; choose another")


def _json_or_empty(path: pathlib.Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _check_space(parent: pathlib.Path, nbytes: int) -> None:
    free = shutil.disk_usage(parent).free
    need = nbytes + 2**26  # headers, tokenizer
    if free < need:
        raise OSError(
            errno.ENOSPC,
            f"saving needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "free some, or save elsewhere or with dtype='bfloat16'",
            str(parent),
        )


@contextlib.contextmanager
def _replacing(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """A fresh directory that takes the place of `directory` if the block succeeds."""
    fresh = directory.with_name(f".{directory.name}.new-{os.getpid()}")
    old = directory.with_name(f".{directory.name}.old-{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        had = directory.exists()
        if had:
            directory.rename(old)
        try:
            fresh.rename(directory)
        except BaseException:
            if had:
                old.rename(directory)
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(dict(tree), sep="/")


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.unflatten_dict(dict(flat), sep="/")
