"""From noise to latents: Euler steps on the learned velocity, guided, as one compiled program.

    latents = generate(model, params, cond_BTE, seeds=(1234,), steps=50, guidance=5.0)

`times` and `turbo_times` are the grids of the released schedulers. The program is compiled once for a batch shape: any
number of steps, any guidance scale and any grid run through it. Latents are those that the network was trained on;
divide by the VAE's scale_factor to decode them.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.hunyuan3d_2.dit.flow import shifted

MAX_STEPS = 1000


def times(steps: int, shift: float = 1.0) -> np.ndarray:
    """The released flow-matching scheduler's grid, float32 [steps + 1]: linspace(0, 1, steps), shifted, and 1.

    Its last two entries are both 1: of `steps` evaluations the last moves nothing, and `generate` leaves it out.
    """
    _check_steps(steps)
    if shift <= 0:
        raise ValueError(f"shift must be positive, got {shift}")
    return np.append(shifted(np.linspace(0, 1, steps), shift), 1).astype(np.float32)


def turbo_times(steps: int, grid: int = 50) -> np.ndarray:
    """The grid of the consistency-distilled (turbo) models, float32 [steps + 1].

    They know `grid` times: of a thousand equidistant ones, the first and every (1000 / grid)-th. `steps` of these are
    taken at equal distances from the first, and 1 is appended.
    """
    _check_steps(steps)
    if not 1 <= grid <= 1000 or steps > grid:
        raise ValueError(f"grid={grid} must be from 1 to 1000 and have room for {steps} steps")
    known = np.concatenate([[0], np.arange(1, grid) * (1000 // grid) - 1])
    chosen = known[np.floor(np.linspace(0, grid, steps, endpoint=False)).astype(int)]
    return np.append(np.linspace(0, 1, 1000)[chosen], 1).astype(np.float32)


def noise(seeds: Sequence[int], num_latents: int, latent_dim: int) -> jax.Array:
    """x_0 of every seed: float32 [B, L, C]; a sample does not depend on what it is in a batch with."""
    seeds_B = np.asarray([seed % 2**32 for seed in seeds], np.uint32)
    return _noise(seeds_B, (num_latents, latent_dim))


def generate(
    model: nn.Module,
    params: Any,
    cond_BTE: jax.Array,
    *,
    seeds: Sequence[int],
    steps: int = 50,
    guidance: float = 5.0,
    shift: float = 1.0,
    turbo_grid: int | None = None,
    num_latents: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> jax.Array:
    """Latents for every condition.

    Args:
      model, params: a `model.build(config)` and its parameters.
      cond_BTE: image tokens; zeros for none.
      seeds: one for each row of the batch.
      steps: evaluations on the released schedulers' count, of which the ordinary one's last does nothing.
      guidance: g in v = v_u + g (v_c - v_u), where v_u is the velocity without a condition (zeros), evaluated in one
        batch [cond, uncond]; 1 is no guidance, at half the cost. A model with `guidance_embed` takes g as an input.
      shift: of the times; 1 in all released models.
      turbo_grid: take `turbo_times` with this grid (50 or 100), for turbo models.
      num_latents: tokens to generate; None: the model's default.
      progress: called after every step with (steps done, all steps); each is then waited for.

    Returns:
      x_1, float32 [B, L, C].

    Raises:
      ValueError: settings or shapes that do not fit.
    """
    config = model.config
    if len(seeds) != cond_BTE.shape[0]:
        raise ValueError(
            f"{len(seeds)} seeds for {cond_BTE.shape[0]} conditions; give one for each"
        )
    grid = times(steps, shift) if turbo_grid is None else turbo_times(steps, turbo_grid)
    x_BLC = noise(seeds, num_latents or config.num_latents, config.latent_dim)
    return integrate(model, params, x_BLC, cond_BTE, grid, guidance, progress)


def integrate(
    model: nn.Module,
    params: Any,
    x_BLC: jax.Array,
    cond_BTE: jax.Array,
    grid: np.ndarray,
    guidance: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> jax.Array:
    """x at the last time of `grid`, from x at its first, by Euler's method: x += (t_{i+1} - t_i) v(x, t_i).

    The state is float32. Steps of length 0 are left out. Raises ValueError for times that decrease.
    """
    grid = np.asarray(grid, np.float32)
    if grid.ndim != 1 or len(grid) < 2 or (np.diff(grid) < 0).any():
        raise ValueError("the times must be a list of at least two, and not decrease")
    grid = grid[np.append(True, np.diff(grid) > 0)]
    steps = len(grid) - 1
    if steps > MAX_STEPS:
        raise ValueError(f"at most {MAX_STEPS} steps, got {steps}")
    padded = np.pad(grid, (0, MAX_STEPS + 1 - len(grid)), constant_values=grid[-1])
    guided = guidance != 1 and not model.config.guidance_embed
    run = functools.partial(_run, model, guided, params)
    x_BLC, guidance = jnp.asarray(x_BLC, jnp.float32), np.float32(guidance)
    if progress is None:
        return run(x_BLC, cond_BTE, padded, guidance, 0, steps)
    for i in range(steps):
        x_BLC = jax.block_until_ready(run(x_BLC, cond_BTE, padded, guidance, i, i + 1))
        progress(i + 1, steps)
    return x_BLC


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(model, guided, params, x_BLC, cond_BTE, times_N, guidance, start, stop):
    """Steps `start` to `stop` of the grid `times_N`."""
    B = x_BLC.shape[0]
    guidance_B = jnp.full(B, guidance) if model.config.guidance_embed else None
    if guided:
        cond_BTE = jnp.concatenate([cond_BTE, jnp.zeros_like(cond_BTE)])

    def step(i, x_BLC):
        state = jnp.concatenate([x_BLC, x_BLC]) if guided else x_BLC
        t_B = jnp.full(state.shape[0], times_N[i])
        v_BLC = model.apply({"params": params}, state, t_B, cond_BTE, guidance_B)
        if guided:
            cond, uncond = jnp.split(v_BLC, 2)
            v_BLC = uncond + guidance * (cond - uncond)
        return x_BLC + (times_N[i + 1] - times_N[i]) * v_BLC

    return jax.lax.fori_loop(start, stop, step, x_BLC)


@functools.partial(jax.jit, static_argnums=1)
def _noise(seeds_B, shape):
    return jax.vmap(
        lambda seed: jax.random.normal(jax.random.key(seed, impl="threefry2x32"), shape)
    )(seeds_B)


def _check_steps(steps: int) -> None:
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be from 1 to {MAX_STEPS}, got {steps}")
