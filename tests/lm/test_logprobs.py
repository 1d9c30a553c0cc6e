"""Scoring against log-softmax of the decoder's own logits, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder
from research.lm.logprobs import token_logprobs

CONFIG = DecoderConfig(
    vocab_size=17,
    hidden_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    mlp_size=12,
    tie_embeddings=True,
    init_std=0.5,
)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_are_the_log_softmax_of_the_logits_before_each_token(temperature):
    model = Decoder(CONFIG)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, CONFIG.vocab_size, size=(2, 9)))
    segment_ids = jnp.asarray([[1, 1, 1, 1, 2, 2, 3, 0, 0], [1] * 9])
    params = model.init(jax.random.key(0), tokens)["params"]
    logprobs, entropy, _ = jax.jit(
        lambda p: token_logprobs(
            model, p, tokens, segment_ids=segment_ids, temperature=temperature
        )
    )(params)
    logits = model.apply({"params": params}, tokens, segment_ids=segment_ids)
    z = np.asarray(logits, np.float64) / temperature
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    for b in range(2):
        for t in range(9):
            s = np.asarray(segment_ids)
            inside = t > 0 and s[b, t] > 0 and s[b, t] == s[b, t - 1]
            want = logp[b, t - 1, tokens[b, t]] if inside else 0.0
            want_entropy = -(np.exp(logp[b, t - 1]) * logp[b, t - 1]).sum() if inside else 0.0
            assert logprobs[b, t] == pytest.approx(want, abs=1e-5)
            assert entropy[b, t] == pytest.approx(want_entropy, abs=1e-5)


def test_without_segments_only_the_first_token_has_no_score():
    model = Decoder(CONFIG)
    tokens = jnp.asarray([[3, 1, 4, 1]])
    params = model.init(jax.random.key(0), tokens)["params"]
    logprobs, *_ = token_logprobs(model, params, tokens)
    assert logprobs[0, 0] == 0 and (np.asarray(logprobs[0, 1:]) < 0).all()
