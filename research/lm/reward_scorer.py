"""Trained reward models: read back from their run, and the scores that they give to sequences of tokens."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from research.core import checkpoint, sharding
from research.core import config as configs
from research.lm import checkpoints, value_head
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder
from research.lm.packing import pack, pack_sequences
from research.lm.tokenizer import Tokenizer

# What it was trained with: pairs, or labels as probabilities or as they are.
Loss = Literal["bradley_terry", "binary", "regression"]


class RewardModel(NamedTuple):
    """params: {'decoder': …, 'value': …} (`value_head.init`). loss, chat: those it was trained with."""

    model: Decoder
    params: Any
    tokenizer: Tokenizer
    loss: Loss
    chat: bool


@dataclasses.dataclass(frozen=True)
class Description:
    """What a run's directory says of its reward model, beside the parameters and the tokenizer."""

    decoder: DecoderConfig
    loss: Loss
    chat: bool


def load(source: str | pathlib.Path, step: int | Literal["best"] | None = None) -> RewardModel:
    """The reward model of a run: its newest checkpoint, or that of `step`.

    Raises ValueError if `source` is no reward model, and FileNotFoundError or CheckpointError without a checkpoint.
    """
    path = checkpoints.reward_model_file(source)
    if not path.exists():
        raise ValueError(
            f"{source} holds no reward model; train one with a config of kind 'reward_model'"
        )
    described = configs.load(path, Description)
    params = checkpoint.load_params(source, step)
    return RewardModel(
        Decoder(described.decoder),
        params,
        Tokenizer.load(path.parent),
        described.loss,
        described.chat,
    )


class Scorer:
    """`score(sequences) -> float32 [N]`: the reward of each sequence of token ids, read at its last token.

    That is the head's number, or for loss 'binary' the probability. Sequences are packed into rows, `micro_rows` for
    each device at a time, of the next power of two tokens that holds the longest: few shapes, so little to compile,
    and what a score is depends on its sequence alone. Those that are empty or beyond the model's context get NaN.
    """

    def __init__(
        self, reward_model: RewardModel, mesh: Mesh, micro_rows: int = 8, dtype: str | None = None
    ):
        shape = reward_model.model.config
        shape = dataclasses.replace(shape, dtype=dtype or shape.dtype, remat="none")
        if shape.moe is not None:  # no expert leaves a token out, as in generation
            moe = dataclasses.replace(shape.moe, capacity_factor=0.0, jitter=0.0)
            shape = dataclasses.replace(shape, moe=moe)
        self._longest = shape.max_position
        self._rows = micro_rows * mesh.size
        self._params = sharding.place(reward_model.params, sharding.replicated(mesh))
        binary, model = reward_model.loss == "binary", Decoder(shape)

        def score(params, tokens_BT, positions_BT, segment_ids_BT):
            scores_BT, _ = value_head.outputs(
                model, params, tokens_BT, positions_BT, segment_ids_BT
            )
            return jax.nn.sigmoid(scores_BT) if binary else scores_BT

        rows = PartitionSpec("data")
        self._layout = jax.NamedSharding(mesh, rows)
        specs = (PartitionSpec(), rows, rows, rows)
        self._program = jax.jit(jax.shard_map(score, mesh=mesh, in_specs=specs, out_specs=rows))

    def __call__(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
        lengths = np.array([len(sequence) for sequence in sequences])
        fits = np.flatnonzero((lengths > 0) & (lengths <= self._longest))
        scores = np.full(len(sequences), np.nan, np.float32)
        if not len(fits):
            return scores
        width = min(self._longest, max(64, 1 << int(lengths[fits].max() - 1).bit_length()))
        where = pack(lengths[fits], width)
        chunks = -(-where.num_rows // self._rows)
        rows = pack_sequences(
            [{"tokens": np.asarray(sequences[i], np.int32)} for i in fits],
            width,
            chunks * self._rows,
            assignment=where,
        )
        inputs = [rows[name] for name in ("tokens", "positions", "segment_ids")]
        parts = []
        for start in range(0, len(inputs[0]), self._rows):
            chunk = jax.device_put([x[start : start + self._rows] for x in inputs], self._layout)
            parts.append(self._program(self._params, *chunk))
        values = np.concatenate([np.asarray(part) for part in parts])
        scores[fits] = values[where.row, where.offset + lengths[fits] - 1]
        return scores
