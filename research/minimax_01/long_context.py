"""Long-context extension in stages (MiniMax-01, section 4.3 and Table 6).

Each stage goes on from the one before with longer rows, a larger rotary base and another mixture of short, medium and
long documents. The shares change linearly, not at once: over the first part of a stage from what they were to its own
mixture, and, before its last fifth, towards a tenth of long-context question answering.
"""

import dataclasses
from dataclasses import dataclass

from research.core.data import SourceConfig
from research.lm import trainer as lm
from research.minimax_01 import recipe
from research.minimax_01.recipe import Extension

SHORT_ONLY = (1.0, 0.0, 0.0, 0.0)  # the mixture before the first stage: what was pre-trained on


@dataclass(frozen=True)
class Sources:
    """Documents by length, and long-context question answering (pairs or documents)."""

    short: SourceConfig
    medium: SourceConfig
    long: SourceConfig
    qa: SourceConfig


def scaled(
    context: int, tokens: float, table: tuple[Extension, ...] = recipe.EXTENSIONS
) -> tuple[Extension, ...]:
    """The table's stages for a model pre-trained on rows of `context` tokens, with a budget of `tokens` for all.

    Lengths keep their proportion to the paper's 8192 of pre-training, and stages their shares of the tokens.
    """
    total = sum(stage.tokens for stage in table)
    return tuple(
        dataclasses.replace(
            stage,
            length=stage.length * context // recipe.SEQ_LEN,
            tokens=stage.tokens * tokens / total,
        )
        for stage in table
    )


def stages(
    base: lm.Config,
    sources: Sources,
    table: tuple[Extension, ...] = recipe.EXTENSIONS,
    *,
    batch_tokens: int,
    transition: float = 0.1,
) -> tuple[tuple[str, lm.Config], ...]:
    """(name, configuration) of each stage, to be run one after another, each from the model before it.

    `base` gives all but the model, the data's sources and shape and the number of steps: its optimizer should have
    the rate at which pre-training ended (choice: the paper names none for the extension). Batches hold `batch_tokens`
    in every stage (choice), and `transition` is the part of a stage over which shares change (choice).

    Raises ValueError for a transition that leaves a stage no time with its own mixture, or rows longer than a batch.
    """
    if not 0 < transition < recipe.QA_FROM / 2:
        raise ValueError(f"transition={transition} must lie between 0 and {recipe.QA_FROM / 2}")
    made = []
    before = SHORT_ONLY
    for stage in table:
        rows = batch_tokens // stage.length
        if rows < 1:
            raise ValueError(
                f"batch_tokens={batch_tokens} hold no row of the stage {stage.name!r}, {stage.length} tokens"
            )
        steps = max(1, round(stage.tokens / (rows * stage.length)))
        knots, before = _shares(stage, before, steps * rows * stage.length, transition)
        named = (sources.short, sources.medium, sources.long, sources.qa)
        weighted = tuple(
            dataclasses.replace(source, weights=weights)
            for source, weights in zip(named, knots, strict=True)
        )
        config = dataclasses.replace(
            base,
            init_from="",
            model=None,
            tokenizer="",
            special_tokens=(),
            batch_ramp=(),
            rope_theta=stage.rope_theta,
            max_position=stage.length,
            data=dataclasses.replace(
                base.data, sources=weighted, seq_len=stage.length, batch_size=rows
            ),
            loop=dataclasses.replace(base.loop, steps=steps),
        )
        made.append((stage.name, config))
    return tuple(made)


def _shares(stage: Extension, before: tuple[float, ...], total: int, transition: float):
    """The (tokens, weight) pairs of each of the four sources over `total` tokens, and the shares at the end."""
    own = (stage.short, stage.medium, stage.long, 0.0)
    rest = 1 - recipe.QA_SHARE
    last = (stage.short * rest, stage.medium * rest, stage.long * rest, recipe.QA_SHARE)
    times = [0, transition, recipe.QA_FROM - transition, recipe.QA_FROM]
    at = [round(time * total) for time in times]
    knots = tuple(
        tuple(zip(at, shares, strict=True)) for shares in zip(before, own, own, last, strict=True)
    )
    return knots, last
