"""Direct preference optimisation (Rafailov et al. 2023) as a `core.loop.Trainer`.

From a prompt with a chosen and a rejected response, the policy learns to prefer the chosen one more than a frozen copy
of where it started does. Responses are scored and tokenized as in fine-tuning (`lm.trainer`): each with its end token.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from research.core import data as pipelines
from research.core import optim as optimizers
from research.core import sharding, step
from research.core.data import DataConfig, Example, SourceConfig
from research.core.loop import LoopConfig, Trainer
from research.core.metrics import Mean
from research.core.optim import OptimConfig
from research.core.sources import Record
from research.core.state import TrainState
from research.lm import checkpoints, trainer
from research.lm import sharding as decoder_sharding
from research.lm.decoder import Decoder
from research.lm.examples import Tokenize
from research.lm.logprobs import Scores, token_logprobs
from research.lm.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
    """A DPO run.

    init_from: an HF directory or the directory of a run, whose model and tokenizer are taken.
    dtype, remat, scan_layers, kernels, rope_theta, max_position: in place of the model's own; None: as it has them.
    data: its sources have `prompt_key`, `chosen_key` and `rejected_key`; `batch_size` counts pairs and `seq_len` is
      that of one prompt and response. Pairs of which a response is longer are left out.
    chat: prompts go through the tokenizer's chat template.
    beta, label_smoothing: see `preference_loss`.
    micro_rows: pairs that a device computes at a time (0: all of its share).
    eval_sources, eval_batches: held-out pairs, as in `lm.trainer`.
    """

    kind: Literal["dpo"] = "dpo"
    seed: int = 0
    mesh: str = "data=-1"
    init_from: str = ""
    dtype: str | None = None
    remat: Literal["none", "full", "dots"] | None = None
    scan_layers: bool | None = None
    kernels: Literal["auto", "reference", "xla", "pallas"] | None = None
    rope_theta: float | None = None
    max_position: int | None = None
    data: DataConfig = DataConfig(pack="none", overlong="drop")
    chat: bool = False
    beta: float = 0.1
    label_smoothing: float = 0.0
    micro_rows: int = 0
    eval_sources: tuple[SourceConfig, ...] = ()
    eval_batches: int = 0
    optim: OptimConfig = OptimConfig(lr=5e-7)
    loop: LoopConfig = LoopConfig(steps=100)

    def __post_init__(self):
        if not self.beta > 0 or not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"beta={self.beta} must be positive, and label_smoothing={self.label_smoothing} in [0, 0.5)"
            )
        if (self.data.pack, self.data.overlong) != ("none", "drop"):
            raise ValueError("preferences need data.pack='none' and data.overlong='drop': pairs stay whole")
        for source in (*self.data.sources, *self.eval_sources):
            if not source.chosen_key:
                raise ValueError(
                    f"the source {source.path!r} holds no preferences: set prompt_key, chosen_key and rejected_key"
                )


def preference_loss(
    logprobs_R2: jax.Array, reference_R2: jax.Array, beta: float, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """-(1 - e) log σ(m) - e log σ(-m), m the margin between the implicit rewards of a pair.

    The reward of a response is β (log π(y | x) - log π_ref(y | x)) (Rafailov et al. 2023, eq. 5 to 7); e is
    `label_smoothing`, the probability that a pair is labelled the wrong way round (Mitchell 2023, "A note on DPO with
    noisy preferences").

    Args:
      logprobs_R2, reference_R2: float32 [R, 2], log-probabilities of the chosen and of the rejected response, summed
        over tokens.

    Returns:
      (loss_R, rewards_R2).
    """
    rewards_R2 = beta * (logprobs_R2 - reference_R2)
    margin_R = rewards_R2[:, 0] - rewards_R2[:, 1]
    loss_R = -(1 - label_smoothing) * jax.nn.log_sigmoid(margin_R)
    return loss_R - label_smoothing * jax.nn.log_sigmoid(-margin_R), rewards_R2


def best_and_worst(samples: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """{'prompt', 'chosen', 'rejected'} for each prompt: its samples of highest and of lowest score.

    `samples` have 'prompt', 'response' and 'score'. Of equal scores the first sample counts. Prompts whose samples
    all have one score teach nothing and are left out; a score that is not finite is a ValueError.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        if not math.isfinite(sample["score"]):
            raise ValueError(f"the score {sample['score']} of a response to {sample['prompt']!r} is not finite")
        groups.setdefault(repr(sample["prompt"]), []).append(sample)
    pairs = []
    for group in groups.values():
        best, worst = (pick(group, key=lambda sample: sample["score"]) for pick in (max, min))
        if best["score"] > worst["score"]:
            pairs.append(
                {
                    "prompt": best["prompt"],
                    "chosen": best["response"],
                    "rejected": worst["response"],
                }
            )
    return pairs


@dataclasses.dataclass(frozen=True)
class TokenizePairs:
    """A preference → one row of two halves of `length` tokens, chosen first, each padded at its end.

    Segments are 1 and 2. A pair that does not fit is given longer than the row, which drops it.
    """

    single: Tokenize
    length: int

    def __call__(self, record: Record) -> Example:
        halves = [
            self.single({"prompt": record["prompt"], "response": record[which]})
            for which in ("chosen", "rejected")
        ]
        longest = max(self.length, *(len(half["tokens"]) for half in halves))
        for segment, half in enumerate(halves, 1):
            half["segment_ids"] = np.full(len(half["tokens"]), segment, np.int32)
        return {
            name: np.concatenate([np.pad(half[name], (0, longest - len(half[name]))) for half in halves])
            for name in ("tokens", "loss_mask", "segment_ids")
        }


def build(
    config: Config,
    workdir: str | pathlib.Path,
    *,
    model: Decoder | None = None,
    params: Any = None,
    tokenizer: Tokenizer | None = None,
) -> Trainer:
    """The trainer of `config`; policy and reference start from `model` and `params` if given, else from init_from.

    Raises ValueError, before any training, for what cannot be trained on, and FileNotFoundError.
    """
    if model is None:
        model, params, tokenizer = checkpoints.load(config.init_from, dtype="float32")
    model = Decoder(trainer.with_own(model.config, config))
    grid = trainer.grid_of(config, model)
    return _Run(config, pathlib.Path(workdir), model, params, tokenizer, grid).trainer()


class _Run:
    """What the functions of one run share."""

    def __init__(self, config, workdir, model, params, tokenizer, grid):
        self.config, self.workdir, self.model, self.params = config, workdir, model, params
        self.tokenizer, self.grid = tokenizer, grid
        self.optimizer = optimizers.make(config.optim, config.loop.steps)
        tokenize = TokenizePairs(Tokenize(tokenizer, config.chat), config.data.seq_len)
        settings = dataclasses.replace(config.data, seq_len=2 * config.data.seq_len)
        self.iterator = iter(pipelines.pipeline(settings, tokenize))
        self.held_out = None
        if config.eval_sources:
            settings = dataclasses.replace(settings, sources=config.eval_sources, workers=0)
            self.held_out = pipelines.pipeline(settings, tokenize, endless=False)
        axes = decoder_sharding.batch_axes(grid)
        micro_rows = config.micro_rows or None
        self.rules = trainer.rules_of(grid)
        # Nothing that `self` holds may hold `self`: open files are closed when the last user is gone.
        model = trainer.runnable(model, grid)
        loss = partial(_loss, config, model)
        self.update = trainer.updater(loss, self.optimizer, grid, micro_rows)
        self.forward = step.evaluation(loss, grid, micro_rows=micro_rows, batch_axes=axes)
        logprobs = lambda params, rows: _pair_logprobs(model, params, rows)[0]  # noqa: E731
        self.score = scorer(logprobs, grid, axes, config.micro_rows)
        self.place = lambda batch: sharding.place_rows(batch, grid, axes)

    def trainer(self) -> Trainer:
        evaluate = self.evaluate if self.held_out is not None else None
        return Trainer(self.init, self.collect, self.step, evaluate, self.iterator, self.iterator.close)

    def init(self) -> TrainState:
        # Here and not in `build`: the loop has found that the directory is not another run's.
        if jax.process_index() == 0:
            checkpoints.describe(self.workdir, self.model, self.tokenizer)
        key = jax.random.key(self.config.seed)

        def create(params):
            policy, reference = (jax.tree.map(jnp.copy, params) for _ in range(2))
            return TrainState.create(policy, self.optimizer, key, ref_params=reference)

        # What was loaded is not held beside the state, but loaded again if `init` is called again.
        given, self.params = self.params, None if self.config.init_from else self.params
        if given is None:
            given = checkpoints.load(self.config.init_from, dtype="float32")[1]
        return trainer.create_state(create, given, self.grid, self.rules)

    def collect(self, state: TrainState, at: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        del state, at
        batch, _ = to_batch(rows := next(self.iterator))
        return batch, {"fill": float((rows["segment_ids"] > 0).mean())}

    def step(self, state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, dict[str, Any]]:
        return self.update(state, self._with_reference(state, batch))

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Means over the held-out pairs."""
        total, pairs = {}, 0.0
        for rows in itertools.islice(iter(self.held_out), self.config.eval_batches or None):
            batch, count = to_batch(rows)
            _, metrics = self.forward(state.params, self._with_reference(state, batch))
            names = ("loss", "accuracy", "margin", "reward/chosen", "reward/rejected")
            for name in names:
                value = metrics["pair_loss" if name == "loss" else name].compute()
                total[name] = total.get(name, 0.0) + float(value) * count
            pairs += count
        return {name: value / pairs for name, value in total.items()} | {"pairs": pairs}

    def _with_reference(self, state: TrainState, batch: dict[str, Any]) -> dict[str, Any]:
        batch = self.place(batch)
        return batch | {"reference": self.score(state.extra["ref_params"], batch)}


def _loss(config: Config, model: Decoder, params: Any, batch: dict[str, jax.Array]):
    """Σ weights · loss over the pairs of a micro-batch; `weights` [R] are 1 / (pairs of the batch)."""
    weights_R = batch["weights"]
    logprobs_R2, scores = _pair_logprobs(model, params, batch)
    loss_R, rewards_R2 = preference_loss(
        logprobs_R2, batch["reference"], config.beta, config.label_smoothing
    )
    loss = jnp.sum(loss_R * weights_R)
    pairs_R = (weights_R > 0).astype(jnp.float32)
    rewards_R2 = lax.stop_gradient(rewards_R2)
    margin_R = rewards_R2[:, 0] - rewards_R2[:, 1]
    metrics = {
        "pair_loss": Mean.of(loss_R, pairs_R),
        "accuracy": Mean.of(margin_R > 0, pairs_R),
        "margin": Mean.of(margin_R, pairs_R),
        "reward/chosen": Mean.of(rewards_R2[:, 0], pairs_R),
        "reward/rejected": Mean.of(rewards_R2[:, 1], pairs_R),
        "logprob/chosen": Mean.of(logprobs_R2[:, 0], pairs_R),
        "logprob/rejected": Mean.of(logprobs_R2[:, 1], pairs_R),
    }
    balance, more = trainer.balancing(model.config, scores.router, jnp.sum(weights_R))
    return loss + balance, metrics | more


def to_batch(rows: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], float]:
    """Rows of the pipeline → what the loss takes, and the pairs in the global batch."""
    there = rows["loss_mask"].any(axis=1).astype(np.float32)
    count = float(there.sum())
    if jax.process_count() > 1:
        count = float(np.sum(multihost_utils.process_allgather(np.float32(count))))
    batch = {name: rows[name] for name in ("tokens", "segment_ids", "positions", "loss_mask")}
    return batch | {"weights": there / np.float32(max(count, 1.0))}, count


def _pair_logprobs(model: Decoder, params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, Scores]:
    """Summed log-probabilities [R, 2] of the chosen and rejected responses of rows [R, 2 T]."""
    R, _ = batch["tokens"].shape
    rows = {name: batch[name].reshape(2 * R, -1) for name in ("tokens", "segment_ids", "positions", "loss_mask")}
    scores = token_logprobs(model, params, rows["tokens"], rows["positions"], rows["segment_ids"])
    return jnp.sum(scores.logprobs_BT * rows["loss_mask"], axis=1).reshape(R, 2), scores


def scorer(
    function: Callable[[Any, dict[str, jax.Array]], jax.Array],
    grid: Mesh,
    axes: tuple[str, ...],
    micro_rows: int,
) -> Callable[[Any, dict[str, jax.Array]], jax.Array]:
    """`score(params, batch) -> [R, …]`, from `function(params, rows)`, which gives [rows, …] of some of the rows.

    A device computes `micro_rows` rows at a time (0: all of its share).
    """
    mapped = tuple(grid.shape) == ("data",)
    shards = 1 if mapped else math.prod(grid.shape[axis] for axis in axes)

    def score(params, batch):
        share = batch["tokens"].shape[0] // shards
        micro = micro_rows or share

        def split(x):  # each micro-batch takes rows from all shards
            x = x.reshape(shards, share // micro, micro, *x.shape[1:]).swapaxes(0, 1)
            return x.reshape(share // micro, shards * micro, *x.shape[3:])

        out = lax.map(lambda rows: function(params, rows), jax.tree.map(split, batch))
        each = out.shape[2:]
        return out.reshape(-1, shards, micro, *each).swapaxes(0, 1).reshape(-1, *each)

    if mapped:
        specs = (PartitionSpec(), PartitionSpec("data"))
        score = jax.shard_map(score, mesh=grid, in_specs=specs, out_specs=PartitionSpec("data"))
    return jax.jit(score, out_shardings=jax.NamedSharding(grid, PartitionSpec(axes)))
