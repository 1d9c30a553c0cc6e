"""Pre-training and supervised fine-tuning as a `core.loop.Trainer`.

Sources with a `text_key` are documents, learned whole; sources with `prompt_key` and `response_key`
are pairs, learned on the response. The loss is the mean negative log-likelihood per learned token of
the global batch, in nats; it does not depend on how the batch is packed or spread over devices. A
mixture of experts adds its balancing loss, which is that of each micro-batch.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from research.core import data as pipelines
from research.core import mesh as meshes
from research.core import optim as optimizers
from research.core import sharding, step
from research.core.data import DataConfig, Example
from research.core.loop import LoopConfig, Trainer
from research.core.metrics import Mean
from research.core.optim import OptimConfig
from research.core.state import TrainState
from research.lm import batch_ramp as ramps
from research.lm import checkpoints, moe
from research.lm import sharding as decoder_sharding
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder
from research.lm.examples import Tokenize
from research.lm.logprobs import token_logprobs
from research.lm.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
    """A pre-training or fine-tuning run.

    init_from: a Hugging Face directory or a run's, whose model and tokenizer are taken; empty to
      start from random parameters of `model`.
    tokenizer: a directory with tokenizer.json, or 'byte'; empty: the one of `init_from`.
    special_tokens: those of a 'byte' tokenizer.
    dtype, remat, scan_layers, kernels, rope_theta, max_position: in place of the model's own;
      None: as it has them.
    chat: prompts go through the tokenizer's chat template.
    micro_rows: rows that a device computes at a time (0: all of its share; with a batch ramp, the
      most of which all its batches are multiples).
    batch_ramp: (tokens, rows) pairs: from so many tokens seen on (rows * seq_len, so with padding),
      the global batch has so many rows. data.batch_size is the largest.
    eval_sources: held-out data, read in one pass with the settings of `data`, at most
      `eval_batches` of them (0: all).
    """

    kind: Literal["lm"] = "lm"
    seed: int = 0
    mesh: str = "data=-1"
    init_from: str = ""
    model: DecoderConfig | None = None
    tokenizer: str = ""
    special_tokens: tuple[str, ...] = ()
    dtype: str | None = None
    remat: Literal["none", "full", "dots"] | None = None
    scan_layers: bool | None = None
    kernels: Literal["auto", "reference", "xla", "pallas"] | None = None
    rope_theta: float | None = None
    max_position: int | None = None
    data: DataConfig = DataConfig()
    chat: bool = False
    micro_rows: int = 0
    batch_ramp: ramps.Ramp = ()
    eval_sources: tuple[pipelines.SourceConfig, ...] = ()
    eval_batches: int = 0
    optim: OptimConfig = OptimConfig()
    loop: LoopConfig = LoopConfig(steps=1000)

    def __post_init__(self):
        ramps.check(self.batch_ramp, self.data.batch_size)


def build(
    config: Config,
    workdir: str | pathlib.Path,
    *,
    params: Any = None,
    tokenizer: Tokenizer | None = None,
    examples: grain.IterDataset | Sequence[Example] | None = None,
    eval_examples: Sequence[Example] | None = None,
) -> Trainer:
    """The trainer of `config`; as it starts, it writes the model's description to `workdir`.

    All data files are read through once here. In place of files, `examples` are learned: a sequence
    of dicts of 'tokens' and 'loss_mask' (int [n], see `research.core.data`), which is packed as
    `config.data` says, or a Grain dataset of whole batches. `eval_examples` likewise take the place
    of `eval_sources`; `params` and `tokenizer` that of what `config` names (without a tokenizer
    nothing is described, so that the run cannot be loaded by its directory alone).

    Raises ValueError, before any training, for a configuration or data that cannot be trained on,
    and FileNotFoundError.
    """
    model, params, tokenizer = _model(config, params, tokenizer)
    schedule = ramps.Schedule(config.batch_ramp, config.data.batch_size, config.data.seq_len)
    name = "a batch of batch_ramp" if config.batch_ramp else "data.batch_size"
    grid = grid_of(config, model, schedule.sizes, name)
    if config.batch_ramp and isinstance(examples, grain.IterDataset):
        raise ValueError("batch_ramp needs rows to make batches of, not a dataset of whole batches")
    train, held_out = _datasets(config, schedule.unit, tokenizer, examples, eval_examples)
    if held_out is not None and next(iter(held_out), None) is None:
        raise ValueError(
            f"nothing of the held-out data (eval_sources) fits in data.seq_len={config.data.seq_len} tokens"
        )
    run = _Run(config, pathlib.Path(workdir), model, params, tokenizer, grid)
    return run.trainer(schedule, train, held_out)


def loss_fn(model: Decoder, params: Any, batch: dict[str, jax.Array]):
    """Σ weights · (-log p(token | before)) over a micro-batch, and its metrics.

    `weights` float32 [rows, seq_len] are those of the global batch: 1 / (learned tokens) at learned
    tokens and 0 elsewhere make the sum over all rows the mean negative log-likelihood.

    With experts, aux_coef · Σ_layers aux · Σ weights is added, where aux is the micro-batch's
    balancing loss (MiniMax-01, section 2.1): each micro-batch counts by its share of the learned tokens.
    'nll' and 'aux' report the two apart: loss = nll + aux_coef · aux. The router jitters, if it
    is to, by the batch entry 'noise', uint32 [rows]; without that, not.
    """
    moe_config = model.config.moe
    jitter = moe_config is not None and moe_config.jitter > 0 and "noise" in batch
    logprobs, entropy, router = token_logprobs(
        model,
        params,
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        jitter_key=jax.random.key(batch["noise"][0]) if jitter else None,
    )
    learned = batch["weights"] > 0
    nll = -jnp.sum(logprobs * batch["weights"])
    metrics = {"entropy": Mean.of(entropy, learned)}
    if moe_config is not None:
        metrics["nll"] = Mean.of(-logprobs, learned)
    balance, more = balancing(model.config, router, jnp.sum(batch["weights"]))
    return nll + balance, metrics | more


def held_out_loss(model: Decoder, params: Any, batch: dict[str, jax.Array]):
    """The likelihood of `loss_fn` alone; no expert leaves a token out, as in generation."""
    shape = model.config
    if shape.moe is not None:
        dropless = dataclasses.replace(shape.moe, capacity_factor=0.0)
        shape = dataclasses.replace(shape, moe=dropless)
    logprobs, *_ = token_logprobs(
        Decoder(shape), params, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    return -jnp.sum(logprobs * batch["weights"]), {}


def balancing(
    config: DecoderConfig, router: moe.RouterStats | None, share: jax.Array | float = 1.0
):
    """aux_coef · share · Σ_layers aux, which a loss adds, and the routers' metrics; 0.0 without experts.

    `share` is what the micro-batch is of the global one, by the loss's weights; 'aux' is Σ_layers aux.
    """
    if config.moe is None:
        return 0.0, {}
    aux = jnp.sum(moe.aux_loss(router, config.moe.top_k, config.moe.aux_form))
    metrics = {"aux": Mean(aux * share, share), **moe.metrics(router, config.moe)}
    return config.moe.aux_coef * aux * share, metrics


def grid_of(
    config: Any, model: Decoder, batches: Sequence[int] = (), name: str = "data.batch_size"
) -> Mesh:
    """The mesh of a run on packed rows, whose `batches` (by default its data's one) it can split.

    Raises ValueError for rows beyond the model's context, and batches that do not split.
    """
    if config.data.seq_len > model.config.max_position:
        raise ValueError(
            f"data.seq_len={config.data.seq_len} is beyond the model's context of "
            f"{model.config.max_position} tokens (model.max_position)"
        )
    grid = meshes.make(config.mesh)
    shards = math.prod(grid.shape[axis] for axis in decoder_sharding.batch_axes(grid))
    for rows in batches or (config.data.batch_size,):
        if rows % (shards * max(1, config.micro_rows)):
            raise ValueError(
                f"{name}={rows} must be a multiple of {shards} devices x micro_rows={config.micro_rows or 1}"
            )
    return grid


def runnable(model: Decoder, grid: Mesh) -> Decoder:
    """`model` with kernels that can run on the mesh: the compiler, which splits arrays by sharding rules, cannot split
    what Pallas kernels do, so there 'auto' is 'xla'."""
    if rules_of(grid) is None or model.config.kernels != "auto":
        return model
    return Decoder(dataclasses.replace(model.config, kernels="xla"))


def rules_of(grid: Mesh) -> sharding.Rules | None:
    """The decoder's sharding rules on a mesh; None where only rows are split."""
    return None if tuple(grid.shape) == ("data",) else decoder_sharding.rules(grid)


def updater(
    loss: step.LossFn, optimizer: optax.GradientTransformation, grid: Mesh, micro_rows: int | None
) -> step.Step:
    """The training step of a decoder on a mesh."""
    rules = rules_of(grid)
    if rules is None:
        return step.data_parallel(loss, optimizer, grid, micro_rows=micro_rows)
    axes = decoder_sharding.batch_axes(grid)
    return step.spmd(loss, optimizer, grid, rules, micro_rows=micro_rows, batch_axes=axes)


def create_state(create, params: Any, grid, rules) -> TrainState:
    """`create(params) -> TrainState`, compiled, with every array made where it will lie.

    That is everywhere, or as the `rules` for the mesh `grid` say. `params` may be None.
    """
    like = jax.eval_shape(create, params)
    if rules is None:
        layout = jax.tree.map(lambda _: sharding.replicated(grid), like)
    else:
        layout = sharding.tree_shardings(rules, like, grid)
    if params is not None:
        params = sharding.place(params, layout.params)
    return jax.jit(create, out_shardings=layout)(params)


def to_batch(rows: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
    """Rows of the pipeline → what `loss_fn` takes, and the learned tokens in the global batch."""
    mask = rows["loss_mask"].astype(np.float32)
    count = float(mask.sum(dtype=np.float64))
    if jax.process_count() > 1:
        count = float(np.sum(multihost_utils.process_allgather(np.float32(count))))
    batch = {name: rows[name] for name in ("tokens", "positions", "segment_ids")}
    return batch | {"weights": mask / np.float32(max(count, 1.0))}, count


class _Run:
    """What the functions of one run share."""

    def __init__(self, config, workdir, model, params, tokenizer, grid):
        self.config, self.workdir, self.model, self.params = config, workdir, model, params
        self.tokenizer, self.grid = tokenizer, grid
        self.optimizer = optimizers.make(config.optim, config.loop.steps)
        self.axes = decoder_sharding.batch_axes(grid)
        self.rules = rules_of(grid)

    def trainer(self, schedule, train, held_out) -> Trainer:
        self.schedule, self.iterator, self.held_out = schedule, iter(train), held_out
        shards = math.prod(self.grid.shape[axis] for axis in self.axes)
        self.shards = shards // jax.process_count()  # those whose rows this process gives
        self.micro_rows = self.config.micro_rows or None
        if self.config.batch_ramp:
            self.micro_rows = self.micro_rows or schedule.unit // shards
        # Nothing that `self` holds may hold `self`: open files are closed when the last user is gone.
        model = runnable(self.model, self.grid)
        loss = partial(loss_fn, model)
        update = updater(loss, self.optimizer, self.grid, self.micro_rows)
        self.forward = step.evaluation(
            partial(held_out_loss, model),
            self.grid,
            micro_rows=self.micro_rows,
            batch_axes=self.axes,
        )
        evaluate = self.evaluate if held_out is not None else None
        return Trainer(
            self.init, self.collect, update, evaluate, self.iterator, self.iterator.close
        )

    def init(self) -> TrainState:
        # Here and not in `build`: the loop has found that the directory is not another run's.
        if self.tokenizer is not None and jax.process_index() == 0:
            checkpoints.describe(self.workdir, self.model, self.tokenizer)
        key = jax.random.key(self.config.seed)
        init_key, key = jax.random.split(key)

        def create(params):
            if params is None:
                params = self.model.init(init_key, jnp.zeros((1, 1), jnp.int32))["params"]
            # Copies, because steps donate the state: what was given stays the caller's.
            return TrainState.create(jax.tree.map(jnp.copy, params), self.optimizer, key)

        given, self.params = self.params, None if self.config.init_from else self.params
        if given is None and self.config.init_from:  # called again; not held in the meantime
            given = checkpoints.load(self.config.init_from, dtype="float32")[1]
        return create_state(create, given, self.grid, self.rules)

    def collect(self, state: TrainState, at: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        del state
        config, size = self.config, self.schedule.rows(at)
        units = [next(self.iterator) for _ in range(size // self.schedule.unit)]
        rows = {name: np.concatenate([unit[name] for unit in units]) for name in units[0]}
        batch, count = to_batch(rows)
        metrics = {"tokens": count, "fill": float((rows["segment_ids"] > 0).mean())}
        if self.model.config.moe is not None and self.model.config.moe.jitter:
            noise = np.random.SeedSequence([config.seed % 2**63, at, jax.process_index()])
            batch["noise"] = noise.generate_state(len(rows["tokens"]))
        if config.batch_ramp:
            local = config.data.batch_size // jax.process_count()
            batch = ramps.lay_out(batch, self.shards, local, self.micro_rows)
            metrics["rows"] = float(size)
        return batch, metrics

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Mean negative log-likelihood per learned token of the held-out data, and perplexity."""
        total, tokens = 0.0, 0.0
        for rows in itertools.islice(iter(self.held_out), self.config.eval_batches or None):
            batch, count = to_batch(rows)
            mean, _ = self.forward(state.params, batch)
            total, tokens = total + float(mean) * count, tokens + count
        loss = total / tokens
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": tokens}


def _model(config: Config, params: Any, tokenizer: Tokenizer | None):
    """(model, parameters or None, tokenizer or None)."""
    if config.init_from and config.model is not None:
        raise ValueError("init_from brings its model: leave `model` out (None)")
    if config.init_from:
        model, params, own = checkpoints.load(config.init_from, dtype="float32")
        tokenizer = tokenizer or own
        shape = model.config
    elif config.model is not None:
        shape = config.model
    else:
        raise ValueError(
            "no model: set init_from to a directory, or `model` to a decoder's configuration"
        )
    if config.tokenizer == "byte":
        tokenizer = Tokenizer.byte(config.special_tokens)
    elif config.tokenizer:
        tokenizer = Tokenizer.load(config.tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {shape.vocab_size}; "
            "they do not belong together, or model.vocab_size is too small"
        )
    return Decoder(with_own(shape, config)), params, tokenizer


def with_own(shape: DecoderConfig, config: Any) -> DecoderConfig:
    """`shape` with what a run's `config` sets in place of the model's own."""
    names = ("dtype", "remat", "scan_layers", "kernels", "rope_theta", "max_position")
    own = {name: getattr(config, name) for name in names}
    return dataclasses.replace(shape, **{k: v for k, v in own.items() if v is not None})


def _datasets(config, rows, tokenizer, examples, eval_examples):
    """The endless training data in units of `rows`; one pass over the held-out data (or None)."""
    if tokenizer is None and (examples is None or (config.eval_sources and not eval_examples)):
        raise ValueError(
            "no tokenizer: set `tokenizer` to 'byte' or a directory, or start from a model"
        )
    tokenize = None if tokenizer is None else Tokenize(tokenizer, config.chat)
    held_out = None
    settings = dataclasses.replace(config.data, sources=config.eval_sources, workers=0)
    if eval_examples is not None:
        held_out = pipelines.from_examples(settings, eval_examples, endless=False)
    elif config.eval_sources:
        held_out = pipelines.pipeline(settings, tokenize, endless=False)
    if isinstance(examples, grain.IterDataset):
        return examples, held_out
    settings = dataclasses.replace(config.data, batch_size=rows)
    if examples is not None:
        return pipelines.from_examples(settings, examples), held_out
    return pipelines.pipeline(settings, tokenize), held_out
