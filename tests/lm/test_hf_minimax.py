"""MiniMax checkpoints: both layouts, their configs, experts on disk, errors before work."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from research.lm import hf, lightning
from research.lm.config import DecoderConfig, LightningConfig, MoEConfig, Residual
from research.lm.decoder import Decoder
from research.lm.hf import tiny
from research.lm.presets import PRESETS, num_params
from research.lm.tokenizer import Tokenizer

V, D, L, H, N, K, F, E = 40, 24, 4, 4, 2, 10, 12, 3  # K is not D / H
G, TYPES = H // N, (0, 0, 0, 1)
REMOTE = {
    "architectures": ["MiniMaxText01ForCausalLM"],
    "model_type": "minimax_text_01",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": N,
    "head_dim": K,
    "attn_type_list": list(TYPES),
    "layernorm_linear_attention_alpha": 2.0,
    "layernorm_linear_attention_beta": 0.9,
    "layernorm_full_attention_alpha": 1.75,
    "layernorm_full_attention_beta": 1.1,
    "layernorm_mlp_alpha": 1.5,
    "layernorm_mlp_beta": 0.8,
    "rotary_dim": 6,
    "rope_theta": 1e6,
    "num_local_experts": E,
    "num_experts_per_tok": 2,
    "postnorm": True,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "max_position_embeddings": 128,
    "router_aux_loss_coef": 0.002,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
}
NATIVE_KEYS = {
    "architectures": ["MiniMaxForCausalLM"],
    "model_type": "minimax",
    "layer_types": ["full_attention" if kind else "linear_attention" for kind in TYPES],
    "linear_attn_alpha_factor": 2.0,
    "linear_attn_beta_factor": 0.9,
    "full_attn_alpha_factor": 1.75,
    "full_attn_beta_factor": 1.1,
    "mlp_alpha_factor": 1.5,
    "mlp_beta_factor": 0.8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.6},
    "block_size": 256,
}
COMMON = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "rms_norm_eps",
    "hidden_act", "initializer_range", "tie_word_embeddings", "max_position_embeddings",
    "router_aux_loss_coef", "router_jitter_noise", "sliding_window",
}  # fmt: skip
NATIVE = {key: REMOTE[key] for key in COMMON} | NATIVE_KEYS
CONFIG = DecoderConfig(
    V, D, L, H, N, K, F, rope_theta=1e6, norm_eps=1e-5, mixers=("lightning",) * 3 + ("softmax",),
    moe=MoEConfig(E, 2, aux_coef=0.002), rotary_dim=6, max_position=128,
    residual=Residual(True, softmax=(1.75, 1.1), lightning=(2.0, 0.9), mlp=(1.5, 0.8)),
)  # fmt: skip


def tensors_of(fused=False, dtype=np.float32, types=TYPES, experts=E) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint: names and [out, in] shapes written out by hand."""
    shapes = {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (V, D),
    }
    for i, kind in enumerate(types):
        layer = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
        if kind:
            layer |= {
                "self_attn.q_proj.weight": (H * K, D),
                "self_attn.k_proj.weight": (N * K, D),
                "self_attn.v_proj.weight": (N * K, D),
                "self_attn.o_proj.weight": (D, H * K),
            }
        else:
            layer |= {
                "self_attn.qkv_proj.weight": (3 * H * K, D),
                "self_attn.output_gate.weight": (H * K, D),
                "self_attn.out_proj.weight": (D, H * K),
                "self_attn.norm.weight": (H * K,),
            }
        layer["block_sparse_moe.gate.weight"] = (experts, D)
        for e in range(experts):
            layer |= {
                f"block_sparse_moe.experts.{e}.w1.weight": (F, D),
                f"block_sparse_moe.experts.{e}.w2.weight": (D, F),
                f"block_sparse_moe.experts.{e}.w3.weight": (F, D),
            }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    return fuse(tensors, len(types), experts) if fused else tensors


def fuse(tensors, layers=L, experts=E):
    """The names of transformers in memory: gate and up of all experts in one tensor."""
    tensors = dict(tensors)
    for i in range(layers):
        old, new = f"model.layers.{i}.block_sparse_moe.", f"model.layers.{i}.mlp."
        w1, w2, w3 = (
            [tensors.pop(f"{old}experts.{e}.{name}.weight") for e in range(experts)]
            for name in ("w1", "w2", "w3")
        )
        tensors[new + "experts.gate_up_proj"] = np.stack(
            [np.concatenate(pair) for pair in zip(w1, w3, strict=True)]
        )
        tensors[new + "experts.down_proj"] = np.stack(w2)
        tensors[new + "gate.weight"] = tensors.pop(old + "gate.weight")
    return tensors


def write(directory, tensors=None, base=REMOTE, name="published", **changes):
    """A checkpoint by the safetensors library; keyword None removes, a value replaces."""
    path = directory / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    config = {k: v for k, v in (base | changes).items() if v is not None}
    (path / "config.json").write_text(json.dumps(config))
    tensors = tensors_of() if tensors is None else tensors
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture
def published(tmp_path):
    return functools.partial(write, tmp_path)


def assert_same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_every_tensor_lands_where_the_equations_put_it(published):
    t = tensors_of()
    model, p = hf.load(published(t))
    assert model.config == CONFIG
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, p) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    same = np.testing.assert_array_equal
    same(p["embed"]["embedding"], t["model.embed_tokens.weight"])
    same(p["head"]["kernel"], t["lm_head.weight"].T)
    same(p["final_norm"]["scale"], t["model.norm.weight"])
    layers = jax.tree.map(np.asarray, p["layers"])
    for i in range(L):
        own = {k.removeprefix(f"model.layers.{i}."): v for k, v in t.items() if f"layers.{i}." in k}
        same(layers["attn_norm"]["scale"][i], own["input_layernorm.weight"])
        same(layers["mlp_norm"]["scale"][i], own["post_attention_layernorm.weight"])
        same(layers["moe"]["router"]["kernel"][i], own["block_sparse_moe.gate.weight"].T)
        for e in range(E):  # the paper's W2(silu(W1 x) * W3 x)
            for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
                stored = own[f"block_sparse_moe.experts.{e}.{theirs}.weight"]
                same(layers["moe"][ours]["kernel"][i, e], stored.T)
    for i in range(3):  # the lightning layers: by head its q, its k, its v
        mixer = jax.tree.map(lambda leaf, i=i: leaf[i], layers["lightning"])
        own = lambda name, i=i: t[f"model.layers.{i}.self_attn.{name}.weight"]  # noqa: E731
        for h in range(H):
            for which in range(3):
                start = (3 * h + which) * K
                same(mixer["qkv"]["kernel"][:, h, which], own("qkv_proj")[start : start + K].T)
            rows = slice(h * K, (h + 1) * K)
            same(mixer["gate"]["kernel"][:, h], own("output_gate")[rows].T)
            same(mixer["norm"]["scale"][h], own("norm")[rows])
            same(mixer["o"]["kernel"][h], own("out_proj")[:, rows].T)
    assert layers["attn"]["qkv"]["kernel"].shape[0] == 1  # of layer 3 alone
    qkv, out = layers["attn"]["qkv"]["kernel"][0], layers["attn"]["o"]["kernel"][0]
    own = lambda name: t[f"model.layers.3.self_attn.{name}.weight"]  # noqa: E731
    for h in range(H):
        n, g = divmod(h, G)
        rows = slice(h * K, (h + 1) * K)
        same(qkv[:, n, g], own("q_proj")[rows].T)
        same(out[n, g], own("o_proj")[:, rows].T)
    for n in range(N):
        rows = slice(n * K, (n + 1) * K)
        same(qkv[:, n, G], own("k_proj")[rows].T)
        same(qkv[:, n, G + 1], own("v_proj")[rows].T)


@pytest.mark.parametrize("base", [REMOTE, NATIVE], ids=["remote", "native"])
def test_experts_alone_or_fused_are_the_same(base, published):
    _, single = hf.load(published(base=base))
    model, fused = hf.load(published(tensors_of(fused=True), base, "fused"))
    assert_same_tree(single, fused)
    hf.save(published(name="again"), model, fused)  # what it writes is the single ones
    stored = safetensors.numpy.load_file(published(name="x").parent / "again" / "model.safetensors")
    for name, tensor in tensors_of().items():
        np.testing.assert_array_equal(stored[name], tensor)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_remote_ours_native_ours_remote(dtype, published, tmp_path):
    """Weights bit for bit, and config.json key by key."""
    source = published(tensors_of(dtype=dtype))
    model, params = hf.load(source)
    hf.save(tmp_path / "native", model, params, "minimax")
    middle, between = hf.load(tmp_path / "native")
    assert_same_tree(params, between)
    native = json.loads((tmp_path / "native" / "config.json").read_text())
    assert {key: native[key] for key in NATIVE} == NATIVE
    slopes = LightningConfig(slopes="native")
    assert middle.config == dataclasses.replace(model.config, lightning=slopes)
    hf.save(tmp_path / "remote", middle, between, "minimax_text_01")
    remote = json.loads((tmp_path / "remote" / "config.json").read_text())
    assert {key: remote[key] for key in REMOTE} == REMOTE
    before = safetensors.numpy.load_file(source / "model.safetensors")
    after = safetensors.numpy.load_file(tmp_path / "remote" / "model.safetensors")
    assert before.keys() == after.keys()  # no buffers there
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        np.testing.assert_array_equal(tensor, after[name])
    again, params = hf.load(tmp_path / "remote")
    assert again.config == model.config
    assert_same_tree(params, between)


def test_buffers_of_transformers(published, tmp_path):
    """Written as the formulas say, whatever the weights' type; read back without a look."""
    model, params = hf.load(published(tensors_of(dtype=ml_dtypes.bfloat16), NATIVE, block_size=8))
    assert model.config.lightning.block == 8
    hf.save(tmp_path / "saved", model, params, "minimax")
    stored = safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors")
    extra = {name: tensor for name, tensor in stored.items() if name not in tensors_of()}
    assert len(extra) == 4 * 3 and {t.dtype for t in extra.values()} == {np.dtype(np.float32)}
    slopes_LH = lightning.slopes(H, L, "native")
    for i in range(3):
        get = lambda name, i=i: extra[f"model.layers.{i}.self_attn.{name}"]  # noqa: E731
        for h, s in enumerate(slopes_LH[i]):
            close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-30)  # noqa: E731
            close(get("slope_rate")[h, 0, 0], s)
            close(get("query_decay")[h, :, 0], [np.exp(-s * r) for r in range(1, 9)])
            close(get("key_decay")[h, :, 0], [np.exp(-s * (8 - r)) for r in range(1, 9)])
            square = [[np.exp(-s * (r - c)) if r >= c else 0 for c in range(8)] for r in range(8)]
            close(get("diagonal_decay")[0, h], square)
    assert_same_tree(hf.load(tmp_path / "saved")[1], params)


@pytest.mark.parametrize(
    "dtype, base", [(np.float32, NATIVE), (ml_dtypes.bfloat16, NATIVE), (np.float32, REMOTE)]
)
def test_stored_slopes_must_be_the_configs(dtype, base, published):
    rule = "native" if base is NATIVE else "remote"
    rows = lightning.slopes(H, L, rule)
    slopes = {
        f"model.layers.{i}.self_attn.slope_rate": rows[i].reshape(H, 1, 1).astype(dtype)
        for i in range(3)
    }
    hf.load(published(tensors_of(dtype=dtype) | slopes, base))
    other = lightning.slopes(H, L + 1, rule)[1]  # of a model with a layer more
    slopes["model.layers.1.self_attn.slope_rate"] = other.reshape(H, 1, 1).astype(dtype)
    with pytest.raises(
        ValueError, match=r"layer 1 stores decays \(slope_rate\).*4 heads and 4 lay"
    ):
        hf.load(published(tensors_of(dtype=dtype) | slopes, base))
    slopes["model.layers.1.self_attn.slope_rate"] = np.zeros((H + 1, 1, 1), dtype)
    with pytest.raises(ValueError, match="layer 1 stores decays"):
        hf.load(published(tensors_of(dtype=dtype) | slopes, base))


def test_other_head_counts_mean_other_decays_in_the_two_layouts(published, tmp_path):
    """With 3 heads the rules disagree: what one means, the other cannot be made to say."""
    model, _ = hf.load(published())
    config = dataclasses.replace(model.config, num_heads=3, num_kv_heads=1)
    shapes = hf.LAYOUTS["minimax"].shapes(config)
    tree = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    params = hf._nest(tree)
    hf.save(tmp_path / "remote", Decoder(config), params)  # the one that can
    assert hf.read_config(tmp_path / "remote")[0].name == "minimax_text_01"
    with pytest.raises(ValueError, match="cannot express the decays.*'remote' for 3 heads"):
        hf.save(tmp_path / "native", Decoder(config), params, "minimax")
    native = dataclasses.replace(config, lightning=LightningConfig(slopes="native"))
    with pytest.raises(ValueError, match="cannot express the decays.*'native' for 3 heads"):
        hf.save(tmp_path / "native", Decoder(native), params, "minimax_text_01")
    hf.save(tmp_path / "native", Decoder(native), params)
    assert hf.read_config(tmp_path / "native")[0].name == "minimax"
    last = dataclasses.replace(model.config, mixers=("softmax", "lightning"))  # f_l differs there
    with pytest.raises(ValueError, match="cannot express the decays"):
        hf.LAYOUTS["minimax"].write_config(last)


def test_the_released_config():
    """MiniMax-Text-01's config.json is the preset, both ways and in both layouts."""
    alpha = 3.5565588200778455
    remote = REMOTE | {
        "vocab_size": 200064, "hidden_size": 6144, "intermediate_size": 9216,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 128, "num_local_experts": 32, "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10,
        "rotary_dim": 64, "rope_theta": 10000000, "max_position_embeddings": 10240000,
        "router_aux_loss_coef": 0.001,
        "layernorm_linear_attention_alpha": alpha, "layernorm_linear_attention_beta": 1.0,
        "layernorm_full_attention_alpha": alpha, "layernorm_full_attention_beta": 1.0,
        "layernorm_mlp_alpha": alpha, "layernorm_mlp_beta": 1.0,
    }  # fmt: skip
    preset = dataclasses.replace(PRESETS["text_01"], init="normal")  # of no matter to weights
    theirs, ours = hf.LAYOUTS["minimax_text_01"], hf.LAYOUTS["minimax"]
    assert theirs.read_config(remote) == preset
    written = json.loads(json.dumps(theirs.write_config(preset)))
    assert {key: written[key] for key in remote if key in written} == {
        key: value for key, value in remote.items() if key not in ("architectures", "model_type")
    }
    native = json.loads(json.dumps(ours.write_config(preset)))
    assert native["rope_parameters"]["partial_rotary_factor"] == 0.5
    back = ours.read_config(native)
    assert dataclasses.replace(back, lightning=preset.lightning) == preset


def test_the_released_tensors():
    """8,243 of them: MiniMax-VL-01's 8,637 are these and its vision tower's and adapter's 394."""
    layout = hf.LAYOUTS["minimax_text_01"]
    config = PRESETS["text_01"]
    sizes = layout.sizes(config)
    shapes = {b.name: b.shape for param in layout.params(config) for b in param.blocks(sizes)}
    vision = 24 * 16 + 5 + 4 + 1  # layers of a ViT, its embeddings and norm, the MLP, a newline
    assert len(shapes) == 8637 - vision
    assert shapes["model.layers.78.self_attn.qkv_proj.weight"] == (24576, 6144)
    assert shapes["model.layers.79.self_attn.k_proj.weight"] == (1024, 6144)
    assert shapes["model.layers.79.block_sparse_moe.experts.31.w2.weight"] == (6144, 9216)
    assert sum(np.prod(shape) for shape in shapes.values()) == num_params(config)


@pytest.mark.parametrize(
    "types, pattern",
    [
        ([0] * 7 + [1], "lllllll" + "s"),
        (([0] * 7 + [1]) * 3, "lllllll" + "s"),
        ([0, 1, 0, 1], "ls"),
        ([1, 0, 1, 0, 1], "slsls"),
        ([0, 1, 1, 0, 1, 0], "lsslsl"),
        ([0, 0, 0], "l"),
        ([1], "s"),
    ],
)
def test_the_smallest_repeating_pattern(types, pattern):
    config = hf.LAYOUTS["minimax_text_01"].read_config(
        REMOTE | {"attn_type_list": types, "num_hidden_layers": len(types)}
    )
    assert "".join(mixer[0] for mixer in config.mixers) == pattern
    written = hf.LAYOUTS["minimax_text_01"].write_config(config)
    assert written["attn_type_list"] == types


def test_rotary_keys(published):
    rope = lambda **keys: {"rope_type": "default", "rope_theta": 1e6} | keys  # noqa: E731
    for changes, expected in (
        ({"rope_parameters": rope()}, None),
        ({"rope_parameters": rope(partial_rotary_factor=1.0)}, None),
        ({"rope_parameters": rope(partial_rotary_factor=0.6)}, 6),
        ({"rope_parameters": rope(), "partial_rotary_factor": 0.2}, 2),
        ({"rope_parameters": rope(), "rotary_dim": 4}, 4),
        ({"rope_parameters": None, "rope_theta": 5e5, "rotary_dim": 10}, None),
    ):
        _, config = hf.read_config(published(base=NATIVE, **changes))
        assert config.rotary_dim == expected
        assert config.rope_theta == changes.get("rope_theta", 1e6)


@pytest.mark.parametrize(
    "base, changes, reason",
    [
        (REMOTE, {"num_attention_heads": 5}, r"num_heads \(5\) must be a multiple"),
        (REMOTE, {"attn_type_list": [0, 0, 1]}, "attn_type_list has 3 entries for num_hidden_lay"),
        (REMOTE, {"attn_type_list": [0, 0, 2, 1]}, "attn_type_list has 2; the kinds are 0, 1"),
        (REMOTE, {"attn_type_list": None}, "'attn_type_list' is missing"),
        (REMOTE, {"postnorm": None}, "'postnorm' is missing"),
        (REMOTE, {"layernorm_mlp_beta": None}, "'layernorm_mlp_beta' is missing"),
        (REMOTE, {"rope_theta": None}, "'rope_theta' is missing"),
        (REMOTE, {"num_local_experts": None}, "'num_local_experts' is missing"),
        (REMOTE, {"shared_intermediate_size": 32}, "shared expert is not supported"),
        (REMOTE, {"sliding_window": 4096}, "sliding_window=4096"),
        (REMOTE, {"attention_bias": True}, "attention_bias=True"),
        (REMOTE, {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (REMOTE, {"quantization_config": {"bits": 8}}, "quantised weights"),
        (REMOTE, {"rotary_dim": 6, "partial_rotary_factor": 0.5}, "disagree"),
        (REMOTE, {"rotary_dim": 5}, "must be even"),
        (REMOTE, {"rotary_dim": 12}, "rotary_dim"),
        (REMOTE, {"num_experts_per_tok": 4}, "top_k=4"),
        (NATIVE, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn.*not supp"),
        (NATIVE, {"layer_types": ["full_attention"] * 3 + ["chunked"]}, "has 'chunked'"),
        (NATIVE, {"layer_types": None}, "'layer_types' is missing"),
        (NATIVE, {"full_attn_alpha_factor": None}, "'full_attn_alpha_factor' is missing"),
        (NATIVE, {"rope_parameters": None}, "'rope_theta' is missing"),
    ],
)
def test_what_the_model_cannot_do_is_refused(base, changes, reason, published):
    with pytest.raises(ValueError, match=f"config.json: .*{reason}"):
        hf.load(published(base=base, **changes))


def test_tensors_that_contradict_config_json_are_one_line(published):
    def refusal(tensors, **changes):
        with pytest.raises(ValueError) as caught:
            hf.load(published(tensors, **changes))
        return str(caught.value)

    reason = refusal(tensors_of(), attn_type_list=[0, 0, 1, 0])
    assert "config.json makes layer 2 softmax attention, its tensors are of lightning" in reason
    assert "(and 1 more)" in reason and "\n" not in reason
    for fused in (False, True):
        reason = refusal(tensors_of(fused=fused), num_local_experts=8)
        assert "config.json means 8 experts (num_local_experts), there are 3" in reason
        reason = refusal(tensors_of(fused=fused), num_local_experts=2)
        assert "config.json means 2 experts (num_local_experts), there are 3" in reason
    assert "k_proj.weight in model.safetensors is [20, 24], config.json means [40, 24]" in refusal(
        tensors_of(), num_key_value_heads=4
    )
    missing = tensors_of(fused=True)
    del missing["model.layers.2.mlp.experts.down_proj"]
    assert "model.layers.2.mlp.experts.down_proj [3, 24, 12] is missing" in refusal(missing)
    missing = tensors_of()
    del missing["model.layers.2.block_sparse_moe.experts.1.w2.weight"]
    missing["model.layers.0.self_attn.q_norm.weight"] = np.zeros(K, np.float32)
    reason = refusal(missing)
    assert "model.layers.2.block_sparse_moe.experts.1.w2.weight [24, 12] is missing" in reason
    assert "model.layers.0.self_attn.q_norm.weight in model.safetensors is unexpected" in reason


def test_what_the_layouts_have_no_words_for():
    for changes, layout, reason in (
        ({"moe": None}, "minimax", "without experts"),
        ({"qkv_bias": True}, "minimax", "qkv_bias=True"),
        ({"qk_norm": True}, "minimax_text_01", "qk_norm=True"),
        ({"residual": Residual()}, "minimax", "post_norm=False"),
        ({"lightning": LightningConfig(norm_eps=1e-5)}, "minimax_text_01", "norm_eps=1e-05"),
        ({}, "qwen2", "qkv_bias"),
        ({}, "llama", "this model has others"),
        ({"moe": None, "mixers": ("softmax",), "residual": Residual()}, "llama", "has others"),
    ):
        with pytest.raises(ValueError, match=reason):
            hf.LAYOUTS[layout].write_config(dataclasses.replace(CONFIG, **changes))
    pre_norm = dataclasses.replace(CONFIG, residual=Residual())
    remote = hf.LAYOUTS["minimax_text_01"]
    assert remote.read_config(remote.write_config(pre_norm)) == pre_norm


def test_nobody_is_led_to_other_logits(published, tmp_path, caplog):
    """Parts of heads turn: transformers would not; by default they go where they are read right."""
    model, params = hf.load(published())
    hf.save(tmp_path / "default", model, params)
    assert hf.read_config(tmp_path / "default")[0].name == "minimax_text_01" and not caplog.records
    hf.save(tmp_path / "native", model, params, "minimax")
    assert "transformers turns all 10 dimensions of a head" in caplog.text
    caplog.clear()
    whole = Decoder(dataclasses.replace(CONFIG, rotary_dim=None))
    hf.save(tmp_path / "whole", whole, params)
    assert hf.read_config(tmp_path / "whole")[0].name == "minimax" and not caplog.records


def test_tied_head(published, tmp_path):
    tensors = tensors_of()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    model, params = hf.load(published(tensors, tie_word_embeddings=True))
    assert model.config.tie_embeddings and "head" not in params
    hf.save(tmp_path / "again", model, params, "minimax_text_01")
    stored = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
    assert "lm_head.weight" not in stored
    tensors["lm_head.weight"] += 1
    with pytest.raises(ValueError, match="should repeat model.embed_tokens"):
        hf.load(published(tensors, tie_word_embeddings=True))


def test_tiny_directory_and_chat_format(tmp_path):
    path = tiny.write(tmp_path / "tiny", layout="minimax_text_01", hidden_size=32)
    found, config = hf.read_config(path)
    assert found.name == "minimax_text_01" and "lightning" in config.mixers and config.moe
    tokenizer = Tokenizer.load(path)
    text = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "2+2?"}]},
            {"role": "assistant", "content": "4"},
        ]
    )
    assert text == (
        "<beginning_of_sentence>system ai_setting=assistant\nBe brief.<end_of_sentence>\n"
        "<beginning_of_sentence>user name=user\n2+2?<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n4<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n"
    )
    model, params = hf.load(path)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert np.isfinite(model.apply({"params": params}, ids[None])).all()
    hf.save(tmp_path / "again", model, params, tokenizer=tokenizer)  # token ids are kept
    first, again = (json.loads((p / "config.json").read_text()) for p in (path, tmp_path / "again"))
    assert first["eos_token_id"] == again["eos_token_id"] == tokenizer.eos_id is not None
