"""Trains many tiny decoders at once: the members of a study differ in seed and learning rate alone.

A study is a decoder, a task of `retrieval`, and an optimizer. For every point of the curve, one program draws the data
and another one scans over the steps; members are an axis of both, split over the devices. Studies of one task share the
first, which takes long to compile where tasks are many.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from tqdm import tqdm

from research.core import mesh, optim
from research.core.optim import OptimConfig
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder
from research.lm.moe import aux_loss
from research.minimax_01 import retrieval
from research.minimax_01.retrieval import Example, Task


@dataclasses.dataclass(frozen=True)
class Study:
    """`optim.lr` is not used: every member has its own. `points`: of the curves."""

    model: DecoderConfig
    task: Task
    optim: OptimConfig = OptimConfig(weight_decay=0.1)
    steps: int = 1000
    batch: int = 32
    points: int = 50

    def __post_init__(self):
        if self.task.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"the task has {self.task.vocab_size} tokens, the model {self.model.vocab_size}"
            )
        if self.points < 1 or self.steps % self.points:
            raise ValueError(f"{self.steps} steps do not make {self.points} points")


class Member(NamedTuple):
    seed: int
    lr: float


class Trained(NamedTuple):
    """params: leaves `[members, …]`. curves: means over the steps of each point, float64 `[members, points]`."""

    params: Any
    curves: dict[str, np.ndarray]


def train(study: Study, members: Sequence[Member], name: str = "") -> Trained:
    """Trains all members. curves: 'loss' (per answer, in nats) and 'grad_norm' (before clipping).

    Batch t of seed s is the same for every study of a task, so arms see the same data. `name` labels the progress bar.
    """
    seeds = jnp.array([m.seed for m in members], jnp.int32)
    rates = jnp.array([m.lr for m in members], jnp.float32)
    init, run = _programs(study, len(members))
    each = study.steps // study.points
    draw = _drawing(study.task, study.batch, each, len(members))
    state = init(seeds)
    found = []
    with tqdm(total=study.steps, desc=name or None, disable=None, leave=False) as bar:
        for point in range(study.points):
            state, measured = run(state, rates, draw(seeds, jnp.int32(point * each)))
            found.append(jax.tree.map(lambda x: np.asarray(x, np.float64), measured))
            bar.update(each)
            bar.set_postfix(loss=f"{found[-1]['loss'].min():.3f}")
    curves = {key: np.stack([point[key] for point in found], axis=1) for key in found[0]}
    return Trained(state[0], curves)


def evaluate(
    study: Study,
    params: Any,
    task: Task | None = None,
    *,
    split: retrieval.Split,
    batches: int = 4,
    size: int = 64,
) -> dict[str, np.ndarray]:
    """Figures of every member on `batches` batches of a split, the same for all; float64 `[members]`.

    loss: nats per answer; accuracy: answers whose most likely token is right; exact: examples with all answers right;
    by_task, [members, tasks]: the accuracy on each part of a mixture.
    """
    task = task or study.task
    count = jax.tree.leaves(params)[0].shape[0]
    sums = _evaluation(study.model, count)(params, _held_out(task, split, batches, size))
    loss, right, answers, exact = np.moveaxis(np.asarray(sums, np.float64), 1, 0)  # [members, rows]
    parts = len(task.tasks) if isinstance(task, retrieval.Mixture) else 1
    by_task = [x.reshape(count, parts, -1).sum(-1) for x in (right, answers)]
    total = answers.sum(1)
    return {
        "loss": loss.sum(1) / total,
        "accuracy": right.sum(1) / total,
        "exact": exact.sum(1) / (batches * size),
        "by_task": by_task[0] / by_task[1],
    }


def choose(trained: Trained, index: int) -> Any:
    """The parameters of one member, still with an axis of members, as `evaluate` takes them; on the host."""
    return jax.tree.map(lambda x: np.asarray(x)[index : index + 1], trained.params)


@functools.lru_cache(maxsize=4)
def _programs(study: Study, count: int) -> tuple[Callable, Callable]:
    model = Decoder(study.model)
    # Rate 1: what the optimizer returns is linear in the rate, which is the member's.
    optimizer = optim.make(dataclasses.replace(study.optim, lr=1.0), study.steps)

    def init(seed):
        params = model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
        return params, optimizer.init(params)

    def run(state, rate, data):
        def step(state, batch):
            params, moments = state
            loss = functools.partial(_objective, study.model, data=batch)
            (_, nll), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, moments = optimizer.update(grads, moments, params)
            params = optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates))
            return (params, moments), {"loss": nll, "grad_norm": optax.tree.norm(grads)}

        state, measured = jax.lax.scan(step, state, data)
        return state, jax.tree.map(jnp.mean, measured)

    return _over_members(init, count), _over_members(run, count, donate=True)


@functools.lru_cache(maxsize=4)
def _drawing(task: Task, size: int, steps: int, count: int) -> Callable:
    """(seeds, first step) → examples `[members, steps, size, ...]`."""

    def draw(seed, start):
        key = retrieval.stream("train", seed)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, start + jnp.arange(steps))
        return jax.vmap(lambda key: retrieval.batch(task, key, size))(keys)

    return _over_members(draw, count, shared=1)


@functools.lru_cache(maxsize=16)
def _held_out(task: Task, split: retrieval.Split, batches: int, size: int) -> Example:
    """`[batches, size, ...]`, on the host."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(retrieval.stream(split), jnp.arange(batches))
    drawn = jax.jit(jax.vmap(lambda key: retrieval.batch(task, key, size)))(keys)
    return jax.tree.map(np.asarray, drawn)


@functools.lru_cache(maxsize=16)
def _evaluation(config: DecoderConfig, count: int) -> Callable:
    def run(params, data):
        def add(sums, batch):
            logits, _ = _logits(config, params, batch)
            right = (jnp.argmax(logits, -1) == batch.targets) * batch.weights
            answers = batch.weights.sum(1)
            exact = right.sum(1) == answers
            new = jnp.stack([_nll(logits, batch).sum(1), right.sum(1), answers, exact])
            return sums + new, None

        return jax.lax.scan(add, jnp.zeros((4, data.tokens.shape[1])), data)[0]

    return _over_members(run, count, shared=1)


def _objective(config: DecoderConfig, params, data: Example):
    """(mean loss per answer with the experts' balance term, without it)."""
    logits, stats = _logits(config, params, data)
    nll = jnp.sum(_nll(logits, data)) / jnp.sum(data.weights)
    if stats is None:
        return nll, nll
    moe = config.moe
    return nll + moe.aux_coef * jnp.mean(aux_loss(stats, moe.top_k, moe.aux_form)), nll


def _logits(config: DecoderConfig, params, data: Example):
    if config.moe is None:
        return Decoder(config).apply({"params": params}, data.tokens), None
    logits, kept = Decoder(config).apply({"params": params}, data.tokens, mutable=["router"])
    return logits, kept["router"]["stats"][0]


def _nll(logits_BTV, data: Example):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, data.targets)
    return losses * data.weights


def _over_members(
    function: Callable, count: int, shared: int = 0, donate: bool = False
) -> Callable:
    """`function` of one member → the jitted program for `count`; the last `shared` arguments are all members'.

    Each device has its own members. On a CPU it takes them one after the other, which keeps a member's arrays in cache
    and its products plain matrices; an accelerator takes them at once.
    """
    devices = max(n for n in range(1, len(jax.devices()) + 1) if count % n == 0)

    def local(*arguments):
        own = arguments[: len(arguments) - shared]
        rest = arguments[len(own) :]
        one = lambda xs: function(*xs, *rest)  # noqa: E731
        return jax.lax.map(one, own) if jax.default_backend() == "cpu" else jax.vmap(one)(own)

    grid = mesh.make({"member": devices})
    member, every = PartitionSpec("member"), PartitionSpec()

    def program(*arguments):
        specs = tuple([member] * (len(arguments) - shared) + [every] * shared)
        # No communication, so nothing to check (and loops inside may start from constants).
        mapped = jax.shard_map(local, mesh=grid, in_specs=specs, out_specs=member, check_vma=False)
        return mapped(*arguments)

    return jax.jit(program, donate_argnums=0 if donate else ())
