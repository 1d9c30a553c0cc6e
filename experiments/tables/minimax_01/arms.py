"""What the tables' rows share: the paper's block at any size, rates chosen on validation draws, differences."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.tables.base import Interval, Results, over_seeds
from research.lm.config import DecoderConfig, Residual
from research.minimax_01 import study
from research.minimax_01.study import Member, Study, Trained

MIXERS = {  # arm → the repeating pattern of its layers
    "softmax": ("softmax",),
    "hybrid-1": ("lightning", "softmax"),
    "hybrid-3": ("lightning",) * 3 + ("softmax",),
    "hybrid-7": ("lightning",) * 7 + ("softmax",),
    "lightning": ("lightning",),
}


def decoder(arm: str, *, width: int, layers: int, vocab: int, **changes: Any) -> DecoderConfig:
    """The paper's block (section 2): DeepNorm, SwiGLU, half of each softmax head rotary; no experts unless given.

    The MLP has the 8 width^2 parameters of the scaling-law models (Table 1), heads are `width / 4` or 128 wide.
    """
    head = min(128, width // 4)
    settings = {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": width // head,
        "num_kv_heads": width // head,
        "head_dim": head,
        "mlp_size": 8 * width // 3,
        "mixers": MIXERS[arm],
        "residual": Residual.deepnorm(layers),
        "init": "deepnorm",
        "rotary_dim": head // 2,
        "norm_eps": 1e-5,
        "tie_embeddings": False,
        "scan_layers": False,
    }
    return DecoderConfig(**settings | changes)


def trained(plan: Study, seed: int, rates: Sequence[float], name: str) -> Trained:
    """One member for each learning rate, all of the same seed."""
    return study.train(plan, [Member(seed, rate) for rate in rates], name)


def best(plan: Study, result: Trained) -> int:
    """The member with the least loss on validation draws, from which no figure is computed."""
    tested = study.evaluate(plan, result.params, split="validation", batches=16, size=plan.batch)
    losses = tested["loss"]
    return int(np.nanargmin(losses)) if np.isfinite(losses).any() else 0


def rounded(values: Any, digits: int = 5) -> list:
    """JSON-ready."""
    return np.round(np.asarray(values, float), digits).tolist()


def difference(results: Results, one: str, other: str, key: Any) -> Interval:
    """Of a figure between two runs, over seeds; `key` is a name or a function of a run's figures."""
    read = key if callable(key) else lambda figures: figures[key]
    return over_seeds(
        [read(results[one][seed]) - read(results[other][seed]) for seed in results[one]]
    )


def level(results: Results, run: str, key: Any) -> Interval:
    read = key if callable(key) else lambda figures: figures[key]
    return over_seeds([read(figures) for figures in results[run].values()])


def smoothed(curve: Sequence[float], width: int = 3) -> np.ndarray:
    """Running mean over the last `width` points, fewer at the start."""
    sums = np.cumsum(np.insert(np.asarray(curve, float), 0, 0.0))
    ends = np.arange(1, len(curve) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def known(results: Results, runs: Sequence[str]) -> Mapping[str, Any]:
    """Of the runs named, those with results."""
    return {run: results[run] for run in runs if results.get(run)}
