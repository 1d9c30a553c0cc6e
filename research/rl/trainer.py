"""Reinforcement learning with verifiable rewards as a `core.loop.Trainer`.

One loop step is one rollout: `prompts` problems x `group_size` responses are sampled and graded, and their advantages
estimated over all of them (`collect`, `preparation.py`); they are scored by the reference and, if several updates
follow, by the policy that sampled them, before the estimate where it needs that; then `updates` minibatches are drawn
from them, one optimizer update each (`step`). DeepSeek-R1's setting is 512 prompts x 16, 16 updates (Nature supplement
2).

With `rollout.staleness` 1 a thread samples rollout t + 1 while the policy learns from rollout t. It is then always the
parameters from before the last update that sample: the state holds a copy of them, as `behaviour_params`, so a resumed
run samples again what was lost.
"""

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.core import mesh as meshes
from research.core import optim, sharding
from research.core.loop import Trainer
from research.core.state import TrainState
from research.core.step import data_parallel
from research.lm import checkpoints, value_head
from research.lm.decoder import Decoder
from research.lm.sampler import Sampler, Sampling
from research.lm.tokenizer import Tokenizer
from research.rewards import Rewarder
from research.rl import advantages
from research.rl.ahead import Ahead
from research.rl.config import Config, EvalConfig, RolloutConfig
from research.rl.objectives import Objectives
from research.rl.preparation import Preparation
from research.rl.processes import gather, local
from research.rl.reward_model import ModelRewarder
from research.rl.rollout import (
    Actor,
    Episodes,
    Rollout,
    evaluate,
    local_devices,
    measure,
    select,
)
from research.tasks import Problem, Task
from research.tasks import make as make_task

__all__ = ["Config", "EvalConfig", "RolloutConfig", "build"]


def build(
    config: Config,
    workdir: str | pathlib.Path,
    *,
    model: Decoder | None = None,
    params: Any = None,
    tokenizer: Tokenizer | None = None,
    rewarder: Rewarder | None = None,
) -> Trainer:
    """The trainer of `config`; its policy starts from `model` and `params` if given, else from `config.init_from`.

    `rewarder` takes the place of the one that `config.reward` and `config.task` describe, with its `task`.

    Raises ValueError, before any training, for prompts that do not fit, limits beyond the model's context, and the
    errors of the task, the checkpoint and the mesh.
    """
    if model is None:
        model, params, tokenizer = checkpoints.load(config.init_from, dtype="float32")
    own = {key: getattr(config, key) for key in ("dtype", "remat", "scan_layers", "kernels")}
    shape = dataclasses.replace(model.config, **own)
    if shape.moe is not None:  # scored as they are sampled: no expert is ever full
        shape = dataclasses.replace(
            shape, moe=dataclasses.replace(shape.moe, capacity_factor=0.0, jitter=0.0)
        )
    model = Decoder(shape)
    return _Run(config, pathlib.Path(workdir), model, params, tokenizer, rewarder).trainer()


class _Run:
    """What the four functions of one RL run share."""

    def __init__(
        self,
        config: Config,
        workdir: pathlib.Path,
        model: Decoder,
        params: Any,
        tokenizer: Tokenizer,
        rewarder: Rewarder | None,
    ):
        config = config.resolved()
        self.config, self.model, self.workdir = config, model, workdir
        self.tokenizer = tokenizer
        self.initial_params = jax.device_get(params)  # device memory is for what trains
        self.mesh = meshes.make(config.mesh)
        rewarder = rewarder or Rewarder(config.reward, make_task(config.task))
        self.task: Task = rewarder.task
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
        self.local_devices = local_devices(self.mesh)
        local_mesh = meshes.make({"data": self.local_devices}, jax.local_devices())
        sampler = Sampler(
            model,
            slots=_round_up(rollout.slots or responses, self.local_devices),
            max_prompt=rollout.max_prompt,
            max_new_tokens=rollout.longest_response,
            mesh=local_mesh,
        )
        if config.reward_model.path:
            rewarder = ModelRewarder(config.reward_model, rewarder, self.local_devices)
        self.actor = Actor(
            sampler, tokenizer, rewarder, rollout.template, rollout.chat, rollout.tools
        )
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
        if rollout.staleness and rollout.rounds > 1 and processes > 1:
            raise ValueError(
                "rollout.staleness=1 with rollout.rounds above 1 serves a single process: the processes would have to "
                "agree on every round while they learn. Set one of them to its default"
            )
        objectives = Objectives(model, config)
        self.preparation = Preparation(
            config, objectives, self.mesh, responses=responses, longest=longest
        )
        self.score = self.preparation.score
        total_updates = config.loop.steps * config.updates * config.epochs
        split = {"mesh": self.mesh, "micro_rows": config.micro_rows}
        self.optimizer = optim.make(config.optim, total_updates)
        self.update = data_parallel(objectives.policy_loss, self.optimizer, **split)
        self.keeps_reference = config.loss.kl_coef != 0.0
        self.kl_in_reward = self.preparation.kl_in_reward
        self.has_critic = self.preparation.has_critic
        if self.has_critic:
            self.critic_optimizer = optim.make(config.critic.optim, total_updates)
            self.critic_update = data_parallel(
                objectives.value_loss, self.critic_optimizer, **split
            )
        self.keeps_old = config.off_policy
        self.ahead = Ahead()
        self.key = jax.random.key(config.seed)
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def trainer(self) -> Trainer:
        evaluate = self.evaluate if self.config.eval.problems else None
        return Trainer(self.init, self.collect, self.step, evaluate, close=self.close)

    def close(self) -> None:
        self.ahead.drop()
        self.actor.rewarder.close()

    def init(self) -> TrainState:
        # Here and not in `build`: the loop has found that the directory is not another run's.
        if jax.process_index() == 0:
            checkpoints.describe(self.workdir, self.model, self.tokenizer)
        everywhere = sharding.replicated(self.mesh)

        def fresh(tree):  # with buffers of their own: the step donates the state
            return jax.tree.map(lambda x: jax.device_put(np.array(x), everywhere), tree)

        def create(params, optimizer, **extra):
            params = fresh(params)
            return TrainState(
                step=fresh(np.int32(0)),
                params=params,
                opt_state=jax.jit(optimizer.init, out_shardings=everywhere)(params),
                key=fresh(jax.random.key_data(self.key)),
                extra=extra,
            )

        extra = fresh(self._first_extra())
        if self.keeps_reference:
            extra["ref_params"] = fresh(self.initial_params)
        if self.has_critic:
            values = value_head.init(self.initial_params, self.model.config.hidden_size)
            extra["critic"] = create(values, self.critic_optimizer)
        if self.config.rollout.staleness:
            extra["behaviour_params"] = fresh(self.initial_params)
        return create(self.initial_params, self.optimizer, **extra)

    def _first_extra(self) -> dict[str, np.ndarray]:
        """What later rollouts need of earlier ones besides parameters; `collect` renews it."""
        extra = {}
        if advantages.rule_of(self.config.estimator).baseline == "moving":
            extra["baseline"] = np.zeros(2, np.float32)  # `advantages.moving_average`
        if self.config.rollout.rounds > 1:
            extra["rounds"] = np.int32(0)  # of sampling, so far
        return extra

    def collect(self, state: TrainState, step: int) -> tuple[dict[str, Any], dict[str, float]]:
        config, limit = self.config, self.config.rollout.limit_at(step)
        stale = bool(config.rollout.staleness)
        behaviour = state.extra["behaviour_params"] if stale else state.params
        extra = {name: np.asarray(local(state.extra[name])) for name in self._first_extra()}
        began = time.perf_counter()
        jax.block_until_ready(behaviour)  # sampling needs them; the wait is the last update's
        rounds = int(extra.get("rounds", step))
        rollout = self.ahead.result(self._rollout, behaviour, step, rounds)
        ended = time.perf_counter()
        if "rounds" in extra:
            extra["rounds"] = np.int32(rollout.rounds)
        batch = {"step": step, "extra": extra}
        if stale:
            batch["behaviour_params"] = jax.tree.map(jnp.copy, state.params)
            if step + 1 < config.loop.steps:
                upcoming = batch["behaviour_params"], step + 1, rollout.rounds
                self.ahead.start(self._rollout, *upcoming)
        episodes, seen = rollout.episodes, rollout.seen
        params = {"old": behaviour, "ref": state.extra.get("ref_params")}
        if self.has_critic:
            params["critic"] = state.extra["critic"].params
        rewards = self._rewards(episodes, limit)
        batch["minibatches"], figures = self.preparation.minibatches(
            episodes, rewards, rollout.greedy, step, limit, params, extra
        )
        tokens = sum(int((b["segment_ids"] > 0).sum()) for b in batch["minibatches"])
        parts = gather(([one.graded() for one in seen], tokens))
        metrics = rollout.metrics | measure([graded for grades, _ in parts for graded in grades])
        if (
            config.save_samples_every
            and step % config.save_samples_every == 0
            and jax.process_index() == 0
        ):
            self._save_samples(episodes, step)
        metrics["rollout/limit"] = float(limit)
        if stale:
            metrics["rollout/staleness"] = float(min(step, 1))
        metrics["tokens"] = float(sum(t for _, t in parts))
        # Of sampling, what this step had to wait for; all of it, unless it ran beside the last update.
        metrics["time/wait"] = ended - began if stale else ended - began - rollout.seconds
        metrics["time/sample"] = rollout.seconds
        metrics["time/pack"] = time.perf_counter() - ended
        sampled = sum(one.lengths.sum() for one in seen)
        metrics["time/sampled_tokens_per_second"] = float(sampled) / rollout.seconds
        return batch, metrics | figures

    def step(self, state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        config = self.config
        started = time.perf_counter()
        everywhere = sharding.replicated(self.mesh)
        # An update donates what the state holds, and the sampler may be reading its copy.
        held = dict(state.extra)
        old_params = held.pop("behaviour_params", state.params)
        state = state.replace(extra=held)
        minibatches_ = [sharding.place_rows(b, self.mesh) for b in batch["minibatches"]]
        for minibatch in minibatches_:
            if self.keeps_reference and not self.kl_in_reward:
                minibatch["ref_logprobs"] = self.score(state.extra["ref_params"], minibatch)
            if self.keeps_old and not self.kl_in_reward:
                minibatch["old_logprobs"] = self.score(old_params, minibatch)
        del old_params
        every = config.reference_every if self.keeps_reference else 0
        total: dict[str, Any] = {}
        updates = batch["step"] * config.updates * config.epochs
        for minibatch in minibatches_:
            if self.has_critic:
                critic, metrics = self.critic_update(state.extra["critic"], minibatch)
                state = state.replace(extra=state.extra | {"critic": critic})
                own = ("loss", "grad_norm", "lr")  # names that the policy has too
                named = {f"value/{k}" if k in own else k: v for k, v in metrics.items()}
                total = _merge(total, named)
            if not self.has_critic or batch["step"] >= config.critic.pretrain:
                state, metrics = self.update(state, minibatch)
                total = _merge(total, metrics)
            updates += 1
            if every and updates % every == 0:
                ref_params = jax.tree.map(jnp.copy, state.params)
                state = state.replace(extra=state.extra | {"ref_params": ref_params})
        # A step of the loop is a rollout, however many updates it makes.
        step = jax.device_put(np.int32(batch["step"] + 1), everywhere)
        extra = {name: jax.device_put(x, everywhere) for name, x in batch["extra"].items()}
        if "behaviour_params" in batch:
            extra["behaviour_params"] = batch["behaviour_params"]
        state = state.replace(step=step, extra=state.extra | extra)
        total["updates"] = float(updates)
        total["time/dispatch"] = time.perf_counter() - started
        return state, total

    def evaluate(self, state: TrainState) -> dict[str, float]:
        settings = self.config.eval
        self.ahead.wait()  # for the rewarder, and the machine
        report, _ = evaluate(
            self.actor,
            local(state.params),
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

    def _rollout(self, params: Any, step: int, rounds: int) -> Rollout:
        """Rollout `step` of a policy, after so many rounds of sampling. May run in a thread of its own."""
        started = time.perf_counter()
        limit, most = self.config.rollout.limit_at(step), self.config.rollout.rounds
        wanted = self.local_prompts
        seen: list[Episodes] = []
        metrics = {}
        if most == 1:
            seen.append(self._round(params, rounds, limit))
            episodes = seen[0]
        else:
            kept: list[tuple[int, int]] = []
            spare: list[tuple[int, int]] = []
            for _ in range(most):
                seen.append(self._round(params, rounds + len(seen), limit))
                last, teaches = len(seen) - 1, self._teaches(seen[-1], limit)
                kept += [(last, int(p)) for p in np.flatnonzero(teaches)]
                spare = [(last, int(p)) for p in np.flatnonzero(~teaches)]
                if all(gather(len(kept) >= wanted)):  # all processes sample equally often
                    break
            found = sum(gather(min(len(kept), wanted)))
            metrics = {"rollout/rounds": float(len(seen)), "rollout/kept": float(found)}
            episodes = select(seen, (kept + spare)[:wanted])
        greedy = self._greedy(params, episodes.problems, step, limit)
        seconds = time.perf_counter() - started
        return Rollout(episodes, seen, greedy, rounds + len(seen), metrics, seconds)

    def _round(self, params: Any, number: int, limit: int) -> Episodes:
        """The responses to the next problems of the stream, which round `number` of sampling takes."""
        rollout = self.config.rollout
        first = jax.process_index() * self.local_prompts
        start = number * rollout.prompts + first
        return self.actor(
            local(params),
            [self._train_problem(start + i) for i in range(self.local_prompts)],
            jax.random.fold_in(self.key, number),
            rollout.sampling(limit, self.stop_ids),
            rollout.group_size,
            seed=_reward_seed(self.config.seed, number),
            first=first,
        )

    def _greedy(
        self, params: Any, problems: list[Problem], step: int, limit: int
    ) -> np.ndarray | None:
        if advantages.rule_of(self.config.estimator).baseline != "greedy":
            return None
        sampling = Sampling(max_new_tokens=limit, temperature=0.0, stop_ids=self.stop_ids)
        seed = _reward_seed(self.config.seed, step)
        episodes = self.actor(local(params), problems, self.key, sampling, 1, seed=seed)
        return np.repeat(self._rewards(episodes, limit), self.config.rollout.group_size)

    def _rewards(self, episodes: Episodes, limit: int) -> np.ndarray:
        totals = np.array([r.total for r in episodes.rewards], np.float64)
        buffer = round(self.config.rollout.overlong * limit)
        return totals + advantages.overlong_penalty(episodes.completions.lengths, limit, buffer)

    def _teaches(self, episodes: Episodes, limit: int) -> np.ndarray:
        """[P] bool: problems with right responses and others; where a reward model judges, with unequal rewards."""
        if not self.config.reward_model.path:
            return episodes.mixed()
        problems = np.repeat(np.arange(len(episodes.problems)), episodes.group_size)
        return advantages.unequal(self._rewards(episodes, limit), problems, self.config.advantage)

    def _save_samples(self, episodes: Episodes, step: int) -> None:
        path = self.workdir / "samples" / f"rollout_{step + 1:06d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        records = list(episodes.records())[: 4 * episodes.group_size]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _merge(total: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Metrics of several updates: accumulators merged, of plain scalars the last."""
    merged = total | new
    for name in total.keys() & new.keys():
        if hasattr(new[name], "merge"):
            merged[name] = total[name].merge(new[name])
    return merged


def _reward_seed(seed: int, step: int) -> int:
    return int(np.random.default_rng([seed, step, jax.process_index()]).integers(2**31))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
