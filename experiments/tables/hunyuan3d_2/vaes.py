"""The shape VAEs of the tables: those that `reconstruction` compares, and the one that the other tables read."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping

from absl import flags

from experiments.configs.hunyuan3d_2 import vae as vae_config
from research.core import loop
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.hunyuan3d_2.data import pipeline, shapes
from research.hunyuan3d_2.vae import trainer
from research.hunyuan3d_2.vae.config import VAEConfig

_SHAPES = flags.DEFINE_string(
    "shapes",
    "data/shapes",
    "hunyuan3d_2: prepared shapes, as research.hunyuan3d_2.data.build makes them.",
)
_VAES = flags.DEFINE_string(
    "vaes",
    "runs/tables/hunyuan3d_2/vaes",
    "hunyuan3d_2: where trained VAEs, and the encoder that scores, are kept.",
)
ARMS = ("default", "uniform", "learned", "fixed")


def _cpu() -> trainer.Config:
    """0.3 M parameters."""
    model = VAEConfig(
        num_tokens=64, latent_dim=8, width=64, heads=2, encoder_layers=1, decoder_layers=3, num_freqs=5,
        uniform_points=256, sharp_points=256, downsample_ratio=8,
    )  # fmt: skip
    return trainer.Config(
        mesh="data=1",  # the same VAE on any machine
        model=model,
        batch_size=8,
        micro_rows=1,
        points=512,
        token_counts=(16, 32, 64),
        truncation=0.1,
        optim=OptimConfig(
            name="muon", lr=6e-3, b2=0.99, weight_decay=0.01, schedule="cosine", warmup_steps=50,
            final_fraction=0.02,
        ),
        loop=LoopConfig(steps=3000, log_every=10, checkpoint_every=500),
    )  # fmt: skip


def _gpu() -> trainer.Config:
    made = vae_config.gpu()
    return dataclasses.replace(made, loop=dataclasses.replace(made.loop, steps=30_000))


SCALES: Mapping[str, trainer.Config] = {"cpu": _cpu(), "gpu": _gpu()}
RECIPES: Mapping[str, trainer.Config] = {"cpu": vae_config.cpu(), "gpu": vae_config.gpu()}


def data() -> str:
    """The directory of prepared shapes. Raises FileNotFoundError, with the command that makes it."""
    for split in ("train", "heldout"):
        shapes.open_split(_SHAPES.value, split)
    return _SHAPES.value


def heldout() -> shapes.Shapes:
    return shapes.open_split(data(), "heldout")


def configured(scale: str, arm: str, seed: int) -> trainer.Config:
    made = vae_config.ablation(SCALES[scale], "" if arm == "default" else arm)
    return dataclasses.replace(made, seed=seed, data=_SHAPES.value)


def trained(scale: str, arm: str, seed: int) -> pathlib.Path:
    """The directory of a VAE of `reconstruction`; trains it, or goes on with it, if it is not at its end."""
    data()
    config = configured(scale, arm, seed)
    batches = pipeline.vae_batches(
        config.data, batch_size=config.batch_size, uniform=config.model.uniform_points,
        sharp=config.model.sharp_points, points=config.points, seed=seed, workers=config.workers,
    )  # fmt: skip
    # Nothing is evaluated on the way: the table does, on all that is held out.
    return _run(config, f"{scale}/{arm}/seed{seed}", batches=batches)


@functools.lru_cache
def recipe(scale: str) -> pathlib.Path:
    """The directory of the VAE that the other tables read, one for all seeds: experiments/configs/hunyuan3d_2/vae.py,
    trained as there, for much longer than those of `reconstruction`; trains it if it is not."""
    return _run(dataclasses.replace(RECIPES[scale], data=data()), f"{scale}/recipe")


def directory(name: str) -> pathlib.Path:
    """Where what several rows share is kept."""
    return pathlib.Path(_VAES.value) / name


def _run(config: trainer.Config, name: str, **given) -> pathlib.Path:
    run = trainer.build(config, directory(name), **given)
    loop.run(run, config.loop, directory(name), fingerprint_of=config, name=f"VAE {name}")
    return directory(name)
