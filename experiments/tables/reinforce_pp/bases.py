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
from research.reinforce_pp import knights_data, tool_data
from research.tasks import make

_BASES = flags.DEFINE_string(
    "bases",
    "runs/tables/reinforce_pp/bases",
    "reinforce_pp, cpu scale: where base models are kept.",
)


Examples = list[dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Base:
    """examples: (tokenizer, seed) → what is read, in that order, again if it does not suffice.
    steps: of batches of 1,536 tokens.
    """

    tokenizer: Callable[[], Tokenizer]
    examples: Callable[[Tokenizer, int], Examples]
    steps: int
    width: int = 64
    layers: int = 2
    head_dim: int = 16
    rate: float = 6e-3


def _arithmetic(tokenizer: Tokenizer, seed: int) -> Examples:
    parts = base_data.textbook(17_000, seed), base_data.web_noise(9_500, seed)
    return _tokenized(tokenizer, [pair for part in parts for pair in part.texts()])


def _knights(tokenizer: Tokenizer, seed: int) -> Examples:
    task = make("knights", min_difficulty=3, max_difficulty=5, terse=True, kinds=KINDS)
    return _tokenized(tokenizer, knights_data.examples(task, 22_000, seed))


def _tools(tokenizer: Tokenizer, seed: int) -> Examples:
    task = make("tool_arithmetic", min_difficulty=1, max_difficulty=3, seed=1_000_000 + seed)
    return tool_data.examples(tokenizer, task, textbook=15_000, noise=8_000, seed=seed)


def _tokenized(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> Examples:
    """Of prompts with responses; the loss is on the response."""
    prompts, responses = (tokenizer.encode_batch(texts) for texts in zip(*pairs, strict=True))
    return [
        {
            "tokens": np.concatenate([prompt, response]),
            "loss_mask": np.repeat(np.int32([0, 1]), [len(prompt), len(response)]),
        }
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def _words(words: tuple[str, ...]) -> Callable[[], Tokenizer]:
    return lambda: Tokenizer.words(words, pad=base_data.PAD, eos=base_data.END)


KINDS = tuple(knights_data.SAYS)  # of the statements in `knights`
BASES = {
    "arithmetic": Base(_words(base_data.WORDS), _arithmetic, steps=340),
    "knights": Base(_words(knights_data.WORDS), _knights, steps=700),
    "tools": Base(tool_data.tokenizer, _tools, steps=500),
}


@functools.lru_cache(maxsize=16)
def base(name: str, seed: int) -> tuple[Decoder, Any, Tokenizer]:
    """(model, parameters, tokenizer); trains it if it is not in --bases, or not to its end."""
    directory = pathlib.Path(_BASES.value) / name / f"seed{seed}"
    described = BASES[name]
    tokenizer = described.tokenizer()
    config = configured(described, tokenizer, seed)
    examples = described.examples(tokenizer, seed)
    trainer = lm.build(config, directory, tokenizer=tokenizer, examples=examples)
    loop.run(trainer, config.loop, directory, fingerprint_of=config, name=f"base {name} {seed}")
    return checkpoints.load(directory)


def configured(base: Base, tokenizer: Tokenizer, seed: int) -> lm.Config:
    model = dataclasses.replace(
        PRESETS["quickstart"],
        vocab_size=-(-tokenizer.vocab_size // 8) * 8,
        hidden_size=base.width,
        num_layers=base.layers,
        head_dim=base.head_dim,
        mlp_size=11 * base.width // 4,
    )
    return lm.Config(
        seed=seed,
        mesh="data=1",  # the same base model on any machine
        model=model,
        data=DataConfig(seq_len=128, batch_size=12, shuffle=False),
        optim=OptimConfig(
            lr=base.rate, b2=0.98, weight_decay=0.01,
            schedule="cosine", warmup_steps=min(30, base.steps // 2), final_fraction=0.3,
        ),
        loop=LoopConfig(steps=base.steps, log_every=20),
    )  # fmt: skip
