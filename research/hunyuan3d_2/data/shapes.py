"""Shapes prepared for training: points, distances and views of each, computed once and kept in files.

A data directory holds `train/` and `heldout/`, each with a file for every shape and `index.json`, which
says what was done to it and what was passed over:

    build(FamilySource("train", 2000), "data/shapes", workers=8)
    build(FolderSource("my/meshes", "train"), "data/mine", workers=8)
    open_split("data/shapes", "train")[0]["uniform"]

A file is made anew only if its mesh, the configuration or the seed has changed, so that an
interrupted build goes on where it was. `index.json` is there only when all files are as it says.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import signal
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import safetensors
import safetensors.numpy
import trimesh
from tqdm import tqdm

from research.hunyuan3d_2.data import families
from research.hunyuan3d_2.data.crashes import as_completed
from research.hunyuan3d_2.geometry import meshes, queries, surface
from research.hunyuan3d_2.geometry.distance import signed_distance

_VERSION = 1  # of what is in a file; another one is made anew
_MOST_BYTES = 230  # of a file's name without the ending; with it and a process id, 255 is the most
_log = logging.getLogger(__name__)
Split = families.Split


@dataclasses.dataclass(frozen=True)
class PoolConfig:
    """How much is kept of a shape; `PAPER` has the numbers of §2.1.

    uniform, sharp: points of the two clouds. queries: of each of the three groups of query points.
    angle: between faces at a sharp edge, in degrees; or the official rule. views: rendered images,
    0 for none, of view_size² pixels.
    """

    uniform: int = 8192
    sharp: int = 8192
    queries: int = 8192
    sharp_rule: Literal["dihedral", "official"] = "dihedral"
    angle: float = 20.0
    views: int = 8
    view_size: int = 64

    def __post_init__(self):
        if min(self.uniform, self.sharp, self.queries, self.view_size) < 1 or self.views < 0:
            raise ValueError("uniform, sharp, queries and view_size must be at least 1, views 0")


PAPER = PoolConfig(124_928, 124_928, 249_856, views=24, view_size=518)


class Source(Protocol):
    """Where meshes come from; picklable."""

    split: Split

    def names(self) -> list[str]:
        """Of all shapes; relative paths, or anything else that tells them apart."""

    def fingerprint(self, name: str) -> str:
        """Changes if the mesh does."""

    def load(self, name: str) -> tuple[trimesh.Trimesh, trimesh.Trimesh, list[str]]:
        """(the solid, how it looks, what was done to it), both normalised; MeshError if it cannot be."""


@dataclasses.dataclass(frozen=True)
class FamilySource:
    """`count` procedural shapes, the families of the split in turn."""

    split: Split
    count: int

    def names(self) -> list[str]:
        of_split = families.names(self.split)
        return [
            f"{of_split[i % len(of_split)]}-{i // len(of_split):06d}" for i in range(self.count)
        ]

    def fingerprint(self, name: str) -> str:
        return f"{self.split}/{name}"

    def load(self, name: str) -> tuple[trimesh.Trimesh, trimesh.Trimesh, list[str]]:
        family, index = name.rsplit("-", 1)
        mesh = families.make(family, int(index), self.split)
        return mesh, mesh, []


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """All meshes in a directory and those below it, of which a share is held out, by their paths."""

    directory: str
    split: Split
    heldout: float = 0.1

    def names(self) -> list[str]:
        if not self._root.is_dir():
            raise FileNotFoundError(f"there is no directory {self._root}")
        found = sorted(
            p for p in self._root.rglob("*") if p.suffix.lower() in meshes.SUFFIXES and p.is_file()
        )
        if not found:
            raise FileNotFoundError(f"{self._root} holds no meshes ({', '.join(meshes.SUFFIXES)})")
        names = [path.relative_to(self._root).as_posix() for path in found]
        return [name for name in names if self._is_held_out(name) == (self.split == "heldout")]

    def fingerprint(self, name: str) -> str:
        held = (self._root / name).stat()
        return f"{held.st_size} bytes of {held.st_mtime_ns}"

    def load(self, name: str) -> tuple[trimesh.Trimesh, trimesh.Trimesh, list[str]]:
        source = meshes.read(self._root / name)
        solid, done = meshes.repair(source)
        solid, transform = meshes.normalize(solid)
        if not np.isfinite(source.vertices).all():
            return solid, solid, done
        looks = source.copy()
        looks.vertices = (
            np.asarray(source.vertices, np.float64) - transform.centre
        ) / transform.scale
        return solid, looks, done

    def _is_held_out(self, name: str) -> bool:
        return zlib.crc32(os.fsencode(name)) / 2**32 < self.heldout

    @property
    def _root(self) -> pathlib.Path:
        return pathlib.Path(self.directory).expanduser()


def pools(
    mesh: trimesh.Trimesh, rng: np.random.Generator, config: PoolConfig
) -> dict[str, np.ndarray]:
    """The points of a normalised solid, float32 (§2.1, §2.5; §8.4: never half precision).

    'uniform' [uniform, 7] and 'sharp' [sharp, 7]: position, unit normal, flag (see surface.py).
    'volume', 'near', 'near_sharp' [queries, 4]: position and signed distance, positive inside.
    """
    rule = {"rule": config.sharp_rule, "angle": config.angle}
    clouds = {
        "uniform": surface.sample_uniform(mesh, config.uniform, rng),
        "sharp": surface.sample_sharp(mesh, config.sharp, rng, **rule),
    }
    asked = {
        "volume": queries.volume(config.queries, rng),
        "near": queries.near_uniform(surface.sample_uniform(mesh, config.queries, rng), rng),
        "near_sharp": queries.near_sharp(
            surface.sample_sharp(mesh, config.queries, rng, **rule), rng
        ),
    }
    distances = signed_distance(mesh, np.concatenate(list(asked.values()))).reshape(3, -1, 1)
    pairs = zip(asked.items(), distances, strict=True)
    return clouds | {
        name: np.concatenate([points, found], axis=1) for (name, points), found in pairs
    }


def build(
    source: Source,
    directory: str | os.PathLike,
    config: PoolConfig = PoolConfig(),
    *,
    workers: int = 0,
    seed: int = 0,
) -> pathlib.Path:
    """Prepares all shapes of a source in `directory`/`split`, which is returned.

    workers: processes (scripts then need `if __name__ == "__main__":`); 0: this one. Meshes that
    cannot be read or repaired, even one that kills the process that reads it, are passed over, with the
    reason in index.json and in the log. Ctrl-C is safe at any time.

    Raises FileNotFoundError for a source that is not there, MeshError if no shape is left.
    """
    root = pathlib.Path(directory) / source.split
    root.mkdir(parents=True, exist_ok=True)
    todo, shapes, failed = [], {}, {}
    names = source.names()
    for name in names:
        job = _Job(source, name, config, seed, _file(root, name))
        done = job.found()
        if done is None:
            todo.append(job)
        else:
            shapes[name] = done
    held = _read_index(root)
    passed_over = {shape["name"] for shape in held.get("failed", [])}  # they are tried again
    if any(job.name not in passed_over for job in todo):
        (root / "index.json").unlink(missing_ok=True)
        held = {}
    bar = tqdm(
        total=len(names), initial=len(shapes), desc=str(root), disable=not sys.stderr.isatty()
    )
    with bar:
        for job, done, reason in as_completed(_Job.run, todo, workers, start=_start_worker):
            bar.update()
            if reason:
                failed[job.name] = reason
                _log.warning("%s is passed over: %s", job.name, reason)
            else:
                shapes[job.name] = done
    if not shapes:
        first = next(iter(failed.items()), ("the source", "has no shapes"))
        raise meshes.MeshError(
            f"no shape of {len(names)} could be prepared; {first[0]}: {first[1]}"
        )
    index = {
        "config": dataclasses.asdict(config),
        "shapes": [{"name": name, "done": shapes[name]} for name in names if name in shapes],
        "failed": [{"name": name, "reason": failed[name]} for name in names if name in failed],
    }
    if index != held:
        _replace(root / "index.json", json.dumps(index, indent=1).encode())
    return root


class Shapes(Sequence):
    """The shapes of a split; each is a mapping whose arrays are read when they are asked for.

    Beside what `pools` gives: 'vertices' float32 [V, 3] and 'faces' int32 [F, 3] of the solid, and
    'views' uint8 [views, view_size, view_size, 4], RGBA.
    """

    def __init__(self, root: pathlib.Path, index: Mapping):
        self.config = PoolConfig(**index["config"])
        self.names = [shape["name"] for shape in index["shapes"]]
        self._root = root

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> "Shape":
        return Shape(self.names[i], _file(self._root, self.names[i]))


class Shape(Mapping):
    def __init__(self, name: str, path: pathlib.Path):
        self.name, self._path = name, path

    def __getitem__(self, key: str) -> np.ndarray:
        with safetensors.safe_open(self._path, "numpy") as file:
            if key not in file.keys():  # noqa: SIM118 (it is no mapping)
                raise KeyError(f"{self._path} has no {key!r}, but {', '.join(file.keys())}")
            return file.get_tensor(key)

    def __iter__(self) -> Iterator[str]:
        with safetensors.safe_open(self._path, "numpy") as file:
            return iter(list(file.keys()))

    def __len__(self) -> int:
        return len(list(iter(self)))


def open_split(directory: str | os.PathLike, split: Split) -> Shapes:
    """The shapes that `build` prepared. Raises FileNotFoundError if it has not, or was interrupted."""
    root = pathlib.Path(directory) / split
    if not (root / "index.json").is_file():
        raise FileNotFoundError(
            f"{root} holds no prepared shapes, or their preparation was interrupted; run "
            f"`python -m research.hunyuan3d_2.data.build --out={directory}`"
        )
    return Shapes(root, json.loads((root / "index.json").read_text()))


@dataclasses.dataclass(frozen=True)
class _Job:
    """One shape to prepare, as a worker gets it."""

    source: Source
    name: str
    config: PoolConfig
    seed: int
    path: pathlib.Path

    def found(self) -> list[str] | None:
        """What was done to the shape, if its file is there and up to date."""
        try:
            with safetensors.safe_open(self.path, "numpy") as file:
                held = file.metadata() or {}
        except (OSError, safetensors.SafetensorError):
            return None
        return json.loads(held["done"]) if held.get("fingerprint") == self.fingerprint() else None

    def fingerprint(self) -> str:
        parts = [
            _VERSION,
            dataclasses.asdict(self.config),
            self.seed,
            self.source.fingerprint(self.name),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def run(self) -> tuple[list[str], str]:
        """(what was done to the mesh, why it cannot be used or '')."""
        try:
            solid, looks, done = self.source.load(self.name)
            rng = np.random.default_rng([*os.fsencode(self.name), self.seed % 2**63])
            arrays = pools(solid, rng, self.config)
            arrays["vertices"] = np.asarray(solid.vertices, np.float32)
            arrays["faces"] = np.asarray(solid.faces, np.int32)
            if self.config.views:
                from research.hunyuan3d_2.render.condition import views

                arrays["views"] = views(looks, self.config.views, self.config.view_size, rng)
            arrays = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
            held = {"fingerprint": self.fingerprint(), "done": json.dumps(done)}
        except Exception as error:  # of one damaged file; the others go on
            kind = "" if isinstance(error, meshes.MeshError) else f"{type(error).__name__}: "
            return [], f"{kind}{error}" or type(error).__name__
        _replace(self.path, safetensors.numpy.save(arrays, held))  # a full disk ends the build
        return done, ""


def _start_worker() -> None:
    """Workers share the machine: one thread each, and no accelerator. Ctrl-C is for the one who started them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["IGL_NUM_THREADS"] = "1"
    import jax

    jax.config.update("jax_platforms", "cpu")


def _file(root: pathlib.Path, name: str) -> pathlib.Path:
    """Where a shape is kept; two names never have one file, and a long one is shortened."""
    quoted = name.replace("%", "%25").replace("/", "%2F")
    encoded = os.fsencode(quoted)
    if len(encoded) > _MOST_BYTES:
        start = encoded[:100].decode(errors="ignore")
        quoted = f"{start}%-{hashlib.sha256(encoded).hexdigest()}"
    return root / f"{quoted}.safetensors"


def _read_index(root: pathlib.Path) -> dict:
    """{} where there is none that can be read."""
    try:
        return json.loads((root / "index.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}


def _replace(path: pathlib.Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
