"""The shape VAE, from prepared shapes; on a CPU by default.

    python -m research.hunyuan3d_2.data.build --out=data/shapes --workers=2
    python -m experiments.run --config=experiments/configs/hunyuan3d_2/vae.py \\
        --config.data=data/shapes --workdir=runs/vae

The default has 0.7 M parameters, 16 to 64 tokens, and learns in under half an hour on two cores. The argument takes:

    vae.py:uniform    the default without points on sharp edges, as many points in all (Table 1's importance sampling)
    vae.py:learned    the default with a table of learned queries in place of sampled ones
    vae.py:fixed      the default always with 64 tokens
    vae.py:gpu        larger, for one H200; --out's --points must be 32768 or more
    vae.py:finetune   a released size; needs --config.init_from, a directory with the encoder, and shapes built with
                      --paper
"""

import dataclasses

from research.core.config import to_config_dict
from research.core.loop import LoopConfig
from research.core.optim import OptimConfig
from research.hunyuan3d_2.vae.config import PRESETS
from research.hunyuan3d_2.vae.evaluation import EvalConfig
from research.hunyuan3d_2.vae.trainer import Config

ABLATIONS = ("uniform", "learned", "fixed")


def get_config(arg: str = ""):
    return to_config_dict(config(arg))


def config(arg: str = "") -> Config:
    if arg in ABLATIONS:
        return ablation(cpu(), arg)
    variants = {"": cpu, "gpu": gpu, "finetune": finetune}
    if arg not in variants:
        raise ValueError(
            f"vae has no variant {arg!r}; it has {', '.join([*ABLATIONS, 'gpu'])} and finetune"
        )
    return variants[arg]()


def ablation(made: Config, name: str) -> Config:
    """Table 1's comparison of this name (one of ABLATIONS) with `made`; '' is `made` itself."""
    model = made.model
    if name == "uniform":
        points = model.uniform_points + model.sharp_points
        model = dataclasses.replace(model, uniform_points=points, sharp_points=0)
    elif name == "learned":
        model = dataclasses.replace(model, queries="learned")
    elif name == "fixed":
        return dataclasses.replace(made, token_counts=())
    elif name:
        raise ValueError(f"no comparison {name!r}; there are {', '.join(ABLATIONS)}")
    return dataclasses.replace(made, model=model)


def cpu() -> Config:
    return Config(
        data="data/shapes",
        model=PRESETS["small"],
        batch_size=8,
        micro_rows=1,
        points=768,
        token_counts=(16, 32, 64),
        truncation=0.1,
        eval=EvalConfig(volume_points=8192, surface_points=4096, shapes=48),
        optim=OptimConfig(
            name="muon", lr=5e-3, b2=0.99, weight_decay=0.01, schedule="cosine", warmup_steps=100,
            final_fraction=0.01,
        ),
        loop=LoopConfig(steps=4000, log_every=20, eval_every=1000, checkpoint_every=500),
    )  # fmt: skip


def gpu() -> Config:
    model = dataclasses.replace(
        PRESETS["v2-mini"], width=512, heads=8, encoder_layers=4, decoder_layers=8, latent_dim=32,
        num_tokens=1024, uniform_points=10240, sharp_points=10240, scale_factor=1.0,
        dtype="bfloat16", remat=True,
    )  # fmt: skip
    return Config(
        data="data/shapes",
        model=model,
        batch_size=32,
        points=6144,
        workers=8,
        token_counts=(256, 512, 1024),
        truncation=0.05,
        eval=EvalConfig(shapes=256),
        optim=OptimConfig(
            lr=3e-4, b2=0.99, weight_decay=0.01, schedule="cosine", warmup_steps=1000,
            final_fraction=0.01,
        ),
        loop=LoopConfig(steps=100_000, log_every=50, eval_every=5000, checkpoint_every=2500),
    )  # fmt: skip


def finetune() -> Config:
    made = gpu()
    optim = dataclasses.replace(made.optim, lr=1e-5, warmup_steps=50)
    loop = dataclasses.replace(made.loop, steps=10_000)
    return dataclasses.replace(
        made, model=None, init_from="models/hunyuan3d-vae-v2-0-withencoder", dtype="bfloat16",
        remat=True, batch_size=4, token_counts=(256, 512, 1024, 2048, 3072), optim=optim, loop=loop,
    )  # fmt: skip
