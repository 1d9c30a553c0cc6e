"""Scaling laws and the critical batch size: what they are measured with, and their fits.

Power laws (Table 2, Figure 6), the loss as a function of parameters and tokens (eq. 14), and the batch size at which
noise and signal of the gradient balance (section 4.2, Figure 13; McCandlish et al. 2018, "An Empirical Model of
Large-Batch Training"). Compute is counted in PFLOP/s-days, as in the paper.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jax import lax

from research.core.step import Batch, LossFn, accumulate
from research.lm import trainer as lm
from research.lm.decoder import Decoder

PFLOP_S_DAY = 1e15 * 24 * 3600  # FLOPs


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient * x^exponent."""

    coefficient: float
    exponent: float

    def __call__(self, x):
        return self.coefficient * np.asarray(x, np.float64) ** self.exponent


@dataclass(frozen=True)
class ScalingLaw:
    """The best loss for a compute C in PFLOP/s-days, and the parameters and tokens that reach it."""

    loss: PowerLaw
    parameters: PowerLaw
    tokens: PowerLaw


# Table 2.
TABLE_2 = {
    "softmax": ScalingLaw(
        PowerLaw(3.7087, -0.0798), PowerLaw(1.82e8, 0.7118), PowerLaw(2.56e10, 0.5102)
    ),
    "lightning": ScalingLaw(
        PowerLaw(3.5391, -0.0768), PowerLaw(2.74e8, 0.6470), PowerLaw(4.43e10, 0.4684)
    ),
    "hybrid": ScalingLaw(
        PowerLaw(3.4797, -0.0763), PowerLaw(2.57e8, 0.6670), PowerLaw(3.70e10, 0.4707)
    ),
}


def fit_power_law(x, y) -> PowerLaw:
    """Least squares of log y on log x. Raises ValueError for fewer than two different positive points."""
    x, y = (np.asarray(values, np.float64) for values in (x, y))
    if x.shape != y.shape or x.ndim != 1 or len(np.unique(x)) < 2:
        raise ValueError(f"a power law needs two points or more, got x {x} and y {y}")
    if not (np.isfinite([x, y]).all() and (x > 0).all() and (y > 0).all()):
        raise ValueError(f"a power law goes through positive numbers, got x {x} and y {y}")
    exponent, intercept = np.polyfit(np.log(x), np.log(y), 1)
    return PowerLaw(float(np.exp(intercept)), float(exponent))


@dataclass(frozen=True)
class Curve:
    """A training run of a model of `parameters`: its loss after so much compute and so many tokens."""

    parameters: float
    compute: Sequence[float]  # PFLOP/s-days, increasing
    tokens: Sequence[float]
    loss: Sequence[float]


def fit_envelope(curves: Sequence[Curve], points: int = 32) -> ScalingLaw:
    """The power laws of the lower envelope of training curves (Kaplan et al. 2020; Hoffmann et al. 2022, approach 1).

    At `points` computes, evenly in their logarithm, the losses of all curves that reach there are interpolated, and
    the lowest counts, with its parameters and tokens. Where the smallest or the largest model wins, the envelope may
    be no more than the end of the range of sizes, so that these points are left out.

    Raises ValueError for fewer than three sizes, or if no other size ever wins.
    """
    sizes = sorted({curve.parameters for curve in curves})
    if len(sizes) < 3:
        raise ValueError(f"an envelope needs models of three sizes or more, got {sizes}")
    low = np.log(min(curve.compute[0] for curve in curves))
    high = np.log(max(curve.compute[-1] for curve in curves))

    def inner(grid) -> list[tuple[float, float, float, float]]:
        """(log compute, loss, parameters, tokens) of the winners that are of a middle size."""
        found = []
        for at in grid:
            reaching = [c for c in curves if np.log(c.compute[0]) <= at <= np.log(c.compute[-1])]
            if not reaching:
                continue
            best = min(reaching, key=lambda curve: _interpolate(curve, at, curve.loss))
            if sizes[0] < best.parameters < sizes[-1]:
                loss, tokens = (_interpolate(best, at, y) for y in (best.loss, best.tokens))
                found.append((at, loss, best.parameters, tokens))
        return found

    coarse = [at for at, *_ in inner(np.linspace(low, high, 1024))]
    if len(coarse) < 2:
        raise ValueError(
            "no model between the smallest and the largest is ever the best: train others, or longer"
        )
    at, loss, parameters, tokens = zip(*inner(np.linspace(coarse[0], coarse[-1], points)), strict=True)
    compute = np.exp(at)
    return ScalingLaw(*(fit_power_law(compute, y) for y in (loss, parameters, tokens)))


def _interpolate(curve: Curve, log_compute: float, values: Sequence[float]) -> float:
    return float(np.exp(np.interp(log_compute, np.log(curve.compute), np.log(values))))


def fit_iso_flop(compute, parameters, tokens, loss) -> ScalingLaw:
    """The power laws of the best sizes at several computes (Hoffmann et al. 2022, approach 2).

    All arguments have one entry per run; runs of the same `compute` belong together. Through each group goes a
    parabola of log loss over log parameters; its minimum is the group's best size. Tokens at it are interpolated.

    Raises ValueError for a group of fewer than three sizes, or whose best size is not between its smallest and largest.
    """
    compute, parameters, tokens, loss = (
        np.asarray(x, np.float64) for x in (compute, parameters, tokens, loss)
    )
    best = []
    for level in np.unique(compute):
        mine = compute == level
        order = np.argsort(parameters[mine])
        size, seen, value = (np.log(x[mine])[order] for x in (parameters, tokens, loss))
        if len(np.unique(size)) < 3:
            raise ValueError(f"{len(size)} sizes at compute {level:g}; a minimum needs three or more")
        middle = size.mean()
        curvature, slope, _ = polynomial = np.polyfit(size - middle, value, 2)
        at = -slope / (2 * curvature) if curvature > 0 else np.nan
        if not size[0] - middle < at < size[-1] - middle:
            raise ValueError(f"at compute {level:g} the best size lies outside of those that were trained")
        lowest, tokens_there = np.polyval(polynomial, at), np.interp(at + middle, size, seen)
        best.append(np.exp([np.log(level), lowest, at + middle, tokens_there]))
    level, lowest, size, seen = np.transpose(best)
    return ScalingLaw(*(fit_power_law(level, y) for y in (lowest, size, seen)))


@dataclass(frozen=True)
class LossSurface:
    """L(P, T) = d + a P^alpha + b T^beta + c (P T)^gamma for activated parameters P and tokens T (eq. 14)."""

    d: float
    a: float
    alpha: float
    b: float
    beta: float
    c: float
    gamma: float

    def __call__(self, parameters, tokens):
        P, T = (np.asarray(x, np.float64) for x in (parameters, tokens))
        return self.d + self.a * P**self.alpha + self.b * T**self.beta + self.c * (P * T) ** self.gamma


def fit_loss_surface(parameters, tokens, loss) -> LossSurface:
    """Eq. 14 for the runs of one number of experts, by least squares of relative errors.

    For given exponents the four coefficients follow from a linear problem; the exponents, in [-1.5, -0.01], are sought
    from several starts. a and b are not negative. Raises ValueError for fewer than seven runs.
    """
    P, T, L = (np.asarray(x, np.float64) for x in (parameters, tokens, loss))
    if len(L) < 7:
        raise ValueError(f"eq. 14 has seven unknowns, and there are {len(L)} runs")
    # Around their geometric means, so that the columns are of one size.
    x, y = np.log(P) - np.log(P).mean(), np.log(T) - np.log(T).mean()
    scale = np.log(P).mean(), np.log(T).mean()
    bounds = np.asarray([-np.inf, 0.0, 0.0, -np.inf]), np.full(4, np.inf)

    def coefficients(exponents):
        alpha, beta, gamma = exponents
        columns = np.stack([np.ones_like(x), np.exp(alpha * x), np.exp(beta * y), np.exp(gamma * (x + y))], 1)
        columns /= L[:, None]
        solved = np.linalg.lstsq(columns, np.ones_like(L), rcond=None)[0]
        if min(solved[1:3]) < 0:
            solved = scipy.optimize.lsq_linear(columns, np.ones_like(L), bounds).x
        return solved, columns @ solved - 1

    fits = [
        scipy.optimize.least_squares(
            lambda e: coefficients(e)[1], start, bounds=(-1.5, -0.01), xtol=1e-12, ftol=1e-12, gtol=1e-12
        )
        for start in itertools.product((-0.1, -0.35, -0.8), repeat=3)
    ]
    alpha, beta, gamma = best = min(fits, key=lambda fit: fit.cost).x
    (d, a, b, c), _ = coefficients(best)
    return LossSurface(
        float(d),
        float(a * np.exp(-alpha * scale[0])), float(alpha),
        float(b * np.exp(-beta * scale[1])), float(beta),
        float(c * np.exp(-gamma * sum(scale))), float(gamma),
    )  # fmt: skip


@dataclass(frozen=True)
class GradientNoise:
    """Of the gradient of one row: the trace of its covariance, and the square of its mean's norm.

    Their ratio is the simple noise scale, the batch size at which the two balance (McCandlish et al. 2018, eq. 2.9).
    Both are unbiased, so the square of a small gradient may come out negative: average over more batches.
    """

    trace: float
    squared_norm: float
    tokens_per_row: float
    loss: float

    @property
    def critical_rows(self) -> float:
        """B_simple in rows; inf where no mean gradient was found in the noise."""
        return self.trace / self.squared_norm if self.squared_norm > 0 else np.inf

    @property
    def critical_tokens(self) -> float:
        return self.critical_rows * self.tokens_per_row


def gradient_noise(
    loss_fn: LossFn, params: Any, batches: Iterable[Batch], micro_rows: int, tokens_per_row: float
) -> GradientNoise:
    """From squared gradient norms at two batch sizes (McCandlish et al. 2018, appendix A.1).

    With G_b the mean gradient over b rows, E|G_b|^2 = |G|^2 + tr(S) / b, so

        |G|^2 = (B |G_B|^2 - b |G_b|^2) / (B - b),    tr(S) = (|G_b|^2 - |G_B|^2) / (1/b - 1/B)

    are unbiased; here b = `micro_rows`, averaged over the micro-batches of a batch, and B its rows. Both are averaged
    over `batches`.

    Args:
      loss_fn: as of a training step: over all rows of a batch its sum is their mean loss.
      batches: [rows, …] with a multiple of `micro_rows`, and at least two micro-batches.

    Raises ValueError for batches of fewer rows.
    """

    @jax.jit
    def norms(params, batch):
        rows = jax.tree.leaves(batch)[0].shape[0]
        parts = jax.tree.map(lambda x: x.reshape(-1, micro_rows, *x.shape[1:]), batch)

        def one(total, part):
            grads, loss, _ = accumulate(loss_fn, params, part)
            # The part's own mean gradient: its sum is a share of micro_rows / rows.
            square = optax.tree.norm(grads, squared=True) * (rows / micro_rows) ** 2
            return jax.tree.map(jnp.add, total, grads), (square, loss)

        start = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
        total, (squares, losses) = lax.scan(one, start, parts)
        return jnp.mean(squares), optax.tree.norm(total, squared=True), jnp.sum(losses)

    found = []
    for batch in batches:
        rows = jax.tree.leaves(batch)[0].shape[0]
        if rows % micro_rows or rows < 2 * micro_rows:
            raise ValueError(f"{rows} rows are not two or more micro-batches of micro_rows={micro_rows}")
        small, large, loss = (float(x) for x in norms(params, batch))
        squared = (rows * large - micro_rows * small) / (rows - micro_rows)
        trace = (small - large) / (1 / micro_rows - 1 / rows)
        found.append((trace, squared, loss))
    if not found:
        raise ValueError("no batch to measure gradients on")
    trace, squared, loss = np.mean(found, axis=0)
    return GradientNoise(float(trace), float(squared), float(tokens_per_row), float(loss))


def critical_batch(
    model: Decoder, params: Any, rows: Iterable[dict[str, np.ndarray]], micro_rows: int = 1
) -> GradientNoise:
    """The gradient noise of a language model on batches of `core.data` (its pipelines'), and its loss on them."""
    rows = list(rows)
    batches, tokens = zip(*(lm.to_batch(batch) for batch in rows), strict=True)
    per_row = sum(tokens) / sum(len(batch["tokens"]) for batch in rows)
    return gradient_noise(partial(lm.loss_fn, model), params, batches, micro_rows, per_row)
