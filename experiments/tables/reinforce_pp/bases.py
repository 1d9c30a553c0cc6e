"""The base models of the `cpu` scale: one for each task and seed, trained once and shared by all tables."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from research.core import loop
from research.core.data import DataConfig
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.deepseek_r1 import base_data
from research.lm import checkpoints
from research.lm import trainer as lm
from research.lm.decoder import Decoder
from research.lm.presets import PRESETS
from research.lm.tokenizer import Tokenizer
from research.reinforce_pp import knights_data
from research.tasks import make

_BASES = flags.DEFINE_string(
    "bases",
    "runs/tables/reinforce_pp/bases",
    "reinforce_pp, cpu scale: where base models are kept.",
)


@dataclasses.dataclass(frozen=True)
class Base:
    """words: the vocabulary. examples: seed → prompts with responses, read in that order, again if they do not suffice.
    steps: of batches of 1,536 tokens.
    """

    words: tuple[str, ...]
    examples: Callable[[int], Sequence[tuple[str, str]]]
    steps: int
    width: int = 64
    layers: int = 2
    rate: float = 6e-3


def _arithmetic(seed: int) -> list[tuple[str, str]]:
    return base_data.textbook(12_500, seed).texts() + base_data.web_noise(9_000, seed).texts()


def _knights(seed: int) -> list[tuple[str, str]]:
    task = make("knights", min_difficulty=2, max_difficulty=6, terse=True, kinds=KINDS)
    return knights_data.examples(task, 12_000, seed, guesses=0.5)


KINDS = (
    "is",
    "and",
    "or",
)  # of the statements in `knights`: what two layers can learn something of
BASES = {
    "arithmetic": Base(base_data.WORDS, _arithmetic, steps=360),
    "knights": Base(knights_data.WORDS, _knights, steps=500),
}


@functools.lru_cache(maxsize=16)
def base(name: str, seed: int) -> tuple[Decoder, Any, Tokenizer]:
    """(model, parameters, tokenizer); trains it if it is not in --bases, or not to its end."""
    directory = pathlib.Path(_BASES.value) / name / f"seed{seed}"
    config = configured(BASES[name], seed)
    tokenizer = Tokenizer.words(BASES[name].words, pad=base_data.PAD, eos=base_data.END)
    trainer = lm.build(
        config, directory, tokenizer=tokenizer, examples=tokenized(BASES[name], seed, tokenizer)
    )
    loop.run(trainer, config.loop, directory, fingerprint_of=config, name=f"base {name} {seed}")
    return checkpoints.load(directory)


def configured(base: Base, seed: int) -> lm.Config:
    model = dataclasses.replace(
        PRESETS["quickstart"],
        vocab_size=-(-len(base.words) // 8) * 8,
        hidden_size=base.width,
        num_layers=base.layers,
        head_dim=16,
        mlp_size=11 * base.width // 4,
    )
    return lm.Config(
        seed=seed,
        model=model,
        data=DataConfig(seq_len=128, batch_size=12, shuffle=False),
        optim=OptimConfig(
            lr=base.rate, b2=0.98, weight_decay=0.01, schedule="cosine", warmup_steps=30, final_fraction=0.05
        ),
        loop=LoopConfig(steps=base.steps, log_every=20),
    )  # fmt: skip


def tokenized(base: Base, seed: int, tokenizer: Tokenizer) -> list[dict[str, np.ndarray]]:
    """Examples whose loss is on the response."""
    pairs = base.examples(seed)
    prompts, responses = (tokenizer.encode_batch(texts) for texts in zip(*pairs, strict=True))
    return [
        {
            "tokens": np.concatenate([prompt, response]),
            "loss_mask": np.repeat(np.int32([0, 1]), [len(prompt), len(response)]),
        }
        for prompt, response in zip(prompts, responses, strict=True)
    ]
