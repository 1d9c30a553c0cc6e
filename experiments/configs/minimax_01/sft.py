"""Supervised fine-tuning on pairs: the loss is on the response and the end token after it.

    python -m experiments.run --config=experiments/configs/minimax_01/sft.py --config.init_from=runs/pretrain \\
        --config.data.sources[0].path=my.jsonl --workdir=runs/sft

reads {"prompt": …, "response": …} from JSON lines; a prompt is a string or a list of chat messages (chat=True). The
default suits the tiny model of `pretrain.py`. `sft.py:short` and `sft.py:long` are the first two stages of Table 7:
2 epochs with sequences of 8,192 in batches of 128, or of 1,032,192 in batches of 80; half of the second's prompts are
long (its second source). They stand for 100,000 examples: set loop.steps to 2 · examples / batch_size for another
number.
"""

import dataclasses

from research.core.config import to_config_dict
from research.core.data import DataConfig, SourceConfig
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.lm.trainer import Config
from research.minimax_01 import recipe

STAGES = {stage.name: stage for stage in recipe.POST_TRAINING}


def get_config(arg: str = ""):
    return to_config_dict(config(arg))


def config(arg: str = "") -> Config:
    pairs = SourceConfig("data/sft.jsonl", prompt_key="prompt", response_key="response")
    if arg in ("short", "long"):
        sources = (pairs,)
        if arg == "long":
            sources += (dataclasses.replace(pairs, path="data/sft_long.jsonl"),)
        made = recipe.post_training(STAGES[f"sft_{arg}"], sources, examples=100_000)
        return dataclasses.replace(
            made, mesh="fsdp=-1", dtype="bfloat16", remat="full", micro_rows=1
        )
    if arg:
        raise ValueError(f"sft has no variant {arg!r}; it has 'short' and 'long'")
    return Config(
        data=DataConfig((pairs,), seq_len=256, batch_size=16),
        micro_rows=1,
        optim=OptimConfig(
            lr=5e-4, weight_decay=0.1, schedule="cosine", warmup_steps=10, final_fraction=0.1
        ),
        loop=LoopConfig(steps=300, checkpoint_every=100),
    )
