"""The `gpu` scale: a Hugging Face directory of the Qwen2.5-0.5B or 1.5B class, given by --init_from."""

import dataclasses
from typing import Any

from experiments.configs.reinforce_pp import countdown
from experiments.tables.base import INIT_FROM
from experiments.tables.reinforce_pp.arms import Start
from research.lm import checkpoints
from research.rl import trainer as rl
from research.rl.losses import LossConfig
from research.rl.trainer import EvalConfig
from research.tasks import TaskConfig

RATES = (1e-6, 3e-6)


def start(seed: int) -> Start:
    """The model of --init_from, the same for every seed."""
    del seed
    if not INIT_FROM.value:
        raise ValueError("scale gpu needs --init_from=DIRECTORY")
    return checkpoints.load(INIT_FROM.value, dtype="float32")


def config(
    arm: str,
    seed: int,
    *,
    task: TaskConfig,
    prompts: int = 128,
    group_size: int = 8,
    **changes: Any,
) -> rl.Config:
    """Of `experiments/configs/reinforce_pp`, with equally many prompts and responses for every arm."""
    usual = countdown.knights(arm) if task.name == "knights" else countdown.config(arm)
    rollout = dataclasses.replace(usual.rollout, prompts=prompts, group_size=group_size)
    settings = {
        "seed": seed,
        "init_from": INIT_FROM.value,
        "task": dataclasses.replace(task, seed=seed),
        "rollout": rollout,
        "loss": LossConfig(kl_coef=0.001),
        "eval": EvalConfig(problems=0),
        "loop": dataclasses.replace(usual.loop, eval_every=0, best_metric=""),
    }
    return dataclasses.replace(usual, **settings | changes)
