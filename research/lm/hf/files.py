"""safetensors files, read and written one tensor at a time.

The format: eight bytes of header length (little endian), a JSON header of name → dtype, shape and
byte range, then the bytes. A large model is a few such files and an index, name → file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Iterable, Mapping, Sequence

import ml_dtypes
import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file: known by the header, read on demand."""

    file: pathlib.Path
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    start: int  # byte offset in the file

    def read(self) -> np.ndarray:
        count = math.prod(self.shape)
        array = np.fromfile(self.file, DTYPES[self.dtype], count, offset=self.start)
        return array.reshape(self.shape)

    def part(self, offset: int, shape: tuple[int, ...]) -> Stored:
        """The piece of this shape that starts at element `offset`."""
        start = self.start + offset * DTYPES[self.dtype].itemsize
        return dataclasses.replace(self, start=start, shape=shape)


@dataclasses.dataclass(frozen=True)
class Spec:
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def list_tensors(directory: pathlib.Path) -> dict[str, Stored]:
    """Name → tensor of a checkpoint of one file, or of several and an index.

    Reads headers only.

    Raises:
        FileNotFoundError: neither kind of file, or a file that the index names.
        ValueError: a damaged file, or one without a tensor that the index says it has.
    """
    index = directory / INDEX
    if not index.is_file():
        if not (directory / SINGLE).is_file():
            other = sorted(p.name for p in directory.glob("*.bin"))
            hint = f"; {other[0]} must first be converted to safetensors" if other else ""
            raise FileNotFoundError(f"{directory} holds neither {SINGLE} nor {INDEX}{hint}")
        return read_header(directory / SINGLE)
    try:
        where = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not an index with a weight_map: {error!r}") from error
    files = sorted(set(where.values()))
    missing = [name for name in files if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index} names {len(files)} files, of which {len(missing)} are missing: "
            f"{', '.join(missing[:5])}; complete the download"
        )
    headers = {name: read_header(directory / name) for name in files}
    for tensor, file in where.items():
        if tensor not in headers[file]:
            raise ValueError(f"{index} places {tensor} in {file}, which does not have it")
    return {tensor: headers[file][tensor] for tensor, file in where.items()}


def read_header(path: pathlib.Path) -> dict[str, Stored]:
    """Name → tensor of one file (ValueError if it is damaged)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise ValueError(f"{path} is not a whole safetensors file ({size} bytes)")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: Stored(path, e["dtype"], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
                for name, e in header.items()
            }
            end = max((8 + length + e["data_offsets"][1] for e in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} has no safetensors header: {error!r}") from error
    if end > size:
        raise ValueError(f"{path} is cut short: {size} bytes of {end}; complete the download")
    return tensors


def split(specs: Sequence[Spec], max_bytes: int) -> list[list[Spec]]:
    """Specs in order, as runs of at most `max_bytes` (or one tensor)."""
    shards: list[list[Spec]] = [[]]
    room = max_bytes
    for spec in specs:
        if shards[-1] and spec.nbytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(spec)
        room -= spec.nbytes
    return shards


def write(directory: pathlib.Path, shards: list[list[Spec]], arrays: Iterable[np.ndarray]) -> None:
    """Writes the shards' tensors, taken one by one from `arrays`, and an index if several."""
    arrays = iter(arrays)
    count = len(shards)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        where |= {spec.name: name for spec in shard}
        with (directory / name).open("wb") as file:
            file.write(_header(shard))
            for spec in shard:
                array = next(arrays)
                if array.shape != spec.shape or array.dtype != spec.dtype:
                    raise AssertionError(f"{spec} is not {array.dtype} {array.shape}")
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
    if count > 1:
        total = sum(spec.nbytes for shard in shards for spec in shard)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _header(shard: Sequence[Spec]) -> bytes:
    entries: dict[str, Mapping] = {"__metadata__": {"format": "pt"}}
    start = 0
    for spec in shard:
        stop = start + spec.nbytes
        entries[spec.name] = {
            "dtype": _NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [start, stop]
        }
        start = stop
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    return struct.pack("<Q", len(text)) + text
