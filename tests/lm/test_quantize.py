"""int8 weights: how far off, what stays, that they compute, decode and are as small as they should be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.lm.config import DecoderConfig, MoEConfig
from research.lm.decoder import Decoder
from research.lm.quantize import Quantized, dequantize, quantize, quantize_array, summed
from research.lm.sampler import Sampler, Sampling

CONFIG = DecoderConfig(
    vocab_size=40, hidden_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    mlp_size=40, mixers=("lightning", "softmax"), moe=MoEConfig(4), max_position=64,
)  # fmt: skip
DENSE = dataclasses.replace(CONFIG, moe=None, qkv_bias=True, qk_norm=True, tie_embeddings=True)
# By hand: which matrices become int8, and the axes of the scales, [L or Ls or Ll, ...].
SCALES = {
    "layers/attn/qkv/kernel": (1, 1, 2, 4, 16),
    "layers/attn/o/kernel": (1, 1, 1, 1, 48),
    "layers/lightning/qkv/kernel": (1, 1, 4, 3, 16),
    "layers/lightning/gate/kernel": (1, 1, 4, 16),
    "layers/lightning/o/kernel": (1, 1, 1, 48),
    "layers/moe/gate/kernel": (2, 4, 1, 40),
    "layers/moe/up/kernel": (2, 4, 1, 40),
    "layers/moe/down/kernel": (2, 4, 1, 48),
}


def init(config, seed=0):
    model = Decoder(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(seed)
    draw = lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.2, jnp.float32)  # noqa: E731
    return model, jax.tree.map(draw, shapes)


def flat(tree) -> dict:
    """Path → leaf."""
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Quantized))
    return {"/".join(key.key for key in path): leaf for path, leaf in pairs}


def plain(params):
    """The arrays that the int8 ones stand for."""
    return dequantize(params, jnp.float32, after=jnp.zeros(()))


def test_matrices_become_int8_and_the_rest_stays():
    _, params = init(CONFIG)
    before, after = flat(params), flat(quantize(params))
    assert before.keys() == after.keys()
    assert {path for path, leaf in after.items() if isinstance(leaf, Quantized)} == set(SCALES)
    for path, leaf in after.items():
        if path not in SCALES:
            assert leaf is before[path]
            continue
        assert leaf.values.dtype == jnp.int8 and leaf.values.shape == before[path].shape
        assert leaf.scale.dtype == jnp.float32 and leaf.scale.shape == SCALES[path]
    kept = {path for path in flat(init(DENSE)[1]) if summed(path) is None}
    assert not {path for path in kept if path.endswith("kernel")}
    assert {"embed/embedding", "layers/attn/qkv/bias", "layers/attn/q_norm/scale"} <= kept


def test_no_weight_is_off_by_more_than_half_a_scale():
    for config in (CONFIG, DENSE):
        _, params = init(config)
        int8 = flat(quantize(params))
        restored, exact = flat(plain(quantize(params))), flat(params)
        for path, array in exact.items():
            error = np.abs(np.asarray(restored[path], np.float64) - np.asarray(array, np.float64))
            if not isinstance(int8[path], Quantized):
                assert (error == 0).all()
                continue
            scale = np.asarray(int8[path].scale, np.float64)
            assert (error <= scale / 2 * (1 + 1e-5)).all()
            assert (error.max() > scale.max() / 4).all()  # and it is no copy
            values = np.abs(np.asarray(int8[path].values, np.int32))
            assert (values.max(axis=summed(path)) == 127).all()  # every channel uses its range


def test_channels_far_apart_in_size_do_not_share_a_scale():
    array = np.ones((1, 6, 3)) * [1e-6, 1.0, 1e6]
    array[0, 2] = 0
    restored = plain(quantize_array(array, (1,)))
    np.testing.assert_allclose(restored, array, rtol=1e-6)


def test_zeros_stay_zeros():
    int8 = quantize_array(jnp.zeros((2, 3, 4)), (1,))
    assert not int8.values.any() and np.isfinite(plain(int8)).all() and not plain(int8).any()


def test_a_quarter_of_float32_and_half_of_bfloat16():
    config = dataclasses.replace(CONFIG, hidden_size=256, head_dim=64, mlp_size=256)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    layers = shapes["params"]["layers"]
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731
    assert size(layers) / size(jax.eval_shape(quantize, {"layers": layers})) == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("config", [CONFIG, DENSE], ids=["hybrid", "dense"])
def test_the_decoder_computes_with_the_restored_weights(config, scan):
    model, params = init(dataclasses.replace(config, scan_layers=scan))
    tokens = np.random.default_rng(1).integers(0, 40, (2, 20))
    int8 = quantize(params)
    apply = jax.jit(lambda params: model.apply({"params": params}, tokens))
    ours, exact = apply(int8), apply(params)
    np.testing.assert_allclose(ours, apply(plain(int8)), rtol=1e-5, atol=1e-5)
    error = np.abs(ours - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 0.05


def test_bfloat16_computation_restores_to_bfloat16():
    params = quantize(init(CONFIG)[1])
    kernel = dequantize(params, "bfloat16", after=jnp.zeros(()))["layers"]["moe"]["up"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        kernel, plain(params)["layers"]["moe"]["up"]["kernel"].astype(jnp.bfloat16)
    )
    model = Decoder(dataclasses.replace(CONFIG, dtype="bfloat16"))
    shape = jax.eval_shape(lambda p: model.apply({"params": p}, jnp.zeros((1, 9), int)), params)
    assert shape.dtype == jnp.float32


def test_generation():
    """The sampler takes int8 parameters as they are, and continues as the restored ones would."""
    model, params = init(CONFIG)
    int8 = quantize(params)
    sampler = Sampler(model, slots=3, max_prompt=8, max_new_tokens=12)
    prompts = [np.arange(3), np.arange(7) + 20, np.arange(5) + 10]
    prepared = sampler.prepare(int8)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(prepared.params["layers"]["0"]["moe"]["gate"])}
    assert kinds == {np.dtype(np.int8), np.dtype(np.float32)}
    ours = sampler(prepared, prompts, jax.random.key(0), Sampling(12, temperature=0.0))
    apply = jax.jit(lambda tokens: model.apply({"params": plain(int8)}, tokens))
    for prompt, sequence in zip(prompts, ours.sequences, strict=True):
        tokens = np.concatenate([prompt, sequence])
        logits = apply(np.pad(tokens, (0, 20 - len(tokens)))[None])[0]
        expected = logits[len(prompt) - 1 : len(tokens) - 1].argmax(-1)
        np.testing.assert_array_equal(sequence, expected)
