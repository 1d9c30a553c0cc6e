"""Metrics: accumulators for inside a step, and the files and the bar that show them.

`metrics.jsonl` is the truth: one JSON object for each logged step, flushed at once. TensorBoard
events hold the same numbers. Names that start with "time/" (seconds) and the name "compiles"
depend on the machine and the moment; every other number is reproduced exactly by a resumed run.
"""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Mean(flax.struct.PyTreeNode):
    """A weighted mean in the making: `total` = Σ w x and `weight` = Σ w, both float32 []."""

    total: jax.Array
    weight: jax.Array

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array | float = 1.0) -> "Mean":
        """The mean of `values` with `weights`, which broadcast against each other."""
        values = jnp.asarray(values, jnp.float32)
        weights = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), values.shape)
        return cls(total=jnp.sum(values * weights), weight=jnp.sum(weights))

    def merge(self, other: "Mean") -> "Mean":
        return Mean(total=self.total + other.total, weight=self.weight + other.weight)

    def psum(self, axis_name: str) -> "Mean":
        """Merged over a mapped axis."""
        return Mean(*lax.psum((self.total, self.weight), axis_name))

    def compute(self) -> jax.Array:
        """Σ w x / Σ w; NaN if nothing was added."""
        return self.total / jnp.where(self.weight == 0, jnp.nan, self.weight)


class Max(flax.struct.PyTreeNode):
    """A maximum in the making: `value` float32 []."""

    value: jax.Array

    @classmethod
    def of(cls, values: jax.Array) -> "Max":
        return cls(value=jnp.max(jnp.asarray(values, jnp.float32)))

    def merge(self, other: "Max") -> "Max":
        return Max(value=jnp.maximum(self.value, other.value))

    def psum(self, axis_name: str) -> "Max":
        """Merged over a mapped axis (named as Mean's, so that a step treats both alike)."""
        return Max(value=lax.pmax(self.value, axis_name))

    def compute(self) -> jax.Array:
        return self.value


def to_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Fetches a step's metrics (Mean, Max, scalars; replicated if sharded) from the device.

    Waits for them. The division of a Mean is made here in float64, without compiling anything.
    """
    floats = {}
    for name, value in jax.device_get(dict(metrics)).items():
        if isinstance(value, Mean):
            total, weight = float(value.total), float(value.weight)
            floats[name] = total / weight if weight else math.nan
        else:
            floats[name] = float(value.value if isinstance(value, Max) else value)
    return floats


class Writer:
    """Writes `workdir`/metrics.jsonl and TensorBoard events; on process 0 only."""

    def __init__(self, workdir: str | os.PathLike):
        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        self._active = jax.process_index() == 0
        self._file = self._events = None
        self._last_step = -1

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds the line of `step`. A number that is not finite becomes null in the file."""
        if not self._active:
            return
        if self._file is None:
            self._open()
        finite = {k: float(v) if np.isfinite(v) else None for k, v in sorted(metrics.items())}
        self._file.write(json.dumps({"step": int(step), **finite}) + "\n")
        self._file.flush()
        for name, value in finite.items():
            if value is not None:
                self._events.add_scalar(name, value, step)

    def truncate(self, step: int) -> None:
        """Drops every line later than `step`, and a line that was cut off while being written."""
        self.close()
        self._last_step = step
        if not self._active or not self.path.exists():
            return
        kept = [line for line in self.path.read_text().splitlines(True) if _step(line) <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        os.replace(temporary, self.path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._events.close()
        self._file = self._events = None

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a")
        self._events = _summary_writer()(
            str(self.path.parent / "tensorboard"),
            purge_step=self._last_step + 1,
            filename_suffix=f".{time.time_ns()}",  # its own names are unique to a second only
        )


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order. null, which stands for NaN and ±inf, is None."""
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


class Progress:
    """A progress bar of `total` steps on stderr, if that is a terminal; else nothing."""

    def __init__(self, total: int, initial: int = 0, name: str = ""):
        self._bar = None
        if jax.process_index() == 0 and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=initial, desc=name or None, dynamic_ncols=True)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._bar is not None:
            names = sorted(metrics, key=lambda name: (name != "loss", "/" in name))[:4]
            self._bar.set_postfix({k: f"{metrics[k]:.4g}" for k in names}, refresh=False)
            self._bar.update(step - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class CompileCounter:
    """Counts the programs that XLA was asked to compile since this counter was made.

    A program that the persistent cache then supplies is counted too.
    """

    _total = 0

    def __init__(self):
        if not _listening:
            jax.monitoring.register_event_duration_secs_listener(_on_duration)
            _listening.append(True)
        self._start = CompileCounter._total

    @property
    def count(self) -> int:
        return CompileCounter._total - self._start


_listening: list[bool] = []  # one listener for the process, however many counters


def _on_duration(event: str, seconds: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        CompileCounter._total += 1


def _summary_writer() -> type:
    """tensorboardX's SummaryWriter; imported late, and without the seconds that torch takes.

    tensorboardX imports torch where it is installed, for tensors that it never gets here.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter


def _step(line: str) -> float:
    """The step of a line of metrics.jsonl; inf if the line is cut off."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except json.JSONDecodeError:
        return math.inf
