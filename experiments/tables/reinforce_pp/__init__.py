"""REINFORCE++'s claims, its theorem by simulation and its tables by training tiny decoders.

`cpu`: minutes each, at least five seeds. `gpu`: the same rows from a Hugging Face directory given by --init_from
(Qwen2.5-0.5B or 1.5B), on generated tasks, for one accelerator.
"""

from experiments.tables.reinforce_pp import (
    bias,
    comparison,
    knights,
    noise,
    overfit,
    proxy,
    tools,
    transfer,
)

TABLES = {
    "bias": bias.TABLE,
    "proxy": proxy.TABLE,
    "noise": noise.TABLE,
    "comparison": comparison.TABLE,
    "overfit": overfit.TABLE,
    "knights": knights.TABLE,
    "transfer": transfer.TABLE,
    "tools": tools.TABLE,
}
