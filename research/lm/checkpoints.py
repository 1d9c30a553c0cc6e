"""A decoder with its parameters and tokenizer, from wherever one may start: a run's directory or a Hugging Face one.

A run's directory holds `model/decoder.json` and the tokenizer's files beside `checkpoints/`.
"""

import dataclasses
import pathlib

import jax

from research.core import checkpoint, config
from research.lm import hf
from research.lm import quantize as int8
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder
from research.lm.tokenizer import Tokenizer

_MODEL = "model"
_DECODER = "decoder.json"
_REWARD_MODEL = "reward_model.json"
_CHECKPOINTS = "checkpoints"


def describe(workdir: str | pathlib.Path, model: Decoder, tokenizer: Tokenizer) -> None:
    """Writes what `load` needs, beside the parameters, into a run's directory."""
    directory = pathlib.Path(workdir) / _MODEL
    directory.mkdir(parents=True, exist_ok=True)
    config.save(directory / _DECODER, model.config)
    tokenizer.save(directory)


def load(
    source: str | pathlib.Path,
    step: int | str | None = None,
    *,
    quantize: bool = False,
    dtype: str | None = None,
) -> tuple[Decoder, dict, Tokenizer]:
    """(model, parameters, tokenizer) of a run or of a Hugging Face directory.

    Args:
      step: which checkpoint of a run: a step, 'best', or None for the newest.
      quantize: large matrices as int8, to decode and score with (`research.lm.quantize`).
      dtype: of the parameters; None keeps them as stored. Training wants 'float32': updates of small rates are lost
        in the bfloat16 of most published models.

    Raises:
      ValueError: `source` is neither, or is empty text.
      FileNotFoundError: the run has no checkpoint (yet).
    """
    if not str(source):
        raise ValueError(
            "no model to start from: set init_from to a run's directory or a Hugging Face directory"
        )
    directory = pathlib.Path(source)
    described = directory / _MODEL / _DECODER
    if described.exists():
        model = Decoder(config.load(described, DecoderConfig))
        params = checkpoint.load_params(directory / _CHECKPOINTS, step)
        if dtype is not None:
            model = Decoder(dataclasses.replace(model.config, param_dtype=dtype))
            params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        params = int8.quantize(params) if quantize else params
        return model, params, Tokenizer.load(directory / _MODEL)
    if reward_model_file(directory).exists():
        raise ValueError(
            f"{directory} is a reward model, which predicts no tokens; use it as reward_model.path of an RL run, or "
            "as init_from of another reward model"
        )
    if not (directory / "config.json").exists():
        raise ValueError(
            f"{directory} is no model: it has neither {_MODEL}/{_DECODER} (a run of this codebase) nor config.json "
            "(a Hugging Face directory)"
        )
    if step is not None:
        raise ValueError(
            f"{directory} is a Hugging Face directory, which has no checkpoint {step!r}"
        )
    model, params = hf.load(directory, quantize=quantize, dtype=dtype)
    return model, params, Tokenizer.load(directory)


def reward_model_file(source: str | pathlib.Path) -> pathlib.Path:
    """Where a run that trains a reward model (`research.lm.reward_model`) describes it."""
    return pathlib.Path(source) / _MODEL / _REWARD_MODEL
