"""Training steps: gradients over micro-batches and devices, one optimizer update.

The convention that makes every split of a batch agree: a loss is a *sum*. The host normalises
per-token weights over the whole global batch, so the gradient of a batch is the plain sum of the
gradients of its rows, however these are spread over micro-batches and devices. Nothing here
divides by a local count.

`data_parallel` replicates the state and splits the rows; `spmd` splits both by sharding rules and
leaves the communication to the compiler. Both give `step(state, batch) -> (state, metrics)`, jitted
once per batch shape, with the state donated: the arrays passed in are gone afterwards, and no two
leaves of a state may be the same buffer (copy reference parameters before storing them in it).

Several forced CPU devices on few cores can deadlock when two programs with collectives are in
flight at once: see `mesh.force_cpu_devices`.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.core import sharding
from research.core.metrics import Max, Mean
from research.core.state import TrainState

Batch = dict[str, Any]
Metrics = dict[str, Any]
# loss_fn(params, micro_batch) -> (the sum of this micro-batch's weighted loss terms, metrics)
LossFn = Callable[[Any, Batch], tuple[jax.Array, dict[str, Mean | Max]]]


class Step:
    """`step(state, batch) -> (state, metrics)`; `place` and `lower` are its two halves' doors.

    metrics: 'loss' and 'grad_norm' (before clipping) as float32 scalars, 'lr' if the optimizer
    records one, and the loss function's accumulators, reduced over all devices.
    """

    def __init__(self, program, place_state, place_batch):
        self._program = program
        self.place = place_state
        self._place_batch = place_batch

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        state = self.place(state)
        return self._program(state)(state, self._place_batch(batch))

    def lower(self, state, batch):
        """The step lowered for ShapeDtypeStructs, to compile for devices that are not there."""
        return self._program(state).lower(state, batch)


def data_parallel(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    micro_rows: int | None = None,
    backend: Literal["shard_map", "pmap", "jit"] = "shard_map",
) -> Step:
    """A step with the state replicated and the batch's rows split over the axis 'data'.

    Batch leaves are [rows, …] (each process gives its own rows), with rows a multiple of the
    number of devices. Each device goes through its rows in micro-batches of `micro_rows` (None: all
    at once). The optional entry 'num_micro', int32 [devices], says how many of its micro-batches
    each device computes; the rest is padding and costs nothing, and a new number compiles
    nothing.

    One body serves 'shard_map' and 'pmap' and reduces gradients once per step. Under 'jit' the
    compiler places the reduction (possibly once per micro-batch), and all devices go through
    max(num_micro) micro-batches, so the padding must carry zero weight; it should anyway.

    Raises ValueError for a mesh with other axes than 'data' (use `spmd` there).
    """
    if tuple(mesh.shape) != ("data",):
        raise ValueError(
            f"data_parallel needs a mesh with the one axis 'data', got {tuple(mesh.shape)}; "
            "use spmd for others"
        )
    if backend == "jit":
        return spmd(loss_fn, optimizer, mesh, ((".*", PartitionSpec()),), micro_rows=micro_rows)
    update = partial(_update, loss_fn, optimizer, micro_rows)
    place_state = partial(sharding.place, shardings=sharding.replicated(mesh))
    if backend == "shard_map":
        program = jax.jit(
            jax.shard_map(
                update,
                mesh=mesh,
                in_specs=(PartitionSpec(), PartitionSpec("data")),
                out_specs=PartitionSpec(),
            ),
            donate_argnums=0,
        )
        return Step(lambda _: program, place_state, partial(sharding.place_rows, mesh=mesh))
    if backend == "pmap":
        if jax.process_count() > 1:
            raise ValueError("backend 'pmap' serves a single process; use 'shard_map'")
        devices = list(mesh.devices.flat)
        program = jax.pmap(
            update, "data", in_axes=(None, 0), out_axes=None, devices=devices, donate_argnums=0
        )
        return Step(lambda _: program, place_state, partial(_stack, len(devices)))
    raise ValueError(f"backend must be 'shard_map', 'pmap' or 'jit', got {backend!r}")


def spmd(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    rules: sharding.Rules,
    *,
    micro_rows: int | None = None,
    batch_axes: str | tuple[str, ...] = "data",
    min_size: int = 2**16,
) -> Step:
    """A step under `jit` with the state laid out by `rules` (see `sharding.tree_shardings`).

    Splitting parameters over 'data' as well gives FSDP, over a second axis tensor parallelism.
    Rows are split over `batch_axes`; `micro_rows` counts rows per batch shard, so that every
    micro-batch uses all devices. 'num_micro', int32 [batch shards], as in `data_parallel`, of which
    the largest counts.
    """
    axes = (batch_axes,) if isinstance(batch_axes, str) else tuple(batch_axes)
    shards = math.prod(mesh.shape[axis] for axis in axes)
    rows = NamedSharding(mesh, PartitionSpec(axes))
    built: dict[Any, tuple[Any, Any]] = {}  # by the state's structure

    def build(state):
        structure = jax.tree.structure(state)
        if structure not in built:
            layout = sharding.tree_shardings(rules, state, mesh, min_size=min_size)

            def constrained(params, micro_batch):
                # The constraint's transpose lays the gradients out like the parameters.
                params = lax.with_sharding_constraint(params, layout.params)
                micro_batch = lax.with_sharding_constraint(micro_batch, rows)
                return loss_fn(params, micro_batch)

            update = partial(
                _update, constrained, optimizer, micro_rows, shards=shards, axis_name=None
            )
            program = jax.jit(
                update,
                in_shardings=(layout, rows),
                out_shardings=(layout, sharding.replicated(mesh)),
                donate_argnums=0,
            )
            built[structure] = layout, program
        return built[structure]

    return Step(
        lambda state: build(state)[1],
        lambda state: sharding.place(state, build(state)[0]),
        partial(sharding.place_rows, mesh=mesh, axes=axes),
    )


def evaluation(
    loss_fn: LossFn,
    mesh: Mesh,
    *,
    micro_rows: int | None = None,
    batch_axes: str | tuple[str, ...] = "data",
) -> Callable[[Any, Batch], tuple[jax.Array, Metrics]]:
    """`f(params, batch) -> (loss, metrics)`: the forward half of a step, for the same batches.

    On a mesh with the one axis 'data' it works like `data_parallel`, otherwise like `spmd` with the
    parameters as they lie.
    """
    axes = (batch_axes,) if isinstance(batch_axes, str) else tuple(batch_axes)
    mapped = tuple(mesh.shape) == ("data",)
    shards = 1 if mapped else math.prod(mesh.shape[axis] for axis in axes)

    def forward(params, batch):
        batch = dict(batch)
        num_micro = batch.pop("num_micro", None)
        loss, metrics = _sum_over_micro_batches(
            lambda b: loss_fn(params, b), batch, micro_rows, num_micro, shards,
            "data" if mapped else None,
        )  # fmt: skip
        if mapped:
            loss = lax.psum(loss, "data")
            metrics = {name: metric.psum("data") for name, metric in metrics.items()}
        return loss, metrics

    if mapped:
        specs = (PartitionSpec(), PartitionSpec("data"))
        forward = jax.shard_map(forward, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    program = jax.jit(forward, out_shardings=sharding.replicated(mesh))

    def evaluate(params, batch):
        if mapped:
            params = sharding.place(params, sharding.replicated(mesh))
        return program(params, sharding.place_rows(batch, mesh, axes))

    return evaluate


def accumulate(
    loss_fn: LossFn,
    params: Any,
    batch: Batch,
    micro_rows: int | None = None,
    num_micro: jax.Array | None = None,
    *,
    shards: int = 1,
    axis_name: str | None = None,
) -> tuple[Any, jax.Array, dict[str, Mean | Max]]:
    """Gradients, loss and metrics of a batch [rows, …], summed over micro-batches of `micro_rows`.

    `num_micro`, a traced int32 scalar or [1], computes only the first ones: the trip count of
    the loop is dynamic, so a batch padded to its maximum costs what is in it. Gradients
    are summed in float32 at least. `shards` > 1 takes each micro-batch from all shards of the rows;
    `axis_name` is the mapped axis over which the operands vary, if any (nothing is reduced over it
    here). Raises ValueError if the rows do not divide into micro-batches.
    """

    def gradients(micro_batch):
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, micro_batch)
        wide = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), grads)
        return (wide, loss), metrics

    (grads, loss), metrics = _sum_over_micro_batches(
        gradients, batch, micro_rows, num_micro, shards, axis_name
    )
    return grads, loss, metrics


def _update(loss_fn, optimizer, micro_rows, state, batch, *, shards=1, axis_name="data"):
    """One update, on one device of a mapped axis or (axis_name=None) on a whole global batch."""
    batch = dict(batch)
    num_micro = batch.pop("num_micro", None)
    params = state.params
    if axis_name is not None:
        # Differentiating with respect to the device's own copy leaves local gradients, to be
        # reduced exactly once. Without the cast, shard_map would reduce them already.
        params = lax.pcast(params, axis_name, to="varying")
    grads, loss, metrics = accumulate(
        loss_fn, params, batch, micro_rows, num_micro, shards=shards, axis_name=axis_name
    )
    if axis_name is not None:
        grads, loss = lax.psum((grads, loss), axis_name)
        metrics = {name: metric.psum(axis_name) for name, metric in metrics.items()}
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = dict(metrics, loss=loss, grad_norm=optax.tree.norm(grads))
    lr = optax.tree.get(opt_state, "learning_rate", default=None)
    if lr is not None:
        metrics["lr"] = lr
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
    )
    return state, metrics


def _sum_over_micro_batches(function, batch, micro_rows, num_micro, shards, axis_name):
    """The sum of `function(micro_batch) -> (tree, metrics)`: trees added, metrics merged."""
    rows = {leaf.shape[0] for leaf in jax.tree.leaves(batch)}
    if len(rows) != 1:
        raise ValueError(f"batch entries have different numbers of rows: {sorted(rows)}")
    share, rest = divmod(rows.pop(), shards)
    micro_rows = micro_rows or share
    total, rest_rows = divmod(share, micro_rows)
    if rest or rest_rows or not total:
        raise ValueError(
            f"{share * shards + rest} rows in {shards} shard(s) do not divide into micro-batches "
            f"of {micro_rows}; make the rows per device a multiple of micro_rows"
        )

    def micro_batch(i):
        def take(x):
            x = x.reshape(shards, total, micro_rows, *x.shape[1:])
            x = lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False)
            return x.reshape(shards * micro_rows, *x.shape[2:])

        return jax.tree.map(take, batch)

    def body(i, carry):
        tree, metrics = function(micro_batch(i))
        return (
            jax.tree.map(jnp.add, carry[0], tree),
            {name: carry[1][name].merge(metric) for name, metric in metrics.items()},
        )

    tree, metrics = jax.eval_shape(lambda: function(micro_batch(0)))
    start = (
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree),
        {name: _identity(metric) for name, metric in metrics.items()},
    )
    if axis_name is not None:
        start = jax.tree.map(lambda x: lax.pcast(x, axis_name, to="varying"), start)
    if num_micro is None and total == 1:
        return body(0, start)
    stop = total if num_micro is None else jnp.minimum(jnp.max(num_micro), total)
    return lax.fori_loop(0, stop, body, start)


def _identity(metric):
    """What changes nothing when merged with a metric of this shape."""
    empty = -jnp.inf if isinstance(metric, Max) else 0
    return jax.tree.map(lambda x: jnp.full(x.shape, empty, x.dtype), metric)


def _stack(devices: int, batch: Batch) -> Batch:
    """[rows, …] → [devices, rows / devices, …], as pmap wants it."""

    def split(path, x):
        if x.shape[0] % devices:
            raise ValueError(
                f"batch entry {sharding.path_name(path)!r} has {x.shape[0]} rows, which do not "
                f"divide over {devices} devices; make the batch size a multiple of {devices}"
            )
        return x.reshape(devices, x.shape[0] // devices, *x.shape[1:])

    return jax.tree_util.tree_map_with_path(split, batch)
