"""The losses' memory by the compiler's own account: no term grows with tokens times vocabulary."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import test_rl_trainer as base

from research.lm import value_head
from research.lm.decoder import Decoder
from research.rl.objectives import Objectives

LENGTH = 256
FEW, MANY = 2048, 4096  # tokens of a micro-batch
SMALL, LARGE = 2000, 4000  # vocabularies
FLOAT = 4  # bytes
COLUMNS = {
    jnp.int32: ("tokens", "segment_ids", "positions"),
    jnp.float32: (
        *("weights", "advantages", "sampler_logprobs", "old_logprobs", "ref_logprobs"),
        *("old_values", "returns"),
    ),
}


@functools.cache
def temporary(tokens, vocabulary, loss="policy_loss", implementation=None):
    """Bytes of temporary buffers that a loss and its gradient take, as compiled."""
    model = Decoder(
        dataclasses.replace(
            base.MODEL.config,
            vocab_size=vocabulary,
            max_position=LENGTH,
            kernels=implementation or "auto",
        )
    )
    objectives = Objectives(model, base.CONFIG.resolved())
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    if loss == "value_loss":
        params = value_head.init(params, model.config.hidden_size)
    rows = {
        name: jax.ShapeDtypeStruct((tokens // LENGTH, LENGTH), dtype)
        for dtype, names in COLUMNS.items()
        for name in names
    }
    gradient = jax.jit(jax.value_and_grad(getattr(objectives, loss), has_aux=True))
    return gradient.lower(params, rows).compile().memory_analysis().temp_size_in_bytes


def test_the_policy_s_loss_never_holds_its_logits():
    """What twice the tokens need more is the same at twice the vocabulary."""
    more = [temporary(MANY, v) - temporary(FEW, v) for v in (SMALL, LARGE)]
    assert abs(more[1] - more[0]) < 0.01 * FLOAT * (MANY - FEW) * (LARGE - SMALL)
    logits = FLOAT * MANY * LARGE
    assert temporary(MANY, LARGE) < logits
    # The probe sees them where they are.
    assert temporary(MANY, LARGE, implementation="reference") > logits


def test_the_critic_s_loss_knows_no_vocabulary():
    more = temporary(FEW, LARGE, "value_loss") - temporary(FEW, SMALL, "value_loss")
    assert abs(more) < 0.05 * FLOAT * FEW * (LARGE - SMALL)  # its embedding's gradient may
