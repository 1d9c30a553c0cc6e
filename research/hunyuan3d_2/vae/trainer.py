"""The shape VAE's trainer (section 3.1): variable numbers of tokens, one compiled program for each.

python -m experiments.run --config=experiments/configs/hunyuan3d_2/vae.py --workdir=runs/vae
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np

from research.core import mesh as meshes
from research.core import optim as optimizers
from research.core import sharding, step
from research.core.loop import LoopConfig, Trainer
from research.core.metrics import Mean
from research.core.optim import OptimConfig
from research.core.state import TrainState
from research.hunyuan3d_2.data import pipeline, shapes
from research.hunyuan3d_2.vae import checkpoint, evaluation
from research.hunyuan3d_2.vae import model as vae_model
from research.hunyuan3d_2.vae.config import VAEConfig
from research.hunyuan3d_2.vae.evaluation import EvalConfig, Pools
from research.hunyuan3d_2.vae.loss import vae_loss
from research.hunyuan3d_2.vae.model import ShapeVAE


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run of the shape VAE.

    data: a directory of shapes, as `research.hunyuan3d_2.data` builds it, with its held-out split.
    init_from: a run's directory or a released one with the encoder, to go on from; else random
      parameters of `model`.
    dtype, remat: in place of the model's own.
    batch_size: shapes of the global batch; micro_rows of them at a time on a device (0: all of its share).
    points: positions per shape at which the field is learned, a third of each kind.
    token_counts: each step draws its number of latent tokens from these; empty: always the model's.
    kl_coef: gamma of equation 1, which is not published.
    truncation: the distance at which the learned field saturates; a mesh is 2 long.
    """

    kind: Literal["shape_vae"] = "shape_vae"
    seed: int = 0
    mesh: str = "data=-1"
    data: str = ""
    init_from: str = ""
    model: VAEConfig | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    remat: bool | None = None
    batch_size: int = 8
    micro_rows: int = 0
    points: int = 1536
    workers: int = 0
    token_counts: tuple[int, ...] = ()
    kl_coef: float = 1e-3
    truncation: float = 0.05
    eval: EvalConfig = EvalConfig()
    optim: OptimConfig = OptimConfig(lr=1e-4, weight_decay=0.01)
    loop: LoopConfig = LoopConfig(steps=1000)

    def __post_init__(self):
        if self.batch_size < 1 or self.points < 1 or self.workers < 0 or self.micro_rows < 0:
            raise ValueError("batch_size and points must be at least 1, workers and micro_rows 0")
        if self.kl_coef < 0 or not self.truncation > 0:
            raise ValueError("kl_coef must not be negative, and truncation positive")
        if min(self.token_counts, default=1) < 1 or len(set(self.token_counts)) < len(
            self.token_counts
        ):
            raise ValueError(f"token_counts must be positive and distinct, got {self.token_counts}")


def build(
    config: Config,
    workdir: str | os.PathLike,
    *,
    batches: grain.IterDataset | None = None,
    eval_shapes: Sequence[Pools] | None = None,
) -> Trainer:
    """The trainer of `config`; as it starts, it writes the model's description to `workdir`.

    In place of `config.data`, `batches` gives this process's rows, float32: 'uniform' [B, M, 7], 'sharp'
    [B, N, 7], 'points' [B, Q, 3] and 'distance' [B, Q], positive inside; `eval_shapes` the held-out
    shapes' pools (None: nothing is evaluated).

    Raises ValueError, before any training, for a configuration or data that cannot be trained on.
    """
    shape, params = _model(config)
    grid = meshes.make(config.mesh)
    if tuple(grid.shape) != ("data",):
        raise ValueError(f"mesh={config.mesh!r}: the VAE is trained on the one axis 'data'")
    rows = grid.size * max(1, config.micro_rows)
    if config.batch_size % rows:
        raise ValueError(
            f"batch_size={config.batch_size} must be a multiple of {grid.size} devices x "
            f"micro_rows={config.micro_rows or 1}"
        )
    for count in config.token_counts:
        if count > shape.num_tokens:
            raise ValueError(
                f"token_counts has {count}, and the model at most {shape.num_tokens} tokens"
            )
    clouds = [
        jax.ShapeDtypeStruct((1, n, 7), np.float32)
        for n in (shape.uniform_points, shape.sharp_points)
    ]
    for count in (config.token_counts or (shape.num_tokens,)) * (shape.queries == "fps"):
        jax.eval_shape(partial(vae_model.select_queries, shape, num_tokens=count), *clouds)
    if batches is None:
        batches, eval_shapes = _data(config, shape)
    return _Run(
        config, pathlib.Path(workdir), shape, params, grid, iter(batches), eval_shapes
    ).trainer()


def loss_fn(
    model: ShapeVAE, config: Config, num_tokens: int, params: Any, batch: dict[str, jax.Array]
):
    """sum of weights * vae_loss over a micro-batch's shapes, and its metrics.

    The batch also has 'weights' float32 [rows], 1 / shapes of the global batch, and 'seed' uint32
    [rows], which makes the noise of each shape's posterior sample.
    """
    noise_BLd = jax.vmap(
        lambda seed: jax.random.normal(jax.random.key(seed), (num_tokens, model.config.latent_dim))
    )(batch["seed"])
    field_BQ, mean, logvar = model.apply(
        {"params": params}, batch["uniform"], batch["sharp"], batch["points"], noise_BLd
    )
    loss_B, reconstruction_B, kl_B = vae_loss(
        field_BQ,
        batch["distance"],
        mean,
        logvar,
        kl_coef=config.kl_coef,
        truncation=config.truncation,
    )
    weights = batch["weights"]
    same_sign_B = jnp.mean((field_BQ > 0) == (batch["distance"] > 0), axis=1)
    metrics = {"reconstruction": reconstruction_B, "kl": kl_B, "sign_accuracy": same_sign_B}
    return jnp.sum(loss_B * weights), {name: Mean.of(x, weights) for name, x in metrics.items()}


class _Run:
    """What the functions of one run share."""

    def __init__(self, config, workdir, shape, params, grid, iterator, eval_shapes):
        self.config, self.workdir, self.model, self.params = (
            config,
            workdir,
            ShapeVAE(shape),
            params,
        )
        self.grid, self.iterator, self.eval_shapes = grid, iterator, eval_shapes
        self.optimizer = optimizers.make(config.optim, config.loop.steps, optimizers.kernels)
        self.token_counts = config.token_counts or (shape.num_tokens,)
        # cuDNN's attention does not run inside shard_map.
        backend = "jit" if jax.default_backend() == "gpu" else "shard_map"
        self.steps = {
            count: step.data_parallel(
                partial(loss_fn, self.model, config, count), self.optimizer, grid,
                micro_rows=config.micro_rows or None, backend=backend,
            )
            for count in self.token_counts
        }  # fmt: skip

    def trainer(self) -> Trainer:
        evaluate = self.evaluate if self.eval_shapes is not None else None
        return Trainer(
            self.init, self.collect, self.step, evaluate, self.iterator, self.iterator.close
        )

    def init(self) -> TrainState:
        if jax.process_index() == 0:
            checkpoint.describe(self.workdir, self.model.config)
        init_key, key = jax.random.split(jax.random.key(self.config.seed))
        params = self.params or vae_model.init(self.model.config, init_key)
        everywhere = sharding.replicated(self.grid)
        # Copies, because steps donate the state: what was loaded stays.
        create = partial(TrainState.create, optimizer=self.optimizer, key=key)
        return jax.jit(lambda p: create(jax.tree.map(jnp.copy, p)), out_shardings=everywhere)(
            sharding.place(params, everywhere)
        )

    def collect(self, state: TrainState, at: int):
        """((number of tokens, rows), metrics) of step `at`."""
        del state
        rows = next(self.iterator)
        words = [self.config.seed % 2**63, at]
        drawn = np.random.default_rng(words).integers(
            len(self.token_counts)
        )  # the same on all processes
        count = self.token_counts[drawn]
        size = len(rows["uniform"])
        seeds = np.random.SeedSequence([*words, jax.process_index()]).generate_state(size)
        weights = np.full(size, 1 / self.config.batch_size, np.float32)
        batch = {name: rows[name] for name in ("uniform", "sharp", "points", "distance")}
        return (count, batch | {"weights": weights, "seed": seeds}), {"num_tokens": float(count)}

    def step(self, state: TrainState, batch):
        count, rows = batch
        return self.steps[count](state, rows)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Reconstruction of the held-out shapes (`evaluation.METRICS`) with the most tokens."""
        values = evaluation.reconstruction(
            self.model, state.params, self.eval_shapes, self.config.eval,
            num_tokens=max(self.token_counts), seed=self.config.seed, mesh=self.grid,
        )  # fmt: skip
        found = evaluation.means(values)
        return {name: x for name, x in found.items() if math.isfinite(x)}


def _model(config: Config) -> tuple[VAEConfig, Any]:
    """(the model's configuration, parameters or None)."""
    if config.init_from and config.model is not None:
        raise ValueError("init_from brings its model: leave `model` out (None)")
    params = None
    if config.init_from:
        shape, params = checkpoint.load(config.init_from)
        if "encoder" not in params:
            raise ValueError(
                f"{config.init_from} is a decoder alone; training needs one with the encoder"
            )
    elif config.model is not None:
        shape = config.model
    else:
        raise ValueError("no model: set `model`, or init_from to a directory")
    own = {name: getattr(config, name) for name in ("dtype", "remat")}
    return dataclasses.replace(shape, **{k: v for k, v in own.items() if v is not None}), params


def _data(config: Config, shape: VAEConfig):
    """(endless batches, held-out shapes) of `config.data`."""
    if not config.data:
        raise ValueError(
            "no data: set `data` to a directory of shapes (research.hunyuan3d_2.data.shapes)"
        )
    batches = pipeline.vae_batches(
        config.data,
        batch_size=config.batch_size,
        uniform=shape.uniform_points,
        sharp=shape.sharp_points,
        points=config.points,
        seed=config.seed,
        workers=config.workers,
    )
    return batches, shapes.open_split(config.data, "heldout")
