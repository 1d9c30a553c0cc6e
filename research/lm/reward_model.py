"""Reward models as a `core.loop.Trainer`: a decoder whose head gives one number at the last token of a response.

From pairs (a prompt, a chosen and a rejected response) it learns by the Bradley-Terry model that the chosen one has the
higher score; from graded responses, point-wise, the probability that a label says (DeepSeek-R1's safety model) or the
label itself. Responses are tokenized as in fine-tuning, each with its end token, where the score is read.
"""

import dataclasses
import itertools
import pathlib
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from research.core import config as configs
from research.core import data as pipelines
from research.core import optim as optimizers
from research.core import sharding
from research.core.data import DataConfig, Example, SourceConfig
from research.core.loop import LoopConfig, Trainer
from research.core.metrics import Mean
from research.core.optim import OptimConfig
from research.core.sources import Record
from research.core.state import TrainState
from research.lm import checkpoints, dpo, trainer, value_head
from research.lm import sharding as decoder_sharding
from research.lm.decoder import Decoder
from research.lm.examples import Tokenize
from research.lm.reward_scorer import Description, Loss, load
from research.lm.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Config:
    """Training of a reward model. R1's helpful one: 66k pairs, batches of 256, lr 6e-6, one epoch, 8,192 tokens.

    init_from: an HF directory or the directory of a run (of a language model, or of a reward model to train on), whose
      model and tokenizer are taken.
    dtype, remat, scan_layers, kernels, rope_theta, max_position: in place of the model's own; None: as it has them.
    loss: bradley_terry reads sources with `prompt_key`, `chosen_key` and `rejected_key`; binary (labels from 0 to 1)
      and regression (any number) sources with `prompt_key`, `response_key` and `label_key`.
    margin, center: of `pair_loss`.
    data: `batch_size` counts pairs or responses and `seq_len` is that of one prompt and response. What is longer is
      left out, pairs whole.
    chat: prompts go through the tokenizer's chat template.
    micro_rows: pairs or responses that a device computes at a time (0: all of its share).
    eval_sources, eval_batches: held-out data, as in `lm.trainer`.
    """

    kind: Literal["reward_model"] = "reward_model"
    seed: int = 0
    mesh: str = "data=-1"
    init_from: str = ""
    dtype: str | None = None
    remat: Literal["none", "full", "dots"] | None = None
    scan_layers: bool | None = None
    kernels: Literal["auto", "reference", "xla", "pallas"] | None = None
    rope_theta: float | None = None
    max_position: int | None = None
    loss: Loss = "bradley_terry"
    margin: float = 0.0
    center: float = 0.0
    data: DataConfig = DataConfig(pack="none", overlong="drop")
    chat: bool = False
    micro_rows: int = 0
    eval_sources: tuple[SourceConfig, ...] = ()
    eval_batches: int = 0
    optim: OptimConfig = OptimConfig(lr=6e-6)
    loop: LoopConfig = LoopConfig(steps=100)

    def __post_init__(self):
        pairs = self.loss == "bradley_terry"
        if self.margin < 0 or self.center < 0 or (not pairs and (self.margin or self.center)):
            raise ValueError(
                f"margin={self.margin} and center={self.center} must be at least 0, and are those of bradley_terry"
            )
        if (self.data.pack, self.data.overlong) != ("none", "drop"):
            raise ValueError(
                "reward models need data.pack='none' and data.overlong='drop': responses stay whole"
            )
        for source in (*self.data.sources, *self.eval_sources):
            if not (source.chosen_key if pairs else source.label_key):
                keys = "chosen_key and rejected_key" if pairs else "response_key and label_key"
                raise ValueError(
                    f"the source {source.path!r} is not what loss={self.loss} learns from: set prompt_key, {keys}"
                )


def pair_loss(scores_R2: jax.Array, margin: float = 0.0, center: float = 0.0) -> jax.Array:
    """-log σ(s_chosen - s_rejected - margin) + center (s_chosen + s_rejected)², float32 [R], of scores [R, 2].

    The first term is the likelihood of Bradley and Terry (1952) with a margin (Llama 2, eq. 2), which speaks of
    differences alone; the second keeps the scores themselves near zero (Eisenstein et al. 2023, "Helping or Herding?").
    """
    chosen_R, rejected_R = scores_R2[:, 0], scores_R2[:, 1]
    loss_R = -jax.nn.log_sigmoid(chosen_R - rejected_R - margin)
    return loss_R + center * jnp.square(chosen_R + rejected_R)


def point_loss(scores_R: jax.Array, labels_R: jax.Array, loss: Loss) -> jax.Array:
    """Float32 [R]. binary: -y log σ(s) - (1 - y) log σ(-s), labels y from 0 to 1; regression: (s - y)²."""
    if loss == "regression":
        return jnp.square(scores_R - labels_R)
    return -labels_R * jax.nn.log_sigmoid(scores_R) - (1 - labels_R) * jax.nn.log_sigmoid(-scores_R)


def pair_report(scores_N2: np.ndarray) -> dict[str, float]:
    """Figures of pairs by their scores [N, 2], chosen first.

    accuracy: share in which the chosen one scores higher, ties by half. margin: mean of s_chosen - s_rejected. loss:
    mean -log σ of it. calibration: `calibration_error` of σ(|margin|) as the probability of being right. score/mean,
    score/std: over all responses, by which scores are normalised.
    """
    scores_N2 = np.asarray(scores_N2, np.float64)
    margin_N = scores_N2[:, 0] - scores_N2[:, 1]
    right_N = (margin_N > 0) + 0.5 * (margin_N == 0)
    return {
        "accuracy": float(right_N.mean()),
        "margin": float(margin_N.mean()),
        "loss": float(np.logaddexp(0, -margin_N).mean()),
        "calibration": calibration_error(_sigmoid(np.abs(margin_N)), right_N),
        "score/mean": float(scores_N2.mean()),
        "score/std": float(scores_N2.std()),
    }


def point_report(scores_N: np.ndarray, labels_N: np.ndarray, loss: Loss) -> dict[str, float]:
    """Figures of graded responses.

    regression: loss (mean squared error) and correlation. binary: loss, calibration, and accuracy: the label is above
    0.5 where the probability is. Both: score/mean and score/std, of what `Scorer` gives.
    """
    scores_N, labels_N = np.asarray(scores_N, np.float64), np.asarray(labels_N, np.float64)
    if loss == "regression":
        varies = np.ptp(scores_N) > 0 and np.ptp(labels_N) > 0
        figures = {
            "loss": float(np.mean((scores_N - labels_N) ** 2)),
            "correlation": float(np.corrcoef(scores_N, labels_N)[0, 1]) if varies else 0.0,
        }
    else:
        nll_N = np.logaddexp(0, scores_N) - labels_N * scores_N
        scores_N = _sigmoid(scores_N)
        figures = {
            "loss": float(nll_N.mean()),
            "accuracy": float(np.mean((scores_N > 0.5) == (labels_N > 0.5))),
            "calibration": calibration_error(scores_N, labels_N),
        }
    return figures | {"score/mean": float(scores_N.mean()), "score/std": float(scores_N.std())}


def calibration_error(probabilities_N: np.ndarray, outcomes_N: np.ndarray, bins: int = 10) -> float:
    """Σ_b (n_b / N) |mean outcome - mean probability| over equally wide bins (Guo et al. 2017, eq. 3)."""
    place_N = np.minimum((np.asarray(probabilities_N) * bins).astype(int), bins - 1)
    gaps = np.bincount(place_N, np.asarray(outcomes_N) - probabilities_N, bins)
    return float(np.abs(gaps).sum() / len(place_N))


@dataclasses.dataclass(frozen=True)
class TokenizeGraded:
    """A graded response → tokens, with its label at each."""

    single: Tokenize
    binary: bool

    def __call__(self, record: Record) -> Example:
        label = record["label"]
        if self.binary and not 0 <= label <= 1:
            raise ValueError(f"the label {label} is not within 0 to 1, as loss='binary' needs it")
        example = self.single(record)
        return example | {"labels": np.full(len(example["tokens"]), label, np.float32)}


def build(
    config: Config,
    workdir: str | pathlib.Path,
    *,
    model: Decoder | None = None,
    params: Any = None,
    tokenizer: Tokenizer | None = None,
) -> Trainer:
    """The trainer of `config`; it starts from a language model's `model` and `params` if given, else from init_from.

    Raises ValueError, before any training, for what cannot be trained on, and FileNotFoundError.
    """
    if model is None:
        model, params, tokenizer = _start(config.init_from)
    else:
        params = value_head.init(params, model.config.hidden_size)
    model = Decoder(trainer.with_own(model.config, config))
    grid = trainer.grid_of(config, model)
    return _Run(config, pathlib.Path(workdir), model, params, tokenizer, grid).trainer()


def _start(init_from: str) -> tuple[Decoder, Any, Tokenizer]:
    if init_from and checkpoints.reward_model_file(init_from).exists():
        return load(init_from)[:3]
    model, params, tokenizer = checkpoints.load(init_from, dtype="float32")
    return model, value_head.init(params, model.config.hidden_size), tokenizer


class _Run:
    """What the functions of one run share."""

    def __init__(self, config, workdir, model, params, tokenizer, grid):
        self.config, self.workdir, self.model, self.params = config, workdir, model, params
        self.tokenizer, self.grid = tokenizer, grid
        self.optimizer = optimizers.make(config.optim, config.loop.steps)
        single, settings = Tokenize(tokenizer, config.chat), config.data
        if config.loss == "bradley_terry":
            tokenize = dpo.TokenizePairs(single, settings.seq_len)
            settings = dataclasses.replace(settings, seq_len=2 * settings.seq_len)
        else:
            tokenize = TokenizeGraded(single, config.loss == "binary")
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
        scores = lambda params, rows: _scores(model, params, rows)[0]  # noqa: E731
        score = dpo.scorer(scores, grid, axes, config.micro_rows)
        known = ("weights", "labels")

        def held_out(params, batch):  # everywhere whole, for reports are of all rows
            batch = sharding.place_rows(batch, grid, axes)
            found = {name: batch[name] for name in known if name in batch}
            return everywhere(found | {"scores": score(params, batch)})

        everywhere = jax.jit(lambda x: x, out_shardings=sharding.replicated(grid))
        self.score = held_out

    def trainer(self) -> Trainer:
        evaluate = self.evaluate if self.held_out is not None else None
        return Trainer(
            self.init, self.collect, self.update, evaluate, self.iterator, self.iterator.close
        )

    def init(self) -> TrainState:
        # Here and not in `build`: the loop has found that the directory is not another run's.
        if jax.process_index() == 0:
            path = checkpoints.reward_model_file(self.workdir)
            path.parent.mkdir(parents=True, exist_ok=True)
            configs.save(path, Description(self.model.config, self.config.loss, self.config.chat))
            self.tokenizer.save(path.parent)
        key = jax.random.key(self.config.seed)

        def create(params):
            return TrainState.create(jax.tree.map(jnp.copy, params), self.optimizer, key)

        # What was loaded is not held beside the state, but loaded again if `init` is called again.
        given, self.params = self.params, None if self.config.init_from else self.params
        if given is None:
            given = _start(self.config.init_from)[1]
        return trainer.create_state(create, given, self.grid, self.rules)

    def collect(self, state: TrainState, at: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        del state, at
        batch = _to_batch(rows := next(self.iterator))
        return batch, {"fill": float((rows["segment_ids"] > 0).mean())}

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """`pair_report` or `point_report` of the held-out data, and how many there are."""
        found: dict[str, list[np.ndarray]] = {}
        for rows in itertools.islice(iter(self.held_out), self.config.eval_batches or None):
            for name, values in jax.device_get(self.score(state.params, _to_batch(rows))).items():
                found.setdefault(name, []).append(values)
        joined = {name: np.concatenate(parts) for name, parts in found.items()}
        there = joined["weights"] > 0
        scores = joined["scores"][there]
        if self.config.loss == "bradley_terry":
            return pair_report(scores) | {"pairs": float(len(scores))}
        figures = point_report(scores, joined["labels"][there], self.config.loss)
        return figures | {"responses": float(len(scores))}


def _loss(config: Config, model: Decoder, params: Any, batch: dict[str, jax.Array]):
    """Σ weights · loss over the rows of a micro-batch; `weights` [R] are 1 / (rows of the batch)."""
    weights_R = batch["weights"]
    there_R = (weights_R > 0).astype(jnp.float32)
    scores, router = _scores(model, params, batch)
    if config.loss == "bradley_terry":
        loss_R = pair_loss(scores, config.margin, config.center)
        margin_R = scores[:, 0] - scores[:, 1]
        figures = {"accuracy": margin_R > 0, "margin": margin_R, "score/mean": scores.mean(axis=1)}
    else:
        loss_R = point_loss(scores, batch["labels"], config.loss)
        figures = {"score/mean": scores}
        if config.loss == "binary":
            figures["accuracy"] = (scores > 0) == (batch["labels"] > 0.5)
    metrics = {name: Mean.of(jax.lax.stop_gradient(x), there_R) for name, x in figures.items()}
    balance, more = trainer.balancing(model.config, router, jnp.sum(weights_R))
    # Rows that are all padding have scores too, of nothing.
    return jnp.sum(jnp.where(weights_R > 0, loss_R * weights_R, 0.0)) + balance, metrics | more


def _scores(model: Decoder, params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
    """Scores at the last tokens, [R] of rows with one response, [R, 2] of pairs' halves; the router's statistics."""
    pairs = "labels" not in batch
    R, _ = batch["tokens"].shape
    rows = {name: batch[name] for name in ("tokens", "positions", "segment_ids")}
    if pairs:
        rows = {name: x.reshape(2 * R, -1) for name, x in rows.items()}
    scores_BT, router = value_head.outputs(
        model, params, rows["tokens"], rows["positions"], rows["segment_ids"]
    )
    last_B = jnp.maximum(jnp.sum(rows["segment_ids"] > 0, axis=1) - 1, 0)
    scores_B = jnp.take_along_axis(scores_BT, last_B[:, None], axis=1)[:, 0]
    return (scores_B.reshape(R, 2) if pairs else scores_B), router


def _to_batch(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows of the pipeline → what the loss takes; labels are one for each row."""
    batch, _ = dpo.to_batch(rows)
    del batch["loss_mask"]
    if "labels" in rows:
        batch["labels"] = rows["labels"][:, 0]
    return batch


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))
