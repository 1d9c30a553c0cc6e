"""Direct preference optimisation: the better and the worse response to each prompt.

    python -m experiments.run --config=experiments/configs/minimax_01/dpo.py --config.init_from=runs/sft \\
        --config.data.sources[0].path=my.jsonl --workdir=runs/dpo

reads {"prompt": …, "chosen": …, "rejected": …} from JSON lines (`research.lm.dpo.best_and_worst` makes them of scored
samples). The default suits the tiny model of `pretrain.py`. `dpo.py:short` and `dpo.py:long` are the third and fourth
stage of Table 7: one epoch in batches of 64 pairs, sequences of 8,192 or of 1,032,192. They stand for 100,000 pairs:
set loop.steps to pairs / 64 for another number.
"""

import dataclasses

from research.core.config import to_config_dict
from research.core.data import DataConfig, SourceConfig
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.lm.dpo import Config
from research.minimax_01 import recipe

STAGES = {stage.name: stage for stage in recipe.POST_TRAINING}


def get_config(arg: str = ""):
    return to_config_dict(config(arg))


def config(arg: str = "") -> Config:
    pairs = SourceConfig(
        "data/dpo.jsonl", prompt_key="prompt", chosen_key="chosen", rejected_key="rejected"
    )
    if arg in ("short", "long"):
        made = recipe.post_training(STAGES[f"dpo_{arg}"], (pairs,), examples=100_000)
        return dataclasses.replace(
            made, mesh="fsdp=-1", dtype="bfloat16", remat="full", micro_rows=1
        )
    if arg:
        raise ValueError(f"dpo has no variant {arg!r}; it has 'short' and 'long'")
    return Config(
        data=DataConfig((pairs,), seq_len=256, batch_size=16, pack="none", overlong="drop"),
        micro_rows=1,
        optim=OptimConfig(lr=5e-5, weight_decay=0.1, schedule="cosine", final_fraction=0.1),
        loop=LoopConfig(steps=200, checkpoint_every=100),
    )
