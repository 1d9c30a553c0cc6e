"""Fits recover the laws that made the data; the gradient's noise is that of a problem with known noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import data
from research.core.data import DataConfig
from research.core.metrics import Mean
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder
from research.minimax_01 import recipe, scaling
from research.minimax_01.scaling import TABLE_2, Curve, PowerLaw


def noisy(values, seed, size):
    return values * np.exp(size * np.random.default_rng(seed).normal(size=np.shape(values)))


def test_the_papers_critical_batches_are_one_power_law():
    loss, batch = zip(*recipe.CRITICAL_BATCH, strict=True)
    law = scaling.fit_power_law(loss, batch)
    assert law.exponent == pytest.approx(-6.12, abs=0.005)
    assert law.coefficient == pytest.approx(2.1e9, rel=0.01)
    np.testing.assert_allclose(law(loss), batch, rtol=0.03)


@pytest.mark.parametrize("name", TABLE_2)
def test_table_2_is_recovered_from_noisy_points(name):
    law = TABLE_2[name]
    compute = np.geomspace(1, 100, 12)
    for part in (law.loss, law.parameters, law.tokens):
        fit = scaling.fit_power_law(compute, noisy(part(compute), 3, 0.002))
        assert fit.exponent == pytest.approx(part.exponent, abs=0.002)
        assert fit.coefficient == pytest.approx(part.coefficient, rel=0.005)
    for at, wanted in {  # losses at one and at a hundred PFLOP/s-days, from the coefficients
        "softmax": (3.709, 2.568), "lightning": (3.539, 2.485), "hybrid": (3.480, 2.449)
    }.items():  # fmt: skip
        np.testing.assert_allclose(TABLE_2[at].loss([1, 100]), wanted, atol=1e-3)


def surface(law, parameters, compute):
    """A loss that is lowest, and the law's, at the law's parameters; tokens likewise."""
    away = np.log(parameters / law.parameters(compute))
    return law.loss(compute) * np.exp(0.02 * away**2), law.tokens(compute) * np.exp(-away)


@pytest.mark.parametrize("name", TABLE_2)
def test_the_envelope_of_training_curves_has_the_laws(name):
    law, curves = TABLE_2[name], []
    for seed, parameters in enumerate(law.parameters(np.geomspace(0.3, 300, 14))):
        middle = np.log((parameters / law.parameters.coefficient) ** (1 / law.parameters.exponent))
        compute = np.exp(np.linspace(middle - 2, middle + 2, 40))
        loss, tokens = surface(law, parameters, compute)
        curves.append(Curve(parameters, compute, tokens, noisy(loss, seed, 2e-4)))
    fit = scaling.fit_envelope(curves, points=64)
    assert fit.loss.exponent == pytest.approx(law.loss.exponent, abs=0.001)
    assert fit.loss.coefficient == pytest.approx(law.loss.coefficient, rel=0.003)
    assert fit.parameters.exponent == pytest.approx(law.parameters.exponent, rel=0.06)
    assert fit.tokens.exponent == pytest.approx(law.tokens.exponent, rel=0.08)
    with pytest.raises(ValueError, match="three sizes"):
        scaling.fit_envelope(curves[:2])
    one = curves[0]
    worse = [Curve(p, one.compute, one.tokens, one.loss * p / 1e8) for p in (1e8, 2e8, 3e8)]
    with pytest.raises(ValueError, match="ever the best"):
        scaling.fit_envelope(worse)


@pytest.mark.parametrize("name", TABLE_2)
def test_iso_flop_groups_have_the_laws(name):
    law, rows = TABLE_2[name], []
    for level in np.geomspace(1, 100, 6):
        for factor in np.geomspace(0.3, 3, 7):
            parameters = law.parameters(level) * factor
            rows.append((level, parameters, *surface(law, parameters, level)[::-1]))
    compute, parameters, tokens, loss = np.transpose(rows)
    fit = scaling.fit_iso_flop(compute, parameters, tokens, noisy(loss, 1, 2e-4))
    for part in ("loss", "parameters", "tokens"):
        mine, theirs = getattr(fit, part), getattr(law, part)
        assert mine.exponent == pytest.approx(theirs.exponent, rel=0.02)
        assert mine.coefficient == pytest.approx(theirs.coefficient, rel=0.03)
    outer = parameters > law.parameters(compute) * 1.2
    with pytest.raises(ValueError, match="lies outside"):
        scaling.fit_iso_flop(*(x[outer] for x in (compute, parameters, tokens, loss)))
    with pytest.raises(ValueError, match="needs three or more"):
        scaling.fit_iso_flop([1, 1], [1e6, 2e6], [1e9, 1e9], [3.0, 2.9])


def test_equation_14_is_recovered():
    """44M to 1.2B parameters, up to 500B tokens, as in the paper's choice of a size."""
    true = scaling.LossSurface(1.6, 350.0, -0.34, 900.0, -0.3, 5e3, -0.25)
    sizes, tokens = np.geomspace(44e6, 1.2e9, 6), np.geomspace(5e9, 5e11, 8)
    P, T = (x.ravel() for x in np.meshgrid(sizes, tokens))
    exact = scaling.fit_loss_surface(P, T, true(P, T))
    np.testing.assert_allclose(exact(P, T), true(P, T), rtol=1e-6)
    np.testing.assert_allclose(
        [exact.alpha, exact.beta, exact.gamma], [-0.34, -0.3, -0.25], rtol=0.02
    )
    assert exact.d == pytest.approx(1.6, rel=0.01)
    fit = scaling.fit_loss_surface(P, T, noisy(true(P, T), 2, 1e-3))
    np.testing.assert_allclose(fit(P, T), true(P, T), rtol=2e-3)
    assert float(fit(9.3e9, 1e12)) == pytest.approx(float(true(9.3e9, 1e12)), rel=0.02)
    with pytest.raises(ValueError, match="seven unknowns"):
        scaling.fit_loss_surface(P[:6], T[:6], T[:6])


@pytest.mark.parametrize("x, y", [([1, 1], [1, 2]), ([1, 2], [0, 1]), ([1, 2, 3], [1, 2])])
def test_points_without_a_power_law_are_refused(x, y):
    with pytest.raises(ValueError, match="power law"):
        scaling.fit_power_law(x, y)


def quadratic(params, batch):
    """Half of the squared distance to each row: a row's gradient is `params` minus it."""
    loss = 0.5 * jnp.sum((params - batch["x"]) ** 2 * batch["weights"][:, None])
    return loss, {"loss": Mean.of(loss)}


def test_the_noise_of_a_quadratic_is_known():
    rng = np.random.default_rng(0)
    spread = np.asarray([1.0, 2.0, 0.5, 3.0], np.float32)
    params = np.asarray([0.5, -0.3, 0.2, 1.0], np.float32)
    batches = [
        {"x": rng.normal(size=(32, 4)).astype(np.float32) * spread,
         "weights": np.full(32, 1 / 32, np.float32)}
        for _ in range(300)
    ]  # fmt: skip
    noise = scaling.gradient_noise(quadratic, jnp.asarray(params), batches, 4, 7.0)
    trace, squared = (spread**2).sum(), (params**2).sum()
    assert noise.trace == pytest.approx(trace, rel=0.03)
    assert noise.squared_norm == pytest.approx(squared, rel=0.06)
    assert noise.critical_rows == pytest.approx(trace / squared, rel=0.08)
    assert noise.critical_tokens == 7 * noise.critical_rows
    assert noise.loss == pytest.approx((squared + trace) / 2, rel=0.02)


def test_the_estimates_equal_the_definitions_on_one_batch():
    """In float64: the sample covariance between micro-batches, and what is left of the mean's square."""
    rng = np.random.default_rng(1)
    x, params = rng.normal(size=(12, 3)), rng.normal(size=3)
    batch = {"x": x.astype(np.float32), "weights": np.full(12, 1 / 12, np.float32)}
    noise = scaling.gradient_noise(quadratic, jnp.asarray(params, jnp.float32), [batch], 3, 1.0)
    small = (params - x).reshape(4, 3, 3).mean(1)  # gradients of the four micro-batches
    trace = 3 * small.var(axis=0, ddof=1).sum()
    assert noise.trace == pytest.approx(trace, rel=1e-4)
    squared = (small.mean(0) ** 2).sum() - trace / 12
    assert noise.squared_norm == pytest.approx(squared, rel=1e-4, abs=1e-5)
    with pytest.raises(ValueError, match="not two or more micro-batches"):
        scaling.gradient_noise(quadratic, jnp.zeros(3), [batch], 12, 1.0)
    still = scaling.GradientNoise(1.0, -0.1, 1.0, 0.0)
    assert still.critical_rows == np.inf


def test_a_language_models_noise_grows_as_it_learns():
    """At the start all rows agree on the frequent token; once that is known, the rest is noise."""
    shape = DecoderConfig(
        vocab_size=16, hidden_size=16, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=16,
        mlp_size=16, tie_embeddings=False, scan_layers=False,
    )  # fmt: skip
    rng, model = np.random.default_rng(0), Decoder(shape)
    examples = [
        {"tokens": np.where(rng.random(9) < 0.5, 3, rng.integers(0, 16, 9)), "loss_mask": np.ones(9)}
        for _ in range(64)
    ]
    rows = list(data.from_examples(DataConfig((), 9, 32, pack="none"), examples, endless=False))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    start = scaling.critical_batch(model, params, rows, micro_rows=4)
    assert start.tokens_per_row == 8
    assert start.loss == pytest.approx(np.log(16), abs=0.1)
    counts = np.bincount(np.concatenate([e["tokens"][1:] for e in examples]), minlength=16)
    learned = jax.tree.map(jnp.zeros_like, params)  # knows the frequencies, by a bias in disguise
    learned["embed"]["embedding"] = jnp.ones((16, 16))
    learned["final_norm"]["scale"] = jnp.ones(16)
    learned["head"]["kernel"] = jnp.tile(jnp.log(counts / counts.sum()) / 16, (16, 1))
    later = scaling.critical_batch(model, learned, rows, micro_rows=4)
    assert later.loss < 2.4 < start.loss
    assert later.critical_tokens > 5 * start.critical_tokens


def test_power_laws_are_functions():
    np.testing.assert_allclose(PowerLaw(2.0, -0.5)([1.0, 4.0]), [2.0, 1.0])
