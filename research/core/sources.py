"""Files of records with random access: JSON lines, Parquet and plain text.

A source is a sequence of records: {'text': str} for documents, {'prompt': …, 'response': str} for
pairs, which may have a 'label', {'prompt': …, 'chosen': str, 'rejected': str} for preferences.
Opening one reads it through once, so that a malformed line, a missing key or a missing file stops
a run before it starts, with the file, the line and what to do in the message.

Sources are small and picklable, as data loaders' worker processes need: they hold byte offsets
and reopen their file where they are used.
"""

import glob
import json
import math
import mmap
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow
import pyarrow.parquet

Record = dict[str, Any]


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the place in it and the remedy."""


@dataclass(frozen=True)
class SourceConfig:
    """Where records come from: one of three kinds, told by the keys that are set.

    `text_key` alone: documents; `prompt_key` and `response_key`: pairs, graded ones with `label_key`
    too; `prompt_key`, `chosen_key` and `rejected_key`: preferences.

    `path` is a file or a pattern like 'data/*.jsonl' (files in sorted order). `format`:

    - 'jsonl': one JSON object per line; blank lines are skipped.
    - 'parquet': the columns named by the keys are held in memory (in every worker); for more
      than memory holds, use 'jsonl'.
    - 'text': documents separated by blank lines; no keys.

    Texts and responses are strings. A prompt is a string, or a list of chat messages
    ({'role': …, 'content': …}). A label is a finite number, or true or false.

    `weight` is the source's share of examples in a mixture (not of tokens), to within one per cent.
    `weights` makes it a share of packed rows, thus of tokens, that changes in the course of a run:
    (tokens, weight) pairs, where `tokens` counts what the run has seen, rows * seq_len of all
    batches so far; between two pairs the weight is interpolated linearly, outside it is constant.
    """

    path: str
    format: Literal["jsonl", "parquet", "text"] = "jsonl"
    text_key: str = ""
    prompt_key: str = ""
    response_key: str = ""
    label_key: str = ""
    chosen_key: str = ""
    rejected_key: str = ""
    weight: float = 1.0
    weights: tuple[tuple[int, float], ...] = ()


def open_source(config: SourceConfig) -> Sequence[Record]:
    """The records of all files of a source. Raises DataError or FileNotFoundError."""
    readers = {"jsonl": JsonLines, "parquet": Parquet, "text": Text}
    if config.format not in readers:
        raise ValueError(f"format must be one of {', '.join(readers)}, got {config.format!r}")
    keys = _keys(config)
    files = [readers[config.format](path, keys) for path in _files(config.path)]
    return files[0] if len(files) == 1 else _Joined(files)


def check(config: SourceConfig) -> None:
    """Raises ValueError or FileNotFoundError for keys or files that cannot be; reads no file."""
    _keys(config)
    _files(config.path)


class JsonLines(Sequence):
    """A file with one JSON object per line. Holds 8 bytes of memory for each line."""

    def __init__(self, path: str, keys: Mapping[str, str]):
        """`keys` maps names in a record to keys in the file, as {'text': 'content'}."""
        self.path, self._keys = path, dict(keys)
        starts, lines = [], []
        with _mapped(path) as (data, size):
            start = number = 0
            while start < size:
                end = data.find(b"\n", start)
                end = size if end < 0 else end
                number += 1
                line = data[start:end]
                if line.strip():
                    self._parse(line, number)
                    starts.append(start)
                    lines.append(number)
                start = end + 1
        if not starts:
            raise DataError(f"{path} is empty; a JSON lines file needs at least one record")
        self._starts = np.asarray(starts, np.int64)
        self._lines = np.asarray(lines, np.int64)
        self._file = None

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        if self._file is None:
            self._file = open(self.path, "rb")  # noqa: SIM115 (open as long as the source)
        self._file.seek(self._starts[index])
        return self._parse(self._file.readline(), int(self._lines[index]))

    def where(self, index: int) -> str:
        """'file, line n' of a record, for messages."""
        return f"{self.path}, line {self._lines[index]}"

    def _parse(self, line: bytes, number: int) -> Record:
        where = f"{self.path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError
            raise DataError(
                f"{where}: not JSON ({error}); every line must be one JSON object: repair or "
                "delete this one"
            ) from None
        if not isinstance(record, dict):
            raise DataError(
                f"{where}: a JSON {type(record).__name__}, but every line must be an object such "
                f"as {json.dumps({key: '…' for key in self._keys.values()}, ensure_ascii=False)}"
            )
        return _select(record, self._keys, where)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_file": None}

    def __del__(self):
        if getattr(self, "_file", None) is not None:
            self._file.close()


class Text(Sequence):
    """A UTF-8 file of documents separated by blank lines."""

    def __init__(self, path: str, keys: Mapping[str, str]):
        del keys
        self.path = path
        with _mapped(path) as (data, size):
            spans = [span for span in _paragraphs(data, size) if data[slice(*span)].strip()]
            self._spans = np.asarray(spans, np.int64).reshape(-1, 2)
            self._file = None
            self._size = size
            for index, (start, end) in enumerate(spans):
                try:
                    data[start:end].decode()
                except UnicodeDecodeError as error:
                    line = data[: start + error.start].count(b"\n") + 1
                    raise DataError(
                        f"{path}, line {line} (document {index}): not UTF-8 ({error.reason}); "
                        "convert the file, e.g. with `iconv -t utf-8`"
                    ) from None
        if not spans:
            raise DataError(f"{path} is empty; a text file needs at least one document")

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Record:
        if self._file is None:
            self._file = open(self.path, "rb")  # noqa: SIM115
        start, end = self._spans[index]
        self._file.seek(start)
        return {"text": self._file.read(end - start).decode().strip("\r\n")}

    def where(self, index: int) -> str:
        return f"{self.path}, byte {self._spans[index, 0]}"

    __getstate__ = JsonLines.__getstate__
    __del__ = JsonLines.__del__


class Parquet(Sequence):
    """A Parquet file; the columns in use are read into memory when first needed."""

    def __init__(self, path: str, keys: Mapping[str, str]):
        self.path, self._keys = path, dict(keys)
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                names, self._length = file.schema_arrow.names, file.metadata.num_rows
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{path} is not a Parquet file that can be read: {error}") from None
        for key in self._keys.values():
            if key not in names:
                raise DataError(_missing(path, key, names))
        if not self._length:
            raise DataError(f"{path} is empty; a Parquet file needs at least one row")
        self._table = None
        for index in range(self._length):
            self[index]

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Record:
        if self._table is None:
            columns = list(dict.fromkeys(self._keys.values()))
            try:
                self._table = pyarrow.parquet.read_table(self.path, columns=columns)
            except pyarrow.ArrowInvalid as error:
                raise DataError(f"{self.path} is damaged: {error}; fetch it again") from None
        record = {key: self._table[key][index].as_py() for key in self._keys.values()}
        return _select(record, self._keys, self.where(index))

    def where(self, index: int) -> str:
        return f"{self.path}, row {index}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_table": None}


class Tokenized(Sequence):
    """A source's records, tokenized; an error in tokenizing one names its place."""

    def __init__(self, source: Any, tokenize: Callable[[Record], Any]):
        self._source, self._tokenize = source, tokenize

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._tokenize(self._source[index])
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"{self._source.where(index)}: {error}") from error


class _Joined(Sequence):
    """Several sources after one another."""

    def __init__(self, parts: Sequence[Any]):
        self._parts = list(parts)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[Any, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part], index - (int(self._ends[part - 1]) if part else 0)

    def __getitem__(self, index: int) -> Record:
        part, index = self._find(index)
        return part[index]

    def where(self, index: int) -> str:
        part, index = self._find(index)
        return part.where(index)


class _mapped:
    """`with _mapped(path) as (bytes, size)`: a file's content without reading it into memory."""

    def __init__(self, path: str):
        self._path = path

    def __enter__(self):
        self._file = open(self._path, "rb")  # noqa: SIM115
        size = os.fstat(self._file.fileno()).st_size
        # An empty file cannot be mapped.
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if size else None
        return self._map or b"", size

    def __exit__(self, *_):
        if self._map is not None:
            self._map.close()
        self._file.close()


def _keys(config: SourceConfig) -> dict[str, str]:
    text, prompt, response = config.text_key, config.prompt_key, config.response_key
    choice, label = (config.chosen_key, config.rejected_key), config.label_key
    if config.format == "text":
        if text or prompt or response or label or any(choice):
            raise ValueError(f"source {config.path!r}: the format 'text' has no keys; remove them")
        return {"text": "text"}
    if text and not (prompt or response or label or any(choice)):
        return {"text": text}
    if prompt and response and not (text or any(choice)):
        return {"prompt": prompt, "response": response} | ({"label": label} if label else {})
    if prompt and all(choice) and not (text or response or label):
        return {"prompt": prompt, "chosen": choice[0], "rejected": choice[1]}
    raise ValueError(
        f"source {config.path!r}: set text_key (documents), or both prompt_key and response_key "
        f"(pairs, with label_key if they are graded), or prompt_key, chosen_key and rejected_key "
        f"(preferences); got text_key={text!r}, prompt_key={prompt!r}, response_key={response!r}, "
        f"label_key={label!r}, chosen_key={choice[0]!r}, rejected_key={choice[1]!r}"
    )


def _files(pattern: str) -> list[str]:
    pattern = os.path.expanduser(pattern)
    if os.path.isfile(pattern):
        return [pattern]
    files = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if files:
        return files
    if os.path.isdir(pattern):
        raise FileNotFoundError(f"{pattern} is a directory; name its files, as {pattern}/*.jsonl")
    parent = pathlib.Path(pattern).parent
    held = sorted(p.name for p in parent.iterdir())[:10] if parent.is_dir() else None
    found = f"{parent} does not exist" if held is None else f"{parent} holds {held}"
    raise FileNotFoundError(f"no data file {pattern}: correct the source's path ({found})")


def _select(record: Mapping[str, Any], keys: Mapping[str, str], where: str) -> Record:
    """The record under our names, with types checked."""
    selected = {}
    for name, key in keys.items():
        if key not in record:
            raise DataError(_missing(where, key, list(record)))
        value = record[key]
        if name == "prompt" and isinstance(value, list):
            for message in value:
                if not isinstance(message, dict) or not {"role", "content"} <= set(message):
                    raise DataError(
                        f"{where}: {key!r} is a list, so it must hold messages with 'role' and "
                        f"'content'; found {str(message)[:80]}"
                    )
        elif name == "label":
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise DataError(
                    f"{where}: {key!r} is {value!r}, not a finite number; repair the record or delete it"
                )
            value = float(value)
        elif not isinstance(value, str):
            kind = "null" if value is None else type(value).__name__
            raise DataError(
                f"{where}: {key!r} is {kind}, not a string; repair the record or delete it"
            )
        selected[name] = value
    return selected


def _missing(where: str, key: str, names: Sequence[str]) -> str:
    return f"{where}: no key {key!r}; it has {', '.join(map(repr, names)) or 'none'}: set the key"


def _paragraphs(data: Any, size: int) -> Iterator[tuple[int, int]]:
    start = 0
    for gap in re.finditer(rb"\n(?:[ \t\r]*\n)+", data) if size else ():
        yield start, gap.start()
        start = gap.end()
    yield start, size
