"""The sampler: the released schedulers' times, Euler's method, guidance, seeds; and multi-view conditions."""

import dataclasses
import math

import flax.linen as nn
import jax
import numpy as np
import pytest

from research.core.metrics import CompileCounter
from research.hunyuan3d_2.dit import flow, multiview, sampler
from research.hunyuan3d_2.dit.config import DiTConfig

CONFIG = DiTConfig(
    num_latents=5, latent_dim=3, cond_dim=4, hidden_size=8, num_heads=2, depth=1, single_depth=0
)


class Field(nn.Module):
    """A velocity that is known: from x to the point that the condition's first token names, or by `kind`."""

    config: DiTConfig = CONFIG
    kind: str = "exact"

    def __call__(self, x, t, cond, guidance=None):
        target = cond[:, :1, :3]
        if self.kind == "exact":  # the straight line through x at t
            return (target - x) / (1 - t[:, None, None])
        if self.kind == "growth":
            return x
        if self.kind == "time":
            return 0 * x + t[:, None, None]
        return 0 * x + target if guidance is None else 0 * x + guidance[:, None, None]


def conditions(B=2):
    return np.random.default_rng(0).normal(size=(B, 6, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("steps", "shift", "want"),
    [
        (5, 1.0, [0, 0.25, 0.5, 0.75, 1, 1]),
        (5, 3.0, [0, 0.5, 0.75, 0.9, 1, 1]),
        (2, 3.0, [0, 1, 1]),
        (1, 1.0, [0, 1]),
    ],
)
def test_times_are_the_schedulers(steps, shift, want):
    np.testing.assert_allclose(sampler.times(steps, shift), want, atol=1e-6)


@pytest.mark.parametrize("grid", [50, 100])
def test_turbo_times_are_the_schedulers(grid):
    got = sampler.turbo_times(5, grid)
    np.testing.assert_allclose(got, [0, 0.199199, 0.399399, 0.5996, 0.7998, 1], atol=1e-6)
    # All of the grid: the first of a thousand times and every r-th after it, counted from one.
    every = [0, *(np.arange(1, grid) * (1000 // grid) - 1), 999]
    np.testing.assert_allclose(sampler.turbo_times(grid, grid)[:-1] * 999, every[:-1], atol=1e-4)


def test_one_step_of_the_exact_velocity_arrives_and_so_do_many():
    cond = conditions()
    target = np.broadcast_to(cond[:, :1, :3], (2, 5, 3))
    for steps in (1, 2, 7):
        got = sampler.generate(Field(), {}, cond, seeds=(0, 1), steps=steps, guidance=1.0)
        np.testing.assert_allclose(got, target, atol=1e-6)


def test_steps_are_eulers_and_the_last_of_the_grid_is_left_out():
    x = np.asarray(sampler.noise((3, 4), 5, 3))
    got = sampler.integrate(Field(kind="growth"), {}, x, conditions(), sampler.times(5))
    np.testing.assert_allclose(got, x * 1.25**4, rtol=1e-6)
    got = sampler.integrate(Field(kind="time"), {}, x, conditions(), sampler.times(5, 3.0))
    left = sum(a * (b - a) for a, b in zip([0, 0.5, 0.75, 0.9], [0.5, 0.75, 0.9, 1], strict=True))
    np.testing.assert_allclose(got, x + left, atol=1e-6)
    calls = []
    got = sampler.integrate(
        Field(kind="growth"),
        {},
        x,
        conditions(),
        sampler.times(5),
        progress=lambda *at: calls.append(at),
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    np.testing.assert_allclose(got, x * 1.25**4, rtol=1e-6)


def test_guidance_extrapolates_from_zeros_or_goes_into_the_model():
    x, cond = np.zeros((2, 5, 3), np.float32), conditions()
    got = sampler.integrate(Field(kind="constant"), {}, x, cond, sampler.times(3), guidance=5.0)
    np.testing.assert_allclose(got, np.broadcast_to(5 * cond[:, :1, :3], x.shape), rtol=1e-5)
    embedded = Field(dataclasses.replace(CONFIG, guidance_embed=True), "constant")
    got = sampler.integrate(embedded, {}, x, cond, sampler.times(3), guidance=5.0)
    np.testing.assert_allclose(got, 5 * np.ones_like(x), rtol=1e-6)  # the raw scale, once


def test_a_seed_is_a_sample_whatever_the_batch():
    first, second = sampler.noise((7, 8), 6, 4), sampler.noise((8,), 6, 4)
    np.testing.assert_array_equal(first[1], second[0])
    assert np.abs(np.asarray(first[0] - first[1])).max() > 0.1
    many = np.asarray(sampler.noise(range(200), 16, 4))
    assert abs(many.mean()) < 0.05 and abs(many.std() - 1) < 0.05


def test_other_steps_guidance_and_grids_compile_nothing():
    cond = conditions()
    sampler.generate(Field(), {}, cond, seeds=(0, 1), steps=4, guidance=2.0)
    counter = CompileCounter()
    sampler.generate(Field(), {}, cond, seeds=(5, 6), steps=9, guidance=7.0, shift=3.0)
    sampler.generate(Field(), {}, cond, seeds=(5, 6), steps=5, guidance=3.0, turbo_grid=100)
    sampler.generate(
        Field(), {}, cond, seeds=(5, 6), steps=6, guidance=3.0, progress=lambda *_: None
    )
    assert counter.count == 0


def test_settings_that_make_no_sense_are_refused():
    cond = conditions()
    with pytest.raises(ValueError, match="3 seeds for 2 conditions"):
        sampler.generate(Field(), {}, cond, seeds=(0, 1, 2))
    with pytest.raises(ValueError, match="steps must be from 1"):
        sampler.times(0)
    with pytest.raises(ValueError, match="room for 51 steps"):
        sampler.turbo_times(51, 50)
    with pytest.raises(ValueError, match="not decrease"):
        sampler.integrate(Field(), {}, np.zeros((2, 5, 3)), cond, np.asarray([0, 0.5, 0.4]))


def test_paths_go_from_noise_to_data():
    rng = np.random.default_rng(0)
    x0, x1 = rng.normal(size=(2, 3, 4, 2)).astype(np.float32)
    np.testing.assert_array_equal(flow.interpolate(x0, x1, np.zeros(3, np.float32)), x0)
    np.testing.assert_array_equal(flow.interpolate(x0, x1, np.ones(3, np.float32)), x1)
    t = np.asarray([0.1, 0.5, 0.8], np.float32)
    want = (1 - t[:, None, None]) * x0 + t[:, None, None] * x1
    np.testing.assert_allclose(flow.interpolate(x0, x1, t), want, atol=1e-6)


def test_times_have_the_law_that_is_asked_for():
    draw = lambda config: np.sort(jax.vmap(lambda k: flow.sample_time(k, config))(keys))  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 4000)
    levels = (np.arange(4000) + 0.5) / 4000
    near = 1.63 / math.sqrt(4000)  # Kolmogorov and Smirnov, 1 %
    assert np.abs(draw(flow.FlowConfig()) - levels).max() < near
    t = draw(flow.FlowConfig(shift=3.0))  # t' = 3 t / (1 + 2 t): back by t = t' / (3 - 2 t')
    assert np.abs(t / (3 - 2 * t) - levels).max() < near
    t = draw(flow.FlowConfig(time="logit_normal", mean=0.5, std=0.7))
    z = (np.log(t / (1 - t)) - 0.5) / 0.7
    cdf = 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
    assert np.abs(cdf - levels).max() < near


class Echo(nn.Module):
    """Its velocity is the first condition token."""

    config: DiTConfig = CONFIG

    def __call__(self, x, t, cond, guidance=None):
        return 0 * x + cond[:, :1, :3]


def test_the_loss_is_the_mean_squared_velocity_error_and_drops_a_tenth():
    B = 2000
    row_errors = jax.jit(flow.row_errors, static_argnums=(0, 5))
    cond, x1 = np.full((B, 2, 4), 3.0, np.float32), np.full((B, 5, 3), 1.0, np.float32)
    keys = jax.random.split(jax.random.key(1), B)
    errors, t = row_errors(Echo(), {}, x1, cond, keys, flow.FlowConfig())
    # u = 1 - x0: E (3 - u)² = 4 + 1 with the condition and E u² = 1 + 1 without.
    kept, dropped = 5.0, 2.0
    share = (kept - float(errors.mean())) / (kept - dropped)
    assert abs(share - 0.1) < 0.06
    assert 0 <= float(t.min()) and float(t.max()) < 1
    errors, _ = row_errors(Echo(), {}, x1, cond, keys, flow.FlowConfig(cond_dropout=0.0))
    assert abs(float(errors.mean()) - kept) < 0.1
    again, _ = row_errors(Echo(), {}, x1[:1], cond[:1], keys[:1], flow.FlowConfig(cond_dropout=0.0))
    np.testing.assert_allclose(again, errors[:1], rtol=1e-6)  # a row's draws are its own


def test_the_loss_of_the_true_velocity_is_zero():
    rng = np.random.default_rng(0)
    x0, x1 = rng.normal(size=(2, 4, 5, 3)).astype(np.float32)
    x1[:] = x1[:, :1]  # every latent the same point, which the condition names
    cond = np.pad(x1[:, :2], ((0, 0), (0, 0), (0, 1)))
    t = np.asarray([0, 0.3, 0.6, 0.9], np.float32)
    np.testing.assert_allclose(flow.velocity_errors(Field(), {}, x0, x1, t, cond), 0, atol=1e-10)


def test_views_are_told_apart_by_sines_of_their_number():
    assert dict(multiview.VIEWS) == {"front": 0, "left": 1, "back": 2, "right": 3}
    tokens = np.random.default_rng(0).normal(size=(2, 2, 3, 8)).astype(np.float32)
    got = np.asarray(multiview.join(tokens, multiview.view_ids(["back", "front"])))
    assert got.shape == (2, 6, 8)
    omega = [10000 ** (-i / 4) for i in range(4)]
    back = [math.sin(2 * w) for w in omega] + [math.cos(2 * w) for w in omega]
    np.testing.assert_allclose(got[:, :3], tokens[:, 0] + np.asarray(back), atol=1e-6)
    np.testing.assert_allclose(got[:, 3:], tokens[:, 1] + [0, 0, 0, 0, 1, 1, 1, 1], atol=1e-6)
    rows = np.asarray(multiview.join(tokens, np.asarray([[2, 0], [1, 3]])))
    np.testing.assert_array_equal(rows[0], got[0])
    assert np.abs(rows[1] - got[1]).max() > 0.1
    for wrong in (["top"], ["front", "front"], []):
        with pytest.raises(
            ValueError, match="views must be different ones of front, left, back, right"
        ):
            multiview.view_ids(wrong)
