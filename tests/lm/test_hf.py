"""Published checkpoints: names and axes, files, sharded placement, and errors before work."""

import dataclasses
import json
import shutil
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from jax.sharding import PartitionSpec as P

from research.core import mesh as meshes
from research.lm import hf
from research.lm.config import DecoderConfig, Llama3Scaling
from research.lm.decoder import Decoder
from research.lm.hf import files, tiny
from research.lm.presets import PRESETS
from research.lm.tokenizer import Tokenizer

V, D, L, H, N, K, F = 48, 24, 3, 6, 2, 10, 20  # K is not D / H
G = H // N
CONFIGS = {
    "qwen2": DecoderConfig(V, D, L, H, N, K, F, qkv_bias=True, tie_embeddings=True),
    "qwen3": DecoderConfig(V, D, L, H, N, K, F, qk_norm=True, rope_theta=1e6),
    "llama": DecoderConfig(V, D, L, H, N, K, F, rope_scaling=Llama3Scaling(), norm_eps=1e-5),
}
HF_CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": N,
    "head_dim": K,
    "intermediate_size": F,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 64,
}


def qwen2_tensors(dtype=np.float32) -> dict[str, np.ndarray]:
    """The tensors of a Qwen2 of transformers: names and [out, in] shapes written out by hand."""
    shapes = {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (V, D),
    }
    for i in range(L):
        layer = {
            "input_layernorm.weight": (D,),
            "post_attention_layernorm.weight": (D,),
            "self_attn.q_proj.weight": (H * K, D),
            "self_attn.k_proj.weight": (N * K, D),
            "self_attn.v_proj.weight": (N * K, D),
            "self_attn.q_proj.bias": (H * K,),
            "self_attn.k_proj.bias": (N * K,),
            "self_attn.v_proj.bias": (N * K,),
            "self_attn.o_proj.weight": (D, H * K),
            "mlp.gate_proj.weight": (F, D),
            "mlp.up_proj.weight": (F, D),
            "mlp.down_proj.weight": (D, F),
        }
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


@pytest.fixture
def published(tmp_path):
    """Writes a checkpoint with the safetensors library; keyword None removes, a value replaces."""

    def write(tensors=None, shards=1, name="published", **changes):
        path = tmp_path / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        config = {k: v for k, v in (HF_CONFIG | changes).items() if v is not None}
        (path / "config.json").write_text(json.dumps(config))
        tensors = qwen2_tensors() if tensors is None else tensors
        if shards == 1:
            safetensors.numpy.save_file(tensors, path / "model.safetensors")
            return path
        where = {}
        for i in range(shards):
            part = {k: v for j, (k, v) in enumerate(sorted(tensors.items())) if j % shards == i}
            safetensors.numpy.save_file(part, path / f"part{i}.safetensors")
            where |= dict.fromkeys(part, f"part{i}.safetensors")
        index = {"metadata": {}, "weight_map": where}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        return path

    return write


def random_params(config, seed=0):
    model = Decoder(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(seed)
    return model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)


def assert_same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_every_tensor_lands_where_the_equations_put_it(published):
    t = qwen2_tensors()
    model, p = hf.load(published(t))
    assert model.config == DecoderConfig(
        V, D, L, H, N, K, F, rope_theta=1e6, norm_eps=1e-5, qkv_bias=True, max_position=128
    )
    same = np.testing.assert_array_equal
    same(p["embed"]["embedding"], t["model.embed_tokens.weight"])
    same(p["head"]["kernel"], t["lm_head.weight"].T)
    same(p["final_norm"]["scale"], t["model.norm.weight"])
    x = np.random.default_rng(1).normal(size=D).astype(np.float32)
    for i in range(L):
        layer = jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), p["layers"])
        own = {k.removeprefix(f"model.layers.{i}."): v for k, v in t.items() if f"layers.{i}." in k}
        qkv, bias = layer["attn"]["qkv"]["kernel"], layer["attn"]["qkv"]["bias"]
        for head in range(H):  # transformers: query head h attends to key-value head h // G
            rows = slice(head * K, (head + 1) * K)
            n, g = divmod(head, G)
            same(qkv[:, n, g], own["self_attn.q_proj.weight"][rows].T)
            same(bias[n, g], own["self_attn.q_proj.bias"][rows])
            same(layer["attn"]["o"]["kernel"][n, g], own["self_attn.o_proj.weight"][:, rows].T)
        for n in range(N):
            rows = slice(n * K, (n + 1) * K)
            for slot, which in ((G, "k"), (G + 1, "v")):
                same(qkv[:, n, slot], own[f"self_attn.{which}_proj.weight"][rows].T)
                same(bias[n, slot], own[f"self_attn.{which}_proj.bias"][rows])
        same(layer["attn_norm"]["scale"], own["input_layernorm.weight"])
        same(layer["mlp_norm"]["scale"], own["post_attention_layernorm.weight"])
        for name in ("gate", "up"):
            kernel = layer["mlp"][name]["kernel"]
            np.testing.assert_allclose(
                x @ kernel, own[f"mlp.{name}_proj.weight"] @ x, rtol=1e-4, atol=1e-4
            )
            same(kernel, own[f"mlp.{name}_proj.weight"].T)
        same(layer["mlp"]["down"]["kernel"], own["mlp.down_proj.weight"].T)


@pytest.mark.parametrize("name", CONFIGS)
def test_save_then_load_is_the_identity(name, tmp_path):
    config = CONFIGS[name]
    model, params = random_params(config)
    assert hf.LAYOUTS[name].shapes(config) == {
        "/".join(str(k.key) for k in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    hf.save(tmp_path / "a", model, params)
    again, loaded = hf.load(tmp_path / "a")
    assert again.config == config
    assert_same_tree(loaded, params)
    described = json.loads((tmp_path / "a" / "config.json").read_text())
    assert described["model_type"] == name and described["eos_token_id"] is None
    with safetensors.safe_open(tmp_path / "a" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    hf.save(tmp_path / "b", again, loaded, name)  # from arrays on a device: byte for byte the same
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_files_are_those_of_the_safetensors_library(tmp_path):
    model, params = random_params(CONFIGS["qwen2"])
    hf.save(tmp_path, model, params)
    theirs = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    ours = dict(hf.tensors(model, params, "qwen2"))
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(tensor, ours[name])


def test_shards_and_index(tmp_path, published):
    path = published(shards=3)
    model, params = hf.load(path)
    assert_same_tree(params, hf.load(published(name="whole"))[1])
    hf.save(tmp_path / "sharded", model, params, max_shard_bytes=6000)
    written = sorted(p.name for p in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(written) > 3 and written[0] == f"model-00001-of-{len(written):05d}.safetensors"
    sizes = [sum(t.nbytes for t in safetensors.numpy.load_file(tmp_path / "sharded" / n).values())
             for n in written]
    largest = max(t.nbytes for t in qwen2_tensors().values())
    assert max(sizes) <= max(6000, largest) and sum(sizes) == sum(
        t.nbytes for t in qwen2_tensors().values()
    )
    index = json.loads((tmp_path / "sharded" / files.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert_same_tree(hf.load(tmp_path / "sharded")[1], params)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_kept_or_widened(dtype, published, tmp_path):
    halves = qwen2_tensors(dtype)
    path = published(halves)
    model, params = hf.load(path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype)}
    assert model.config.param_dtype == np.dtype(dtype).name and model.config.dtype == "float32"
    wide_model, wide = hf.load(path, dtype="float32")
    assert wide_model.config.param_dtype == "float32"
    assert_same_tree(wide, jax.tree.map(lambda x: x.astype(jnp.float32), params))
    tokens = jnp.arange(6).reshape(2, 3)
    logits = model.apply({"params": params}, tokens)
    assert logits.dtype == jnp.float32 and logits.shape == (2, 3, V)
    # The same numbers, widened before or during the computation (norm scales: float32 products).
    np.testing.assert_allclose(logits, wide_model.apply({"params": wide}, tokens), rtol=1e-5)
    hf.save(tmp_path / "again", wide_model, wide, dtype=np.dtype(dtype).name)
    stored = safetensors.numpy.load_file(tmp_path / "again" / "model.safetensors")
    for name, tensor in stored.items():
        assert tensor.dtype == dtype
        np.testing.assert_array_equal(tensor, halves[name])
    model16, _ = hf.load(path, compute_dtype="bfloat16")
    assert model16.config.dtype == "bfloat16"


def test_mixed_precision_is_kept_parameter_by_parameter(published):
    tensors = qwen2_tensors(np.float16)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    name = "model.layers.1.self_attn.k_proj.bias"
    tensors[name] = tensors[name].astype(np.float32)
    _, params = hf.load(published(tensors))
    assert params["final_norm"]["scale"].dtype == np.float32
    assert params["layers"]["attn"]["qkv"]["bias"].dtype == np.float32  # the wider of its parts
    assert params["layers"]["attn"]["qkv"]["kernel"].dtype == np.float16


def test_straight_into_a_sharded_array(tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIGS["qwen2"], num_heads=4, tie_embeddings=False)
    model, params = random_params(config)  # two query heads a group: four slots of q, q, k, v
    hf.save(tmp_path, model, params)
    mesh = meshes.make({"data": 2, "model": 4})
    rules = (
        ("embed/embedding", P("model", None)),
        ("qkv/kernel", P(None, None, "data", "model")),  # some shards hold q alone, some k or v
        ("qkv/bias", P(None, None, None, "data")),
        ("(gate|up)/kernel", P(None, "data", "model")),
        ("down/kernel", P(None, "model", None)),
        ("o/kernel", P(None, "data", None, None, "model")),
        ("head/kernel", P(None, ("data", "model"))),
    )
    reads = []
    read = files.Stored.read
    monkeypatch.setattr(files.Stored, "read", lambda self: (reads.append(self), read(self))[1])
    _, loaded = hf.load(tmp_path, mesh=mesh, rules=rules, dtype="float32")
    assert len(reads) == len(set(reads)) == len(list(hf.tensors(model, params, "qwen2")))
    assert_same_tree(loaded, params)
    kernel = loaded["layers"]["attn"]["qkv"]["kernel"]
    assert kernel.sharding.spec == P(None, None, "data", "model")
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(L, D, 1, 1, K)}
    hf.save(tmp_path / "again", model, loaded)
    assert_same_tree(hf.load(tmp_path / "again")[1], params)
    with pytest.raises(ValueError, match="both mesh and rules"):
        hf.load(tmp_path, mesh=mesh)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supp.*Qwen2ForCausalLM"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "is not supported"),
        ({"architectures": None, "model_type": "mamba"}, "'mamba' is not supported"),
        ({"hidden_size": None}, "config.json: the key 'hidden_size' is missing"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn.*is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear.*is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"num_attention_heads": 5}, "num_heads"),
    ],
)
def test_what_the_model_cannot_do_is_refused(changes, reason, published):
    with pytest.raises(ValueError, match=reason):
        hf.load(published(**changes))


def test_config_keys_old_and_new(published):
    llama3 = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaling = Llama3Scaling(factor=32.0)
    for changes, expected in (
        ({"rope_theta": None}, {"rope_theta": 1e4}),
        ({"rope_scaling": llama3}, {"rope_scaling": scaling, "rope_theta": 1e6}),
        (
            {"rope_theta": None, "rope_parameters": llama3 | {"rope_theta": 5e5}},
            {"rope_scaling": scaling, "rope_theta": 5e5},
        ),
        (
            {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7e5}},
            {"rope_scaling": None, "rope_theta": 7e5},
        ),
        ({"tie_word_embeddings": True}, {"tie_embeddings": True}),
        ({"head_dim": None}, {"head_dim": D // H}),
        ({"num_key_value_heads": None}, {"num_kv_heads": H}),
        ({"architectures": None}, {"qkv_bias": True, "qk_norm": False}),
        ({"architectures": ["Qwen3ForCausalLM"]}, {"qkv_bias": False, "qk_norm": True}),
        ({"architectures": ["LlamaForCausalLM"]}, {"qkv_bias": False, "qk_norm": False}),
    ):
        _, config = hf.read_config(published(**changes))
        for key, value in expected.items():
            assert getattr(config, key) == value, changes


@pytest.mark.parametrize(
    "name", [name for name, config in PRESETS.items() if config.qkv_bias or config.qk_norm]
)
def test_presets_survive_config_json(name, published):
    """Sizes of the presets, through `write_config` and `read_config`."""
    config = PRESETS[name]
    layout = hf.LAYOUTS["qwen2" if config.qkv_bias else "qwen3"]
    assert layout.read_config(json.loads(json.dumps(layout.write_config(config)))) == config


def test_missing_extra_and_misshapen_tensors_are_named(published):
    t = qwen2_tensors()
    del t["model.layers.2.mlp.up_proj.weight"]
    t["model.layers.3.mlp.up_proj.weight"] = np.zeros((F, D), np.float32)
    t["model.norm.weight"] = np.zeros(D + 1, np.float32)
    t["lm_head.weight"] = t["lm_head.weight"].astype(np.int32)
    with pytest.raises(ValueError) as caught:
        hf.load(published(t))
    for words in (
        "model.layers.2.mlp.up_proj.weight [20, 24] is missing",
        "model.layers.3.mlp.up_proj.weight in model.safetensors is unexpected",
        "model.norm.weight in model.safetensors is [25], config.json means [24]",
        "lm_head.weight in model.safetensors is I32",
    ):
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="and 24 more"):
        hf.load(published(num_hidden_layers=6))  # three layers of twelve tensors


def test_tied_head_may_be_stored_but_must_agree(published):
    t = qwen2_tensors()
    with pytest.raises(ValueError, match="lm_head.weight.*should repeat model.embed_tokens"):
        hf.load(published(t, tie_word_embeddings=True))
    t["lm_head.weight"] = t["model.embed_tokens.weight"].copy()
    t["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(5, np.float32)
    model, params = hf.load(published(t, tie_word_embeddings=True))
    assert model.config.tie_embeddings and "head" not in params


def test_broken_directories_are_named(published, tmp_path):
    with pytest.raises(NotADirectoryError, match="not a directory.*hf download"):
        hf.load(tmp_path / "Qwen" / "Qwen2.5-0.5B")
    with pytest.raises(FileNotFoundError, match="config.json"):
        hf.load(tmp_path)
    path = published(shards=3)
    (path / "part1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="part1.safetensors"):
        hf.load(path)
    path = published(shards=3)
    shutil.copy(path / "part0.safetensors", path / "part1.safetensors")
    with pytest.raises(ValueError, match="part1.safetensors, which does not have it"):
        hf.load(path)
    (path / files.INDEX).write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        hf.load(path)
    path = published()
    whole = (path / files.SINGLE).read_bytes()
    for broken, reason in (
        (whole[:-4], "cut short"),
        (whole[:40], "not a whole safetensors"),
        (whole[:3], "not a whole safetensors"),
        (whole[:8] + b"x" + whole[9:], "no safetensors header"),
    ):
        (path / files.SINGLE).write_bytes(broken)
        with pytest.raises(ValueError, match=f"model.safetensors.*{reason}"):
            hf.load(path)
    (path / files.SINGLE).rename(path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin must first be converted"):
        hf.load(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        hf.load(path)


def test_save_refuses_before_it_writes(tmp_path, monkeypatch):
    model, params = random_params(CONFIGS["qwen3"])
    for layout, reason in (("qwen2", "qkv_bias=True"), ("llama", "qk_norm=False"), ("x", "no lay")):
        with pytest.raises(ValueError, match=reason):
            hf.save(tmp_path / "new", model, params, layout)
    with pytest.raises(ValueError, match="head/kernel is missing"):
        hf.save(tmp_path / "new", model, {k: v for k, v in params.items() if k != "head"})
    wrong = params | {"final_norm": {"scale": np.zeros(3, np.float32)}, "more": np.zeros(1)}
    with pytest.raises(ValueError, match=r"final_norm/scale is \(3,\).*more is unexpected"):
        hf.save(tmp_path / "new", model, wrong)
    with pytest.raises(ValueError, match="cannot save float64"):
        hf.save(tmp_path / "new", model, params, dtype="float64")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"steps": 3}')  # some run's directory
    with pytest.raises(FileExistsError, match="not a saved model"):
        hf.save(tmp_path / "other", model, params)
    full = types.SimpleNamespace(free=10**6)
    monkeypatch.setattr(hf.shutil, "disk_usage", lambda path: full)
    with pytest.raises(OSError, match="0.0 GB are free"):
        hf.save(tmp_path / "new", model, params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other"]


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    model, params = random_params(CONFIGS["qwen2"])
    hf.save(tmp_path / "model", model, params)
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    write = files.write

    def fail_halfway(directory, shards, arrays):
        arrays = iter(arrays)
        write(directory, shards[:1], arrays)
        raise KeyboardInterrupt

    other = jax.tree.map(lambda x: x + 1, params)
    monkeypatch.setattr(files, "write", fail_halfway)
    with pytest.raises(KeyboardInterrupt):
        hf.save(tmp_path / "model", model, other, max_shard_bytes=6000)
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    monkeypatch.undo()
    hf.save(tmp_path / "model", model, other, max_shard_bytes=6000)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert not (tmp_path / "model" / files.SINGLE).exists()  # no leftovers of the old one
    assert_same_tree(hf.load(tmp_path / "model")[1], other)


def test_tiny_model_is_a_whole_published_directory(tmp_path):
    path = tiny.write(tmp_path / "tiny")
    model, params = hf.load(path)
    tokenizer = Tokenizer.load(path)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "2+2?"}])
    assert text == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and ids.max() < model.config.vocab_size
    described = json.loads((path / "config.json").read_text())
    assert described["eos_token_id"] == tokenizer.eos_id == described["pad_token_id"]
    other = hf.load(tiny.write(tmp_path / "other", seed=1))[1]
    assert_same_tree(hf.load(tiny.write(tmp_path / "again"))[1], params)
    assert not np.array_equal(other["embed"]["embedding"], params["embed"]["embedding"])
    assert np.isfinite(model.apply({"params": params}, ids[None])).all()
