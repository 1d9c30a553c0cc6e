"""Training a shape diffusion transformer as a `core.loop.Trainer`.

An example is a shape as the frozen VAE sees it (the mean and log-variance of its latents) and views of it. A step draws
a latent, a time, noise and a view for every row and fits the velocity (`flow.py`). What a checkpoint holds as `params`,
what is evaluated and what `checkpoint.load` gives are the exponential averages of the parameters; those that are
trained are in the state's `extra`.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

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
from research.hunyuan3d_2.dit import checkpoint, latents, multiview, sampler
from research.hunyuan3d_2.dit.config import DiTConfig
from research.hunyuan3d_2.dit.examples import (
    Decode,
    Example,
    check,
    dataset,
    latent_scale,
    row,
)
from research.hunyuan3d_2.dit.flow import FlowConfig, row_errors, velocity_errors
from research.hunyuan3d_2.dit.model import build as build_model
from research.hunyuan3d_2.dit.tower import Tower, condition, load_tower
from research.hunyuan3d_2.vae.evaluation import iou

EVAL_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is measured on held-out shapes.

    shapes: that are generated (0: none).
    loss_shapes: whose flow matching loss is taken, at fixed times and noise.
    steps, guidance: of the sampler.
    """

    shapes: int = 16
    loss_shapes: int = 64
    steps: int = 10
    guidance: float = 3.0


@dataclasses.dataclass(frozen=True)
class Config:
    """A run that trains a shape diffusion transformer; the defaults are the published fine-tuning recipe's.

    data: a directory of shapes, as `research.hunyuan3d_2.data` builds it.
    vae: a run's directory or a released one, with the encoder; it stays as it is.
    init_from: a run or a released directory to start from, whose model is taken; empty: random parameters of `model`.
    dtype, remat: in place of the model's own; None: as it has them.
    tower: what turns images into condition tokens: a directory of a published DINOv2, which stays as it is, or the name
      of a preset of `research.vision`, which is trained along. Its tokens must be the model's cond_dim wide.
    image_size: that the tower sees, in pixels.
    views: images of one condition. 1: any of a shape's views; more: so many of front, left, back and right.
    scale_factor: of the latents, to give them unit variance; None: that of the run in init_from, else the VAE's own if
      it has one (not 1), else that of the training latents.
    micro_rows: rows that a device computes at a time (0: all of its share).
    ema_decay: of the averaged parameters, reached gradually: min(ema_decay, (1 + t) / (10 + t)).
    """

    kind: Literal["shape_dit"] = "shape_dit"
    seed: int = 0
    mesh: str = "data=-1"
    data: str = ""
    vae: str = ""
    init_from: str = ""
    model: DiTConfig | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    remat: Literal["none", "dots", "full"] | None = None
    tower: str = "tiny"
    image_size: int = 64
    views: int = 1
    scale_factor: float | None = None
    flow: FlowConfig = FlowConfig()
    batch_size: int = 32
    micro_rows: int = 0
    ema_decay: float = 0.999
    optim: OptimConfig = OptimConfig(
        lr=1e-5,
        b1=0.9,
        b2=0.99,
        eps=1e-6,
        weight_decay=0.01,
        clip_norm=1.0,
        schedule="cosine",
        warmup_steps=50,
    )
    eval: EvalConfig = EvalConfig()
    loop: LoopConfig = LoopConfig(steps=1000)

    def __post_init__(self):
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if not 1 <= self.views <= len(multiview.VIEWS):
            raise ValueError(f"views must be from 1 to {len(multiview.VIEWS)}, got {self.views}")
        if self.batch_size < 1 or self.micro_rows < 0:
            raise ValueError("batch_size must be positive and micro_rows not negative")


def build(
    config: Config,
    workdir: str | pathlib.Path,
    *,
    examples: Sequence[Example] | None = None,
    eval_examples: Sequence[Example] | None = None,
    decode: Decode | None = None,
    tower: Tower | None = None,
) -> Trainer:
    """The trainer of `config`; as it starts, it writes the model's description to `workdir`.

    In place of what `config` names, shapes may be given as sequences of examples, the VAE's decoder as a function, and
    the image tower. Without held-out examples nothing is evaluated, and without `decode` nothing is generated.

    Raises ValueError, before any training, for a configuration or data that cannot be trained on, and
    FileNotFoundError.
    """
    shape, params, scale = _model(config)
    grid = meshes.make(config.mesh)
    if config.batch_size % (grid.size * max(1, config.micro_rows)):
        raise ValueError(
            f"batch_size={config.batch_size} must be a multiple of {grid.size} devices x "
            f"micro_rows={config.micro_rows or 1}"
        )
    tower = tower or load_tower(config.tower, config.image_size, shape.dtype)
    if tower.dim != shape.cond_dim:
        raise ValueError(
            f"the image tower's tokens have size {tower.dim}, model.cond_dim is {shape.cond_dim}"
        )
    if examples is None:
        examples, eval_examples, decode, own = latents.load(
            config.data, config.vae, shape, config.views
        )
        scale = scale or own
    if not len(examples):
        raise ValueError("there are no shapes to learn")
    first = examples[0]
    check(shape, config.views, first["mean"].shape[-1], len(first["image"]))
    scale = scale or latent_scale(examples)
    return _Run(config, pathlib.Path(workdir), shape, params, grid, tower, scale, decode).trainer(
        examples, eval_examples
    )


def loss_fn(
    model, tower: Tower, config: FlowConfig, scale: float, params: Any, batch: dict[str, jax.Array]
):
    """Σ weight · |v - u|² over rows, and the loss by quarters of time, 'flow/0.00' and so on."""
    keys_B = _keys(batch["seed"])
    x1_BLC = draw_latents(batch, scale)
    cond_BTE = condition(tower, params, batch)
    errors_B, t_B = row_errors(model, params["dit"], x1_BLC, cond_BTE, keys_B, config)
    quarters = np.linspace(0, 1, 4, endpoint=False)
    metrics = {f"flow/{q:.2f}": Mean.of(errors_B, (t_B >= q) & (t_B < q + 0.25)) for q in quarters}
    return jnp.sum(errors_B * batch["weight"]), metrics


def held_out_loss(model, tower: Tower, scale: float, params: Any, batch: dict[str, jax.Array]):
    """As `loss_fn` with the rows' own times ('time') and nothing dropped; metrics at each of EVAL_TIMES."""
    keys_B = _keys(batch["seed"])
    x1_BLC = draw_latents(batch, scale)
    x0_BLC = jax.vmap(lambda key: jax.random.normal(key, x1_BLC.shape[1:]))(keys_B)
    cond_BTE = condition(tower, params, batch)
    errors_B = velocity_errors(model, params["dit"], x0_BLC, x1_BLC, batch["time"], cond_BTE)
    metrics = {
        f"flow/{t}": Mean.of(errors_B, batch["weight"] * (batch["time"] == np.float32(t)))
        for t in EVAL_TIMES
    }
    return jnp.sum(errors_B * batch["weight"]), metrics


def draw_latents(batch: dict[str, jax.Array], scale: float) -> jax.Array:
    """scale · (mean + σ ε) of every row, with ε from the row's own key: float32 [B, L, C]."""

    def draw(seed, mean_LC):
        return jax.random.normal(_posterior_key(_keys(seed)), mean_LC.shape)

    noise_BLC = jax.vmap(draw)(batch["seed"], batch["mean"])
    return scale * (batch["mean"] + jnp.exp(0.5 * batch["logvar"]) * noise_BLC)


def _posterior_key(key: jax.Array) -> jax.Array:
    """Another one than flow.py takes of a row's key: of the same key, fold_in(key, i) is split(key, n)[i] for i < n."""
    return jax.random.fold_in(key, 2**31 - 1)


def _keys(seeds: jax.Array) -> jax.Array:
    """PRNG keys of uint32 [..., 2]."""
    return jax.random.wrap_key_data(seeds, impl="threefry2x32")


class _Run:
    """What the functions of one run share."""

    def __init__(self, config, workdir, shape, params, grid, tower, scale, decode):
        self.config, self.workdir, self.shape, self.params = config, workdir, shape, params
        self.grid, self.tower, self.scale, self.decode = grid, tower, scale, decode
        self.model = build_model(shape)
        self.shards = grid.size
        self.optimizer = optimizers.make(config.optim, config.loop.steps, optimizers.kernels)
        self.frozen = None
        if tower.params is not None:
            self.params = {name: part for name, part in params.items() if name != "tower"}
            self.frozen = {"tower": sharding.place(tower.params, sharding.replicated(self.grid))}

    def trainer(self, examples, eval_examples) -> Trainer:
        config = self.config
        micro_rows = config.micro_rows or None
        loss = functools.partial(loss_fn, self.model, self.tower, config.flow, self.scale)
        self.update = step.data_parallel(loss, self.optimizer, self.grid, micro_rows=micro_rows)
        self.average = jax.jit(
            functools.partial(_average, config.ema_decay), donate_argnums=0,
            out_shardings=sharding.replicated(self.grid),
        )  # fmt: skip
        self.iterator = iter(dataset(examples, config.views, config.batch_size, config.seed))
        evaluate = None
        if eval_examples:
            held_out = functools.partial(held_out_loss, self.model, self.tower, self.scale)
            self.forward = step.evaluation(held_out, self.grid, micro_rows=micro_rows)
            self.eval_rows = self._eval_rows(_first(eval_examples, config.eval.loss_shapes))
            self.eval_examples = _first(eval_examples, config.eval.shapes)
            evaluate = self.evaluate
        return Trainer(
            self.init, self.collect, self.step, evaluate, self.iterator, self.iterator.close
        )

    def init(self) -> TrainState:
        if jax.process_index() == 0:
            made = checkpoint.Description(
                self.shape,
                self.config.vae,
                self.config.tower,
                self.config.image_size,
                self.config.views,
                self.scale,
            )
            checkpoint.describe(self.workdir, made)
        key = jax.random.key(self.config.seed)
        dit_key, tower_key, key = jax.random.split(key, 3)

        def create(given):
            x_BLC = jnp.zeros((1, 2, self.shape.latent_dim))
            cond_BTE = jnp.zeros((1, 2, self.shape.cond_dim))
            one_B = jnp.ones(1)
            params = dict(given)
            if "dit" not in params:
                params["dit"] = self.model.init(dit_key, x_BLC, one_B, cond_BTE, one_B)["params"]
            if self.tower.params is None and "tower" not in params:
                params["tower"] = self.tower.init(tower_key)
            # Copies, because steps donate the state, and no two of its arrays may be one.
            state = TrainState.create(
                params, self.optimizer, key, online=jax.tree.map(jnp.copy, params)
            )
            return state.replace(params=jax.tree.map(jnp.copy, params))

        return jax.jit(create, out_shardings=sharding.replicated(self.grid))(self.params)

    def collect(self, state: TrainState, at: int) -> tuple[dict[str, Any], dict[str, float]]:
        del state, at
        rows = next(self.iterator)
        weight = np.float32(1 / self.config.batch_size)
        return self._encoded(rows | {"weight": np.full(len(rows["seed"]), weight)}), {}

    def step(self, state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        average = state.params
        online = state.replace(params=state.extra["online"], extra={})
        online, metrics = self.update(online, batch)
        average = self.average(average, online.params, online.step)
        return online.replace(params=average, extra={"online": online.params}), metrics

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """The held-out loss, at each of EVAL_TIMES too; and if shapes are generated, their V-IoU with the truth under
        their own condition ('matched'), another shape's ('shuffled') and none ('zero')."""
        metrics: dict[str, Mean] = {}
        total = 0.0
        for rows in self.eval_rows:
            loss, more = self.forward(state.params, self._encoded(rows))
            total += float(loss)
            metrics = {k: more[k].merge(metrics[k]) if k in metrics else more[k] for k in more}
        result = {"flow": total} | {name: float(mean.compute()) for name, mean in metrics.items()}
        if self.decode is not None and self.config.eval.shapes:
            ious = self.generated(state.params)
            result |= {f"v_iou/{name}": float(iou.mean()) for name, iou in ious.items()}
            result["v_iou/margin"] = result["v_iou/matched"] - result["v_iou/shuffled"]
        return result

    def generated(self, params: Any) -> dict[str, np.ndarray]:
        """V-IoU of every held-out shape with 'matched', 'shuffled' and 'zero' conditions, float64 [N]."""
        # On the first device: these are few, and programs over all of them would have to agree on their sharding.
        params = jax.tree.map(
            lambda x: x.addressable_data(0) if isinstance(x, jax.Array) else x,
            {**params, **(self.frozen or {})},
        )
        examples, settings = self.eval_examples, self.config.eval
        cond = np.asarray(_condition(self.tower, params, self._stacked(examples)))
        points = np.stack([example["points"] for example in examples]).astype(np.float32)
        distance = np.stack([example["distance"] for example in examples])
        # Half the list away: neighbours may be of one family.
        conditions = {"matched": cond, "shuffled": np.roll(cond, max(1, len(cond) // 2), axis=0)}
        conditions["zero"] = np.zeros_like(cond)
        ious = {}
        for name, tokens in conditions.items():
            made = sampler.generate(
                self.model, params["dit"], tokens, seeds=range(len(tokens)), steps=settings.steps,
                guidance=settings.guidance, num_latents=examples[0]["mean"].shape[0],
            )  # fmt: skip
            made = np.asarray(made) / self.scale
            fields = [self.decode(made[i : i + 1], points[i : i + 1]) for i in range(len(made))]
            pairs = zip(distance, fields, strict=True)
            ious[name] = np.asarray(
                [iou(truth > 0, np.asarray(field[0]) > 0) for truth, field in pairs]
            )
        return ious

    def _stacked(self, examples) -> dict[str, np.ndarray]:
        """A row of every example, its views and seed always the same."""
        rows = [
            row(example, self.config.views, np.random.default_rng([i, 7]))
            for i, example in enumerate(examples)
        ]
        return {name: np.stack([r[name] for r in rows]) for name in rows[0]}

    def _eval_rows(self, examples) -> list[dict[str, np.ndarray]]:
        """Batches of every example at every time of EVAL_TIMES, of one size; rows of weight 0 fill the last."""
        rows = self._stacked(examples)
        pairs = list(itertools.product(range(len(examples)), EVAL_TIMES))
        size, batches = self.config.batch_size, []
        for start in range(0, len(pairs), size):
            part = pairs[start : start + size]
            index = [i for i, _ in part] + [0] * (size - len(part))
            batch = {name: values[index] for name, values in rows.items()}
            batch["seed"] = batch["seed"] + np.arange(size, dtype=np.uint32)[:, None] % len(
                EVAL_TIMES
            )
            batch["time"] = np.asarray(
                [t for _, t in part] + [0.5] * (size - len(part)), np.float32
            )
            weight = np.arange(size) < len(part)
            batch["weight"] = (weight / len(pairs)).astype(np.float32)
            share = slice(jax.process_index(), None, jax.process_count())
            batches.append({name: values[share] for name, values in batch.items()})
        return batches

    def _encoded(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Rows with 'tokens' in place of images, if the tower is frozen."""
        if self.frozen is None:
            return rows
        if len(rows["seed"]) % self.shards == 0:
            rows = sharding.place_rows(rows, self.grid)
        tokens = _condition(self.tower, self.frozen, rows)
        return {name: x for name, x in rows.items() if name not in ("image", "view")} | {
            "tokens": tokens
        }


@functools.partial(jax.jit, static_argnums=0)
def _condition(tower, params, rows):
    return condition(tower, params, rows)


def _average(decay: float, average: Any, params: Any, count: jax.Array) -> Any:
    """d average + (1 - d) params, with d = min(decay, (1 + t) / (10 + t)) after update t."""
    t = count.astype(jnp.float32)
    d = jnp.minimum(decay, (1 + t) / (10 + t))
    return jax.tree.map(lambda a, p: d * a + (1 - d) * p, average, params)


def _model(config: Config) -> tuple[DiTConfig, dict[str, Any], float | None]:
    """(the model's configuration, parameters to start from by part: 'dit', 'tower' or none, the latents' scale if it is
    said: what a run was trained with, it goes on with)."""
    if config.init_from and config.model is not None:
        raise ValueError("init_from brings its model: leave `model` out (None)")
    scale = config.scale_factor
    if config.init_from and checkpoint.is_run(config.init_from):
        made, params = checkpoint.load_run(config.init_from)
        seen, asked = (made.tower, made.image_size), (config.tower, config.image_size)
        if "tower" in params and seen != asked:
            raise ValueError(
                f"{config.init_from} learned with tower={seen[0]!r} and image_size={seen[1]}, not with "
                f"tower={asked[0]!r} and image_size={asked[1]}"
            )
        shape, scale = made.model, scale or made.scale_factor
    elif config.init_from:
        shape, params = checkpoint.load(config.init_from)
        params = {"dit": params}
    elif config.model is not None:
        shape, params = config.model, {}
    else:
        raise ValueError("no model: set init_from to a directory, or `model` to a configuration")
    own = {"dtype": config.dtype, "remat": config.remat}
    shape = dataclasses.replace(shape, **{k: v for k, v in own.items() if v is not None})
    return shape, params, scale


def _first(examples: Sequence[Example], count: int) -> list[Example]:
    return [examples[i] for i in range(min(count, len(examples)))]
