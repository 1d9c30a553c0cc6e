"""An image becomes a mesh.

    python -m experiments.shape --image=chair.png --checkpoint=runs/dit --out=chair.glb
    python -m experiments.shape --image=photos --checkpoint=hunyuan3d-dit-v2-0 --out=meshes --format=obj --turntable=gif
    python -m experiments.shape --image=front.png --back=back.png --checkpoint=hunyuan3d-dit-v2-mv --out=chair.glb

`--checkpoint` is a run that trained a diffusion transformer (experiments/configs/hunyuan3d_2), or a released directory.
The image shows one object, on a transparent ground. Opaque images are cut out if `rembg` is installed, or by
`--matting=module:function`. A folder of images becomes a folder of meshes: those that fail are reported and passed
over. Beside each mesh, NAME.json says what was done and how long each stage took.
"""

import importlib
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import app, flags

from research.core.checkpoint import CheckpointError
from research.hunyuan3d_2 import condition
from research.hunyuan3d_2.geometry import cleaning, isosurface
from research.hunyuan3d_2.pipeline import ImageToShape, Shape
from research.hunyuan3d_2.render import turntable

FORMATS = ("glb", "obj", "ply", "stl")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

_FLAGS = (
    flags.FlagValues()
)  # of its own, so that this module and another that is a program can be imported together


def _define(kind: str, name: str, default: Any, text: str, *more: Any) -> flags.FlagHolder:
    return getattr(flags, f"DEFINE_{kind}")(name, default, *more, text, flag_values=_FLAGS)


_IMAGE = _define(
    "string", "image", None, "An image (of several views, the front), or a folder of images."
)
_VIEWS = {
    name: _define("string", name, None, f"The object's {name} view, for models of several views.")
    for name in ("left", "back", "right")
}
_CHECKPOINT = _define("string", "checkpoint", None, "A run's directory, or a released one.")
_STEP = _define(
    "string", "step", None, "Checkpoint of a run: a step or 'best'; default: the newest."
)
_VAE = _define("string", "vae", None, "The VAE's directory; default: the one that the run names.")
_OUT = _define(
    "string",
    "out",
    None,
    "The mesh to write (.glb, .obj, .ply, .stl); of a folder of images, a folder.",
)
_FORMAT = _define("enum", "format", "glb", "Of the meshes of a folder.", FORMATS)
_SKIP_EXISTING = _define(
    "bool",
    "skip_existing",
    False,
    "Pass over images whose mesh is there, to go on where it was stopped.",
)
_MATTING = _define(
    "string",
    "matting",
    None,
    "What cuts out opaque images, as module:function, of a PIL RGB image; default: rembg:remove, if it is installed.",
)
_SEED = _define("integer", "seed", 1234, "Of the noise: the same seed makes the same shape.")
_STEPS = _define(
    "integer", "steps", None, "Network evaluations; default: as the model was made for."
)
_GUIDANCE = _define("float", "guidance", 5.0, "How strongly the image counts; 1 is none.")
_RESOLUTION = _define("integer", "resolution", 256, "Cells of the grid along an axis.")
_SELECTION = _define(
    "enum",
    "selection",
    "none",
    "Choose tokens to attend to: faster, not quite exact.",
    ("none", "topk", "merge"),
)
_SURFACE = _define(
    "enum",
    "surface",
    "marching_cubes",
    "How the surface is found.",
    ("marching_cubes", "surface_nets"),
)
_LEVEL = _define("float", "level", 0.0, "Of the field, at the surface; lower is fatter.")
_FACES = _define("integer", "faces", cleaning.FACES, "At most about so many faces; 0: all.")
_DTYPE = _define(
    "enum", "dtype", None, "Of activations; default: the models' own.", ("float32", "bfloat16")
)
_TURNTABLE = _define(
    "enum",
    "turntable",
    "none",
    "Also render the mesh, turning: NAME.turntable.gif, or a .png of eight views.",
    ("none", "gif", "png"),
)
_CACHE = _define(
    "string",
    "compilation_cache",
    "~/.cache/january/jax",
    "Where compiled programs are kept ('' to keep none).",
)


def find_images(
    image: str | None, out: str | None, views: Mapping[str, str], extension: str
) -> dict[pathlib.Path, Any]:
    """What to make: the mesh's path → an image's path, or views by name.

    Raises ValueError or FileNotFoundError for what is not there or does not fit together.
    """
    if not image or not out:
        raise ValueError("give --image and --out")
    source, target = pathlib.Path(image), pathlib.Path(out)
    if not source.exists():
        raise FileNotFoundError(f"there is no image {source}")
    if not source.is_dir():
        if target.suffix.lower()[1:] not in FORMATS:
            raise ValueError(
                f"--out={out} must end in one of {', '.join('.' + name for name in FORMATS)}"
            )
        if target.is_dir():
            raise ValueError(f"--out={out} is a folder, and --image is not: name the mesh")
        return {target: {"front": source} | views if views else source}
    if views:
        raise ValueError(f"--{', --'.join(views)} need one --image, not a folder")
    named_as_mesh = not target.is_dir() and target.suffix.lower()[1:] in FORMATS
    if target.is_file() or named_as_mesh:
        raise ValueError(f"--image is a folder, so --out={out} must be one too")
    found = sorted(
        path for path in source.iterdir() if path.suffix.lower() in IMAGES and path.is_file()
    )
    if not found:
        raise FileNotFoundError(f"{source} holds no images ({', '.join(IMAGES)})")
    stems = [path.stem for path in found]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ValueError(
            f"{source} holds several images called {', '.join(twice)}: their meshes would have one name"
        )
    return {target / f"{path.stem}.{extension}": path for path in found}


def find_matting(name: str | None) -> condition.Matting | None:
    """The function that 'module:function' names. Raises ValueError if there is none."""
    if not name:
        return None
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--matting={name}: {error}; name a function as rembg:remove") from error
    if not callable(found):
        raise ValueError(f"--matting={name}: is no function; name one as rembg:remove")
    return found


def make_all(
    jobs: Mapping[pathlib.Path, Any],
    load: Callable[[], ImageToShape],
    *,
    turn: str = "none",
    matting: condition.Matting | None = None,
    note: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = print,
    **settings: Any,
) -> list[pathlib.Path]:
    """Makes and writes every mesh; of several, those whose image or surface is no good are reported and returned.

    The folders are made, and the first image is read and cut out, before the models are loaded.

    Args:
      jobs: see `find_images`.
      load: makes the pipeline.
      turn: 'gif' or 'png' to render a turntable beside the mesh.
      note: to be said in the JSON files too.
      settings: of `ImageToShape.__call__`.

    Raises: what that, `condition.cut_out` and `load` raise; of several jobs, what concerns all of them.
    """
    failed, pipeline = [], None
    for target in jobs:
        target.parent.mkdir(parents=True, exist_ok=True)
    for number, (target, source) in enumerate(jobs.items(), 1):
        head = f"[{number}/{len(jobs)}] " if len(jobs) > 1 else ""
        try:
            views = source if isinstance(source, Mapping) else {"front": source}
            images = {name: condition.cut_out(view, matting) for name, view in views.items()}
            pipeline = pipeline or load()
            shape = pipeline(images, **settings)
        except (condition.ImageError, isosurface.NoSurface) as error:
            if len(jobs) == 1:
                raise
            say(f"{head}{target.name}: passed over: {error}")
            failed.append(target)
            continue
        write(shape, target, turn, {"image": _named(source)} | dict(note or {}))
        s = shape.statistics
        say(
            f"{head}{target}: {s['faces']} faces{'' if s['watertight'] else ', open'}, {s['time']['total']:.1f} s"
        )
    return failed


def write(shape: Shape, target: pathlib.Path, turn: str, note: Mapping[str, Any]) -> None:
    """The mesh, NAME.json with the note and its statistics, and NAME.turntable.gif or .png if it shall turn.

    The mesh is put in place last: where it is, the rest is.
    """
    statistics = target.with_suffix(".json")
    picture = target.with_suffix(f".turntable.{turn}")  # NAME.png may be the image
    results = [statistics, target] if turn == "none" else [statistics, picture, target]
    content = dict(note) | shape.statistics
    try:
        cleaning.save(shape.mesh, _unfinished(target))
        if turn != "none":
            turntable.save(shape.mesh, _unfinished(picture))
        _unfinished(statistics).write_text(json.dumps(content, indent=2) + "\n")
        for path in results:
            os.replace(_unfinished(path), path)
    finally:
        for path in results:
            _unfinished(path).unlink(missing_ok=True)


def _unfinished(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".unfinished-{path.name}")


def _named(source: Any) -> Any:
    """Paths as text, of one image or of views by name."""
    if isinstance(source, Mapping):
        return {name: str(path) for name, path in source.items()}
    return str(source)


def run_from_flags() -> list[pathlib.Path]:
    if not _CHECKPOINT.value:
        raise ValueError(
            "give --checkpoint: a run that trained a diffusion transformer, or a released directory"
        )
    if not pathlib.Path(_CHECKPOINT.value).is_dir():
        raise FileNotFoundError(f"there is no checkpoint directory {_CHECKPOINT.value}")
    views = {name: holder.value for name, holder in _VIEWS.items() if holder.value}
    jobs = find_images(_IMAGE.value, _OUT.value, views, _FORMAT.value)
    if _SKIP_EXISTING.value:
        jobs = {target: source for target, source in jobs.items() if not target.exists()}
    matting = find_matting(_MATTING.value)
    step = int(_STEP.value) if (_STEP.value or "").isdigit() else _STEP.value

    def load() -> ImageToShape:
        return ImageToShape.load(_CHECKPOINT.value, step=step, vae=_VAE.value, dtype=_DTYPE.value)

    return make_all(
        jobs,
        load,
        turn=_TURNTABLE.value,
        matting=matting,
        note={
            "checkpoint": _CHECKPOINT.value,
            "step": step,
            "vae": _VAE.value,
            "dtype": _DTYPE.value,
            "matting": _MATTING.value,
        },
        seed=_SEED.value,
        steps=_STEPS.value,
        guidance=_GUIDANCE.value,
        resolution=_RESOLUTION.value,
        selection=_SELECTION.value,
        surface=_SURFACE.value,
        level=_LEVEL.value,
        faces=_FACES.value or None,
        progress=True,
    )


def main(arguments: list[str]) -> None:
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}; the image is --image=FILE")
    for name in ("absl", "jax"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if _CACHE.value:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(_CACHE.value))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    try:
        failed = run_from_flags()
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; what is written is whole, and --skip_existing goes on", file=sys.stderr)
        sys.exit(130)
    if failed:
        sys.exit(f"{len(failed)} of the images failed")


if __name__ == "__main__":
    flags.FLAGS.append_flag_values(_FLAGS)
    _FLAGS.mark_as_parsed()
    for name in _FLAGS:  # what --help shows
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], _FLAGS[name])
    app.run(main)
