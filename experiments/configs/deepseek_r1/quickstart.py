"""R1-Zero on two CPU cores: 0.56 M parameters, chained arithmetic modulo 10 (`make run`, about two minutes).

Expected on held-out problems: pass@1 from about 0.16 to 0.85, "wait" from 2 % of the responses to most of those to
problems with a product. `--config.zero.seed=1 --config.base.seed=1` gives another seed.

`quickstart.py:hybrid` does the same with a model like MiniMax-Text-01's: lightning attention, one layer of softmax
attention, experts. Two seeds went from 0.16 and 0.14 to 0.96 and 0.86, in 150 steps.
"""

from experiments.quickstart import Config
from research.core.config import to_config_dict
from research.core.data import DataConfig
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.lm import trainer as lm
from research.lm.presets import PRESETS
from research.rewards import RewardConfig
from research.rl import trainer as rl
from research.rl.losses import LossConfig
from research.rl.trainer import EvalConfig, RolloutConfig
from research.tasks import TaskConfig

# argument → preset, and steps of reinforcement learning to about the same result
MODELS = {"": ("quickstart", 120), "hybrid": ("quickstart-hybrid", 150)}


def get_config(arg: str = ""):
    return to_config_dict(config(arg))


def config(arg: str = "") -> Config:
    if arg not in MODELS:
        raise ValueError(f"quickstart.py:{arg}: the argument can be {', '.join(filter(None, MODELS))}, or none")
    preset, steps = MODELS[arg]
    return Config(
        base=lm.Config(
            model=PRESETS[preset],
            data=DataConfig(seq_len=128, batch_size=12, shuffle=False),
            micro_rows=3,
            optim=OptimConfig(
                lr=3e-3,
                b2=0.98,
                weight_decay=0.01,
                schedule="cosine",
                warmup_steps=50,
                final_fraction=0.05,
            ),
            loop=LoopConfig(steps=520),
        ),
        zero=rl.Config(
            task=TaskConfig(name="arithmetic"),
            # A guess without reasoning is in format: the reward must not ask for reasoning as such.
            reward=RewardConfig(
                accuracy=1.0,
                format=0.2,
                accuracy_needs_format=True,
                format_needs_answer=True,
                think_required=False,
            ),
            rollout=RolloutConfig(prompts=32, group_size=16, max_prompt=9, max_new_tokens=39),
            loss=LossConfig(aggregation="token", kl_coef=0.005),
            reference_every=0,
            scan_layers=False,
            row_length=64,
            micro_rows=8,
            optim=OptimConfig(name="adam", lr=3e-4, b2=0.95),
            eval=EvalConfig(problems=0),
            loop=LoopConfig(steps=steps),
        ),
    )
