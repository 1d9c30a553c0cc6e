"""What an RL run differentiates, and what it reads off its models, on packed rows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from research.core.metrics import Mean
from research.lm import value_head
from research.lm.decoder import Decoder
from research.lm.logprobs import token_logprobs
from research.lm.trainer import balancing
from research.rl.config import Config
from research.rl.critic import value_loss
from research.rl.losses import policy_loss

Rows = dict[str, jax.Array]  # of `rollout.minibatches`, [R, T] each


@dataclasses.dataclass(frozen=True)
class Objectives:
    """Losses return (a sum over the rows, accumulators), as `core.step` takes them; the others [R, T] float32."""

    model: Decoder
    config: Config

    def logprobs(self, params: Any, rows: Rows) -> jax.Array:
        temperature = self.config.rollout.temperature
        return token_logprobs(self.model, params, *_places(rows), temperature).logprobs_BT

    def values(self, params: Any, rows: Rows) -> jax.Array:
        return value_head.token_values(self.model, params, *_places(rows))

    def value_loss(self, params: Any, rows: Rows) -> tuple[jax.Array, dict[str, Any]]:
        return value_loss(
            values=self.values(params, rows),
            old_values=rows["old_values"],
            returns=rows["returns"],
            weights=rows["weights"],
            clip=self.config.critic.clip,
        )

    def policy_loss(self, params: Any, rows: Rows) -> tuple[jax.Array, dict[str, Any]]:
        temperature = self.config.rollout.temperature
        logprobs, entropy, router = token_logprobs(self.model, params, *_places(rows), temperature)
        loss, metrics = policy_loss(
            self.config.loss,
            logprobs=logprobs,
            old_logprobs=rows.get("old_logprobs"),
            ref_logprobs=rows.get("ref_logprobs"),
            sampler_logprobs=rows["sampler_logprobs"],
            advantages=rows["advantages"],
            weights=rows["weights"],
            segment_ids=rows["segment_ids"],
        )
        mask = rows["weights"] > 0
        metrics["entropy"] = Mean(
            jnp.where(mask, jax.lax.stop_gradient(entropy), 0.0).sum(), mask.sum()
        )
        balance, more = balancing(self.model.config, router, jnp.sum(rows["weights"]))
        return loss + balance, metrics | more


def _places(rows: Rows) -> tuple[jax.Array, ...]:
    return tuple(rows[name] for name in ("tokens", "positions", "segment_ids"))
