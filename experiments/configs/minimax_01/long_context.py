"""Pre-training, then the long-context extension in stages (MiniMax-01, Table 6), on a CPU by default.

    python -m experiments.run --config=experiments/configs/minimax_01/long_context.py --workdir=runs/long

reads documents by their length from data/short.txt, data/medium.txt and data/long.txt, and questions about long texts
from data/qa.jsonl (keys "prompt" and "response"). A tiny hybrid is pre-trained on 256 bytes (`pretrain.py`) and
extended to 1,024, 2,048 and 4,096, with Table 6's rotary bases, mixtures and shares of the budget.

`long_context.py:paper` has the stages to 128K, 512K and 1M tokens, for a model to be named in
--config.stages[0].lm.init_from.
"""

import dataclasses

from experiments.configs.minimax_01 import pretrain
from experiments.stages import Config, Stage
from research.core.config import to_config_dict
from research.core.data import SourceConfig
from research.core.loop import LoopConfig
from research.lm import trainer as lm
from research.minimax_01 import long_context, recipe


def get_config(arg: str = ""):
    return to_config_dict(config(arg))


def config(arg: str = "") -> Config:
    if arg not in ("", "paper"):
        raise ValueError(f"long_context has no variant {arg!r}; it has 'paper'")
    if arg == "paper":
        return _paper()
    before = pretrain.tiny()
    short = SourceConfig("data/short.txt", format="text")
    before = dataclasses.replace(before, data=dataclasses.replace(before.data, sources=(short,)))
    sources = long_context.Sources(
        short,
        SourceConfig("data/medium.txt", format="text"),
        SourceConfig("data/long.txt", format="text"),
        SourceConfig("data/qa.jsonl", prompt_key="prompt", response_key="response"),
    )
    lengths = (1024, 2048, 4096)
    table = tuple(
        dataclasses.replace(stage, name=str(length), length=length)
        for stage, length in zip(
            long_context.scaled(256, 3e6), lengths, strict=True
        )
    )
    end = dataclasses.replace(recipe.ADAMW, lr=3e-3 * recipe.LR_PHASES[-1][1] / recipe.PEAK_LR)
    base = dataclasses.replace(
        before, micro_rows=1, optim=end, loop=LoopConfig(steps=1, checkpoint_every=50)
    )
    stages = long_context.stages(base, sources, table, batch_tokens=8192)
    return Config((Stage("pretrain", lm=before), *(Stage(name, lm=run) for name, run in stages)))


def _paper() -> Config:
    sources = long_context.Sources(
        *(SourceConfig(f"data/{name}/*.jsonl", text_key="text") for name in ("short", "medium", "long")),
        SourceConfig("data/qa/*.jsonl", prompt_key="prompt", response_key="response"),
    )
    base = lm.Config(
        mesh="fsdp=-1",
        dtype="bfloat16",
        remat="full",
        micro_rows=1,
        optim=dataclasses.replace(recipe.ADAMW, lr=recipe.LR_PHASES[-1][1]),
        loop=LoopConfig(steps=1, checkpoint_every=100),
    )
    # Choice: the extension keeps pre-training's last batch of 128M tokens.
    stages = long_context.stages(base, sources, batch_tokens=2**27)
    return Config(tuple(Stage(name, lm=run) for name, run in stages))
