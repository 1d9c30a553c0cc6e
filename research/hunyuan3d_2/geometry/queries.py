"""Where the field is asked for in training: the three groups of query points of §2.5."""

import numpy as np
from scipy import stats

BOUND = 1.05  # volume points are uniform in [-BOUND, BOUND]³
NEAR_SIGMAS = (0.005, 0.05)
NEAR_CUT = 0.25
SHARP_SIGMAS = (0.001, 0.003, 0.06, 0.01, 0.02, 0.04)


def volume(count: int, rng: np.random.Generator) -> np.ndarray:
    """[count, 3] float32, uniform in the cube."""
    return rng.uniform(-BOUND, BOUND, (count, 3)).astype(np.float32)


def near_uniform(surface_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uniform surface points, each coordinate moved by a normal number cut at ±0.25.

    `surface_N` is [N, 3 or more], position first. The first half of the points is moved with σ =
    0.005, the rest with σ = 0.05. [N, 3] float32.
    """
    sigma = _groups(len(surface_N), NEAR_SIGMAS)
    cut = NEAR_CUT / sigma
    shift = stats.truncnorm.rvs(-cut, cut, scale=sigma, size=(len(surface_N), 3), random_state=rng)
    return (surface_N[:, :3] + shift).astype(np.float32)


def near_sharp(sharp_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Points on sharp edges, moved by Gaussians of six widths, a sixth of the points each.

    `sharp_N` is [N, 3 or more]. [N, 3] float32.
    """
    shift = rng.standard_normal((len(sharp_N), 3)) * _groups(len(sharp_N), SHARP_SIGMAS)
    return (sharp_N[:, :3] + shift).astype(np.float32)


def _groups(count: int, sigmas: tuple[float, ...]) -> np.ndarray:
    """[count, 1]: each of the sigmas for an equal share of consecutive points."""
    return np.asarray(sigmas)[np.arange(count) * len(sigmas) // max(count, 1)][:, None]
