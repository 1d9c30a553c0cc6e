"""The shape VAE's trainer on spheres and boxes, whose distances are exact."""

import dataclasses
import importlib
import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import loop, mesh
from research.core.config import from_config_dict
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.hunyuan3d_2.vae import checkpoint, evaluation, trainer
from research.hunyuan3d_2.vae import model as vae_model
from research.hunyuan3d_2.vae.config import VAEConfig
from research.hunyuan3d_2.vae.evaluation import EvalConfig
from research.hunyuan3d_2.vae.model import ShapeVAE

TINY = VAEConfig(
    num_tokens=8, latent_dim=4, width=32, heads=2, encoder_layers=1, decoder_layers=1, num_freqs=3,
    uniform_points=32, sharp_points=32, downsample_ratio=4,
)  # fmt: skip


def pools(index, count=64, queries=300):
    """A sphere (odd index) or a cube: its pools, with the exact signed distance."""
    rng = np.random.default_rng(index)
    size, box = rng.uniform(0.5, 0.9), index % 2 == 0

    def surface(n, edges):
        if not box:
            normal = rng.standard_normal((n, 3))
            normal /= np.linalg.norm(normal, axis=1, keepdims=True)
            return np.concatenate([size * normal, normal, np.zeros((n, 1))], 1)
        x, axis = rng.uniform(-size, size, (n, 3)), rng.integers(0, 3, n)
        on = np.arange(3) != axis[:, None] if edges else np.arange(3) == axis[:, None]
        x = np.where(on, np.sign(x) * size, x)
        normal = np.where(on, np.sign(x), 0)
        normal /= np.linalg.norm(normal, axis=1, keepdims=True)
        return np.concatenate([x, normal, np.full((n, 1), edges)], 1)

    def measured(x):
        outside = np.abs(x) - size
        cube = np.linalg.norm(np.maximum(outside, 0), axis=1) + np.minimum(outside.max(1), 0)
        d = -cube if box else size - np.linalg.norm(x, axis=1)
        return np.concatenate([x, d[:, None]], 1)

    def near(edges):
        return surface(queries, edges)[:, :3] + rng.normal(0, 0.02, (queries, 3))

    made = {"uniform": surface(count, False), "sharp": surface(count, True)}
    asked = (rng.uniform(-1.05, 1.05, (queries, 3)), near(False), near(True))
    made |= dict(zip(("volume", "near", "near_sharp"), map(measured, asked), strict=True))
    return {name: x.astype(np.float32) for name, x in made.items()}


SHAPES = [pools(i) for i in range(16)]


def batches(rows):
    def draw(shape, rng):
        asked = np.concatenate([shape["volume"], shape["near"]])
        asked = asked[rng.permutation(len(asked))[:64]]
        return {
            "uniform": shape["uniform"][rng.permutation(64)[:32]],
            "sharp": shape["sharp"][rng.permutation(64)[:32]],
            "points": asked[:, :3],
            "distance": asked[:, 3],
        }

    data = grain.MapDataset.source(SHAPES).seed(0).shuffle().repeat().random_map(draw)
    sequential = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return data.to_iter_dataset(sequential).batch(rows)


def make_config(**changes):
    config = trainer.Config(
        mesh="data=1",
        model=TINY,
        batch_size=8,
        token_counts=(4, 8),
        truncation=0.2,
        eval=EvalConfig(volume_points=200, surface_points=100),
        optim=OptimConfig(lr=3e-3),
        loop=LoopConfig(steps=4),
    )
    return dataclasses.replace(config, **changes)


def run(config, workdir, eval_shapes=None):
    built = trainer.build(config, workdir, batches=batches(8), eval_shapes=eval_shapes)
    return loop.run(built, config.loop, workdir, fingerprint_of=config)


def history(workdir):
    """metrics.jsonl without what depends on the moment."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    skip = lambda name: name.startswith("time/") or name == "compiles"  # noqa: E731
    return [{k: v for k, v in line.items() if not skip(k)} for line in lines]


@pytest.mark.slow
def test_it_learns_and_its_checkpoint_is_read(tmp_path):
    config = make_config(loop=LoopConfig(steps=80, eval_every=80))
    state = run(config, tmp_path, SHAPES[:4])
    lines = history(tmp_path)
    assert {line["num_tokens"] for line in lines} == {4, 8}
    raw = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert raw[-2]["compiles"] == raw[9]["compiles"]  # a program for each number of tokens, no more
    first, last = (np.mean([x["reconstruction"] for x in part]) for part in (lines[:5], lines[-5:]))
    assert last < 0.5 * first
    for line in lines:
        assert line["loss"] == pytest.approx(line["reconstruction"] + 1e-3 * line["kl"], rel=1e-4)
    assert lines[-1]["eval/v_iou"] > 0.6

    model, params = checkpoint.load(tmp_path)
    assert model == TINY
    jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_reconstruction_is_the_iou_of_signs():
    assert evaluation.iou(np.array([1, 1, 0, 0]) > 0, np.array([1, 0, 1, 0]) > 0) == 1 / 3
    assert evaluation.iou(np.zeros(3, bool), np.zeros(3, bool)) == 1

    params = trainer.vae_model.init(TINY, jax.random.key(3))
    model = trainer.ShapeVAE(TINY)
    settings = EvalConfig(volume_points=250, surface_points=40, band=0.01)
    shapes = SHAPES[:3]
    found = evaluation.reconstruction(model, params, shapes, settings, mesh=mesh.make("data=2"))
    spheres = np.arange(3) % 2 == 1
    np.testing.assert_array_equal(np.isnan(found["sharp_s_iou"]), spheres)  # they have no edges
    assert evaluation.means(found)["sharp_s_iou"] == np.mean(found["sharp_s_iou"][~spheres])

    @jax.jit
    def field(uniform, sharp, points):
        mean, _ = model.apply({"params": params}, uniform, sharp, method="encode")
        tokens = model.apply({"params": params}, mean, method="decode")
        return model.apply({"params": params}, tokens, points, method="query")

    for i, shape in enumerate(shapes):
        close = shape["near"][np.abs(shape["near"][:, 3]) < 0.01]
        assert len(close) > 40
        spread = close[(np.arange(40) * len(close)) // 40]
        asked = np.concatenate([shape["volume"][np.arange(250) * 300 // 250], spread])
        clouds = (shape["uniform"][None, :32], shape["sharp"][None, :32])
        inside = np.asarray(field(*clouds, asked[None, :, :3])[0]) > 0
        for name, part in (("v_iou", slice(250)), ("s_iou", slice(250, None))):
            a, b = inside[part], asked[part, 3] > 0
            assert found[name][i] == pytest.approx((a & b).sum() / (a | b).sum())
    # A sample of a posterior of variance near 1 is not its mean. Any seed makes one.
    assert (found["v_iou_sample"] != found["v_iou"]).any()
    again = evaluation.reconstruction(
        model, params, shapes, settings, seed=-1, mesh=mesh.make("data=2")
    )
    np.testing.assert_array_equal(again["v_iou"], found["v_iou"])


@pytest.mark.slow
def test_a_run_resumes_exactly(tmp_path):
    config, final = make_config(loop=LoopConfig(steps=6)), {}
    for name, stops in (("whole", (6,)), ("halves", (3, 6))):
        for steps in stops:
            part = dataclasses.replace(config, loop=LoopConfig(steps=steps))
            final[name] = run(part, tmp_path / name).params
    assert history(tmp_path / "halves") == history(tmp_path / "whole")
    assert len(history(tmp_path / "whole")) == 6
    jax.tree.map(np.testing.assert_array_equal, final["halves"], final["whole"])


@pytest.mark.slow
def test_any_number_of_devices_has_the_same_losses(tmp_path):
    losses = {}
    for shape, micro_rows in (("data=1", 2), ("data=8", 0)):
        config = make_config(mesh=shape, micro_rows=micro_rows)
        built = trainer.build(config, tmp_path, batches=batches(8))
        state, got = built.init(), []
        for at in range(4):
            state, metrics = built.step(state, built.collect(state, at)[0])
            got.append([float(metrics["loss"]), float(metrics["grad_norm"])])
        losses[shape] = got
    np.testing.assert_allclose(*losses.values(), rtol=1e-4)


def test_the_posterior_is_sampled_anew_for_every_shape_and_step(tmp_path):
    built = trainer.build(make_config(), tmp_path, batches=batches(8))
    drawn = [built.collect(None, at)[0][1] for at in range(3)]
    assert len(np.unique([batch["seed"] for batch in drawn])) == 24
    assert all(batch["weights"].sum() == pytest.approx(1) for batch in drawn)


def test_the_loss_is_the_weighted_sum_over_shapes():
    rng = np.random.default_rng(0)
    mean, logvar = rng.standard_normal((2, 3, 50, 4)).astype(np.float32)
    seen = []

    class Constant:
        config = TINY

        def apply(self, variables, uniform, sharp, points, noise):
            seen.append(noise)
            return jnp.full(points.shape[:2], variables["params"]), mean, logvar

    batch = {"uniform": None, "sharp": None, "points": np.zeros((3, 20, 3), np.float32)}
    batch["distance"] = rng.uniform(-1, 1, (3, 20)).astype(np.float32)
    batch["weights"] = np.float32([0.5, 0.125, 0.375])
    batch["seed"] = np.uint32([7, 8, 8])
    config = make_config(kl_coef=0.1, truncation=0.3)
    loss, metrics = trainer.loss_fn(Constant(), config, 50, 0.2, batch)
    error = ((0.2 - np.clip(batch["distance"] / 0.3, -1, 1)) ** 2).mean(1)
    kl = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).mean((1, 2))
    assert loss == pytest.approx((batch["weights"] * (error + 0.1 * kl)).sum(), rel=1e-5)
    inside = (batch["distance"] > 0).mean(1)
    for name, rows in (("reconstruction", error), ("kl", kl), ("sign_accuracy", inside)):
        wanted = (batch["weights"] * rows).sum()
        assert metrics[name].compute() == pytest.approx(wanted, rel=1e-5)
    noise = np.asarray(seen[0])
    assert noise.shape == (3, 50, 4) and abs(noise.std() - 1) < 0.1
    assert (noise[1] == noise[2]).all() and abs(np.corrcoef(noise[:2].reshape(2, -1))[0, 1]) < 0.2


def test_configurations_that_cannot_be_trained(tmp_path):
    for changes, message in (
        ({"model": None}, "no model"),
        ({"init_from": "x"}, "leave `model` out"),
        ({"token_counts": (4, 9)}, "token_counts has 9"),
        # As late as the step that draws 8 tokens, if it were not for this.
        (
            {"model": dataclasses.replace(TINY, downsample_ratio=10), "token_counts": (4, 8)},
            "8 tokens need 40 uniform points",
        ),
        ({"batch_size": 6, "mesh": "data=4"}, "multiple of 4 devices"),
        ({"mesh": "data=1,model=1"}, "one axis 'data'"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.build(make_config(**changes), tmp_path, batches=batches(8))
    with pytest.raises(ValueError, match="no data"):
        trainer.build(make_config(), tmp_path)
    for changes, message in (
        ({"token_counts": (4, 4)}, "distinct"),
        ({"truncation": 0.0}, "truncation"),
        ({"points": 0}, "points"),
    ):
        with pytest.raises(ValueError, match=message):
            make_config(**changes)

    decoder = {k: v for k, v in checkpoint.shapes(TINY, encoder=False).items()}
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), decoder)
    checkpoint.save(tmp_path / "decoder", TINY, zeros)
    with pytest.raises(ValueError, match="decoder alone"):
        config = make_config(model=None, init_from=str(tmp_path / "decoder"))
        trainer.build(config, tmp_path, batches=batches(8))


def test_training_starts_with_latents_that_can_be_read():
    """The noise of the posterior is small against what differs between tokens and shapes."""
    params = vae_model.init(TINY, jax.random.key(0))
    clouds = [np.stack([shape[name][:32] for shape in SHAPES]) for name in ("uniform", "sharp")]
    mean, logvar = ShapeVAE(TINY).apply({"params": params}, *clouds, method="encode")
    assert np.exp(0.5 * logvar).mean() < 0.3 * np.std(mean)


def test_training_starts_with_small_branches():
    """What the blocks add to the residual stream: kernels with 0.1 of the usual variance, 1 / inputs."""
    ends = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(vae_model.init(TINY, jax.random.key(0))):
        if path[-1].key == "kernel":
            size = leaf.std() * leaf.shape[0] ** 0.5
            ends.append(path[-2].key == "c_proj")
            assert size == pytest.approx(0.1**0.5 if ends[-1] else 1, rel=0.25), path
    assert sum(ends) == 8 and len(ends) > 16


@pytest.mark.parametrize("variant", ["", "uniform", "learned", "fixed", "gpu", "finetune"])
def test_the_experiment_files_are_configurations(variant):
    file = importlib.import_module("experiments.configs.hunyuan3d_2.vae")
    config = from_config_dict(trainer.Config, file.get_config(variant))
    if config.model is not None:
        most = config.model.num_tokens
        assert max(config.token_counts, default=most) == most
    with pytest.raises(ValueError, match="no variant 'cup'"):
        file.config("cup")
