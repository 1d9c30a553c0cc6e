"""Typed configuration: frozen dataclasses are the schema, ConfigDicts the form that flags edit.

An experiment file returns `to_config_dict(SomeConfig(...))` from `get_config()`; absl flags
(`ml_collections.config_flags`) override single values of it, as `--config.optim.lr=0.1`; the
launcher turns the result back into the dataclass with `from_config_dict`. Every assignment on the
way is checked against the dataclass, so a wrong key or type is refused where it is written.

A field may be int, float, str, bool, Literal, another dataclass, tuple[X, ...], tuple[X, Y],
or X | None. On the command line, `none` sets a field of type X | None to None, and a tuple of
dataclasses is edited by index: `--config.data.sources[0].path=...`.
"""

import ast
import copy
import dataclasses
import difflib
import functools
import hashlib
import json
import os
import pathlib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

T = TypeVar("T")
_SCALARS = (bool, int, float, str)


# absl prints a flags.Error as one line and exits, where another exception is a traceback.
class ConfigError(flags.Error, ValueError):
    """A value that the configuration's schema refuses; the message names its dotted key."""


class UnknownKeyError(ConfigError, KeyError, AttributeError):
    """A key that the schema does not have; the message names the nearest one that it has."""

    __str__ = Exception.__str__  # a KeyError would print the message's repr


def to_config_dict(dc: Any) -> ConfigDict:
    """`dc` as a locked ConfigDict that checks every assignment against dc's class.

    Raises ConfigError if dc itself holds a value of a wrong type.
    """
    dc = _convert(type(dc), dc, "", type(dc))
    return _node(dc, "", type(dc))


def from_config_dict(cls: type[T], cd: ConfigDict | Mapping[str, Any]) -> T:
    """The dataclass `cls` with the values of `cd`; keys that are not there take their defaults.

    Raises UnknownKeyError for a key that cls does not have, and ConfigError for a value of a
    wrong type, a missing value that has no default, or one that cls refuses (ValueError in
    __post_init__). An int may stand for a float, and nothing else for anything.
    """
    return _convert(cls, cd, "", cls)


def to_dict(dc: Any) -> dict[str, Any]:
    """`dc` as nested dicts, lists and scalars: what JSON holds."""
    return _plain(_convert(type(dc), dc, "", type(dc)))


def save(path: str | os.PathLike, dc: Any) -> None:
    """Writes `dc` as JSON to `path`, atomically."""
    path = pathlib.Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(to_dict(dc), indent=2) + "\n")
    os.replace(temporary, path)


def load(path: str | os.PathLike, cls: type[T]) -> T:
    """The `cls` that `save` wrote to `path`. Raises ConfigError naming the file and the key."""
    try:
        return from_config_dict(cls, json.loads(pathlib.Path(path).read_text()))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    except ConfigError as error:
        raise type(error)(f"{path}: {error}") from None


def fingerprint(dc: Any) -> str:
    """sha256 (hex) of the configuration's values: equal configurations have equal fingerprints."""
    return hashlib.sha256(json.dumps(to_dict(dc), sort_keys=True).encode()).hexdigest()


def differences(a: Any, b: Any) -> list[str]:
    """The keys that differ between two configurations (dataclasses, or dicts from `to_dict`).

    One line for each, as "optim.lr: 0.001 != 0.01", a's value first.
    """
    return [f"{key}: {x} != {y}" for key, (x, y) in differing(a, b).items()]


def differing(a: Any, b: Any) -> dict[str, tuple[str, str]]:
    """As `differences`: dotted key → the two values in words ("absent" where there is none)."""
    flat_a, flat_b = (
        dict(_flat(to_dict(x) if dataclasses.is_dataclass(x) else x, "")) for x in (a, b)
    )
    pairs = {
        key: tuple(repr(flat[key]) if key in flat else "absent" for flat in (flat_a, flat_b))
        for key in flat_a | flat_b
    }
    return {key: (x, y) for key, (x, y) in pairs.items() if x != y}


class _Node(ConfigDict):
    """A ConfigDict that knows the dataclass it stands for, and where it is in the whole."""

    def __setitem__(self, key: str, value: Any) -> None:
        hint = self._hint(key)
        path = self._prefix + key
        value = _convert(hint, value, path, self._root)
        self._fields[key] = _wrap(value, path, self._root)

    def __getitem__(self, key: str) -> Any:
        head = key.split(".")[0]
        self._hint(head)
        return super().__getitem__(key)

    def get_type(self, key: str) -> type:
        """What config_flags parses the text of a flag as."""
        return _flag_type(self._hint(key))

    def copy_and_resolve_references(self, visit_map=None) -> "_Node":
        return copy.deepcopy(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _hint(self, key: str) -> Any:
        hints = _hints(self._cls)
        if key not in hints:
            raise _unknown(key, self._cls, self._prefix, self._root)
        return hints[key]


def _node(dc: Any, prefix: str, root: type) -> _Node:
    node = _Node(sort_keys=False)
    for name, value in (("_cls", type(dc)), ("_prefix", prefix), ("_root", root)):
        object.__setattr__(node, name, value)
    for name in _hints(type(dc)):
        if hasattr(ConfigDict, name):
            raise TypeError(f"{type(dc).__name__}.{name}: ConfigDict has a method of this name")
        node._fields[name] = _wrap(getattr(dc, name), prefix + name, root)
    return node.lock()


def _wrap(value: Any, path: str, root: type) -> Any:
    if dataclasses.is_dataclass(value):
        return _node(value, path + ".", root)
    if isinstance(value, tuple):
        return tuple(_wrap(item, f"{path}[{i}]", root) for i, item in enumerate(value))
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {name: _plain(getattr(value, name)) for name in _hints(type(value))}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else key)
    elif isinstance(value, (list, tuple)) and any(isinstance(x, Mapping) for x in value):
        for i, item in enumerate(value):
            yield from _flat(item, f"{path}[{i}]")
    else:
        yield path, list(value) if isinstance(value, tuple) else value


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _optional(hint: Any) -> Any:
    """X of X | None; None if `hint` is no union."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return None
    args = [arg for arg in typing.get_args(hint) if arg is not types.NoneType]
    if len(args) != 1:
        raise TypeError(f"a config field cannot be of type {hint}: only X | None is a union")
    return args[0]


def _convert(hint: Any, value: Any, path: str, root: type) -> Any:
    """`value` as an instance of `hint`, or ConfigError naming `path`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if (inner := _optional(hint)) is not None:
        return None if value is None else _convert(inner, value, path, root)
    if origin is Literal:
        for choice in args:
            if type(choice) is type(value) and choice == value:
                return choice
        near = difflib.get_close_matches(str(value), [str(x) for x in args], 1)
        hint_text = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{path}: {value!r} is not one of {_list(args)}{hint_text}")
    if dataclasses.is_dataclass(hint):
        if dataclasses.is_dataclass(value) and type(value) is hint:
            value = {name: getattr(value, name) for name in _hints(hint)}
        if isinstance(value, (Mapping, ConfigDict)):
            return _build(hint, value, path, root)
    elif origin is tuple:
        if isinstance(value, (tuple, list)):
            if len(args) == 2 and args[1] is Ellipsis:
                items = [args[0]] * len(value)
            else:
                items = list(args)
            if len(items) != len(value):
                raise ConfigError(f"{path}: needs {len(items)} values, got {value!r}")
            return tuple(
                _convert(item, x, f"{path}[{i}]", root)
                for i, (item, x) in enumerate(zip(items, value, strict=True))
            )
    elif hint in _SCALARS:
        if hint is bool or not isinstance(value, bool):  # bool is a subclass of int
            if isinstance(value, hint) or (hint is float and isinstance(value, int)):
                return hint(value)
    else:
        raise TypeError(f"{path}: a config field cannot be of type {hint}")
    name = hint.__name__ if isinstance(hint, type) else hint
    raise ConfigError(f"{path or root.__name__}: needs {name}, got {value!r}")


def _build(cls: type, values: Mapping | ConfigDict, path: str, root: type) -> Any:
    prefix = f"{path}." if path else ""
    hints = _hints(cls)
    for key in values.keys():
        if key not in hints:
            raise _unknown(str(key), cls, prefix, root)
    kwargs = {
        key: _convert(hints[key], values[key], prefix + key, root) for key in values.keys()
    }
    for field in dataclasses.fields(cls):
        default = (field.default, field.default_factory)
        if field.init and field.name not in kwargs and default == (dataclasses.MISSING,) * 2:
            raise ConfigError(f"{prefix}{field.name}: missing, and it has no default")
    try:
        return cls(**kwargs)
    except ValueError as error:
        raise ConfigError(f"{path or cls.__name__}: {error}") from error


def _unknown(key: str, cls: type, prefix: str, root: type) -> UnknownKeyError:
    near = difflib.get_close_matches(key, list(_hints(cls)), 1)
    suggestion = prefix + near[0] if near else None
    if suggestion is None:  # the right name at the wrong level
        everywhere = {dotted.rpartition(".")[2]: dotted for dotted in _dotted(root, "")}
        near = difflib.get_close_matches(key, list(everywhere), 1)
        suggestion = everywhere[near[0]] if near else None
    if suggestion is None:
        where = prefix.rstrip(".") or root.__name__
        return UnknownKeyError(f"unknown key {prefix}{key}; {where} has {_list(_hints(cls))}")
    return UnknownKeyError(f"unknown key {prefix}{key}; did you mean {suggestion}?")


def _dotted(cls: type, prefix: str) -> Iterator[str]:
    for name, hint in _hints(cls).items():
        yield prefix + name
        hint = _optional(hint) or hint
        if typing.get_origin(hint) is tuple:
            hint, name = typing.get_args(hint)[0], f"{name}[0]"
        if dataclasses.is_dataclass(hint):
            yield from _dotted(hint, f"{prefix}{name}.")


def _list(values: typing.Iterable) -> str:
    return ", ".join(str(value) for value in values)


class _OptionalParser(flags.ArgumentParser):
    """The text of a flag for a field of type X | None."""

    def __init__(self, parse: typing.Callable[[str], Any]):
        self._parse_value = parse

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):
            return argument
        return None if argument.lower() == "none" else self._parse_value(argument)


# config_flags finds the parser of a field by its type: one made-up type for each X | None.
_OPTIONAL_FLAG_TYPES = {
    base: config_flags.register_flag_parser_for_type(
        type(f"Optional_{base.__name__}", (), {}), _OptionalParser(parse)
    )
    for base, parse in {
        bool: flags.BooleanParser().parse,
        int: flags.IntegerParser().parse,
        float: flags.FloatParser().parse,
        str: str,
        tuple: tuple_parser.TupleParser().parse,
        ConfigDict: ast.literal_eval,
    }.items()
}


def _flag_type(hint: Any) -> type:
    if (inner := _optional(hint)) is not None:
        return _OPTIONAL_FLAG_TYPES[_flag_type(inner)]
    if typing.get_origin(hint) is Literal:
        return type(typing.get_args(hint)[0])
    if dataclasses.is_dataclass(hint):
        return ConfigDict
    return typing.get_origin(hint) or hint
