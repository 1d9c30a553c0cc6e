"""Presets have the sizes their publishers state."""

import pytest

from research.lm.presets import PRESETS, num_params

# Parameters as listed on each model's page (from its safetensors files; where the embedding is
# tied and stored twice, counted once).
PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-math-1.5b": 1_543_714_304,
    "qwen2.5-math-7b": 7_615_616_512,
    "r1-distill-qwen-1.5b": 1_777_088_000,
    "r1-distill-qwen-7b": 7_615_616_512,
    "qwen3-0.6b": 751_632_384 - 151_936 * 1024,
    "qwen3-1.7b": 2_031_739_904 - 151_936 * 2048,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    # By hand: V*D + D + L * (2*D + D*(H+2*KV)*K + H*K*D + 3*D*F).
    "study": 128 * 128 + 128 + 4 * (2 * 128 + 128 * 8 * 32 + 128 * 128 + 3 * 128 * 352),
    "quickstart": 40 * 128 + 128 + 3 * (2 * 128 + 128 * 8 * 32 + 128 * 128 + 3 * 128 * 352),
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts_are_the_published_ones(name):
    assert num_params(PRESETS[name]) == PUBLISHED[name]


def test_small_models_have_the_stated_sizes():
    assert round(num_params(PRESETS["quickstart"]) / 1e6, 3) == 0.559
    assert 0.75e6 < num_params(PRESETS["study"]) < 0.765e6
