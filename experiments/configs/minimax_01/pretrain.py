"""Pre-training as MiniMax-Text-01's: schedule, batch ramp and model, on a CPU by default.

    python -m experiments.run --config=experiments/configs/minimax_01/pretrain.py \\
        --config.data.sources[0].path='my/*.txt' --workdir=runs/pretrain

The default is a hybrid of 0.9 M parameters with 4 experts over the bytes of text files (documents separated by blank
lines), 8 M tokens, with the phases of section 4.2 in proportion. The argument takes others:

    pretrain.py:410m            70m, 160m, 410m, 1b, 3b, 7b in the setting of the scaling laws (Table 2): 300B tokens
    pretrain.py:410m-softmax    … -softmax, -lightning or -hybrid (the default)
    pretrain.py:text_01         456B parameters, 11.4T tokens

These need a tokenizer of their own: --config.tokenizer=DIRECTORY, with no more tokens than the model's vocabulary.
"""

import dataclasses

from research.core.config import to_config_dict
from research.core.data import SourceConfig
from research.lm.presets import PRESETS
from research.lm.trainer import Config
from research.minimax_01 import recipe

TEXT = SourceConfig("data/*.txt", format="text")
DOCUMENTS = SourceConfig("data/*.jsonl", text_key="text")
SIZES = ("70m", "160m", "410m", "1b", "3b", "7b")


def get_config(arg: str = ""):
    return to_config_dict(config(arg))


def config(arg: str = "") -> Config:
    if not arg:
        return tiny()
    if arg == "text_01":
        # Tens of accelerators' memory: parameters and optimizer in shares over all of them.
        large = {"mesh": "fsdp=-1", "dtype": "bfloat16", "remat": "full"}
        return _saved(dataclasses.replace(recipe.paper((DOCUMENTS,)), **large))
    size, _, form = arg.partition("-")
    name = f"minimax-{size}-{form or 'hybrid'}"
    if size not in SIZES or name not in PRESETS:
        raise ValueError(
            f"pretrain has no variant {arg!r}; it has text_01 and {', '.join(SIZES)}, "
            "each also with -softmax, -lightning or -hybrid"
        )
    large = {"dtype": "bfloat16", "remat": "dots", "micro_rows": 1}
    return _saved(dataclasses.replace(recipe.scaling_law(PRESETS[name], (DOCUMENTS,)), **large))


def tiny() -> Config:
    """Bytes in rows of 256, batches of 2, 4, 8 and 16 rows."""
    model = dataclasses.replace(PRESETS["quickstart-hybrid"], vocab_size=260, max_position=256)
    scaled = recipe.pretraining(
        model, (TEXT,), tokens=8e6, seq_len=256, rows=16, lr=3e-3, micro_rows=1
    )
    return _saved(dataclasses.replace(scaled, tokenizer="byte"))


def _saved(made: Config) -> Config:
    every = max(1, made.loop.steps // 20)
    loop = dataclasses.replace(made.loop, checkpoint_every=every, eval_every=every)
    return dataclasses.replace(made, loop=loop)
