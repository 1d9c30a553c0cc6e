"""The shape diffusion transformer, from the latents of a trained VAE; on a CPU by default.

    python -m experiments.run --config=experiments/configs/hunyuan3d_2/dit.py \\
        --config.data=data/shapes --config.vae=runs/vae --workdir=runs/dit

The default learns from scratch, with a small image tower, in under half an hour on two cores. The argument takes:

    dit.py:gpu        larger, for one H200
    dit.py:cross      the default's size with cross-attention to the condition (Table 2's comparison)
    dit.py:finetune   the published recipe; needs --config.init_from, --config.tower and --config.vae (released
                      directories, the VAE's with its encoder)
"""

import dataclasses

from research.core.config import to_config_dict
from research.core.loop import LoopConfig
from research.hunyuan3d_2.dit.config import PRESETS, DiTConfig
from research.hunyuan3d_2.dit.trainer import Config, EvalConfig

RECIPE = Config().optim


def get_config(arg: str = ""):
    variants = {"": cpu, "gpu": gpu, "cross": cross, "finetune": finetune}
    if arg not in variants:
        raise ValueError(f"dit has no variant {arg!r}; it has {', '.join(filter(None, variants))}")
    return to_config_dict(variants[arg]())


def cpu() -> Config:
    return Config(
        data="data/shapes",
        vae="runs/vae",
        model=small("tiny"),
        batch_size=16,
        ema_decay=0.995,
        optim=dataclasses.replace(RECIPE, name="muon", lr=2e-3, warmup_steps=100),
        eval=EvalConfig(shapes=16, loss_shapes=64, steps=20, guidance=3.0),
        loop=LoopConfig(steps=2000, log_every=10, eval_every=500, checkpoint_every=250),
    )


def small(preset: str) -> DiTConfig:
    """Half as wide and half as deep: more steps in the same time."""
    made = PRESETS[preset]
    depths = {"depth": made.depth // 2, "single_depth": made.single_depth // 2}
    return dataclasses.replace(made, hidden_size=128, **depths)


def cross() -> Config:
    return dataclasses.replace(cpu(), model=small("tiny-cross"))


def gpu() -> Config:
    model = DiTConfig(
        num_latents=256, latent_dim=32, cond_dim=384, hidden_size=512, num_heads=8, depth=8, single_depth=16,
        dtype="bfloat16",
    )  # fmt: skip
    return dataclasses.replace(
        cpu(),
        model=model,
        tower="small",
        image_size=224,
        batch_size=256,
        ema_decay=0.9999,
        optim=dataclasses.replace(RECIPE, lr=2e-4, warmup_steps=2000),
        eval=EvalConfig(shapes=64, loss_shapes=200, steps=50, guidance=3.0),
        loop=LoopConfig(steps=100_000, log_every=50, eval_every=5000, checkpoint_every=2000),
    )


def finetune() -> Config:
    return dataclasses.replace(
        cpu(),
        model=None,
        dtype="bfloat16",
        remat="dots",
        tower="",
        image_size=518,
        batch_size=4,
        ema_decay=0.999,
        optim=RECIPE,
        eval=EvalConfig(shapes=4, loss_shapes=16, steps=50, guidance=5.0),
        loop=LoopConfig(steps=5000, log_every=10, eval_every=1000, checkpoint_every=500),
    )
