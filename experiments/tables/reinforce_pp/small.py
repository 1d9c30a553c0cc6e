"""The `cpu` scale: a decoder of 0.1 M parameters, rollouts of 128 responses, seconds for each run."""

import dataclasses
from typing import Any

from experiments.configs.deepseek_r1 import quickstart
from experiments.tables.reinforce_pp import bases
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.rl import trainer as rl
from research.rl.config import RolloutConfig
from research.rl.critic import CriticConfig
from research.rl.losses import LossConfig
from research.rl.trainer import EvalConfig
from research.tasks import TaskConfig

RATES = (5e-4, 1e-3)
SUMS = ("max_products=0",)  # of the quickstart's task, what two layers can learn
KL = LossConfig(kl_coef=0.001)  # v1's coefficient for mathematics, at each algorithm's own place


def config(
    estimator: str,
    seed: int,
    *,
    task: TaskConfig,
    steps: int,
    prompts: int = 16,
    group_size: int = 8,
    max_prompt: int = 9,
    max_new_tokens: int = 24,
    **changes: Any,
) -> rl.Config:
    """A run with the quickstart's rewards, strictly on-policy unless `changes` say otherwise."""
    optim = OptimConfig(name="adam", lr=RATES[0], b2=0.95, warmup_steps=4)
    usual = {
        "seed": seed,
        "task": dataclasses.replace(task, seed=seed),
        "estimator": estimator,
        "rollout": RolloutConfig(
            prompts=prompts, group_size=group_size, max_prompt=max_prompt, max_new_tokens=max_new_tokens
        ),
        "loss": KL,
        "critic": CriticConfig(optim=dataclasses.replace(optim, lr=1e-3)),
        "optim": optim,
        "row_length": 64,
        "eval": EvalConfig(problems=0),
        "save_samples_every": 0,
        "loop": LoopConfig(steps=steps),
    }  # fmt: skip
    return dataclasses.replace(quickstart.config().zero, **usual | changes)


def arithmetic(seed: int):
    return bases.base("arithmetic", seed)


def knights(seed: int):
    return bases.base("knights", seed)
