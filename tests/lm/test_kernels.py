"""The decoder and the scores on the Pallas kernels, interpreted, against the plain definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import chips
from research.lm.config import DecoderConfig, MoEConfig
from research.lm.decoder import Decoder
from research.lm.logprobs import token_logprobs

HYBRID = DecoderConfig(
    vocab_size=256, hidden_size=128, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=128,
    mlp_size=128, mixers=("lightning", "softmax"), moe=MoEConfig(num_experts=4, top_k=2),
    rotary_dim=64, scan_layers=False,
)  # fmt: skip
LIGHTNING = dataclasses.replace(HYBRID, num_layers=1, mixers=("lightning",), dtype="bfloat16")


@pytest.mark.parametrize(
    "chip, config, tolerance",
    [
        pytest.param("v5p", HYBRID, 2e-5, marks=pytest.mark.slow),
        pytest.param(
            "h200", LIGHTNING, 2e-2,  # softmax attention there is cuDNN's, which nothing interprets
            marks=pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="no interpreter for GPU kernels"),
        ),
    ],
)  # fmt: skip
def test_scores_and_gradients_are_those_of_the_definitions(chip, config, tolerance):
    T = 130
    tokens = jax.random.randint(jax.random.key(1), (1, T), 0, config.vocab_size)
    segments = jnp.asarray([[1] * 50 + [2] * 70 + [0] * (T - 120)])
    params = jax.jit(Decoder(config).init)(jax.random.key(0), tokens[:, :2])["params"]

    def scores(kernels, params):
        model = Decoder(dataclasses.replace(config, kernels=kernels))
        out = token_logprobs(model, params, tokens, segment_ids=segments)
        return jnp.sum(out.logprobs_BT) + 0.1 * jnp.sum(out.entropy_BT), out.logprobs_BT

    both = {}
    for kernels in ("reference", "pallas"):
        with chips.target(chip, interpret=True):
            run = jax.jit(jax.grad(lambda p, how=kernels: scores(how, p), has_aux=True))
            both[kernels] = run(params)
    for want, got in zip(*map(jax.tree.leaves, (both["reference"], both["pallas"])), strict=True):
        np.testing.assert_allclose(got, want, atol=tolerance * max(1e-3, float(jnp.abs(want).max())))
