"""From a graded rollout to its minibatches: scores of the models, advantages over all of it, weights, packing."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from research.core import sharding
from research.rl import advantages, kl
from research.rl.config import Config
from research.rl.losses import token_weights
from research.rl.objectives import Objectives
from research.rl.processes import gather, local_rows
from research.rl.rollout import Episodes, local_devices, minibatches, rows_needed
from research.rl.scoring import SCORED, scorer


class Preparation:
    """Prepares rollouts of `responses` sequences of this process, each of at most `longest` tokens.

    `score(params, minibatch)` and `value(params, minibatch)` give log-probabilities and values [rows, T].

    Raises ValueError for rows that are too short, or responses that do not split into minibatches.
    """

    def __init__(
        self, config: Config, objectives: Objectives, mesh: Mesh, *, responses: int, longest: int
    ):
        if responses % config.updates:
            raise ValueError(
                f"the {responses} responses of each of {jax.process_count()} processes do not split into "
                f"updates={config.updates} minibatches"
            )
        self.config, self.mesh = config, mesh
        self.devices = local_devices(mesh)
        self.row_length = config.row_length or longest
        self.capacity = rows_needed(
            responses // config.updates, longest, self.row_length, self.devices, config.micro_rows
        )
        self.score = scorer(objectives.logprobs, mesh, config.micro_rows)
        self.value = scorer(objectives.values, mesh, config.micro_rows)
        self.kl_in_reward = config.loss.kl_coef != 0.0 and config.loss.kl_in == "reward"
        self.has_critic = advantages.rule_of(config.estimator).baseline == "value"

    def orders(self, step: int, responses: int) -> list[np.ndarray]:
        """Rows of each minibatch: random ones of equal size, `epochs` times over the rollout."""
        rng = np.random.default_rng([self.config.seed, step, jax.process_index()])
        orders = []
        for _ in range(self.config.epochs):
            permutation = rng.permutation(responses)
            orders += np.split(permutation, self.config.updates)
        return orders

    def minibatches(
        self,
        episodes: Episodes,
        rewards: np.ndarray,
        greedy: np.ndarray | None,
        step: int,
        limit: int,
        params: dict[str, Any],
        extra: dict[str, np.ndarray],
    ) -> tuple[list[dict[str, np.ndarray]], dict[str, float]]:
        """The minibatches of a loop step, and metrics; renews the moving average in `extra`.

        rewards, greedy: [N] float64, of the responses and of the greedy ones to the same problems.
        params: of the models that score the rollout: `old`, `ref` and `critic`, as far as there are such.
        """
        counted = np.isfinite(rewards if greedy is None else rewards + greedy)
        if self.config.mask_truncated:
            counted &= episodes.completions.stopped
        width = int(episodes.completions.lengths.max())
        mask_NT = episodes.completions.sampled[:, :width] & counted[:, None]
        orders = self.orders(step, len(rewards))
        per_token, metrics = self._estimate(
            episodes, rewards, greedy, mask_NT, orders[: self.config.updates], params, extra
        )
        lengths = mask_NT.sum(axis=1)
        batches = [self._minibatch(episodes, order, per_token, lengths, limit) for order in orders]
        return batches, metrics

    def _estimate(
        self, episodes, rewards, greedy, mask_NT, orders, params, extra
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """What the minibatches hold for each token, [N, T], and metrics."""
        config, metrics, penalty = self.config, {}, None
        per_token = self._scored(episodes, orders, mask_NT.shape[1], params)
        values, reference = per_token.get("old_values"), per_token.pop("ref_logprobs", None)
        if self.kl_in_reward:
            divergence = kl.in_reward(
                per_token["old_logprobs"],
                reference,
                config.loss.kl_estimator,
                limit=config.loss.kl_limit,
            )
            penalty = config.loss.kl_coef * divergence
            own = np.array([divergence[mask_NT].sum(), mask_NT.sum()])
            divergence, count = np.sum(gather(own), 0)
            metrics["kl"] = float(divergence / max(count, 1))
            if not config.off_policy:
                del per_token["old_logprobs"]
        group_size = config.rollout.group_size
        groups = len(rewards) // group_size
        moving = extra.get("baseline")
        result = advantages.estimate(
            config.estimator,
            rewards,
            mask_NT,
            np.repeat(jax.process_index() * groups + np.arange(groups), group_size),
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
        return per_token, metrics | result.statistics

    def _scored(
        self, episodes: Episodes, orders: list[np.ndarray], width: int, params: dict[str, Any]
    ) -> dict[str, np.ndarray]:
        """What the estimate needs of models, [N, width] float32: old_logprobs, ref_logprobs, old_values, or nothing."""
        wanted = {}
        if self.kl_in_reward:
            wanted["old_logprobs"] = (self.score, params["old"])
            wanted["ref_logprobs"] = (self.score, params["ref"])
        if self.has_critic:
            wanted["old_values"] = (self.value, params["critic"])
        count = len(episodes.rewards)
        found = {name: np.zeros(count * width, np.float32) for name in wanted}
        # Packed like any array per token, it tells where each score belongs.
        place = np.arange(1, count * width + 1, dtype=np.int32).reshape(count, width)
        for order in orders if wanted else ():
            batch = self._pack(episodes, order, {"place": place}, np.zeros(count))
            used = batch["place"] > 0
            inputs = sharding.place_rows({k: batch[k] for k in SCORED}, self.mesh)
            for name, (score, weights) in wanted.items():
                found[name][batch["place"][used] - 1] = local_rows(score(weights, inputs))[used]
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
            devices=self.devices,
            micro_rows=self.config.micro_rows,
        )
