"""Presets have the sizes their publishers state."""

import pytest

from research.lm import costs
from research.lm.presets import HYBRID, PRESETS, num_params

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

# MiniMax-01: billions, total and active without embeddings, as the paper prints them ("59B" of its
# tables is "60B" in its text); None: it prints none.
NAMED = {
    "text_01": (456, 45.9),
    "minimax-moe-28b-softmax": (28, None),  # "28B, 5B active" is of the pair; hybrids have gates
    "minimax-moe-28b-hybrid": (28, 5),
    "minimax-moe-60b-pre": (60, 9.3),
    "minimax-moe-60b-post": (60, 9.3),
    "minimax-moe-24b": (24, 2),
} | {
    f"minimax-{name}-{form}": (billions, None)
    for name, billions in {
        "70m": 0.07, "160m": 0.16, "410m": 0.41, "1b": 1, "3b": 3, "7b": 7,
    }.items()
    for form in ("softmax", "lightning", "hybrid")
}  # fmt: skip
OURS = {"study-hybrid": 15_357_952}


@pytest.mark.parametrize("name", sorted(set(PRESETS) - set(NAMED) - {"quickstart-hybrid"}))
def test_parameter_counts_are_the_published_ones(name):
    assert num_params(PRESETS[name]) == (PUBLISHED | OURS)[name]


@pytest.mark.parametrize("name", NAMED)
def test_minimax_models_have_about_the_sizes_that_name_them(name):
    total, active = NAMED[name]
    count = costs.parameters(PRESETS[name])
    released = name == "text_01"
    assert count.total / 1e9 == pytest.approx(total, rel=0.001 if released else 0.14)
    if active is not None:
        assert count.active / 1e9 == pytest.approx(active, rel=0.001 if released else 0.09)


def test_minimax_models_are_one_family():
    """Seven lightning layers, then a softmax one; the three forms differ in their mixers alone."""
    for name, config in PRESETS.items():
        if name.endswith("-hybrid") and name.startswith("minimax"):
            assert config.mixers == HYBRID == ("lightning",) * 7 + ("softmax",)
    for size in ("70m", "160m", "410m", "1b", "3b", "7b"):
        forms = [PRESETS[f"minimax-{size}-{form}"] for form in ("softmax", "lightning", "hybrid")]
        assert {repr(form).split("mixers=")[0] for form in forms} == {
            repr(forms[0]).split("mixers=")[0]
        }
        assert {form.mixers for form in forms} == {("softmax",), ("lightning",), HYBRID}
    released = PRESETS["text_01"]
    softmax = [i for i, mixer in enumerate(released.layer_mixers) if mixer == "softmax"]
    assert softmax == list(range(7, 80, 8))
    assert released.residual.mlp == (3.5565588200778455, 1.0)  # as its config.json has it


def test_small_models_have_the_stated_sizes():
    assert round(num_params(PRESETS["quickstart"]) / 1e6, 3) == 0.559
    assert 0.75e6 < num_params(PRESETS["study"]) < 0.765e6
