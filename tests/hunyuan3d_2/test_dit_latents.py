"""Latents are encoded once, by the VAE that is asked for; and all the way from meshes to a trained step."""

import dataclasses

import jax
import numpy as np
import pytest

from research.core import loop
from research.core.loop import LoopConfig
from research.hunyuan3d_2.data import shapes
from research.hunyuan3d_2.dit import checkpoint, examples, latents, trainer
from research.hunyuan3d_2.dit.config import DiTConfig
from research.hunyuan3d_2.dit.tower import load_tower
from research.hunyuan3d_2.vae import checkpoint as vae_checkpoint
from research.hunyuan3d_2.vae import model as vae_model
from research.hunyuan3d_2.vae.config import VAEConfig

VAE = VAEConfig(
    num_tokens=4, latent_dim=3, width=16, heads=2, encoder_layers=1, decoder_layers=1, num_freqs=2, uniform_points=16,
    sharp_points=16, downsample_ratio=4, scale_factor=1.5,
)  # fmt: skip


def clouds(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {name: rng.normal(size=(20, 7)).astype(np.float32) for name in ("uniform", "sharp")}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def params():
    return jax.device_get(vae_model.init(VAE, jax.random.key(0)))


def test_every_shape_is_encoded_as_the_vae_does_and_decoded_so(params):
    many = clouds(latents.ROWS + 1)
    mean, logvar = latents.encode(VAE, params, many, 4)
    assert mean.shape == logvar.shape == (len(many), 4, 3)
    net = vae_model.ShapeVAE(VAE)
    for i in (0, len(many) - 1):
        want = net.apply(
            {"params": params},
            *(many[i][n][None, :16] for n in ("uniform", "sharp")),
            4,
            method="encode",
        )
        np.testing.assert_allclose(mean[i], want[0][0], atol=2e-5)
        np.testing.assert_allclose(logvar[i], want[1][0], atol=2e-5)
    points = np.random.default_rng(1).uniform(-1, 1, (2, 5, 3)).astype(np.float32)
    tokens = net.apply({"params": params}, mean[:2], method="decode")
    want = net.apply({"params": params}, tokens, points, method="query")
    np.testing.assert_allclose(latents.decoder(VAE, params)(mean[:2], points), want, atol=2e-5)
    with pytest.raises(ValueError, match="takes 16 sharp points, the shapes have 8"):
        latents.encode(
            VAE, params, [{"uniform": many[0]["uniform"], "sharp": many[0]["sharp"][:8]}], 4
        )


def test_what_is_encoded_is_kept_for_this_vae_and_these_shapes(params, tmp_path):
    def mean(params, seed, identity):
        return latents.encoded(tmp_path, VAE, params, clouds(2, seed), 4, identity)[0]

    first = mean(params, 0, "a")
    np.testing.assert_array_equal(mean(params, 1, "a"), first)  # read, not encoded
    assert np.abs(mean(params, 1, "b") - first).max() > 1e-3
    other = jax.tree.map(lambda x: x * 1.5, params)
    assert np.abs(mean(other, 0, "a") - first).max() > 1e-3
    assert len(list(tmp_path.iterdir())) == 3


def test_towers_are_found_by_name():
    tower = load_tower("tiny", 16)
    assert tower.params is None and tower.dim == 128
    params = jax.jit(tower.init)(jax.random.key(0))
    images = np.random.default_rng(0).integers(0, 255, (2, 24, 24, 3), np.uint8)  # of another size
    tokens = jax.jit(tower.apply)(params, images)
    assert tokens.shape == (2, 5, 128)
    with pytest.raises(ValueError, match="neither a directory nor one of the presets"):
        load_tower("dinov3", 16)
    with pytest.raises(ValueError, match="neither a directory"):
        load_tower("", 16)
    with pytest.raises(ValueError, match="image_size=20 must be a multiple of"):
        load_tower("tiny", 20)


@pytest.mark.slow
def test_from_meshes_to_a_trained_step(params, tmp_path, monkeypatch):
    pools = shapes.PoolConfig(uniform=64, sharp=64, queries=64, views=4, view_size=16)
    for split in ("train", "heldout"):
        shapes.build(shapes.FamilySource(split, 4), tmp_path / "shapes", pools)
    vae_checkpoint.save(tmp_path / "vae", VAE, params, "float32")
    config = trainer.Config(
        mesh="data=1",
        data=str(tmp_path / "shapes"),
        vae=str(tmp_path / "vae"),
        model=DiTConfig(
            num_latents=4,
            latent_dim=3,
            cond_dim=128,
            hidden_size=16,
            num_heads=2,
            depth=1,
            single_depth=1,
        ),
        image_size=16,
        batch_size=4,
        eval=trainer.EvalConfig(shapes=2, loss_shapes=2, steps=2),
        optim=dataclasses.replace(trainer.Config().optim, warmup_steps=1),
        loop=LoopConfig(steps=2),
    )
    state = loop.run(
        trainer.build(config, tmp_path / "run"),
        config.loop,
        tmp_path / "run",
        fingerprint_of=config,
    )
    assert int(state.step) == 2
    description, loaded = checkpoint.load_run(tmp_path / "run")
    assert description.scale_factor == 1.5 and description.vae == str(tmp_path / "vae")
    assert set(loaded) == {"dit", "tower"}
    shape = latents.load(config.data, config.vae, config.model)[1][0]
    assert shape["image"].shape == (4, 16, 16, 4) and shape["points"].shape == (64, 3)
    assert shape["distance"].shape == (64,) and shape["mean"].shape == (4, 3)

    def encodes(*given):
        raise AssertionError("encoded before it was refused")

    monkeypatch.setattr(latents, "encoded", encodes)
    model = config.model
    for changes, message in (
        ({"batch_size": 3, "micro_rows": 2}, "batch_size=3 must be a multiple"),
        ({"model": dataclasses.replace(model, cond_dim=64)}, "tokens have size 128"),
        ({"model": dataclasses.replace(model, latent_dim=5)}, r"are \[L, 3\], the model's are \[L, 5\]"),
        ({"vae": str(tmp_path / "none")}, "none"),
    ):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            trainer.build(dataclasses.replace(config, **changes), tmp_path / "run2")
    with pytest.raises(ValueError, match="views=2 needs shapes with the four named views"):
        examples.check(model, 2, 3, 3)

    released = {name: x for name, x in params.items() if name not in ("encoder", "pre_kl")}
    vae_checkpoint.save(tmp_path / "decoder", VAE, released, "float32")
    with pytest.raises(ValueError, match="is a decoder alone"):
        trainer.build(dataclasses.replace(config, vae=str(tmp_path / "decoder")), tmp_path / "run2")
    with pytest.raises(ValueError, match="set `data` to a directory"):
        trainer.build(dataclasses.replace(config, data=""), tmp_path / "run2")
