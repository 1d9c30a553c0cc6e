"""Policy optimisation on countdown from a Hugging Face directory of the Qwen2.5-0.5B or 1.5B class, on one GPU.

    python -m experiments.run --config=experiments/configs/reinforce_pp/countdown.py:reinforce_pp_baseline \\
        --config.init_from=/models/Qwen2.5-0.5B

The argument is any of `research.rl.algorithms.ALGORITHMS`; without one it is REINFORCE++ w/ Baseline. Problems are
generated, so there is nothing to download but the model. Not run at this size here.
"""

import dataclasses

from research.core.config import to_config_dict
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.deepseek_r1 import zero
from research.rewards import RewardConfig
from research.rl.algorithms import algorithm
from research.rl.critic import CriticConfig
from research.rl.trainer import Config, EvalConfig, RolloutConfig
from research.tasks import TaskConfig


def get_config(arg: str = ""):
    return to_config_dict(config(arg or "reinforce_pp_baseline"))


def config(estimator: str) -> Config:
    """1,024 responses for each rollout and one update, as OpenRLHF's example of the paper's authors has it.

    PPO and REINFORCE++ take as many prompts of one response; the others 128 of 8.
    """
    algorithm(estimator)  # an unknown name is refused here
    single = estimator in ("ppo", "reinforce", "reinforce_pp", "remax")
    return Config(
        dtype="bfloat16",
        remat="dots",
        estimator=estimator,
        task=TaskConfig("countdown"),
        reward=RewardConfig(accuracy=1.0, format=0.2, answer_from="answer_tag"),
        rollout=RolloutConfig(
            prompts=1024 if single else 128,
            group_size=1 if single else 8,
            max_prompt=256,
            max_new_tokens=512,
            template=zero.TEMPLATE,
            slots=512,
        ),
        critic=CriticConfig(optim=OptimConfig(lr=9e-6, b2=0.95), pretrain=5),
        reference_every=0,
        micro_rows=8,
        optim=OptimConfig(lr=1e-6, b2=0.95, clip_norm=1.0, warmup_steps=5),
        eval=EvalConfig(problems=256, samples=4),
        loop=LoopConfig(steps=200, eval_every=20, checkpoint_every=20, best_metric="eval/pass@1"),
    )


def knights(estimator: str) -> Config:
    """Companies of 2 to 6 people; longer prompts and responses."""
    usual = config(estimator)
    return dataclasses.replace(
        usual,
        task=TaskConfig("knights", min_difficulty=2, max_difficulty=6),
        rollout=dataclasses.replace(usual.rollout, max_prompt=512, max_new_tokens=1024),
    )
