"""Reinforcement learning with verifiable rewards as a `core.loop.Trainer`.

One loop step is one rollout: `prompts` problems x `group_size` responses are sampled and graded, and their advantages
estimated over all of them (`collect`); they are scored by the reference and, if several updates follow, by the policy
that sampled them, before the estimate where it needs that; then `updates` minibatches are drawn from them, one
optimizer update each (`step`). DeepSeek-R1's setting is 512 prompts x 16, 16 updates (Nature supplement 2).
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
from research.core.metrics import Mean
from research.core.state import TrainState
from research.core.step import data_parallel
from research.lm import checkpoints, value_head
from research.lm.decoder import Decoder
from research.lm.logprobs import token_logprobs
from research.lm.sampler import Sampler, Sampling
from research.lm.tokenizer import Tokenizer
from research.lm.trainer import balancing
from research.rewards import Rewarder
from research.rl import advantages, kl
from research.rl.config import Config, EvalConfig, RolloutConfig
from research.rl.critic import value_loss
from research.rl.losses import policy_loss, token_weights
from research.rl.processes import gather, local, local_rows
from research.rl.rollout import (
    Actor,
    Episodes,
    evaluate,
    local_devices,
    measure,
    minibatches,
    rows_needed,
    select,
)
from research.rl.scoring import SCORED, scorer
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
        config = config.resolved()
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
        self.score = scorer(self._logprobs, self.mesh, config.micro_rows)
        self.keeps_reference = config.loss.kl_coef != 0.0
        self.kl_in_reward = self.keeps_reference and config.loss.kl_in == "reward"
        self.has_critic = advantages.rule_of(config.estimator).baseline == "value"
        if self.has_critic:
            self.critic_optimizer = optim.make(config.critic.optim, total_updates)
            self.value = scorer(self._values, self.mesh, config.micro_rows)
            self.critic_update = data_parallel(
                self._value_loss, self.critic_optimizer, self.mesh, micro_rows=config.micro_rows
            )
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
        config, rollout = self.config, self.config.rollout
        began = time.perf_counter()
        jax.block_until_ready(state.params)  # sampling needs them; the wait is the last update's
        started = time.perf_counter()
        limit = rollout.limit_at(step)
        extra = {name: np.asarray(local(state.extra[name])) for name in self._first_extra()}
        episodes, seen, metrics = self._sample(state, step, limit, extra)
        greedy = self._greedy(state, episodes.problems, step, limit)
        sampled = time.perf_counter()
        orders = self._orders(step, len(episodes.rewards))
        lengths, per_token, figures = self._estimate(state, episodes, greedy, orders, limit, extra)
        batches = [self._minibatch(episodes, order, per_token, lengths, limit) for order in orders]
        tokens = sum(int((b["segment_ids"] > 0).sum()) for b in batches)
        parts = gather(([one.graded() for one in seen], tokens))
        metrics |= measure([graded for grades, _ in parts for graded in grades]) | figures
        if (
            config.save_samples_every
            and step % config.save_samples_every == 0
            and jax.process_index() == 0
        ):
            self._save_samples(episodes, step)
        metrics["rollout/limit"] = float(limit)
        metrics["tokens"] = float(sum(t for _, t in parts))
        metrics["time/wait"] = started - began
        metrics["time/sample"] = sampled - started
        metrics["time/pack"] = time.perf_counter() - sampled
        metrics["time/sampled_tokens_per_second"] = float(
            sum(one.completions.lengths.sum() for one in seen)
        ) / (sampled - started)
        return {"minibatches": batches, "step": step, "extra": extra}, metrics

    def step(self, state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        config = self.config
        started = time.perf_counter()
        everywhere = sharding.replicated(self.mesh)
        minibatches_ = [sharding.place_rows(b, self.mesh) for b in batch["minibatches"]]
        for minibatch in minibatches_:
            if self.keeps_reference and not self.kl_in_reward:
                minibatch["ref_logprobs"] = self.score(state.extra["ref_params"], minibatch)
            if self.keeps_old and not self.kl_in_reward:
                minibatch["old_logprobs"] = self.score(state.params, minibatch)
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
        state = state.replace(step=step, extra=state.extra | extra)
        total["updates"] = float(updates)
        total["time/dispatch"] = time.perf_counter() - started
        return state, total

    def evaluate(self, state: TrainState) -> dict[str, float]:
        settings = self.config.eval
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

    def _orders(self, step: int, responses: int) -> list[np.ndarray]:
        """Rows of each minibatch: random ones of equal size, `epochs` times over the rollout."""
        rng = np.random.default_rng([self.config.seed, step, jax.process_index()])
        orders = []
        for _ in range(self.config.epochs):
            permutation = rng.permutation(responses)
            orders += np.split(permutation, self.config.updates)
        return orders

    def _sample(
        self, state: TrainState, step: int, limit: int, extra: dict[str, np.ndarray]
    ) -> tuple[Episodes, list[Episodes], dict[str, float]]:
        """The groups to learn from, all that were sampled for them, and metrics; counts the rounds in `extra`."""
        rounds = self.config.rollout.rounds
        if rounds == 1:
            episodes = self._round(state, step, limit)
            return episodes, [episodes], {}
        first, wanted = int(extra["rounds"]), self.local_prompts
        seen: list[Episodes] = []
        kept: list[tuple[int, int]] = []
        spare: list[tuple[int, int]] = []
        for _ in range(rounds):
            seen.append(self._round(state, first + len(seen), limit))
            last, mixed = len(seen) - 1, seen[-1].mixed()
            kept += [(last, int(p)) for p in np.flatnonzero(mixed)]
            spare = [(last, int(p)) for p in np.flatnonzero(~mixed)]
            if all(gather(len(kept) >= wanted)):  # all processes sample equally often
                break
        extra["rounds"] = np.int32(first + len(seen))
        found = sum(gather(min(len(kept), wanted)))
        metrics = {"rollout/rounds": float(len(seen)), "rollout/kept": float(found)}
        return select(seen, (kept + spare)[:wanted]), seen, metrics

    def _round(self, state: TrainState, number: int, limit: int) -> Episodes:
        """The responses to the next problems of the stream, which round `number` of sampling takes."""
        rollout = self.config.rollout
        first = jax.process_index() * self.local_prompts
        start = number * rollout.prompts + first
        return self.actor(
            local(state.params),
            [self._train_problem(start + i) for i in range(self.local_prompts)],
            jax.random.fold_in(self.key, number),
            rollout.sampling(limit, self.stop_ids),
            rollout.group_size,
            seed=_reward_seed(self.config.seed, number),
            first=first,
        )

    def _greedy(
        self, state: TrainState, problems: list[Problem], step: int, limit: int
    ) -> np.ndarray | None:
        """[N] reward of the greedy response to the problem of each response, if the estimator asks for it."""
        if advantages.rule_of(self.config.estimator).baseline != "greedy":
            return None
        sampling = Sampling(max_new_tokens=limit, temperature=0.0, stop_ids=self.stop_ids)
        seed = _reward_seed(self.config.seed, step)
        episodes = self.actor(local(state.params), problems, self.key, sampling, 1, seed=seed)
        return np.repeat(self._rewards(episodes, limit), self.config.rollout.group_size)

    def _rewards(self, episodes: Episodes, limit: int) -> np.ndarray:
        totals = np.array([r.total for r in episodes.rewards], np.float64)
        buffer = round(self.config.rollout.overlong * limit)
        return totals + advantages.overlong_penalty(episodes.completions.lengths, limit, buffer)

    def _estimate(
        self,
        state: TrainState,
        episodes: Episodes,
        greedy: np.ndarray | None,
        orders: list[np.ndarray],
        limit: int,
        extra: dict[str, np.ndarray],
    ) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, float]]:
        """(loss tokens of each response [N], arrays for the minibatches [N, T], metrics); renews `extra`."""
        config = self.config
        rewards = self._rewards(episodes, limit)
        lengths = episodes.completions.lengths.copy()
        if config.mask_truncated:
            lengths[~episodes.completions.stopped] = 0
        lengths[~np.isfinite(rewards if greedy is None else rewards + greedy)] = 0
        width = int(episodes.completions.lengths.max())
        mask = np.arange(width) < lengths[:, None]
        scores = self._scored(state, episodes, orders[: config.updates], width)
        values, penalty, metrics = scores.get("old_values"), None, {}
        per_token = {name: x for name, x in scores.items() if name != "ref_logprobs"}
        if self.kl_in_reward:
            divergence = kl.in_reward(
                scores["old_logprobs"],
                scores["ref_logprobs"],
                config.loss.kl_estimator,
                limit=config.loss.kl_limit,
            )
            penalty = config.loss.kl_coef * divergence
            divergence, count = np.sum(gather(np.array([divergence[mask].sum(), mask.sum()])), 0)
            metrics["kl"] = float(divergence / max(count, 1))
            if not self.keeps_old:
                del per_token["old_logprobs"]
        places = jax.process_index() * self.local_prompts + np.arange(self.local_prompts)
        moving = extra.get("baseline")
        result = advantages.estimate(
            config.estimator,
            rewards,
            mask,
            np.repeat(places, config.rollout.group_size),
            kl=penalty,
            values=values,
            greedy=greedy,
            baseline=None if moving is None else advantages.average_of(moving),
            config=config.advantage,
            gather=gather,
        )
        if moving is not None:
            decay, mean = config.advantage.baseline_decay, result.statistics["reward/used"]
            extra["baseline"] = np.float32(advantages.moving_average(moving, mean, decay))
        per_token["advantages"] = result.advantages
        if self.has_critic:
            per_token["returns"] = result.returns
        return lengths, per_token, metrics | result.statistics

    def _scored(
        self, state: TrainState, episodes: Episodes, orders: list[np.ndarray], width: int
    ) -> dict[str, np.ndarray]:
        """What the estimate needs of models, [N, width] float32: old_logprobs, ref_logprobs, old_values, or nothing."""
        wanted = {}
        if self.kl_in_reward:
            wanted["old_logprobs"] = (self.score, state.params)
            wanted["ref_logprobs"] = (self.score, state.extra["ref_params"])
        if self.has_critic:
            wanted["old_values"] = (self.value, state.extra["critic"].params)
        count = len(episodes.rewards)
        found = {name: np.zeros(count * width, np.float32) for name in wanted}
        # Packed like any array per token, it tells where each score belongs.
        place = np.arange(1, count * width + 1, dtype=np.int32).reshape(count, width)
        for order in orders if wanted else ():
            batch = self._pack(episodes, order, {"place": place}, np.zeros(count))
            used = batch["place"] > 0
            inputs = sharding.place_rows({k: batch[k] for k in SCORED}, self.mesh)
            for name, (score, params) in wanted.items():
                found[name][batch["place"][used] - 1] = local_rows(score(params, inputs))[used]
        return {name: x.reshape(count, width) for name, x in found.items()}

    def _minibatch(
        self,
        episodes: Episodes,
        order: np.ndarray,
        per_token: dict[str, np.ndarray],
        lengths: np.ndarray,
        limit: int,
    ) -> dict[str, np.ndarray]:
        sequences, tokens = sum(gather(np.array([len(order), lengths[order].sum()])))
        weights = np.zeros(len(lengths), np.float32)
        weights[order] = token_weights(
            lengths[order],
            self.config.loss.aggregation,
            num_sequences=int(sequences),
            num_tokens=int(tokens),
            length_limit=limit,
        )
        return self._pack(episodes, order, per_token, weights)

    def _pack(self, episodes, order, per_token, weights) -> dict[str, np.ndarray]:
        return minibatches(
            episodes,
            order,
            per_token,
            weights,
            row_length=self.row_length,
            capacity=self.capacity,
            devices=self.local_devices,
            micro_rows=self.config.micro_rows,
        )

    def _logprobs(self, params: Any, rows: dict[str, jax.Array]) -> jax.Array:
        temperature = self.config.rollout.temperature
        places = (rows[name] for name in ("tokens", "positions", "segment_ids"))
        return token_logprobs(self.model, params, *places, temperature).logprobs_BT

    def _values(self, params: Any, rows: dict[str, jax.Array]) -> jax.Array:
        places = (rows[name] for name in ("tokens", "positions", "segment_ids"))
        return value_head.token_values(self.model, params, *places)

    def _value_loss(self, params: Any, batch: dict[str, jax.Array]):
        return value_loss(
            values=self._values(params, batch),
            old_values=batch["old_values"],
            returns=batch["returns"],
            weights=batch["weights"],
            clip=self.config.critic.clip,
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
