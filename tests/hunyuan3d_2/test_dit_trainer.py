"""The transformer's trainer: it learns, averages, resumes exactly, and computes the same on one device and on eight."""

import dataclasses
import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.configs.hunyuan3d_2 import dit as dit_config
from experiments.configs.hunyuan3d_2 import vae as vae_config
from research.core import config as configs
from research.core import loop
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.hunyuan3d_2.dit import checkpoint, examples, multiview, trainer
from research.hunyuan3d_2.dit.config import DiTConfig
from research.hunyuan3d_2.dit.flow import FlowConfig, row_errors
from research.hunyuan3d_2.dit.tower import Tower
from research.hunyuan3d_2.render import shading

MODEL = DiTConfig(
    num_latents=4, latent_dim=3, cond_dim=8, hidden_size=16, num_heads=2, depth=1, single_depth=1
)


def make_examples(count, seed, views=5):
    """Latents that the image tells: its colour is their place. A sphere around the first latent is the shape."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        colour = rng.integers(40, 216, 3)
        mean = np.tile(2 * (colour / 255 - 0.5), (4, 1)).astype(np.float32) * 4
        points = rng.uniform(-3, 3, (256, 3)).astype(np.float32)
        made.append(
            {
                "mean": mean,
                "logvar": np.full((4, 3), -6.0, np.float32),
                "image": np.broadcast_to(colour, (views, 8, 8, 3)).astype(np.uint8),
                "points": points,
                "distance": (1.5 - np.linalg.norm(points - mean[0], axis=1)).astype(np.float32),
            }
        )
    return made


@jax.jit
def decode(latents_BLC, points_BQ3):
    centre = jnp.mean(latents_BLC, axis=1, keepdims=True)
    return 1.5 - jnp.linalg.norm(points_BQ3 - centre, axis=2)


def tower(frozen=False):
    """Mean colour through a matrix: one token and a constant one."""

    def init(key):
        return {"kernel": 0.5 * jax.random.normal(key, (3, 8))}

    def apply(params, images):
        colour = images.astype(jnp.float32).mean((1, 2)) / 127.5 - 1
        token = colour @ params["kernel"]
        return jnp.stack([token, jnp.ones_like(token)], axis=1)

    return Tower(8, init, apply, init(jax.random.key(5)) if frozen else None)


def make_config(**changes):
    config = trainer.Config(
        mesh="data=2", model=MODEL, image_size=8, batch_size=16, micro_rows=4, ema_decay=0.9,
        optim=OptimConfig(lr=1e-2, b1=0.9, b2=0.99, eps=1e-6, weight_decay=0.01, schedule="cosine", warmup_steps=1),
        eval=trainer.EvalConfig(shapes=4, loss_shapes=6, steps=5, guidance=1.0),
        loop=LoopConfig(steps=6),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def build(config, workdir, frozen=False, held_out=True, views=5):
    return trainer.build(
        config, workdir, examples=make_examples(24, 0, views), tower=tower(frozen),
        eval_examples=make_examples(6, 1, views) if held_out else None, decode=decode if held_out else None,
    )  # fmt: skip


def history(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    skip = lambda name: name.startswith("time/") or name == "compiles"  # noqa: E731
    return [{k: v for k, v in line.items() if not skip(k)} for line in lines]


@pytest.mark.slow
def test_it_learns_the_condition_averages_and_says_what_it_trained(tmp_path):
    config = make_config(loop=LoopConfig(steps=100))
    state = loop.run(build(config, tmp_path), config.loop, tmp_path, fingerprint_of=config)
    lines = history(tmp_path)
    first = np.mean([line["loss"] for line in lines[:5]])
    last = np.mean([line["loss"] for line in lines[-5:]])
    assert last < 0.6 * first
    final = lines[-1]
    assert {f"eval/flow/{t}" for t in trainer.EVAL_TIMES} <= set(final)
    assert final["eval/flow"] == pytest.approx(
        np.mean([final[f"eval/flow/{t}"] for t in trainer.EVAL_TIMES]), rel=1e-5
    )
    assert final["eval/v_iou/matched"] > final["eval/v_iou/shuffled"] + 0.1
    assert final["eval/v_iou/margin"] == final["eval/v_iou/matched"] - final["eval/v_iou/shuffled"]
    assert final["eval/v_iou/matched"] > final["eval/v_iou/zero"]

    # The latents' scale gives them unit variance; the run says it, and its model, to whoever loads it.
    description, params = checkpoint.load_run(tmp_path)
    means = np.stack([e["mean"] for e in make_examples(24, 0)]).astype(np.float64)
    assert description.scale_factor == pytest.approx(
        1 / np.sqrt(means.var() + np.exp(-6.0)), rel=1e-6
    )
    assert description.model == MODEL and description.image_size == 8
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)
    shape, loaded = checkpoint.load(tmp_path)
    assert shape == MODEL and set(params) == {"dit", "tower"} and set(loaded) == set(params["dit"])
    online = state.extra["online"]
    gaps = [
        np.abs(np.asarray(a - b)).max()
        for a, b in zip(*map(jax.tree.leaves, (params, online)), strict=True)
    ]
    assert max(gaps) > 0  # averages, not the last parameters

    start = trainer.build(
        make_config(model=None, init_from=str(tmp_path)), tmp_path / "next", examples=make_examples(24, 0),
        tower=tower(),
    ).init()  # fmt: skip
    for tree in (start.params, start.extra["online"]):
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(a, b)
    # Other shapes are scaled as those were that the run learned, and images have the size that its tower knows.
    further = make_config(model=None, init_from=str(tmp_path))
    assert trainer._model(further)[2] == description.scale_factor
    assert trainer._model(dataclasses.replace(further, scale_factor=2.0))[2] == 2.0
    for other in ({"image_size": 16}, {"tower": "small"}):
        with pytest.raises(
            ValueError, match="learned with tower='tiny' and image_size=8, not with"
        ):
            trainer._model(dataclasses.replace(further, **other))


def test_all_that_is_drawn_for_a_row_is_independent():
    """Time, noise and the posterior's sample of 400 rows: no correlation beyond chance, of the first numbers or any."""
    seeds = np.random.default_rng(0).integers(2**32, size=(400, 2), dtype=np.uint32)
    seen = []

    class Watching:
        config = MODEL

        def apply(self, params, x_BLC, t_B, cond_BTE, guidance_B):
            seen.append(x_BLC / (1 - t_B)[:, None, None])  # of x_1 = 0, so this is x_0
            return x_BLC

    zeros = jnp.zeros((400, 4, 3))
    _, t_B = row_errors(
        Watching(), {}, zeros, jnp.zeros((400, 1, 8)), trainer._keys(seeds), FlowConfig()
    )
    epsilon = trainer.draw_latents({"mean": zeros, "logvar": zeros, "seed": seeds}, 1.0)
    drawn = np.concatenate(
        [jax.scipy.stats.norm.ppf(t_B)[:, None], seen[0].reshape(400, -1), epsilon.reshape(400, -1)], 1
    )  # fmt: skip
    assert drawn.shape == (400, 25)
    correlation = np.corrcoef(drawn.T) - np.eye(25)
    assert np.abs(correlation).max() < 5 / 20  # five standard errors


def test_the_average_is_what_it_says():
    decay, average, rng = 0.5, 0.0, np.random.default_rng(0)
    got = {"w": jnp.zeros(3)}
    for t in range(1, 30):
        value = rng.normal()
        d = min(decay, (1 + t) / (10 + t))
        average = d * average + (1 - d) * value
        got = trainer._average(decay, got, {"w": jnp.full(3, value)}, jnp.int32(t))
        np.testing.assert_allclose(got["w"], average, rtol=1e-5)  # early on too


@pytest.mark.slow
def test_eight_devices_compute_what_one_does(tmp_path):
    records, params = {}, {}
    for name, mesh, micro_rows in (("one", "data=1", 0), ("eight", "data=8", 1)):
        config = make_config(mesh=mesh, micro_rows=micro_rows, loop=LoopConfig(steps=2))
        config = dataclasses.replace(config, eval=trainer.EvalConfig(shapes=0, loss_shapes=6))
        state = loop.run(build(config, tmp_path / name), config.loop, tmp_path / name)
        records[name], params[name] = history(tmp_path / name), state.params
    assert len(records["one"]) == 2 and "eval/flow" in records["one"][-1]
    for a, b in zip(records["one"], records["eight"], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=2e-5, abs=1e-6), key
    for a, b in zip(*map(jax.tree.leaves, params.values()), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_stopped_run_goes_on_exactly(tmp_path):
    config = make_config(loop=LoopConfig(steps=4, checkpoint_every=2))
    whole = loop.run(
        build(config, tmp_path / "a", held_out=False),
        config.loop,
        tmp_path / "a",
        fingerprint_of=config,
    )
    training = build(config, tmp_path / "b", held_out=False)

    def collect(state, at):
        if at == 3:
            raise KeyboardInterrupt
        return training.collect(state, at)

    with pytest.raises(KeyboardInterrupt):
        stopped = dataclasses.replace(training, collect=collect)
        loop.run(stopped, config.loop, tmp_path / "b", fingerprint_of=config)
    resumed = loop.run(
        build(config, tmp_path / "b", held_out=False),
        config.loop,
        tmp_path / "b",
        fingerprint_of=config,
    )
    assert history(tmp_path / "a") == history(tmp_path / "b")
    flat = [jax.tree.leaves((s.params, s.extra, s.opt_state)) for s in (whole, resumed)]
    for a, b in zip(*flat, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_frozen_tower_is_no_parameter_and_several_views_are_one_condition(tmp_path):
    config = make_config(views=2, loop=LoopConfig(steps=2))
    state = loop.run(build(config, tmp_path, frozen=True, held_out=False), config.loop, tmp_path)
    assert set(state.params) == {"dit"}
    batch = {
        "image": np.zeros((3, 2, 8, 8, 3), np.uint8),
        "view": np.asarray([[0, 1], [2, 3], [1, 0]]),
    }
    own = tower(frozen=True)
    got = trainer.condition(own, {"tower": own.params}, batch)
    assert got.shape == (3, 4, 8)
    tokens = own.apply(own.params, np.zeros((2, 8, 8, 3), np.uint8))
    np.testing.assert_allclose(
        got[1], multiview.join(tokens[None], np.asarray([2, 3]))[0], atol=1e-6
    )


def test_a_row_is_drawn_from_its_shape():
    example = make_examples(1, 0)[0]
    example["image"] = np.arange(5)[:, None, None, None] * np.ones((1, 8, 8, 4), np.uint8)
    example["image"][..., 3] = 255
    seen, seeds = set(), set()
    for i in range(60):
        row = examples.row(example, 1, np.random.default_rng(i))
        assert row["image"].shape == (1, 8, 8, 3) and "view" not in row
        seen.add(int(row["image"][0, 0, 0, 0]))
        seeds.add(tuple(row["seed"]))
        row = examples.row(example, 3, np.random.default_rng(i))
        assert len(set(row["view"])) == 3 and max(row["view"]) < 4
        np.testing.assert_array_equal(row["image"][:, 0, 0, 0], row["view"])
    assert seen == set(range(5)) and len(seeds) == 60


def test_latents_are_drawn_from_their_posterior_and_rows_weigh_the_same(tmp_path):
    seeds = np.random.default_rng(0).integers(2**32, size=(400, 2), dtype=np.uint32)
    seeds[1] = seeds[0]
    moments = np.broadcast_to(np.float32([[3.0], [np.log(4)]]), (2, 400))[..., None, None]
    mean, logvar = np.broadcast_to(moments, (2, 400, 4, 3))
    drawn = np.asarray(trainer.draw_latents({"mean": mean, "logvar": logvar, "seed": seeds}, 0.5))
    assert drawn.dtype == np.float32
    assert abs(drawn.mean() - 1.5) < 0.06 and abs(drawn.std() - 1.0) < 0.05
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert len(np.unique(drawn)) > 0.99 * 399 * 12
    batch, _ = build(make_config(), tmp_path, held_out=False).collect(None, 0)
    np.testing.assert_array_equal(batch["weight"], np.full(16, 1 / 16, np.float32))


def test_transparent_images_lie_on_white():
    image = np.asarray([[[[0, 100, 200, 0], [0, 100, 200, 255], [0, 100, 200, 51]]]], np.uint8)
    assert shading.on_white(image)[0, 0].tolist() == [
        [255, 255, 255],
        [0, 100, 200],
        [204, 224, 244],
    ]


def test_batches_shuffle_every_epoch_and_go_on_where_they_were():
    shapes = make_examples(8, 0)
    data = iter(examples.dataset(shapes, 1, 4, seed=3))
    first = [next(data) for _ in range(4)]
    state = data.get_state()
    after = next(data)
    again = iter(examples.dataset(shapes, 1, 4, seed=3))
    again.set_state(state)
    for name, values in next(again).items():
        np.testing.assert_array_equal(values, after[name])
    epochs = [np.concatenate([b["mean"][:, 0, 0] for b in first[i : i + 2]]) for i in (0, 2)]
    known = sorted(e["mean"][0, 0] for e in shapes)
    assert [sorted(epoch) for epoch in epochs] == [known, known] and list(epochs[0]) != list(
        epochs[1]
    )
    assert not (first[0]["seed"] == first[2]["seed"]).any()
    assert isinstance(examples.dataset(shapes, 1, 4, seed=3), grain.IterDataset)


def test_what_cannot_be_trained_is_refused(tmp_path):
    def refused(match, **changes):
        with pytest.raises(ValueError, match=match):
            build(make_config(**changes), tmp_path)

    refused("must be a multiple of 2 devices", batch_size=12)
    refused("no model", model=None)
    refused("brings its model", init_from="somewhere")
    refused(r"the model's are \[L, 5\]", model=dataclasses.replace(MODEL, latent_dim=5))
    refused("tokens have size 8, model.cond_dim is 6", model=dataclasses.replace(MODEL, cond_dim=6))
    with pytest.raises(ValueError, match="four named views, these have 3"):
        build(make_config(views=2), tmp_path, views=3)
    with pytest.raises(ValueError, match="no shapes to learn"):
        trainer.build(make_config(), tmp_path, examples=[], tower=tower())
    with pytest.raises(ValueError, match="ema_decay"):
        make_config(ema_decay=1.0)
    with pytest.raises(ValueError, match="cond_dropout"):
        FlowConfig(cond_dropout=1.0)


@pytest.mark.parametrize("variant", ["", "cross", "gpu", "finetune"])
def test_the_experiment_files_are_configurations(variant):
    config = configs.from_config_dict(trainer.Config, dit_config.get_config(variant))
    if variant == "finetune":  # the published recipe
        assert config.optim == trainer.Config().optim and config.optim.lr == 1e-5
    else:  # its VAE's file has the same name
        vae = vae_config.config("" if variant == "cross" else variant).model
        assert config.model.latent_dim == vae.latent_dim
        assert config.model.num_latents <= vae.num_tokens
    with pytest.raises(ValueError, match="no variant 'cup'"):
        dit_config.get_config("cup")


def test_a_config_goes_through_flags():
    config = make_config()
    edited = configs.to_config_dict(config)
    edited.flow.time = "logit_normal"
    edited.model.depth = 3
    back = configs.from_config_dict(trainer.Config, edited)
    assert back.flow.time == "logit_normal" and back.model.depth == 3
