"""A reward model from preferences, or from graded responses; then a policy trained on it.

    python -m experiments.run --config=experiments/configs/reinforce_pp/reward_model.py \\
        --config.init_from=/models/Qwen2.5-0.5B --config.data.sources[0].path=train.jsonl \\
        --config.eval_sources[0].path=held_out.jsonl --config.loop.steps=250 --workdir=runs/reward_model
    python -m experiments.run --config=experiments/configs/deepseek_r1/zero_gsm8k.py … \\
        --config.estimator=reinforce_pp --config.reward_model.path=runs/reward_model --config.reward_model.normalise

reads {"prompt": …, "chosen": …, "rejected": …} from JSON lines. `reward_model.py:binary` reads {"prompt": …,
"response": …, "label": 0 … 1} and learns the label's probability, `:regression` the label. Batches, rate and length are
DeepSeek-R1's (256 pairs, 6e-6, 8,192 tokens, one epoch: set loop.steps to pairs / 256).
"""

from research.core.config import to_config_dict
from research.core.data import DataConfig, SourceConfig
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.lm.reward_model import Config


def get_config(arg: str = ""):
    return to_config_dict(config(arg))


def config(arg: str = "") -> Config:
    if arg not in ("", "binary", "regression"):
        raise ValueError(f"reward_model has no variant {arg!r}; it has 'binary' and 'regression'")
    keys = {"chosen_key": "chosen", "rejected_key": "rejected"}
    if arg:
        keys = {"response_key": "response", "label_key": "label"}
    train, held_out = (
        SourceConfig(f"data/{name}.jsonl", prompt_key="prompt", **keys)
        for name in ("preferences", "preferences_held_out")
    )
    return Config(
        dtype="bfloat16",
        remat="full",
        loss=arg or "bradley_terry",
        data=DataConfig((train,), seq_len=8192, batch_size=256, pack="none", overlong="drop"),
        chat=True,
        micro_rows=1,
        eval_sources=(held_out,),
        optim=OptimConfig(lr=6e-6, schedule="cosine", warmup_steps=10, final_fraction=0.1),
        loop=LoopConfig(steps=250, checkpoint_every=50),
    )
