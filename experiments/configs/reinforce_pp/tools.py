"""The same as `countdown.py` on arithmetic with a calculator (REINFORCE++ v9, Table 4): two calls to a problem.

    python -m experiments.run --config=experiments/configs/reinforce_pp/tools.py:reinforce_pp_baseline \\
        --config.init_from=/models/Qwen2.5-1.5B

What the calculator says is spliced into the response and masked. Not run at this size here.
"""

import dataclasses

from experiments.configs.reinforce_pp import countdown
from research.core.config import to_config_dict
from research.rewards import RewardConfig
from research.rl.tools import ToolConfig
from research.rl.trainer import Config
from research.tasks import TaskConfig

TEMPLATE = (
    "Solve the problem. You have a calculator for one operation at a time: write <tool>12*34</tool>, and its result "
    "follows as <result>408</result>. End with the number, as <answer>408</answer>.\nProblem: {question}\n"
)


def get_config(arg: str = ""):
    return to_config_dict(config(arg or "reinforce_pp_baseline"))


def config(estimator: str) -> Config:
    usual = countdown.config(estimator)
    return dataclasses.replace(
        usual,
        task=TaskConfig("tool_arithmetic", min_difficulty=2, max_difficulty=2),
        reward=RewardConfig(accuracy=1.0, format=0.0),
        rollout=dataclasses.replace(
            usual.rollout,
            max_new_tokens=256,
            template=TEMPLATE,
            tools=ToolConfig(calls=4, operations=1),
        ),
    )
