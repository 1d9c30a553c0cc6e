"""The value head: it sees what stands before a token, and packing does not show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.lm import value_head
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder

MODEL = Decoder(
    DecoderConfig(
        vocab_size=17,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        mlp_size=16,
        max_position=32,
    )  # fmt: skip
)


@pytest.fixture(scope="module")
def params():
    policy = MODEL.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    fresh = value_head.init(policy, 16)
    assert set(fresh["decoder"]) == set(policy) - {"head"}
    assert not value_head.token_values(MODEL, fresh, jnp.ones((1, 4), jnp.int32)).any()
    value = {"kernel": jax.random.normal(jax.random.key(1), (16,)), "bias": jnp.float32(0.5)}
    return fresh | {"value": value}


def test_a_value_does_not_depend_on_its_token_nor_on_later_ones(params):
    tokens = jax.random.randint(jax.random.key(2), (1, 8), 0, 17)
    values = value_head.token_values(MODEL, params, tokens)
    other = value_head.token_values(MODEL, params, tokens.at[0, 5:].set((tokens[0, 5:] + 1) % 17))
    np.testing.assert_allclose(values[0, :6], other[0, :6], atol=1e-6)
    assert np.abs(values[0, 6:] - other[0, 6:]).min() > 1e-4
    assert values[0, 0] == 0 and np.abs(values[0, 1:]).min() > 0


def test_packing_changes_no_value(params):
    a, b = (jax.random.randint(jax.random.key(i), (1, n), 0, 17) for i, n in ((3, 5), (4, 4)))
    row = jnp.concatenate([a, b, jnp.zeros((1, 2), jnp.int32)], axis=1)
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 2])
    positions = jnp.array([[*range(5), *range(4), 0, 0]])
    packed = value_head.token_values(MODEL, params, row, positions, segments)
    alone = [value_head.token_values(MODEL, params, x) for x in (a, b)]
    np.testing.assert_allclose(packed[:, :9], np.concatenate(alone, axis=1), atol=1e-5)
    assert not packed[:, 9:].any()
