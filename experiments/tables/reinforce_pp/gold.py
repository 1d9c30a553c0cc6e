"""What the tables on requests share, whose gold score a program gives: sizes, base models, runs that are judged."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from research.core import loop, metrics
from research.core.data import DataConfig
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.lm import checkpoints, reward_model
from research.lm import trainer as lm
from research.reinforce_pp import over_optimisation as study
from research.rl import trainer as rl
from research.rl.losses import LossConfig
from research.rl.trainer import EvalConfig, RolloutConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Settings:
    """base: of the policy, None: the directory of --init_from. `samples` responses per step, `steps` of them, judged
    every `every` on `judged` held-out requests. pairs: for the reward model, before ties are dropped; `flip`: share of
    them labelled the wrong way round. rate: of `equal`; rates: those that `tuned` chooses from.
    """

    base: lm.Config | None
    proxy: reward_model.Config
    task: Mapping[str, Any]
    samples: int
    steps: int
    every: int
    judged: int
    pairs: int
    flip: float
    rate: float
    rates: tuple[float, ...]
    beta: float = 0.01
    max_prompt: int = 7
    max_new_tokens: int = 20
    micro_rows: int = 8
    dtype: str = "float32"


NOUNS = tuple(
    "apple river stone cloud tiger bread music window garden silver train ocean candle forest paper winter bridge "
    "lemon horse mirror basket island thunder button".split()
)
SCALES = {
    "cpu": Settings(
        base=study.base_config(0),
        proxy=reward_model.Config(
            data=DataConfig(seq_len=32, batch_size=32, pack="none", overlong="drop"),
            optim=OptimConfig(lr=3e-3, schedule="cosine", warmup_steps=10),
            loop=LoopConfig(steps=250, log_every=50),
        ),
        task={},
        samples=128, steps=40, every=4, judged=128, pairs=4000, flip=0.15, rate=1e-3, rates=(3e-4, 1e-3, 3e-3),
    ),
    "gpu": Settings(
        base=None,
        proxy=reward_model.Config(
            dtype="bfloat16",
            data=DataConfig(seq_len=256, batch_size=64, pack="none", overlong="drop"),
            micro_rows=16,
            optim=OptimConfig(lr=6e-6, schedule="cosine", warmup_steps=10),
            loop=LoopConfig(steps=200),
        ),
        task={
            "vocabulary": NOUNS, "waste": 0.02,
            "question": "Write one short sentence that uses each of these words once: {words}.\nSentence:",
        },
        samples=1024, steps=200, every=10, judged=256, pairs=16_000, flip=0.25, rate=1e-6,
        rates=(5e-7, 1e-6, 2e-6), max_prompt=96, max_new_tokens=128, dtype="bfloat16",
    ),
}  # fmt: skip


def task_of(s: Settings, seed: int) -> study.Requests:
    return study.Requests(seed=seed, test_size=s.judged, **s.task)


def base_of(s: Settings, seed: int, directory: pathlib.Path):
    """(model, parameters, tokenizer) of a seed's base policy, whose run is `directory`."""
    if s.base is None:
        if not flags.FLAGS.init_from:
            raise ValueError("scale gpu needs --init_from=DIRECTORY, of a Hugging Face model")
        return checkpoints.load(flags.FLAGS.init_from, dtype="float32")
    config = dataclasses.replace(
        s.base, seed=seed, data=dataclasses.replace(s.base.data, seed=seed)
    )
    return study.train_base(config, task_of(s, seed), directory / "policy")


def actor_of(s: Settings, model, tokenizer, task: study.Requests):
    return study.make_actor(
        model,
        tokenizer,
        study.GoldRewarder(task),
        slots=2 * s.judged,
        max_prompt=s.max_prompt,
        max_new_tokens=s.max_new_tokens,
    )


def run_of(
    s: Settings,
    estimator: str,
    seed: int,
    *,
    prompts: int,
    group: int,
    rate: float,
    kl_coef: float,
    steps: int,
    every: int,
) -> rl.Config:
    """A run on the requests, strictly on-policy, judged by `study.Judge` instead of the trainer's evaluation."""
    return rl.Config(
        seed=seed,
        dtype=s.dtype,
        scan_layers=s.base is None,
        rollout=RolloutConfig(
            prompts=prompts, group_size=group, max_prompt=s.max_prompt, max_new_tokens=s.max_new_tokens
        ),
        estimator=estimator,
        loss=LossConfig(kl_coef=kl_coef),
        reference_every=0,
        micro_rows=s.micro_rows,
        optim=OptimConfig(name="adam", lr=rate, b2=0.95),
        eval=EvalConfig(problems=0),
        save_samples_every=0,
        loop=LoopConfig(steps=steps, eval_every=every, checkpoint_every=steps),
    )  # fmt: skip


def judged(
    config: rl.Config, directory: pathlib.Path, base, judge: study.Judge, rewarder, name: str
) -> tuple[Any, list[dict[str, float]], list[Mapping[str, float]]]:
    """(parameters after the run, what `judge` found on the way, metrics)"""
    model, params, tokenizer = base
    trainer = rl.build(
        config, directory, model=model, params=params, tokenizer=tokenizer, rewarder=rewarder
    )
    trainer = dataclasses.replace(trainer, evaluate=lambda state: judge(state.params))
    state = loop.run(trainer, config.loop, directory, fingerprint_of=config, name=name)
    history = metrics.read(directory / "metrics.jsonl")
    curve = [
        {"step": r["step"]} | {k[5:]: round(v, 5) for k, v in r.items() if k.startswith("eval/")}
        for r in history
        if "eval/gold" in r
    ]
    return state.params, curve, history


def mean_of(history: Sequence[Mapping[str, float]], key: str) -> float:
    """Over the rollouts that have it."""
    return float(np.mean([r[key] for r in history if r.get(key) is not None]))


def late(figures: Mapping[str, Any], key: str) -> float:
    """Mean over the last three evaluations."""
    return float(np.mean([point[key] for point in figures["curve"][-3:]]))
