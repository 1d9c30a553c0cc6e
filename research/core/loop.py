"""The one training loop: it runs any trainer, and makes stopping at any moment harmless.

A run that is interrupted or killed and started again in the same directory computes, bit for bit
on the same machine, what it would have computed undisturbed: the newest checkpoint is restored
(parameters, optimizer, keys, counters, the data iterator's place) and metrics.jsonl is cut back to
it. The host fetches the metrics of a step after it has dispatched the next one, so the device is
never waited for, except where a step is evaluated or saved.
"""

import contextlib
import dataclasses
import logging
import math
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.core import config as config_lib
from research.core import metrics as metrics_lib
from research.core.checkpoint import Checkpointer, describe
from research.core.optim import OptimConfig

_log = logging.getLogger(__name__)
State = Any
Batch = Any


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """All counts are in steps. A checkpoint can be the best only if it is of an evaluated step."""

    steps: int
    log_every: int = 1
    eval_every: int = 0  # 0: only at the end
    checkpoint_every: int = 0  # 0: only at the end
    keep_last: int = 2
    keep_best: int = 1
    best_metric: str = ""  # as "eval/accuracy"; empty: only the last checkpoints are kept
    best_mode: Literal["max", "min"] = "max"

    def __post_init__(self):
        for name, least in (
            *(("steps", 0), ("log_every", 1), ("eval_every", 0), ("checkpoint_every", 0)),
            *(("keep_last", 1), ("keep_best", 1)),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class Trainer:
    """What is trained, as functions on a state: any pytree, a TrainState as a rule.

    `collect(state, t)` makes the batch of step t = 0, 1, … on the host, with metrics of its own;
    it depends on nothing but the state, t and `iterator` (a Grain DatasetIterator), which are what
    a checkpoint holds. `step` is jitted inside, may donate its state, and returns metrics as Mean,
    Max or device scalars; one named 'loss' must stay finite.
    """

    init: Callable[[], State]
    collect: Callable[[State, int], tuple[Batch, Mapping[str, float]]]
    step: Callable[[State, Batch], tuple[State, Mapping[str, Any]]]
    evaluate: Callable[[State], Mapping[str, float]] | None = None
    iterator: Any = None
    close: Callable[[], None] | None = None


class Interrupted(SystemExit):
    """SIGINT or SIGTERM came; the run is saved after `step`. Uncaught, it ends the program."""

    def __init__(self, step: int, signum: int):
        super().__init__(128 + signum)
        self.step, self.signum = step, signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name} after step {self.step}, and saved"


class NonFiniteLoss(FloatingPointError):
    """The loss or the parameters are not finite after `step`; earlier checkpoints are kept."""

    def __init__(self, step: int, what: str, saved: list[int], directory: pathlib.Path):
        self.step = step
        kept = f"the last checkpoint is of step {saved[-1]}" if saved else "there is no checkpoint"
        super().__init__(f"{what} at step {step}; nothing of it is saved, {kept} ({directory})")


def run(
    trainer: Trainer,
    config: LoopConfig,
    workdir: str | os.PathLike,
    *,
    fingerprint_of: Any = None,
    name: str = "",
) -> State:
    """Trains for `config.steps` steps, from the newest checkpoint in `workdir` if there is one.

    `fingerprint_of` is the whole configuration, a dataclass: it is written to workdir/config.json,
    and checkpoints of another one are refused, but for the keys in `changeable`. Returns the state
    after the last step. Raises Interrupted, NonFiniteLoss, and what checkpoint.py raises.
    """
    if config.best_metric.startswith("eval/") and trainer.evaluate is None:
        raise ValueError(f"loop.best_metric={config.best_metric!r}: this trainer evaluates nothing")
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        if trainer.close is not None:
            stack.callback(trainer.close)
        checkpointer = Checkpointer(
            workdir / "checkpoints",
            fingerprint_of,
            may_change=changeable(fingerprint_of),
            keep_last=config.keep_last,
            best_metric=config.best_metric,
            best_mode=config.best_mode,
            keep_best=config.keep_best,
        )
        stack.callback(checkpointer.close)
        checkpointer.check_config()  # before init, which may take long
        state, step = trainer.init(), 0
        if checkpointer.steps():
            # Described, so that the state is not in memory twice.
            like, state = describe(state), None
            step, state = checkpointer.restore(like, trainer.iterator)
            _log.info("Resumed %s from step %d of %d", workdir, step, config.steps)
        checkpointer.check_space(state)
        if fingerprint_of is not None and jax.process_index() == 0:
            config_lib.save(workdir / "config.json", fingerprint_of)
        writer = metrics_lib.Writer(workdir)
        stack.callback(writer.close)
        writer.truncate(step)
        progress = metrics_lib.Progress(config.steps, step, name)
        stack.callback(progress.close)
        return _Run(trainer, config, checkpointer, writer, progress).train(state, step)


def changeable(config: Any) -> set[str]:
    """The dotted keys of a configuration that a resumed run may change.

    They are the fields of a LoopConfig, since they say when to look and what to keep, not what to
    compute. Its `steps` is one of them only if the configuration holds an OptimConfig and all that
    it holds have the schedule 'constant' or 'piecewise': the others stretch over the run.
    """
    if config is None:
        return set()
    parts = dict(_dataclasses(config, ""))
    schedules = [part.schedule for part in parts.values() if isinstance(part, OptimConfig)]
    steps_free = schedules and set(schedules) <= {"constant", "piecewise"}
    return {
        prefix + field.name
        for prefix, part in parts.items()
        if isinstance(part, LoopConfig)
        for field in dataclasses.fields(part)
        if field.name != "steps" or steps_free
    }


@dataclasses.dataclass
class _Run:
    trainer: Trainer
    config: LoopConfig
    checkpointer: Checkpointer
    writer: metrics_lib.Writer
    progress: metrics_lib.Progress
    clock: float = 0.0  # when the metrics of a step last came

    def train(self, state: State, start: int) -> State:
        self._catch_up(state, start)
        with _Signals() as signals:
            return self._train(state, start, signals)

    def _train(self, state: State, start: int, signals: "_Signals") -> State:
        compiles = metrics_lib.CompileCounter()
        self.clock = time.perf_counter()
        pending = None  # the step that the device is at, as (step, device metrics, host metrics)
        step, signum = start, 0
        for step in range(start + 1, self.config.steps + 1):
            began = time.perf_counter()
            batch, host = self.trainer.collect(state, step - 1)
            host = {**host, "time/collect": time.perf_counter() - began}
            state, device = self.trainer.step(state, batch)
            del batch
            host["compiles"] = compiles.count
            if pending is not None:
                self._log(pending[0], self._fetch(*pending))
            pending = (step, device, host)
            signum = signals.agreed()
            evaluate, save = self._evaluates(step), self._saves(step)
            if evaluate or save or signum:
                record = self._fetch(*pending)
                pending = None
                if evaluate and not signum:  # a stop cannot wait: the resumed run evaluates
                    record |= self._evaluate(state)
                    signum = signals.agreed()
                self._log(step, record)
                if save or signum:
                    self._save(step, state, record)
                if signum:
                    break
                self.clock = time.perf_counter()
        self.checkpointer.wait()
        if signum := signum or signals.signum:
            stopped = Interrupted(step, signum)
            _log.warning("The run was %s", stopped)
            raise stopped
        return state

    def _catch_up(self, state: State, step: int) -> None:
        """What a stopped or shorter run left undone at its last step."""
        if step >= self.config.steps:
            _log.warning(
                "Nothing to train: the run is finished, at step %d of %d", step, self.config.steps
            )
        if step and self._evaluates(step):
            record = self.checkpointer.metrics(step)
            if not any(key.startswith("eval/") for key in record):
                record |= self._evaluate(state)
                self.writer.truncate(step - 1)
                self._log(step, record)
                if self._saves(step):  # else it was saved for the stop alone
                    self.checkpointer.set_metrics(step, record)

    def _evaluates(self, step: int) -> bool:
        if self.trainer.evaluate is None:
            return False
        return step >= self.config.steps or _due(step, self.config.eval_every)

    def _saves(self, step: int) -> bool:
        return step >= self.config.steps or _due(step, self.config.checkpoint_every)

    def _fetch(self, step: int, device: Mapping[str, Any], host: Mapping[str, float]) -> dict:
        """The metrics of a step, once the device is done with it."""
        record = {**host, **metrics_lib.to_floats(device)}
        now = time.perf_counter()
        record["time/step"], self.clock = now - self.clock, now
        if not math.isfinite(record.get("loss", 0.0)):
            self.writer.write(step, record)
            raise self._non_finite(step, f"the loss is {record['loss']}")
        return record

    def _log(self, step: int, record: Mapping[str, float]) -> None:
        ends = step >= self.config.steps
        if _due(step, self.config.log_every) or self._evaluates(step) or ends:
            self.writer.write(step, record)
        self.progress.update(step, record)

    def _evaluate(self, state: State) -> dict[str, float]:
        began = time.perf_counter()
        values = {f"eval/{key}": float(x) for key, x in self.trainer.evaluate(state).items()}
        return values | {"time/eval": time.perf_counter() - began}

    def _save(self, step: int, state: State, record: Mapping[str, float]) -> None:
        # The loss was finite before the update; the update itself may not have been.
        if not _finite(getattr(state, "params", state)):
            raise self._non_finite(step, "the parameters are not finite")
        self.checkpointer.save(step, state, self.trainer.iterator, record)
        best = self.config.best_metric
        expected = not best.startswith("eval/") or any(key.startswith("eval/") for key in record)
        if best and expected and best not in record:
            names = ", ".join(sorted(record))
            raise ValueError(f"loop.best_metric={best!r} is not among the metrics: {names}")

    def _non_finite(self, step: int, what: str) -> NonFiniteLoss:
        self.checkpointer.wait()
        return NonFiniteLoss(step, what, self.checkpointer.steps(), self.checkpointer.directory)


class _Signals:
    """Notes SIGINT and SIGTERM instead of dying of them; a second SIGINT kills.

    In a process forked meanwhile (a data or reward worker), SIGINT, which a terminal sends to all,
    is ignored: the step that is to be finished may need it. SIGTERM ends it as ever.
    """

    def __init__(self):
        self.signum = 0
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}
        self._agreed: jax.Array | None = None

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def agreed(self) -> int:
        """The signal to stop for after this step, the same on all processes; 0 if none."""
        if jax.process_count() == 1:
            return self.signum
        # Read one step after it is sent, like the metrics, so that the host does not wait.
        sent, self._agreed = self._agreed, _max_over_processes(self.signum)
        return 0 if sent is None else int(sent)

    def _note(self, signum: int, _: Any) -> None:
        if os.getpid() != self._process:
            if signum == signal.SIGTERM:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        self.signum = self.signum or signum
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        name = signal.Signals(signum).name
        text = f"\n{name}: stopping after this step, with a checkpoint. Ctrl-C again kills.\n"
        os.write(2, text.encode())  # print is not safe in a signal handler


def _max_over_processes(value: int) -> jax.Array:
    """Dispatches the maximum of `value` over all processes; int32 []."""
    mesh = Mesh(np.asarray(jax.devices()), ("device",))
    local = np.full(jax.local_device_count(), value, np.int32)
    values = jax.make_array_from_process_local_data(
        NamedSharding(mesh, PartitionSpec("device")), local
    )
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))(values)


def _finite(tree: Any) -> bool:
    leaves = [
        x
        for x in jax.tree.leaves(tree)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    return bool(_all_finite(leaves))


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    return jnp.all(jnp.asarray([jnp.all(jnp.isfinite(x)) for x in leaves] + [True]))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _dataclasses(value: Any, prefix: str):
    """(dotted prefix, dataclass) for `value` and all that it holds."""
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            yield from _dataclasses(item, f"{prefix[:-1]}[{i}].")
    elif dataclasses.is_dataclass(value):
        yield prefix, value
        for field in dataclasses.fields(value):
            yield from _dataclasses(getattr(value, field.name), f"{prefix}{field.name}.")
