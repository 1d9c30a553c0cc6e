"""Pre- against post-norm in deep stacks, experts against a dense MLP, the hybrid with experts (Figure 4, Table 5)."""

import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np

from experiments import plots
from experiments.tables.base import Claim, Results, Run, Table, Verdict, over_seeds, verdict
from experiments.tables.minimax_01 import arms
from research.core.optim import OptimConfig
from research.lm import costs
from research.lm.config import DecoderConfig, MoEConfig, Residual
from research.minimax_01 import study
from research.minimax_01.retrieval import Language
from research.minimax_01.study import Study

DEEP = ("post", "pre", "post-1")  # of which alpha is (2L)^(1/4), none, 1
FLAT = ("dense", "experts", "experts-softmax")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Deep stacks and flat ones, each with its width, layers, steps and rates; both read the same language."""

    language: Language
    deep: tuple[int, int, int]  # width, layers, steps
    flat: tuple[int, int, int]
    experts: int
    batch: int
    rates: tuple[float, ...]
    points: int = 50
    dtype: str = "float32"
    scan_layers: bool = False


SCALES = {
    "cpu": Settings(
        Language(length=128, vocab=32, classes=16, repeat=0.25),
        deep=(32, 24, 400), flat=(48, 4, 600), experts=8, batch=8, rates=(3e-3, 1e-2),
    ),
    "gpu": Settings(
        Language(length=1024, vocab=1024, classes=65536, repeat=0.25),
        deep=(512, 48, 20_000), flat=(512, 8, 20_000), experts=16, batch=64, rates=(3e-4, 1e-3),
        points=100, dtype="bfloat16", scan_layers=True,
    ),
}  # fmt: skip


def model(s: Settings, arm: str) -> DecoderConfig:
    width, layers, _ = s.deep if arm in DEEP else s.flat
    vocab = s.language.vocab_size
    build = functools.partial(
        arms.decoder,
        width=width,
        layers=layers,
        vocab=vocab,
        dtype=s.dtype,
        scan_layers=s.scan_layers,
    )
    if arm == "post":
        return build("hybrid-3")
    if arm == "pre":
        return build("hybrid-3", residual=Residual())
    if arm == "post-1":
        return build("hybrid-3", residual=Residual(post_norm=True))
    if arm == "dense":
        return build("hybrid-3", mlp_size=4 * width)
    # As much of each token's arithmetic: two of the experts, each half as wide.
    experts = MoEConfig(s.experts, top_k=2)
    mixers = "softmax" if arm == "experts-softmax" else "hybrid-3"
    return build(mixers, mlp_size=2 * width, moe=experts)


def plan(s: Settings, arm: str) -> Study:
    steps = (s.deep if arm in DEEP else s.flat)[2]
    optim = OptimConfig(weight_decay=0.1, warmup_steps=steps // 20)
    return Study(model(s, arm), s.language, optim, steps, s.batch, s.points)


def measure(s: Settings, arm: str, seed: int, directory: pathlib.Path, results: Any) -> dict:
    del directory, results
    p = plan(s, arm)
    result = arms.trained(p, seed, s.rates, arm)
    chosen = arms.best(p, result)
    tested = study.evaluate(p, result.params, split="test")
    return {
        "rates": s.rates,
        "chosen": chosen,
        "loss": float(tested["loss"][chosen]),
        "losses": arms.rounded(tested["loss"]),
        "floor": s.language.entropy * (1 - s.language.repeat),
        "curve": arms.rounded(result.curves["loss"][chosen]),
        "grad_norm": arms.rounded(result.curves["grad_norm"][chosen]),
        "flops": costs.training_flops(p.model, s.language.length)
        * p.steps
        * p.batch
        * s.language.length,
        "parameters": costs.parameters(p.model).total,
    }


def _gap(results: Results, one: str, other: str) -> Any:
    return arms.difference(results, one, other, "loss")


def _post_wins(results: Results) -> Verdict:
    gap = _gap(results, "post", "pre")
    numbers = {f"{arm}: loss": arms.level(results, arm, "loss") for arm in ("post", "pre")}
    return verdict(gap.high <= 0, gap.low > 0, {**numbers, "post - pre": gap})


def _alpha_matters(results: Results) -> Verdict:
    def spread(figures):
        norms = np.array(figures["grad_norm"])
        return float(np.nanmax(norms) / np.nanmedian(norms))

    gap = _gap(results, "post-1", "post")
    numbers = {
        "loss with alpha 1 - DeepNorm's": gap,
        "largest over median gradient norm, alpha 1": arms.level(results, "post-1", spread),
        "the same, DeepNorm": arms.level(results, "post", spread),
    }
    return verdict(gap.low > 0, gap.high < 0, numbers)


def share_of_compute(fast: Any, slow: Any) -> float:
    """FLOPs at which `fast`'s running loss first is `slow`'s last, as a share of `slow`'s FLOPs; 1 if it never is."""
    target = arms.smoothed(slow["curve"])[-1]
    losses = arms.smoothed(fast["curve"])
    (reached,) = np.nonzero(losses <= target)
    if not reached.size:
        return 1.0
    return float((reached[0] + 1) / len(losses) * fast["flops"] / slow["flops"])


def _experts_save(results: Results) -> Verdict:
    shares = over_seeds(
        [
            share_of_compute(results["experts"][seed], results["dense"][seed])
            for seed in results["dense"]
        ]
    )
    numbers = {
        "FLOPs to the dense model's last loss, as a share": shares,
        "loss at equal FLOPs, experts - dense": _gap(results, "experts", "dense"),
    }
    return verdict(shares.high <= 0.6, shares.low > 0.6, numbers)


def _hybrid_with_experts(results: Results) -> Verdict:
    gap = _gap(results, "experts", "experts-softmax")
    return verdict(gap.high <= 0.01, gap.low > 0.01, {"loss, hybrid - softmax": gap})


def figure(results: Results, path: pathlib.Path) -> None:
    def curve(figures, key):
        points = figures[key]
        return [((i + 1) / len(points) * figures["flops"] / 1e12, x) for i, x in enumerate(points)]

    panels = {
        title: {
            arm: [curve(f, key) for f in runs.values()]
            for arm, runs in arms.known(results, group).items()
        }
        for title, key, group in (
            ("deep stacks: training loss", "curve", DEEP),
            ("deep stacks: gradient norm", "grad_norm", DEEP),
            ("experts and dense: training loss", "curve", FLAT),
        )
    }
    plots.curves(path, panels, xlabel="training compute, TFLOP", smooth=2)


TABLE = Table(
    name="minimax_01/architecture",
    title="MiniMax-01: post-norm, experts, and the hybrid with experts",
    scales={
        scale: [Run(arm, functools.partial(measure, s, arm)) for arm in DEEP + FLAT]
        for scale, s in SCALES.items()
    },
    claims=[
        Claim(
            "T5-2a",
            "Post-norm with DeepNorm beats pre-norm in a deep stack",
            "post / pre-norm: MMLU 50.2 / 43.9, GSM8k 16.8 / 12.2, BBH 32.6 / 29.9 (60B, 48 layers, Table 5)",
            "held-out loss, each at its best rate: post - pre at most 0 (upper bound); refuted if the lower bound is "
            "above 0.",
            ("post", "pre"),
            _post_wins,
        ),
        Claim(
            "T5-2b",
            "It is DeepNorm's scale that makes it work",
            "alpha = (2L)^(1/4) (section 4.2; no ablation printed)",
            "held-out loss with alpha = 1 less that with DeepNorm's above 0 (lower bound); refuted if the upper bound "
            "is below 0.",
            ("post", "post-1"),
            _alpha_matters,
        ),
        Claim(
            "F4",
            "Experts reach a dense model's loss with less compute",
            "24B experts, 2B active: about 4 ZFLOP against 13.5 for a dense 7B at 1T tokens (Fig. 4, read off)",
            "FLOPs until the running training loss first is the dense model's last: at most 0.6 of the dense model's "
            "(upper bound; 1 where it never is); refuted if the lower bound is above 0.6.",
            ("dense", "experts"),
            _experts_save,
        ),
        Claim(
            "T5-1",
            "The hybrid is as good as softmax attention in a model with experts",
            "hybrid / softmax: MMLU 49.5 / 49.3, BBH 32.2 / 28.2, GSM8k 18.5 / 18.8 (28B, Table 5)",
            "held-out loss of the hybrid at most 0.01 above softmax's (upper bound); refuted if the lower bound is "
            "above 0.01.",
            ("experts", "experts-softmax"),
            _hybrid_with_experts,
        ),
    ],
    figure=figure,
)  # fmt: skip
