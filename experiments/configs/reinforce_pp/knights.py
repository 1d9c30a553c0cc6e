"""The same as `countdown.py` on knights and knaves of 2 to 6 people (REINFORCE++ v9, Figure 4).

    python -m experiments.run --config=experiments/configs/reinforce_pp/knights.py:reinforce_pp \\
        --config.init_from=/models/Qwen2.5-1.5B
    python -m experiments.evaluate --run=runs/knights --task=knights --task_options=min_difficulty=8,max_difficulty=8

Not run at this size here.
"""

from experiments.configs.reinforce_pp import countdown
from research.core.config import to_config_dict


def get_config(arg: str = ""):
    return to_config_dict(countdown.knights(arg or "reinforce_pp_baseline"))
