"""Checkpoints of a run: written in the background, atomically; read back exactly, or not at all.

`directory`/<step>/ holds the state (an Orbax PyTree), the data iterator's state (Grain) and `meta`,
a JSON object with the configuration, its fingerprint, the metrics of that step and a checksum of
every array. A checkpoint appears under its name by a rename, after all of it is on disk, and an
older one is deleted only after that. One that cannot be read, or whose arrays do not have their
checksums, is passed over with a message, renamed to unreadable-<step>, and the one before it used.
"""

import contextlib
import dataclasses
import gc
import json
import logging
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax import lax

from research.core import config as config_lib

_log = logging.getLogger(__name__)
State = Any
_UNREADABLE = object()
_META = pathlib.Path("meta") / "metadata"  # in a checkpoint's directory


class CheckpointError(Exception):
    """There are checkpoints, and none that was asked for can be used."""


class ConfigMismatch(CheckpointError):
    """The checkpoint belongs to another configuration; `differences` lists the keys."""

    def __init__(self, where: str, differences: list[str]):
        self.differences = differences
        super().__init__(
            f"{where} belongs to another configuration (saved != this run's):\n  "
            + "\n  ".join(differences)
            + "\nSet these back to resume it, or give the new run a directory of its own."
        )


class StateMismatch(CheckpointError):
    """The checkpoint's arrays are not those of the state to restore; `differences` lists them."""

    def __init__(self, where: str, differences: list[str]):
        self.differences = differences
        super().__init__(
            f"{where} holds another state (saved != this run's):\n  "
            + "\n  ".join(differences[:20])
            + (f"\n  and {len(differences) - 20} more" if len(differences) > 20 else "")
            + "\nWas the code changed since it was saved?"
        )


class DiskSpaceError(CheckpointError):
    """There is no room for the checkpoints that the run is to keep."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What a leaf of a state is, without its values. `sharding` None: wherever JAX likes."""

    shape: tuple[int, ...]
    dtype: Any
    sharding: jax.sharding.Sharding | None = None
    kind: Literal["array", "numpy", "python"] = "array"
    key_impl: Any = None  # of a typed PRNG key; shape and dtype are then those of its data


def describe(state: State) -> State:
    """`state` with a Leaf for every array: enough to restore onto, and it holds no memory."""
    return jax.tree.map(_describe, state)


class Checkpointer:
    """The checkpoints in `directory`.

    The last `keep_last` are kept, and with `best_metric` also the `keep_best` whose metric of that
    name is highest (`best_mode` 'max') or lowest ('min') among those saved with it. `config` is
    the run's configuration, a dataclass; a checkpoint of another one is refused, but for the
    dotted keys in `may_change`. With several processes, all of them make the same calls.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        config: Any = None,
        *,
        may_change: Collection[str] = (),
        keep_last: int = 2,
        best_metric: str | None = None,
        best_mode: Literal["max", "min"] = "max",
        keep_best: int = 1,
    ):
        self.directory = pathlib.Path(directory).absolute()
        self._config = config
        self._may_change = frozenset(may_change)
        self._best = (best_metric or None, best_mode)
        self._keep = _Keep(keep_last, keep_best if best_metric else 0, best_mode)
        self._manager = self._open()
        self._space_checked = False

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, oldest first."""
        return sorted(self._manager.all_steps())

    def metrics(self, step: int) -> dict[str, float]:
        """The metrics that were saved with `step`."""
        return _read_meta(self.directory / str(step))["metrics"]

    def save(
        self,
        step: int,
        state: State,
        iterator: Any = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to write a checkpoint; the state may be donated as soon as this returns.

        Waits for the one before it, and raises what went wrong there. Raises DiskSpaceError.
        """
        if not self._space_checked:
            self.check_space(state)
        arrays = jax.tree.map(_saved_form, state)
        metrics = dict(metrics or {})
        meta = {
            "config": None if self._config is None else config_lib.to_dict(self._config),
            "fingerprint": None if self._config is None else config_lib.fingerprint(self._config),
            "metrics": metrics,
            "best": list(self._best),
            "checksums": _checksums(arrays),
        }
        items = {"state": ocp.args.PyTreeSave(arrays), "meta": ocp.args.JsonSave(meta)}
        if iterator is not None:
            from grain.checkpoint import CheckpointSave  # here, because it takes a while to import

            items["iterator"] = CheckpointSave(iterator)
        self._keep.values[step] = metrics.get(self._best[0], math.nan)
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def set_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Puts others in the place of those that were saved with `step`; the best checkpoint is told by them."""
        self.wait()
        if jax.process_index() == 0:
            path = self.directory / str(step) / _META
            meta = _read_meta(self.directory / str(step)) | {"metrics": dict(metrics)}
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text(json.dumps(meta))
            os.replace(temporary, path)
        self._keep.values[step] = metrics.get(self._best[0], math.nan)

    def restore(
        self, like: State, iterator: Any = None, step: int | None = None
    ) -> tuple[int, State] | None:
        """The newest checkpoint that can be read (or that of `step`), as (step, state).

        `like` is a state of the same structure, shapes and dtypes, or its `describe`; every array
        is restored onto like's sharding. `iterator` is set to where it was. None if there are no
        checkpoints. Raises ConfigMismatch, StateMismatch, and CheckpointError if none is readable.
        """
        self.wait()
        like = describe(like)
        candidates = self.steps()[::-1] if step is None else [step]
        unreadable: list[int] = []
        for candidate in candidates:
            where = self.directory / str(candidate)
            state = _attempt(where, lambda where=where: self._read(where, like, iterator))
            if _everywhere(state is not _UNREADABLE):
                self._set_aside(unreadable)
                return candidate, state
            unreadable.append(candidate)
        if unreadable:
            raise CheckpointError(
                f"No readable checkpoint in {self.directory} (tried {unreadable}). Bring back a "
                f"copy of it, or remove the directory to start again."
            )
        return None

    def check_config(self) -> None:
        """Raises ConfigMismatch if the newest readable checkpoint is of another configuration."""
        for step in self.steps()[::-1]:
            try:
                return self._check_config(self.directory / str(step))
            except (OSError, ValueError, KeyError):  # torn; restore will pass it over
                continue

    def check_space(self, state: State) -> None:
        """Raises DiskSpaceError if the checkpoints to keep, and one in writing, do not fit."""
        size = sum(
            math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
            for leaf in jax.tree.leaves(describe(state))
        )
        missing = max(1, self._keep.last + self._keep.best + 1 - len(self.steps()))
        needed, free = size * missing, shutil.disk_usage(self.directory).free
        if needed > free:
            raise DiskSpaceError(
                f"{missing} checkpoints of {_gigabytes(size)} need {_gigabytes(needed)} in "
                f"{self.directory}, where {_gigabytes(free)} are free. Make room, keep fewer "
                f"(loop.keep_last, loop.keep_best), or choose another directory for the run."
            )
        self._space_checked = True

    def wait(self) -> None:
        """Returns when what was saved is on disk; raises what went wrong while writing it."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the background threads."""
        self._manager.close()

    def _open(self) -> ocp.CheckpointManager:
        self._keep.values = {}
        manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=self._keep,
                cleanup_tmp_directories=True,  # what a killed run was writing
            ),
            item_names=("state", "meta", "iterator"),
        )
        for step in manager.all_steps():
            with contextlib.suppress(Exception):  # a torn one has no value, and is not kept for it
                metrics = _read_meta(self.directory / str(step))["metrics"]
                self._keep.values[step] = metrics.get(self._best[0], math.nan)
        return manager

    def _read(self, where: pathlib.Path, like: State, iterator: Any) -> State:
        self._check_config(where)
        state = _read_state(where, like)
        if iterator is not None:
            _restore_iterator(where, iterator)
        return state

    def _check_config(self, where: pathlib.Path) -> None:
        saved = _read_meta(where)["config"]
        if saved is None or self._config is None:
            return
        pairs = config_lib.differing(saved, self._config)
        lines = [f"{k}: {x} != {y}" for k, (x, y) in pairs.items() if k not in self._may_change]
        if lines:
            raise ConfigMismatch(str(where), lines)

    def _set_aside(self, steps: list[int]) -> None:
        # Under its own name it would be in the way when the run gets to that step again.
        for step in steps:
            if jax.process_index() == 0:
                target = self.directory / f"unreadable-{step}"
                shutil.rmtree(target, ignore_errors=True)
                os.rename(self.directory / str(step), target)
        if steps:
            _everywhere(True)
            self._manager.close()
            self._manager = self._open()


def load_params(
    directory: str | os.PathLike, step: int | Literal["best"] | None = None
) -> dict[str, Any]:
    """The parameters of a checkpoint, as nested dicts of NumPy arrays. Writes nothing.

    `directory` is a run's, or its checkpoints'. `step` None takes the newest readable checkpoint,
    'best' the best one by the metric the run was told to keep. Raises CheckpointError.
    """
    return _newest(directory, step, _read_params)


def load_metrics(
    directory: str | os.PathLike, step: int | Literal["best"] | None = None
) -> dict[str, float]:
    """The metrics that were saved with a checkpoint, chosen as by `load_params`. Raises CheckpointError."""
    return _newest(directory, step, lambda where: _read_meta(where)["metrics"])


def _newest(directory: str | os.PathLike, step: Any, read: Callable[[pathlib.Path], Any]) -> Any:
    """`read` of the newest checkpoint that it can read, or of the one asked for."""
    directory = pathlib.Path(directory).absolute()
    if (directory / "checkpoints").is_dir():
        directory = directory / "checkpoints"
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    steps = sorted((int(name) for name in names if name.isdigit()), reverse=True)
    if step == "best":
        steps = _best_first(directory, steps)
    elif step is not None:
        steps = [s for s in steps if s == step]
    for candidate in steps:
        where = directory / str(candidate)
        found = _attempt(where, lambda where=where: read(where))
        if found is not _UNREADABLE:
            return found
    asked = "" if step is None else f" for step {step!r}"
    raise CheckpointError(f"No readable checkpoint{asked} in {directory}")


class _Keep:
    """Orbax preservation policy: the last ones and the best ones. `values`: step → metric."""

    def __init__(self, last: int, best: int, mode: str):
        if last < 1:
            raise ValueError(f"keep_last must be at least 1, got {last}")
        self.last, self.best, self.sign = last, best, 1 if mode == "max" else -1
        self.values: dict[int, float] = {}

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        valued = [s for s in steps if math.isfinite(self.values.get(s, math.nan))]
        ranked = sorted(valued, key=lambda s: (-self.sign * self.values[s], -s))
        kept = {*sorted(steps)[-self.last :], *ranked[: self.best]}
        return [step in kept for step in steps]


def _describe(leaf: Any) -> Leaf:
    if isinstance(leaf, Leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return Leaf(leaf.shape, leaf.dtype, leaf.sharding)
    if isinstance(leaf, jax.Array):
        key_impl = None
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            key_impl, leaf = jax.random.key_impl(leaf), jax.random.key_data(leaf)
        # An uncommitted array restored as a committed one could no longer meet those of a mesh.
        sharding = leaf.sharding if leaf.committed else None
        return Leaf(leaf.shape, leaf.dtype, sharding, key_impl=key_impl)
    if isinstance(leaf, (np.ndarray, np.generic)):
        return Leaf(leaf.shape, leaf.dtype, kind="numpy")
    if isinstance(leaf, (bool, int, float)):
        return Leaf((), type(leaf), kind="python")
    raise TypeError(f"a {type(leaf).__name__} in the state cannot be checkpointed")


def _saved_form(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf


def _restored_form(value: Any, leaf: Leaf) -> Any:
    if leaf.kind == "python":
        return leaf.dtype(value)
    if leaf.kind == "array" and leaf.sharding is None:
        value = jnp.array(value)
    return value if leaf.key_impl is None else jax.random.wrap_key_data(value, impl=leaf.key_impl)


def _restore_args(leaf: Leaf) -> ocp.RestoreArgs:
    if leaf.kind == "python":
        return ocp.RestoreArgs(restore_type=leaf.dtype)
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _read_state(where: pathlib.Path, like: State, *, whole: bool = True) -> State:
    """What `like`, a tree of Leaf, names of a checkpoint's state; it must name all if `whole`."""
    saved, wanted = _by_path(_saved_tree(where)), _by_path(like)
    lines = []
    for name in wanted | saved if whole else wanted:
        x, y = (
            f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" if leaf is not None else "absent"
            for leaf in (saved.get(name), wanted.get(name))
        )
        if x != y:
            lines.append(f"{name}: {x} != {y}")
    if lines:
        raise StateMismatch(str(where), lines)
    values = ocp.PyTreeCheckpointHandler().restore(
        epath.Path(where / "state"),
        args=ocp.args.PyTreeRestore(
            item=like, restore_args=jax.tree.map(_restore_args, like), partial_restore=not whole
        ),
    )
    checksums = _read_meta(where)["checksums"]
    for name, checksum in _checksums(values).items():
        if checksum != checksums[name]:
            raise ValueError(f"{name} is not what was saved: its checksum differs")
    return jax.tree.map(_restored_form, values, like)


def _read_params(where: pathlib.Path) -> dict[str, Any]:
    tree = _saved_tree(where)
    if "params" not in tree:
        raise StateMismatch(str(where), ["params: absent != the parameters"])
    like = jax.tree.map(lambda m: Leaf(tuple(m.shape), m.dtype, kind="numpy"), tree["params"])
    return _read_state(where, {"params": like}, whole=False)["params"]


def _restore_iterator(where: pathlib.Path, iterator: Any) -> None:
    from grain.checkpoint import CheckpointHandler  # here, because it takes a while to import

    if not (where / "iterator").exists():
        raise StateMismatch(str(where), ["iterator: absent != the run's data iterator"])
    CheckpointHandler().restore(epath.Path(where / "iterator"), item=iterator)


def _read_meta(where: pathlib.Path) -> dict[str, Any]:
    return json.loads((where / _META).read_text())


def _saved_tree(where: pathlib.Path) -> Any:
    """The saved state's structure; its leaves have `shape` and `dtype`."""
    return ocp.PyTreeCheckpointHandler().metadata(epath.Path(where / "state")).tree


def _by_path(tree: Any) -> dict[str, Any]:
    """Path, as "params.layers.scale" → leaf."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in paths}


def _checksums(tree: Any) -> dict[str, int]:
    """A number for each array, that changes if any bit of it does."""
    arrays = {k: x for k, x in _by_path(tree).items() if not isinstance(x, (bool, int, float))}
    sums = {name: _checksum(x) for name, x in arrays.items()}
    return {name: int(value) for name, value in sums.items()}


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    # A sum of the bits with odd weights that depend on the place: it needs no reshape, so a
    # sharded array stays where it is, and integers add up to the same in any order.
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if jnp.issubdtype(x.dtype, jnp.floating):
        x = lax.bitcast_convert_type(x, jnp.dtype(f"uint{jnp.finfo(x.dtype).bits}"))
    if x.dtype.itemsize == 8:
        x = x ^ (x >> 32)
    weights = jnp.ones(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        weights = weights * 31 + 2 * lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(x.astype(jnp.uint32) * weights, dtype=jnp.uint32)


def _best_first(directory: pathlib.Path, steps: list[int]) -> list[int]:
    ranked = []
    for step in steps:
        with contextlib.suppress(OSError, ValueError, KeyError):  # a torn one is not the best
            meta = _read_meta(directory / str(step))
            name, mode = meta["best"]
            value = meta["metrics"].get(name, math.nan)
            if math.isfinite(value):
                ranked.append((-value if mode == "max" else value, -step))
    return [-negative for _, negative in sorted(ranked)]


def _attempt(where: pathlib.Path, read: Callable[[], Any]) -> Any:
    """What `read` returns, or _UNREADABLE, with a message, if the checkpoint is not whole."""
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    # Orbax gives up at the first array that it cannot read, and closes the event loop; the tasks
    # of the others still end, and complain, each with a traceback. One message is enough.
    logger.disabled, sys.unraisablehook = True, lambda _: None
    try:
        try:
            return read()
        except CheckpointError:
            raise
        except Exception as error:  # Orbax raises whatever its layers raise
            reason = f"{type(error).__name__}: {str(error):.300}"
        time.sleep(0.2)
        gc.collect()
    finally:
        logger.disabled, sys.unraisablehook = False, hook
    _log.warning("Passed over checkpoint %s, which cannot be read: %s", where, reason)
    return _UNREADABLE


def _everywhere(here: bool) -> bool:
    """Whether `here` is true on every process; waits for all of them."""
    if jax.process_count() == 1:
        return here
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(here)).all())


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
