"""Costs: the published numbers, the arrays that models make, and the compiler's own count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.lm import costs
from research.lm.config import DecoderConfig, MoEConfig
from research.lm.decoder import Decoder
from research.lm.presets import PRESETS

TEXT_01 = PRESETS["text_01"]
SMALL = DecoderConfig(
    vocab_size=64, hidden_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    mlp_size=80, scan_layers=False,
)  # fmt: skip
CASES = {
    "dense, biases": dataclasses.replace(SMALL, qkv_bias=True, tie_embeddings=True),
    "dense, norms of q and k": dataclasses.replace(SMALL, qk_norm=True),
    "hybrid": dataclasses.replace(SMALL, num_layers=4, mixers=("lightning", "softmax")),
    "lightning": dataclasses.replace(SMALL, mixers=("lightning",)),
    "experts": dataclasses.replace(SMALL, mixers=("lightning", "softmax"), moe=MoEConfig(4, 2)),
    "one expert": dataclasses.replace(SMALL, moe=MoEConfig(3, 1), tie_embeddings=True),
}


def test_the_released_model_has_the_published_parameters():
    """456B total, 45.9B active (MiniMax-01, abstract); the active ones leave out both embeddings."""
    counted, formula = costs.counted(TEXT_01), costs.parameters(TEXT_01)
    assert counted == formula
    assert round(formula.total / 1e9, 2) == 456.09
    assert round(formula.active / 1e9, 2) == 45.94
    assert round((formula.active + formula.head) / 1e9, 1) == 47.2
    assert formula.embedding == formula.head == 200064 * 6144


def test_the_released_model_by_its_parts():
    """An expert 169.87M, a layer's experts 5.436B, a mixer 251.67M or 113.25M (by hand)."""
    without = lambda **changes: costs.parameters(dataclasses.replace(TEXT_01, **changes)).layers  # noqa: E731
    one_more = without(moe=MoEConfig(33)) - without(moe=MoEConfig(32))
    assert one_more == 80 * (3 * 6144 * 9216 + 6144)
    assert round((one_more / 80 - 6144) / 1e6, 2) == 169.87
    mixers = without(mixers=("lightning",)) - without(mixers=("softmax",))
    assert mixers == 80 * (5 * 6144 * 8192 + 8192 - 2 * 6144 * (8192 + 1024))
    assert round(5 * 6144 * 8192 / 1e6, 2) == 251.66  # 251.67 with the norm's 8192
    assert round(2 * 6144 * (8192 + 1024) / 1e6, 2) == 113.25


def test_a_million_tokens_of_cache():
    """40 GiB of keys and values in bfloat16, and 280 MiB of states whatever the length."""
    pairs, states = costs.cache_bytes(TEXT_01, 2**20)
    assert pairs == 40 * 2**30 and states == 280 * 2**20
    assert costs.cache_bytes(TEXT_01, 1) == (40 * 2**10, states)
    assert costs.cache_bytes(TEXT_01, 2**20, itemsize=4)[0] == 2 * pairs
    assert costs.cache_bytes(PRESETS["minimax-1b-lightning"], 2**20)[0] == 0


@pytest.mark.parametrize("case", CASES)
def test_the_formula_counts_what_the_model_makes(case):
    assert costs.counted(CASES[case]) == costs.parameters(CASES[case])


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith("minimax")])
def test_the_formula_holds_for_large_models(name):
    assert costs.counted(PRESETS[name]) == costs.parameters(PRESETS[name])


def compiled_flops(function, *args) -> float:
    cost = jax.jit(function).lower(*args).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


@pytest.mark.parametrize("case", ["dense, biases", "hybrid", "lightning"])
def test_forward_flops_are_the_compilers(case):
    """Between -5 and +25 %: XLA counts norms, rotary positions and softmax too, and all pairs of
    tokens; of lightning attention's first block it sees that no state comes before it.
    (Experts run in loops, of which XLA counts one round.)"""
    config, length = CASES[case], 64
    model = Decoder(config)
    tokens = jnp.zeros((1, length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    compiled = compiled_flops(model.apply, params, tokens)
    formula = costs.training_flops(config, length) * length / 3
    softmax = config.layer_mixers.count("softmax")
    width = config.num_heads * config.head_dim
    formula += softmax * 4 * width * length * (length - 1) / 2  # pairs above the diagonal
    assert 0.95 * formula < compiled < 1.25 * formula


def test_decoding_costs_grow_with_the_context_in_softmax_layers_alone():
    for config in CASES.values():
        grown = costs.decode_flops(config, 5000) - costs.decode_flops(config, 1000)
        softmax = config.layer_mixers.count("softmax")
        assert grown == softmax * 4 * config.num_heads * config.head_dim * 4000


def test_a_prompt_costs_what_its_tokens_cost_one_by_one():
    """But for logits, and for products within lightning's blocks, which decoding makes one by one."""
    config, length = CASES["dense, biases"], 37
    whole = costs.prefill_flops(config, length) * length
    steps = sum(costs.decode_flops(config, n) for n in range(length))
    assert whole == steps - (length - 1) * 2 * config.hidden_size * config.vocab_size
    assert costs.training_flops(config, length) * length == 3 * steps


def test_a_token_passes_its_own_experts_and_the_router():
    experts = dataclasses.replace(SMALL, moe=MoEConfig(8, 3))
    wide = dataclasses.replace(SMALL, mlp_size=3 * SMALL.mlp_size)
    router = 2 * SMALL.num_layers * SMALL.hidden_size * 8
    for flops in (costs.training_flops, costs.prefill_flops, costs.decode_flops):
        times = 3 if flops is costs.training_flops else 1
        assert flops(experts, 50) == pytest.approx(flops(wide, 50) + times * router, rel=1e-12)


def test_lightning_attention_costs_less_beyond_twice_block_and_head():
    """4 d (B + d) a token and head, against 2 N d: they meet at N = 2 (B + d) (section 2.2)."""
    base = dataclasses.replace(
        TEXT_01, num_layers=1, mixers=("softmax",), num_kv_heads=64, moe=None
    )
    for block, meet in ((0, 768), (64, 384)):
        lightning = dataclasses.replace(
            base, mixers=("lightning",), lightning=dataclasses.replace(base.lightning, block=block)
        )
        softmax = dataclasses.replace(base, mixers=("softmax",))
        gate = 2 * 6144 * 8192

        def saved(length, lightning=lightning, softmax=softmax, gate=gate):
            flops = [costs.prefill_flops(c, length) for c in (softmax, lightning)]
            return flops[0] + gate - flops[1]

        assert saved(meet - 8) < 0 < saved(meet + 8)


def test_table_1():
    """The paper's formulas at its own hybrid: an eighth of softmax, seven of lightning."""
    shape = {"layers": 24, "width": 1024, "heads": 8}
    steps = {"batch": 4, "length": 8192}
    for formula, kwargs in ((costs.table1_parameters, shape), (costs.table1_flops, shape | steps)):
        softmax, lightning, hybrid = (
            formula(form, **kwargs) for form in ("softmax", "lightning", "hybrid")
        )
        assert hybrid == pytest.approx(softmax / 8 + lightning * 7 / 8)
    assert costs.table1_parameters("softmax", **shape) == 12 * 24 * 1024**2
    assert costs.table1_flops("softmax", **shape, **steps) == pytest.approx(
        72 * 4 * 8192 * 24 * 1024**2 * (1 + 8192 / (6 * 1024) + 5 / (18 * 1024))
    )


def test_table_1_and_our_count_agree_on_attention():
    """Its 1/2h is blocks of 256 with heads of 128; its n/6d is twice ours, which are causal."""
    l, d, h, n = 8, 2048, 16, 65536
    config = dataclasses.replace(
        PRESETS["minimax-1b-softmax"], num_layers=l, vocab_size=1, mlp_size=1
    )
    attention = {}
    for form in ("softmax", "lightning"):
        model = dataclasses.replace(config, mixers=(form,))
        matrices = l * ({"softmax": 4, "lightning": 5}[form] * d**2 + 3 * d) + d  # MLP, logits: 1
        attention[form] = costs.training_flops(model, n) - 6 * matrices
    for form, term, ratio in (("softmax", n / (6 * d), 0.5), ("lightning", 1 / (2 * h), 1.0)):
        ours, paper = attention[form], 72 * l * d**2 * term
        np.testing.assert_allclose(ours / paper, ratio, rtol=1e-4)


def test_scaling_law_models_have_about_table_1s_parameters():
    """12 l d^2 in the softmax form (MLPs rounded up); the others' gates are not of low rank."""
    for size in ("70m", "160m", "410m", "1b", "3b", "7b"):
        for form in ("softmax", "lightning", "hybrid"):
            c = PRESETS[f"minimax-{size}-{form}"]
            shape = {"layers": c.num_layers, "width": c.hidden_size, "heads": c.num_heads}
            table = costs.table1_parameters(form, **shape)
            lightning = c.layer_mixers.count("lightning")
            gates = lightning * (c.hidden_size**2 - 2 * c.hidden_size**2 / c.num_heads)
            assert costs.parameters(c).layers == pytest.approx(table + gates, rel=0.03)
