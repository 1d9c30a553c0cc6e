"""Optimizers and learning-rate schedules, from one small config.

`make` returns an Optax transformation: clip by global norm → SGD, Adam, AdamW or Muon → learning rate.
Its state holds the rate of the last update under the name `learning_rate`, which the training
steps report as the metric 'lr'.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax


@dataclass(frozen=True)
class OptimConfig:
    """`lr` is the peak rate. Fields that a schedule does not use are ignored by it."""

    name: Literal["adamw", "adam", "sgd", "muon"] = "adamw"
    lr: float = 1e-3
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0  # AdamW and Muon; decoupled, times the learning rate
    clip_norm: float = 1.0  # global gradient norm; 0 = no clipping
    schedule: Literal["constant", "cosine", "wsd", "piecewise"] = "constant"
    warmup_steps: int = 0  # linear, for every schedule
    final_fraction: float = 0.0  # cosine, wsd: the rate at the end, as a share of the peak
    decay_steps: int = 0  # length of the final decay: linear in wsd, exponential in piecewise
    boundaries: tuple[int, ...] = ()  # piecewise: from this update on …
    factors: tuple[float, ...] = ()  # … the rate is lr times this


class ScheduleState(NamedTuple):
    """`count` updates were made, the last one with `learning_rate`."""

    count: jax.Array
    learning_rate: jax.Array


def make(
    config: OptimConfig,
    total_steps: int,
    matrices: Callable[[Any], Any] | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a run of `total_steps` updates.

    Moments are kept in float32 at least, whatever the parameters' dtype. AdamW (Loshchilov and
    Hutter 2019, algorithm 2) decays weights with `decayed` alone. Muon (Jordan et al. 2024) takes the
    leaves for which `matrices(params)` is True, and Adam the others; a matrix's update has the root
    mean square 0.2 (Liu et al. 2025, section 2.2), so that one rate and decay serve both.

    Raises ValueError for settings that make no sense, naming them, and for Muon where the caller's
    model has not said which of its parameters are matrices.
    """
    if config.lr < 0 or config.clip_norm < 0 or config.weight_decay < 0:
        raise ValueError("optim: lr, clip_norm and weight_decay must not be negative")
    if config.weight_decay and config.name not in ("adamw", "muon"):
        raise ValueError(f"optim: weight_decay needs name='adamw' or 'muon', got {config.name!r}")
    if config.name == "muon" and matrices is None:
        raise ValueError("optim: name='muon' is not there for this kind of model; take 'adamw'")
    parts = []
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.name == "muon":
        muon = optax.chain(optax.contrib.scale_by_muon(weight_dimension_numbers=_axes), _even())
        labels = lambda params: jax.tree.map(lambda m: "muon" if m else "adam", matrices(params))  # noqa: E731
        parts.append(_wide(optax.partition({"muon": muon, "adam": adam}, labels)))
    elif config.name != "sgd":
        parts.append(_wide(adam))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, decayed))
    parts.append(_scale_by_schedule(schedule(config, total_steps)))
    return optax.chain(*parts)


def schedule(config: OptimConfig, total_steps: int) -> Callable[[jax.Array], jax.Array]:
    """The learning rate of update t = 0, 1, …, as a float32 scalar.

    With W warm-up steps every schedule is multiplied by min(1, (t + 1) / W): the first update is
    not wasted on a zero rate, and update W - 1 has the full one. Then, with f = final_fraction:

    - constant: lr.
    - cosine: lr (f + (1 - f) (1 + cos(π x)) / 2), x = (t - W) / (total - W).
    - wsd (warm-up, stable, decay): lr until total - decay_steps, then linearly to f lr at `total`.
    - piecewise: lr times factors[i] from boundaries[i] on. With decay_steps, the last factor is
      approached exponentially: from f' = factors[-2] (1 if there is one factor alone) the rate
      falls as lr f' (factors[-1] / f')^x, x = min(1, (t - boundaries[-1]) / decay_steps), and
      stays there. This is MiniMax-01's schedule (section 4.2); it does not depend on the total.
    """
    warmup, decay = config.warmup_steps, config.decay_steps
    if total_steps < 1 or warmup < 0:
        raise ValueError(f"optim: total_steps {total_steps} and warmup_steps {warmup} are no run")
    if config.schedule == "cosine" and warmup >= total_steps:
        raise ValueError(
            f"optim: warmup_steps={warmup} leaves nothing of {total_steps} steps to the cosine"
        )
    if config.schedule == "wsd" and not 0 < decay <= total_steps - warmup:
        raise ValueError(
            f"optim: schedule 'wsd' needs 0 < decay_steps <= total - warmup_steps = "
            f"{total_steps - warmup}, got {decay}"
        )
    if config.schedule == "piecewise":
        if len(config.boundaries) != len(config.factors) or not config.boundaries:
            raise ValueError("optim: schedule 'piecewise' needs as many factors as boundaries")
        if any(b <= a for a, b in zip(config.boundaries, config.boundaries[1:], strict=False)):
            raise ValueError(f"optim: boundaries {config.boundaries} must increase")
        if decay < 0 or (decay and min((1.0, *config.factors)[-2:]) <= 0):
            raise ValueError(
                f"optim: an exponential decay (decay_steps={decay}) needs positive factors at its "
                f"two ends, got {config.factors}"
            )

    def share(t: jax.Array) -> jax.Array:
        if config.schedule == "cosine":
            x = jnp.clip((t - warmup) / (total_steps - warmup), 0.0, 1.0)
            return config.final_fraction + (1 - config.final_fraction) * (
                0.5 * (1 + jnp.cos(jnp.pi * x))
            )
        if config.schedule == "wsd":
            x = jnp.clip((t - (total_steps - decay)) / decay, 0.0, 1.0)
            return 1 - (1 - config.final_fraction) * x
        if config.schedule == "piecewise":
            factors = jnp.asarray((1.0, *config.factors), jnp.float32)
            passed = jnp.sum(t >= jnp.asarray(config.boundaries, jnp.float32))
            if not decay:
                return factors[passed]
            x = jnp.clip((t - config.boundaries[-1]) / decay, 0.0, 1.0)
            falling = factors[-2] * (factors[-1] / factors[-2]) ** x
            return jnp.where(passed == len(config.boundaries), falling, factors[passed])
        return jnp.ones((), jnp.float32)

    def rate(count: jax.Array) -> jax.Array:
        t = jnp.asarray(count, jnp.float32)
        ramp = jnp.minimum(1.0, (t + 1) / warmup) if warmup else 1.0
        return jnp.asarray(config.lr * ramp * share(t), jnp.float32)

    return rate


def decayed(params):
    """True where weight decay applies: not on scales, biases and vectors.

    By name as well as by rank, because the decoder stacks its layers: a norm scale is [L, D].
    """

    def decays(path, leaf) -> bool:
        name = str(getattr(path[-1], "key", getattr(path[-1], "name", ""))) if path else ""
        return leaf.ndim >= 2 and name not in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(decays, params)


def kernels(params):
    """True for the leaves named 'kernel' of two axes, inputs and outputs, or of three, a stack of such matrices."""

    def matrix(path, leaf) -> bool:
        return str(getattr(path[-1], "key", "")) == "kernel" and leaf.ndim in (2, 3)

    return jax.tree_util.tree_map_with_path(matrix, params)


def _axes(updates):
    """The axes that make a matrix: the last two."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(-2, -1), updates)


def _even() -> optax.GradientTransformation:
    """Orthogonal matrices [..., D, F], of which a number is 1 / sqrt(max(D, F)) large, to 0.2."""

    def scale(updates, params=None):
        del params
        return jax.tree.map(lambda u: 0.2 * max(u.shape[-2:]) ** 0.5 * u, updates)

    return optax.stateless(scale)


def _scale_by_schedule(rate: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformation:
    def init(params):
        del params
        return ScheduleState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32))

    def update(updates, state, params=None):
        del params
        lr = rate(state.count)
        updates = jax.tree.map(lambda u: -lr.astype(u.dtype) * u, updates)
        return updates, ScheduleState(state.count + 1, lr)

    return optax.GradientTransformation(init, update)


def _wide(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` with a state in float32 at least; bfloat16 second moments do not move."""

    def widen(tree):
        return jax.tree.map(lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree)

    def init(params):
        return inner.init(widen(params))

    def update(updates, state, params=None):
        return inner.update(widen(updates), state, params)

    return optax.GradientTransformation(init, update)
