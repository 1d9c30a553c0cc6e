"""Writes a run's model as a directory that transformers, vLLM and others read.

    python -m experiments.export --run=runs/zero --out=my-model [--step=best] [--dtype=bfloat16] [--layout=minimax]

`--run` may also be such a directory itself, to turn one layout into another.
"""

import sys

import jax
from absl import app, flags

from research.core.checkpoint import CheckpointError
from research.lm import checkpoints, hf

_RUN = flags.DEFINE_string("run", None, "A run's directory, or a Hugging Face one.", required=True)
_OUT = flags.DEFINE_string("out", None, "Directory to write; a model that is there is replaced.", required=True)
_STEP = flags.DEFINE_string("step", "", "Which checkpoint of a run: a step, 'best', or '' for the newest.")
_DTYPE = flags.DEFINE_enum(
    "dtype", "", ["", "float32", "bfloat16", "float16"], "Of the weights; '' keeps the run's."
)
_LAYOUT = flags.DEFINE_enum(
    "layout", "", ["", *hf.LAYOUTS], "Names and config.json; '' takes the one that can express the model."
)


def main(arguments: list[str]) -> None:
    try:
        if len(arguments) > 1:
            raise ValueError(f"unknown arguments {arguments[1:]}")
        step = int(_STEP.value) if _STEP.value.isdigit() else _STEP.value or None
        with jax.default_device(jax.devices("cpu")[0]):  # a model larger than an accelerator's memory
            model, params, tokenizer = checkpoints.load(_RUN.value, step)
            hf.save(
                _OUT.value, model, params, _LAYOUT.value or None,
                tokenizer=tokenizer, dtype=_DTYPE.value or None,
            )  # fmt: skip
    except (ValueError, OSError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"written to {_OUT.value}")


if __name__ == "__main__":
    app.run(main)
