"""Pre-training and supervised fine-tuning as a `core.loop.Trainer`.

Sources with a `text_key` are documents, learned whole; sources with `prompt_key` and `response_key`
are pairs, learned on the response. The loss is the mean negative log-likelihood per learned token of
the global batch, in nats; it does not depend on how the batch is packed or spread over devices.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from research.core import data as pipelines
from research.core import mesh as meshes
from research.core import optim as optimizers
from research.core import sharding, step
from research.core.data import DataConfig, Example
from research.core.loop import LoopConfig, Trainer
from research.core.metrics import Mean
from research.core.optim import OptimConfig
from research.core.state import TrainState
from research.lm import checkpoints
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
    dtype, remat, scan_layers: in place of the model's own; None: as it has them.
    chat: prompts go through the tokenizer's chat template.
    micro_rows: rows that a device computes at a time (0: all of its share).
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
    data: DataConfig = DataConfig()
    chat: bool = False
    micro_rows: int = 0
    eval_sources: tuple[pipelines.SourceConfig, ...] = ()
    eval_batches: int = 0
    optim: OptimConfig = OptimConfig()
    loop: LoopConfig = LoopConfig(steps=1000)


def build(
    config: Config,
    workdir: str | pathlib.Path,
    *,
    params: Any = None,
    tokenizer: Tokenizer | None = None,
    examples: grain.IterDataset | Sequence[Example] | None = None,
    eval_examples: Sequence[Example] | None = None,
) -> Trainer:
    """The trainer of `config`, which writes the model's description to `workdir`.

    All data files are read through once here. In place of files, `examples` are learned: a sequence
    of dicts of 'tokens' and 'loss_mask' (int [n], see `research.core.data`), which is packed as
    `config.data` says, or a Grain dataset of whole batches. `eval_examples` likewise take the place
    of `eval_sources`; `params` and `tokenizer` that of what `config` names (without a tokenizer
    nothing is described, so that the run cannot be loaded by its directory alone).

    Raises ValueError, before any training, for a configuration or data that cannot be trained on,
    and FileNotFoundError.
    """
    model, params, tokenizer = _model(config, params, tokenizer)
    if config.data.seq_len > model.config.max_position:
        raise ValueError(
            f"data.seq_len={config.data.seq_len} is beyond the model's context of "
            f"{model.config.max_position} tokens (model.max_position)"
        )
    grid = meshes.make(config.mesh)
    shards = math.prod(grid.shape[axis] for axis in decoder_sharding.batch_axes(grid))
    if config.data.batch_size % (shards * max(1, config.micro_rows)):
        raise ValueError(
            f"data.batch_size={config.data.batch_size} must be a multiple of {shards} devices x "
            f"micro_rows={config.micro_rows or 1}"
        )
    if tokenizer is not None and jax.process_index() == 0:
        checkpoints.describe(workdir, model, tokenizer)
    train, held_out = _datasets(config, tokenizer, examples, eval_examples)
    return _Run(config, model, params, grid, train, held_out).trainer()


def loss_fn(model: Decoder, params: Any, batch: dict[str, jax.Array]):
    """Σ weights · (-log p(token | before)) over a micro-batch, and its metrics.

    `weights` float32 [rows, seq_len] are those of the global batch: 1 / (learned tokens) at learned
    tokens and 0 elsewhere make the sum over all rows the mean negative log-likelihood.
    """
    logprobs, entropy, _ = token_logprobs(
        model, params, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    learned = batch["weights"] > 0
    return -jnp.sum(logprobs * batch["weights"]), {"entropy": Mean.of(entropy, learned)}


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

    def __init__(self, config, model, params, grid, train, held_out):
        self.config, self.model, self.params, self.grid = config, model, params, grid
        self.optimizer = optimizers.make(config.optim, config.loop.steps)
        self.iterator = iter(train)
        self.held_out = held_out
        micro_rows = config.micro_rows or None
        self.axes = decoder_sharding.batch_axes(grid)
        self.rules = None
        loss = lambda params, batch: loss_fn(model, params, batch)  # noqa: E731
        if tuple(grid.shape) == ("data",):
            self.update = step.data_parallel(loss, self.optimizer, grid, micro_rows=micro_rows)
        else:
            self.rules = decoder_sharding.rules(grid)
            self.update = step.spmd(
                loss, self.optimizer, grid, self.rules, micro_rows=micro_rows, batch_axes=self.axes
            )
        self.forward = step.evaluation(loss, grid, micro_rows=micro_rows, batch_axes=self.axes)

    def trainer(self) -> Trainer:
        evaluate = self.evaluate if self.held_out is not None else None
        return Trainer(
            self.init, self.collect, self.update, evaluate, self.iterator, self.iterator.close
        )

    def init(self) -> TrainState:
        key = jax.random.key(self.config.seed)
        init_key, key = jax.random.split(key)

        def create(params):
            if params is None:
                params = self.model.init(init_key, jnp.zeros((1, 1), jnp.int32))["params"]
            # Copies, because steps donate the state: what was given stays the caller's.
            return TrainState.create(jax.tree.map(jnp.copy, params), self.optimizer, key)

        given, self.params = self.params, None if self.config.init_from else self.params
        if given is None and self.config.init_from:  # called again; not held in the meantime
            given = checkpoints.load(self.config.init_from)[1]
        # Every array is made where it will lie.
        layout = jax.tree.map(
            lambda _: sharding.replicated(self.grid), like := jax.eval_shape(create, given)
        )
        if self.rules is not None:
            layout = sharding.tree_shardings(self.rules, like, self.grid)
        if given is not None:
            given = sharding.place(given, layout.params)
        return jax.jit(create, out_shardings=layout)(given)

    def collect(self, state: TrainState, at: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        del state, at
        rows = next(self.iterator)
        batch, count = to_batch(rows)
        metrics = {"tokens": count, "fill": float((rows["segment_ids"] > 0).mean())}
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
        model, params, own = checkpoints.load(config.init_from)
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
    own = {name: getattr(config, name) for name in ("dtype", "remat", "scan_layers")}
    own = {name: value for name, value in own.items() if value is not None}
    return Decoder(dataclasses.replace(shape, **own)), params, tokenizer


def _datasets(config, tokenizer, examples, eval_examples):
    """The endless training batches, and those of one pass over the held-out data (or None)."""
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
    if examples is not None:
        return pipelines.from_examples(config.data, examples), held_out
    return pipelines.pipeline(config.data, tokenize), held_out
