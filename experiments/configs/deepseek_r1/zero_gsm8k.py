"""R1-Zero on GSM8K: GRPO from a Hugging Face directory of the Qwen2.5-0.5B class, on one GPU.

    python -m experiments.run --config=experiments/configs/deepseek_r1/zero_gsm8k.py \\
        --config.init_from=/models/Qwen2.5-0.5B --config.task.train_file=gsm8k_train.jsonl \\
        --config.task.test_file=gsm8k_test.jsonl

Data: the two .jsonl files of the grade-school-math repository. Not run at this size here; for calibration, public GRPO
runs take Qwen2.5-0.5B-Instruct from 49.6 % to 54-57 % on the test set. `:tiny` shrinks every limit, to walk the whole
path on a CPU with a small random model.
"""

import dataclasses

from research.core.config import to_config_dict
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.deepseek_r1 import zero
from research.rewards import RewardConfig
from research.rl.trainer import EvalConfig, RolloutConfig
from research.tasks import TaskConfig


def get_config(arg: str = ""):
    published = zero.paper()
    config = dataclasses.replace(
        published,
        dtype="bfloat16",
        remat="dots",
        task=TaskConfig(name="gsm8k"),
        reward=RewardConfig(accuracy=1.0, format=1.0, answer_from="answer_tag"),
        rollout=RolloutConfig(
            prompts=64,
            group_size=16,
            max_prompt=512,
            max_new_tokens=1024,
            template=zero.TEMPLATE,
            slots=512,
        ),
        updates=2,
        reference_every=400,
        micro_rows=4,
        optim=OptimConfig(lr=1e-6, b2=0.95, clip_norm=1.0, warmup_steps=10),
        eval=EvalConfig(problems=256, samples=4),
        loop=LoopConfig(steps=200, eval_every=20, checkpoint_every=20, best_metric="eval/pass@1"),
    )
    if arg == "tiny":
        config = dataclasses.replace(
            config,
            dtype="float32",
            remat="none",
            scan_layers=False,
            rollout=RolloutConfig(
                prompts=4, group_size=4, max_prompt=1280, max_new_tokens=32, template=zero.TEMPLATE
            ),
            micro_rows=1,
            eval=EvalConfig(problems=4, samples=2),
            loop=LoopConfig(steps=2, checkpoint_every=1),
        )
    elif arg:
        raise ValueError(f"zero_gsm8k has no variant {arg!r}; it has 'tiny'")
    return to_config_dict(config)
