"""Reinforcement learning with verifiable rewards as a `core.loop.Trainer`.

One loop step is one rollout: `prompts` problems x `group_size` responses are sampled and graded (`collect`), scored by
the reference and, if several updates follow, by the policy that sampled them; then `updates` minibatches are drawn from
them, one optimizer update each (`step`). DeepSeek-R1's setting is 512 prompts x 16, 16 updates (Nature supplement 2).
"""

import dataclasses
import json
import pathlib
import pickle
import time
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec

from research.core import mesh as meshes
from research.core import optim, sharding
from research.core.loop import LoopConfig, Trainer
from research.core.metrics import Mean
from research.core.optim import OptimConfig
from research.core.state import TrainState
from research.core.step import data_parallel
from research.lm import checkpoints
from research.lm.decoder import Decoder
from research.lm.logprobs import token_logprobs
from research.lm.sampler import Sampler, Sampling
from research.lm.tokenizer import Tokenizer
from research.lm.trainer import balancing
from research.rewards import RewardConfig, Rewarder
from research.rl import advantages
from research.rl.losses import LossConfig, policy_loss, token_weights
from research.rl.rollout import (
    Actor,
    Episodes,
    evaluate,
    local_devices,
    measure,
    minibatches,
    rows_needed,
)
from research.tasks import Problem, Task, TaskConfig
from research.tasks import make as make_task

T = TypeVar("T")


def _at_least(least: int, config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)}: it must be at least {least}")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How responses are drawn.

    prompts, group_size: problems for each rollout over all processes, and responses to each.
    max_prompt, max_new_tokens: limits in tokens; `length_schedule` holds (step, limit) pairs, each of which replaces
      the response limit from that loop step on (R1-Zero doubles it at update 8,200).
    template, chat: see `Actor`.
    slots: responses sampled at the same time, over this process's devices (0: all of a rollout).
    """

    prompts: int = 32
    group_size: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_prompt: int = 512
    max_new_tokens: int = 1024
    length_schedule: tuple[tuple[int, int], ...] = ()
    template: str = "{question}"
    chat: bool = False
    slots: int = 0

    def __post_init__(self):
        _at_least(1, self, "prompts", "max_prompt", "max_new_tokens")
        _at_least(0, self, "slots")
        if self.group_size < 2:
            raise ValueError(
                f"group_size={self.group_size}: advantages compare the responses to a prompt, so there must be at "
                "least 2"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}: a greedy rollout explores nothing, and has no probabilities to "
                "learn from; it must be positive"
            )

    @property
    def longest_response(self) -> int:
        return max([self.max_new_tokens, *(limit for _, limit in self.length_schedule)])

    def limit_at(self, step: int) -> int:
        """Response limit at a loop step."""
        limit = self.max_new_tokens
        for start, value in sorted(self.length_schedule):
            if step >= start:
                limit = value
        return limit

    def sampling(self, limit: int, stop_ids: tuple[int, ...]) -> Sampling:
        """What the sampler is told for responses of at most `limit` tokens."""
        return Sampling(
            max_new_tokens=limit,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            stop_ids=stop_ids,
        )


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """pass@1 and the rest over `samples` responses to the first `problems` of the test split (0: no evaluation)."""

    problems: int = 64
    samples: int = 16
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        _at_least(0, self, "problems")
        _at_least(1, self, "samples")


@dataclasses.dataclass(frozen=True)
class Config:
    """An RL run.

    init_from: an HF directory or the directory of a run, whose model and tokenizer are taken.
    dtype, remat, scan_layers, kernels: how the model is run, see `DecoderConfig`.
    advantage_scale, advantage_ddof: see `advantages.group_relative`.
    mask_truncated: leave out responses that hit the length limit (the paper does not say; off keeps the pressure
      to finish).
    updates, epochs: optimizer updates drawn from one rollout, and passes over it.
    reference_every: the reference becomes the policy every so many updates (0: never).
    row_length, micro_rows: training rows hold `row_length` tokens (0: prompt + response limit); a device computes
      `micro_rows` of them at a time.
    save_samples_every: write the first groups of every n-th rollout to samples/ (0: never).
    """

    kind: Literal["rl"] = "rl"
    seed: int = 0
    mesh: str = "data=-1"
    init_from: str = ""
    dtype: str = "float32"
    remat: Literal["none", "full", "dots"] = "none"
    scan_layers: bool = True
    kernels: Literal["auto", "reference", "xla", "pallas"] = "auto"
    task: TaskConfig = TaskConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    loss: LossConfig = LossConfig()
    advantage_scale: advantages.Scale = "group_std"
    advantage_ddof: int = 1
    mask_truncated: bool = False
    updates: int = 1
    epochs: int = 1
    reference_every: int = 400
    row_length: int = 0
    micro_rows: int = 8
    optim: OptimConfig = OptimConfig(lr=1e-6)
    eval: EvalConfig = EvalConfig()
    save_samples_every: int = 10
    loop: LoopConfig = LoopConfig(steps=100)

    def __post_init__(self):
        _at_least(1, self, "updates", "epochs", "micro_rows")
        _at_least(0, self, "reference_every", "row_length", "save_samples_every")
        responses = self.rollout.prompts * self.rollout.group_size
        if responses % self.updates:
            raise ValueError(
                f"{responses} responses of a rollout do not split into updates={self.updates} minibatches; "
                "choose a divisor of rollout.prompts * rollout.group_size"
            )


def build(
    config: Config,
    workdir: str | pathlib.Path,
    *,
    model: Decoder | None = None,
    params: Any = None,
    tokenizer: Tokenizer | None = None,
) -> Trainer:
    """The trainer of `config`; its policy starts from `model` and `params` if given, else from `config.init_from`.

    Raises ValueError, before any training, for prompts that do not fit, limits beyond the model's context, and the
    errors of the task, the checkpoint and the mesh.
    """
    if model is None:
        model, params, tokenizer = checkpoints.load(config.init_from)
    own = {key: getattr(config, key) for key in ("dtype", "remat", "scan_layers", "kernels")}
    shape = dataclasses.replace(model.config, **own)
    if shape.moe is not None:  # scored as they are sampled: no expert is ever full
        shape = dataclasses.replace(
            shape, moe=dataclasses.replace(shape.moe, capacity_factor=0.0, jitter=0.0)
        )
    model = Decoder(shape)
    return _Run(config, pathlib.Path(workdir), model, params, tokenizer).trainer()


class _Run:
    """What the four functions of one RL run share."""

    def __init__(
        self,
        config: Config,
        workdir: pathlib.Path,
        model: Decoder,
        params: Any,
        tokenizer: Tokenizer,
    ):
        self.config, self.model, self.workdir = config, model, workdir
        self.tokenizer = tokenizer
        self.initial_params = jax.device_get(params)  # device memory is for what trains
        self.mesh = meshes.make(config.mesh)
        self.task: Task = make_task(config.task)
        rollout = config.rollout
        longest = rollout.max_prompt + rollout.longest_response
        if longest > model.config.max_position:
            raise ValueError(
                f"rollout.max_prompt + the longest response limit is {longest} tokens, and the model's context is "
                f"{model.config.max_position}"
            )
        processes = jax.process_count()
        if rollout.prompts % processes:
            raise ValueError(
                f"rollout.prompts={rollout.prompts} does not split over {processes} processes"
            )
        self.local_prompts = rollout.prompts // processes
        responses = self.local_prompts * rollout.group_size
        if responses % config.updates:
            raise ValueError(
                f"the {responses} responses of each of {processes} processes do not split into "
                f"updates={config.updates} minibatches"
            )
        self.local_devices = local_devices(self.mesh)
        local_mesh = meshes.make({"data": self.local_devices}, jax.local_devices())
        sampler = Sampler(
            model,
            slots=_round_up(rollout.slots or responses, self.local_devices),
            max_prompt=rollout.max_prompt,
            max_new_tokens=rollout.longest_response,
            mesh=local_mesh,
        )
        rewarder = Rewarder(config.reward, self.task)
        self.actor = Actor(sampler, tokenizer, rewarder, rollout.template, rollout.chat)
        self.actor.check(self.task, "train")
        if config.eval.problems:
            self.actor.check(self.task, "test", config.eval.problems)
        if not tokenizer.stop_ids:
            raise ValueError(
                "the tokenizer has no end token, so no response could ever end; name one as eos_token in its "
                "tokenizer_config.json"
            )
        self.stop_ids = tokenizer.stop_ids
        # All settings are refused now, not after hours.
        rollout.sampling(rollout.longest_response, self.stop_ids)
        self.eval_sampling = Sampling(
            max_new_tokens=rollout.longest_response,
            temperature=config.eval.temperature,
            top_p=config.eval.top_p,
            stop_ids=self.stop_ids,
        )
        self.row_length = config.row_length or longest
        self.capacity = rows_needed(
            -(-responses // config.updates),
            longest,
            self.row_length,
            self.local_devices,
            config.micro_rows,
        )
        total_updates = config.loop.steps * config.updates * config.epochs
        self.optimizer = optim.make(config.optim, total_updates)
        self.update = data_parallel(
            self._loss, self.optimizer, self.mesh, micro_rows=config.micro_rows
        )
        self.score = _scorer(model, self.mesh, config.micro_rows, rollout.temperature)
        self.keeps_reference = config.loss.kl_coef != 0.0
        self.keeps_old = config.updates * config.epochs > 1
        self.key = jax.random.key(config.seed)
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def trainer(self) -> Trainer:
        evaluate = self.evaluate if self.config.eval.problems else None
        return Trainer(
            self.init, self.collect, self.step, evaluate, close=self.actor.rewarder.close
        )

    def init(self) -> TrainState:
        # Here and not in `build`: the loop has found that the directory is not another run's.
        if jax.process_index() == 0:
            checkpoints.describe(self.workdir, self.model, self.tokenizer)
        everywhere = sharding.replicated(self.mesh)

        def fresh(tree):  # with buffers of their own: the step donates the state
            return jax.tree.map(lambda x: jax.device_put(np.array(x), everywhere), tree)

        params = fresh(self.initial_params)
        return TrainState(
            step=fresh(np.int32(0)),
            params=params,
            opt_state=jax.jit(self.optimizer.init, out_shardings=everywhere)(params),
            key=fresh(jax.random.key_data(self.key)),
            extra={"ref_params": fresh(self.initial_params)} if self.keeps_reference else {},
        )

    def collect(self, state: TrainState, step: int) -> tuple[dict[str, Any], dict[str, float]]:
        config, rollout = self.config, self.config.rollout
        began = time.perf_counter()
        jax.block_until_ready(state.params)  # sampling needs them; the wait is the last update's
        started = time.perf_counter()
        first = jax.process_index() * self.local_prompts
        problems = [
            self._train_problem(step * rollout.prompts + first + i)
            for i in range(self.local_prompts)
        ]
        limit = rollout.limit_at(step)
        episodes = self.actor(
            _local(state.params),
            problems,
            jax.random.fold_in(self.key, step),
            rollout.sampling(limit, self.stop_ids),
            rollout.group_size,
            seed=_reward_seed(config.seed, step),
            first=first,
        )
        sampled = time.perf_counter()
        rewards = np.array([r.total for r in episodes.rewards], np.float64)
        values, degenerate = advantages.group_relative(
            rewards, rollout.group_size, scale=config.advantage_scale, ddof=config.advantage_ddof
        )
        lengths = episodes.completions.lengths.copy()
        if config.mask_truncated:
            lengths[~episodes.completions.stopped] = 0
        batches = [
            self._minibatch(episodes, order, values, lengths, limit)
            for order in self._orders(step, len(rewards))
        ]
        tokens = sum(int((b["segment_ids"] > 0).sum()) for b in batches)
        parts = _gather((episodes.graded(), degenerate, tokens))
        metrics = measure([graded for graded, _, _ in parts])
        metrics["rollout/zero_std"] = float(np.concatenate([d for _, d, _ in parts]).mean())
        if (
            config.save_samples_every
            and step % config.save_samples_every == 0
            and jax.process_index() == 0
        ):
            self._save_samples(episodes, step)
        metrics["rollout/limit"] = float(limit)
        metrics["tokens"] = float(sum(t for _, _, t in parts))
        metrics["time/wait"] = started - began
        metrics["time/sample"] = sampled - started
        metrics["time/pack"] = time.perf_counter() - sampled
        metrics["time/sampled_tokens_per_second"] = float(episodes.completions.lengths.sum()) / (
            sampled - started
        )
        return {"minibatches": batches, "step": step}, metrics

    def step(self, state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        config = self.config
        started = time.perf_counter()
        minibatches_ = [sharding.place_rows(b, self.mesh) for b in batch["minibatches"]]
        for minibatch in minibatches_:
            inputs = {k: minibatch[k] for k in ("tokens", "segment_ids", "positions", "num_micro")}
            if self.keeps_reference:
                minibatch["ref_logprobs"] = self.score(state.extra["ref_params"], inputs)
            if self.keeps_old:
                minibatch["old_logprobs"] = self.score(state.params, inputs)
        every = config.reference_every if self.keeps_reference else 0
        total: dict[str, Any] = {}
        updates = batch["step"] * config.updates * config.epochs
        for minibatch in minibatches_:
            state, metrics = self.update(state, minibatch)
            total = _merge(total, metrics)
            updates += 1
            if every and updates % every == 0:
                state = state.replace(extra={"ref_params": jax.tree.map(jnp.copy, state.params)})
        # A step of the loop is a rollout, however many updates it makes.
        step = jax.device_put(np.int32(batch["step"] + 1), sharding.replicated(self.mesh))
        state = state.replace(step=step)
        total["updates"] = float(updates)
        total["time/dispatch"] = time.perf_counter() - started
        return state, total

    def evaluate(self, state: TrainState) -> dict[str, float]:
        settings = self.config.eval
        report, _ = evaluate(
            self.actor,
            _local(state.params),
            self.task,
            problems=settings.problems,
            samples=settings.samples,
            sampling=self.eval_sampling,
            seed=self.config.seed,
        )
        return report

    def _train_problem(self, index: int) -> Problem:
        """Problem number `index` of the stream: fresh ones, or a finite split in a new order in each epoch."""
        size = self.task.size("train")
        if size is None:
            return self.task.problem("train", index)
        epoch, place = divmod(index, size)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.config.seed, epoch]).permutation(size)
        return self.task.problem("train", int(self._order[place]))

    def _orders(self, step: int, responses: int) -> list[np.ndarray]:
        """Rows of each minibatch: random ones of equal size, `epochs` times over the rollout."""
        rng = np.random.default_rng([self.config.seed, step, jax.process_index()])
        orders = []
        for _ in range(self.config.epochs):
            permutation = rng.permutation(responses)
            orders += np.split(permutation, self.config.updates)
        return orders

    def _minibatch(
        self,
        episodes: Episodes,
        order: np.ndarray,
        values: np.ndarray,
        lengths: np.ndarray,
        limit: int,
    ) -> dict[str, np.ndarray]:
        sequences, tokens = sum(_gather(np.array([len(order), lengths[order].sum()])))
        weights = np.zeros(len(lengths), np.float32)
        weights[order] = token_weights(
            lengths[order],
            self.config.loss.aggregation,
            num_sequences=int(sequences),
            num_tokens=int(tokens),
            length_limit=limit,
        )
        return minibatches(
            episodes,
            order,
            values,
            weights,
            row_length=self.row_length,
            capacity=self.capacity,
            devices=self.local_devices,
            micro_rows=self.config.micro_rows,
        )

    def _loss(self, params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, Any]]:
        logprobs, entropy, router = token_logprobs(
            self.model,
            params,
            batch["tokens"],
            batch["positions"],
            batch["segment_ids"],
            temperature=self.config.rollout.temperature,
        )
        loss, metrics = policy_loss(
            self.config.loss,
            logprobs=logprobs,
            old_logprobs=batch.get("old_logprobs"),
            ref_logprobs=batch.get("ref_logprobs"),
            sampler_logprobs=batch["sampler_logprobs"],
            advantages=batch["advantages"],
            weights=batch["weights"],
            segment_ids=batch["segment_ids"],
        )
        mask = batch["weights"] > 0
        metrics["entropy"] = Mean(
            jnp.where(mask, jax.lax.stop_gradient(entropy), 0.0).sum(), mask.sum()
        )
        balance, more = balancing(self.model.config, router, jnp.sum(batch["weights"]))
        return loss + balance, metrics | more

    def _save_samples(self, episodes: Episodes, step: int) -> None:
        path = self.workdir / "samples" / f"rollout_{step + 1:06d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        records = list(episodes.records())[: 4 * episodes.group_size]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _scorer(model: Decoder, mesh, micro_rows: int, temperature: float):
    """`score(params, batch) -> logprobs [rows, T]` over the micro-batches that hold anything."""

    def score(params, batch):
        num_micro, batch = batch["num_micro"], {k: v for k, v in batch.items() if k != "num_micro"}
        rows, length = batch["tokens"].shape

        def one(i, out):
            part = {
                k: lax.dynamic_slice_in_dim(v, i * micro_rows, micro_rows) for k, v in batch.items()
            }
            logprobs, *_ = token_logprobs(
                model, params, part["tokens"], part["positions"], part["segment_ids"], temperature
            )
            return lax.dynamic_update_slice_in_dim(out, logprobs, i * micro_rows, axis=0)

        start = lax.pcast(jnp.zeros((rows, length), jnp.float32), "data", to="varying")
        return lax.fori_loop(0, num_micro[0], one, start)

    split, whole = PartitionSpec("data"), PartitionSpec()
    program = jax.jit(jax.shard_map(score, mesh=mesh, in_specs=(whole, split), out_specs=split))
    return lambda params, batch: program(sharding.place(params, sharding.replicated(mesh)), batch)


def _merge(total: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Metrics of several updates: accumulators merged, of plain scalars the last."""
    merged = dict(new)
    for name, value in total.items():
        if hasattr(value, "merge"):
            merged[name] = value.merge(new[name])
    return merged


def _local(params: Any) -> Any:
    """Parameters that every process holds whole, as arrays of this process alone."""
    if jax.process_count() == 1:
        return params
    return jax.tree.map(lambda x: x.addressable_data(0), params)


def _gather(value: T) -> list[T]:
    """The picklable `value` of every process, in their order, on all of them."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data))).ravel()
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)  # few shapes to compile for
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def _reward_seed(seed: int, step: int) -> int:
    return int(np.random.default_rng([seed, step, jax.process_index()]).integers(2**31))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
