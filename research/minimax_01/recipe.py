"""The training recipe of MiniMax-Text-01: the numbers as published, and the same scaled to any budget.

Sections, tables and figures are the paper's. What it leaves open is marked "choice".
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from research.core.data import DataConfig, SourceConfig
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.lm import batch_ramp, dpo
from research.lm import trainer as lm
from research.lm.config import DecoderConfig
from research.lm.presets import PRESETS

# Section 4.2, in tokens and learning rates: a linear warm-up to PEAK_LR, constant; lowered after abnormal gradient
# norms; a fast exponential decay to the last.
TOKENS = 11.4e12
WARMUP_STEPS = 500
PEAK_LR = 2e-4
LR_PHASES = ((7.2e12, PEAK_LR), (3.2e12, 1.3e-4), (1.0e12, 3e-5))
SEQ_LEN = 8192
PRETRAIN_ROPE_THETA = 1e4
# From so many tokens seen on, so many rows of SEQ_LEN: 16M, 32M, 64M and 128M tokens, M = 2^20 (choice).
BATCH_RAMP = ((0.0, 2048), (69e9, 4096), (790e9, 8192), (4.7e12, 16384))
ADAMW = OptimConfig(lr=PEAK_LR, b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0)  # choice: the clipping, and epsilon

# Figure 13: (loss, batch in tokens) at which the batch was doubled, fitted on 50M, 150M and 600M active parameters.
CRITICAL_BATCH = ((2.22, 16e6), (1.98, 32e6), (1.77, 64e6), (1.58, 128e6))


@dataclass(frozen=True)
class Extension:
    """A stage of the long-context extension; `short`, `medium`, `long` are shares of < 32K, 32K-128K and > 128K."""

    name: str
    length: int
    rope_theta: float
    tokens: float
    short: float
    medium: float
    long: float


# Table 6; the last fifth of each stage has a tenth of long-context question answering (section 4.3).
EXTENSIONS = (
    Extension("128k", 2**17, 5e6, 300e9, 0.30, 0.70, 0.00),
    Extension("512k", 2**19, 1e7, 32e9, 0.35, 0.35, 0.30),
    Extension("1m", 2**20, 1e7, 26e9, 0.30, 0.30, 0.40),
)
QA_SHARE, QA_FROM = 0.10, 0.80


@dataclass(frozen=True)
class PostTraining:
    """A stage of Table 7. `final_lr` differs from `lr` where the rate falls as a cosine."""

    name: str
    kind: Literal["sft", "dpo", "rl"]
    seq_len: int
    epochs: int
    batch_size: int
    lr: float
    final_lr: float


# Table 7, with the rotary base fixed at 10M; 1,032,192 = 4032 * 256.
ROPE_THETA = 1e7
POST_TRAINING = (
    PostTraining("sft_short", "sft", 8192, 2, 128, 1e-5, 1e-6),
    PostTraining("sft_long", "sft", 1_032_192, 2, 80, 3e-6, 3e-6),  # half of the prompts are long
    PostTraining("dpo_short", "dpo", 8192, 1, 64, 5e-7, 5e-8),
    PostTraining("dpo_long", "dpo", 1_032_192, 1, 64, 5e-7, 5e-7),  # long ones only
    PostTraining("rl", "rl", 8192, 1, 512, 1e-6, 1e-7),
)


def paper(sources: tuple[SourceConfig, ...] = ()) -> lm.Config:
    """MiniMax-Text-01's pre-training as published, with the rotary base and the context of that time."""
    model = dataclasses.replace(PRESETS["text_01"], rope_theta=PRETRAIN_ROPE_THETA, max_position=SEQ_LEN)
    return pretraining(model, sources)


def pretraining(
    model: DecoderConfig,
    sources: tuple[SourceConfig, ...] = (),
    *,
    tokens: float = TOKENS,
    seq_len: int = SEQ_LEN,
    rows: int = BATCH_RAMP[-1][1],
    lr: float = PEAK_LR,
    micro_rows: int = 0,
) -> lm.Config:
    """The pre-training of section 4.2 with a budget of `tokens`, batches of `rows` at the end and a peak rate `lr`.

    All phases keep their shares: of the tokens, those of the learning rate and of the batch ramp (an eighth, a quarter
    and a half of `rows` come before), of the steps, the warm-up. For `paper()`, these are the published numbers.

    Raises ValueError if `rows` is no multiple of 8, or if the budget is too small for all phases to have a step.
    """
    largest = BATCH_RAMP[-1][1]
    if rows % (largest // BATCH_RAMP[0][1]):
        raise ValueError(
            f"rows={rows} must be a multiple of 8, because the batch begins at an eighth of it"
        )
    scale = tokens / TOKENS
    ramp = tuple((round(start * scale), size * rows // largest) for start, size in BATCH_RAMP)
    try:
        schedule = batch_ramp.Schedule(ramp, rows, seq_len)
        first, second, _ = (phase[0] * scale for phase in LR_PHASES)
        lower, decay, steps = (schedule.steps(round(t)) for t in (first, first + second, tokens))
        warmup = max(1, round(steps * WARMUP_STEPS / _paper_steps()))
        if not warmup <= lower < decay < steps:
            raise ValueError(f"{steps} steps")
    except ValueError as error:
        raise ValueError(
            f"tokens={tokens:g} are too few for the phases of the recipe with rows={rows} of "
            f"{seq_len} tokens ({error}); allow more tokens, or smaller batches"
        ) from None
    optim = dataclasses.replace(
        ADAMW,
        lr=lr,
        schedule="piecewise",
        warmup_steps=warmup,
        boundaries=(lower, decay),
        factors=tuple(rate / PEAK_LR for _, rate in LR_PHASES[1:]),
        decay_steps=steps - decay,
    )
    return lm.Config(
        model=model,
        data=DataConfig(sources, seq_len=seq_len, batch_size=rows),
        batch_ramp=ramp,
        micro_rows=micro_rows,
        optim=optim,
        loop=LoopConfig(steps=steps),
    )


def scaling_law(model: DecoderConfig, sources: tuple[SourceConfig, ...] = (), *, tokens: float = 300e9) -> lm.Config:
    """A run of the scaling-law experiments (Table 2): batches of 4M tokens, a fixed rate of 3e-4."""
    rows, seq_len = 512, 8192
    return lm.Config(
        model=model,
        data=DataConfig(sources, seq_len=seq_len, batch_size=rows),
        optim=dataclasses.replace(ADAMW, lr=3e-4),
        loop=LoopConfig(steps=round(tokens / (rows * seq_len))),
    )


def post_training(
    stage: PostTraining, sources: tuple[SourceConfig, ...], examples: int
) -> lm.Config | dpo.Config:
    """A supervised or preference stage of Table 7 on so many examples (pairs), from a model to be named in init_from.

    A row holds one example, as the table counts them. beta is not published: 0.1 (choice). Raises ValueError for the
    stage of reinforcement learning, which has its own trainer, and for too few examples to fill a batch.
    """
    steps = stage.epochs * examples // stage.batch_size
    if steps < 1:
        raise ValueError(f"{examples} examples make no batch of {stage.batch_size}")
    falls = stage.final_lr != stage.lr
    optim = dataclasses.replace(
        ADAMW,
        lr=stage.lr,
        schedule="cosine" if falls else "constant",
        final_fraction=stage.final_lr / stage.lr if falls else 0.0,
    )
    # One document per row, none cut.
    data = DataConfig(
        sources, seq_len=stage.seq_len, batch_size=stage.batch_size, pack="none", overlong="drop"
    )
    shared = {
        "data": data,
        "chat": True,
        "rope_theta": ROPE_THETA,
        "optim": optim,
        "loop": LoopConfig(steps=steps),
    }
    if stage.kind == "sft":
        return lm.Config(**shared)
    if stage.kind == "dpo":
        return dpo.Config(**shared)
    raise ValueError(f"the stage {stage.name!r} is trained by research.rl.trainer")


def _paper_steps() -> int:
    ramp = tuple((round(tokens), rows) for tokens, rows in BATCH_RAMP)
    return batch_ramp.Schedule(ramp, ramp[-1][1], SEQ_LEN).steps(round(TOKENS))
