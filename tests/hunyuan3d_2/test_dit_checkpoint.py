"""Published names and layouts, in and out."""

import flax.traverse_util
import numpy as np
import pytest
from dit_oracle import random_params

from research.hunyuan3d_2.dit import checkpoint, model
from research.hunyuan3d_2.dit.config import PRESETS, DiTConfig

SMALL = DiTConfig(
    num_latents=3072, latent_dim=6, cond_dim=10, hidden_size=32, num_heads=4, depth=2, single_depth=3,
    guidance_embed=True,
)  # fmt: skip
CROSS = DiTConfig(
    architecture="cross_attention", num_latents=3072, latent_dim=6, cond_dim=10, hidden_size=32, num_heads=4,
    depth=5, single_depth=0, moe_depth=2, num_experts=4, qkv_bias=False,
)  # fmt: skip


def shape_of(config):
    leaves = flax.traverse_util.flatten_dict(model.shapes(config), sep="/")
    places = checkpoint.places(config)
    return {
        p.name: leaves[p.path].shape[0 if p.index is None else 1 :][:: -1 if p.transposed else 1]
        for p in places
    }


def test_names_and_shapes_are_the_published_ones():
    got = shape_of(PRESETS["v2-0-turbo"])
    want = {
        "latent_in.weight": (1024, 64), "latent_in.bias": (1024,), "cond_in.weight": (1024, 1536),
        "time_in.in_layer.weight": (1024, 256), "guidance_in.out_layer.weight": (1024, 1024),
        "final_layer.linear.weight": (64, 1024), "final_layer.adaLN_modulation.1.weight": (2048, 1024),
        "double_blocks.15.img_mod.lin.weight": (6144, 1024), "double_blocks.0.txt_mod.lin.bias": (6144,),
        "double_blocks.3.img_attn.qkv.weight": (3072, 1024), "double_blocks.3.txt_attn.qkv.bias": (3072,),
        "double_blocks.3.img_attn.norm.query_norm.scale": (64,), "double_blocks.3.txt_attn.norm.key_norm.scale": (64,),
        "double_blocks.3.img_attn.proj.weight": (1024, 1024), "double_blocks.3.txt_mlp.0.weight": (4096, 1024),
        "double_blocks.3.img_mlp.2.weight": (1024, 4096), "single_blocks.31.linear1.weight": (7168, 1024),
        "single_blocks.31.linear2.weight": (1024, 5120), "single_blocks.0.norm.key_norm.scale": (64,),
        "single_blocks.0.modulation.lin.weight": (3072, 1024),
    }  # fmt: skip
    assert {name: got.get(name) for name in want} == want
    # 16 double blocks of 2 x 12 tensors, 32 single ones of 8, two linear maps in, two embedders, the final layer.
    assert len(got) == 16 * 24 + 32 * 8 + 4 + 8 + 4
    assert sum(np.prod(shape) for shape in got.values()) == model.num_params(PRESETS["v2-0-turbo"])


def test_the_names_of_2_1():
    got = shape_of(PRESETS["v2-1"])
    want = {
        "x_embedder.weight": (2048, 64), "t_embedder.mlp.0.weight": (8192, 2048), "t_embedder.mlp.2.bias": (2048,),
        "blocks.0.attn1.to_q.weight": (2048, 2048), "blocks.0.attn2.to_k.weight": (2048, 1024),
        "blocks.0.attn2.q_norm.weight": (128,), "blocks.0.attn1.out_proj.bias": (2048,), "blocks.3.norm2.bias": (2048,),
        "blocks.14.mlp.fc1.weight": (8192, 2048), "blocks.11.skip_linear.weight": (2048, 4096),
        "blocks.11.skip_norm.weight": (2048,), "blocks.15.moe.gate.weight": (8, 2048),
        "blocks.20.moe.experts.7.net.0.proj.weight": (8192, 2048), "blocks.20.moe.experts.7.net.2.bias": (2048,),
        "blocks.15.moe.shared_experts.net.2.weight": (2048, 8192), "final_layer.norm_final.weight": (2048,),
        "final_layer.linear.weight": (64, 2048),
    }  # fmt: skip
    assert {name: got.get(name) for name in want} == want
    absent = (
        "blocks.10.skip_linear.weight",
        "blocks.14.moe.gate.weight",
        "blocks.15.mlp.fc1.weight",
    )
    assert not set(absent) & set(got)


@pytest.mark.parametrize("config", [SMALL, CROSS], ids=["double_stream", "cross_attention"])
def test_what_goes_out_comes_back(config, tmp_path):
    params = random_params(config)
    tensors = checkpoint.to_tensors(config, params, "float32")
    back, again = checkpoint.from_tensors(tensors)
    assert back == config
    for (path, a), (_, b) in zip(
        flax.traverse_util.flatten_dict(params).items(),
        flax.traverse_util.flatten_dict(again).items(),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b, err_msg=str(path))
    extra = {"post_kl.weight": np.ones((3, 2), np.float16)}
    parts = {"vae": extra, "conditioner": {"a.b": np.zeros(1, np.float32)}}
    parts["model"] = checkpoint.to_tensors(config, params)
    checkpoint.write_bundle(tmp_path / "bundle", parts)
    read = checkpoint.read_bundle(tmp_path / "bundle")
    assert set(read) == {"model", "vae", "conditioner"}
    np.testing.assert_array_equal(read["vae"]["post_kl.weight"].read(), extra["post_kl.weight"])
    loaded, halves = checkpoint.load(tmp_path / "bundle")
    assert loaded == config
    for a, b in zip(
        *(flax.traverse_util.flatten_dict(t).values() for t in (params, halves)), strict=True
    ):
        assert b.dtype == np.float32
        np.testing.assert_array_equal(b, a.astype(np.float16).astype(np.float32))


def test_a_matrix_is_stored_turned_over_and_at_its_block():
    params = random_params(SMALL)
    tensors = checkpoint.to_tensors(SMALL, params, "float32")
    want = params["double_blocks"]["latent"]["qkv"]["kernel"][1].T
    np.testing.assert_array_equal(tensors["double_blocks.1.img_attn.qkv.weight"], want)
    want = params["single_blocks"]["linear1"]["bias"][2]
    np.testing.assert_array_equal(tensors["single_blocks.2.linear1.bias"], want)


@pytest.mark.parametrize("name", ["v2-0", "v2-mini", "v2-0-turbo", "v2-1"])
def test_a_released_model_is_told_by_its_tensors(name):
    class Shape:
        def __init__(self, shape):
            self.shape = shape

    tensors = {key: Shape(shape) for key, shape in shape_of(PRESETS[name]).items()}
    assert checkpoint.infer_config(tensors) == PRESETS[name]


def test_tensors_that_are_not_the_models_are_named(tmp_path):
    tensors = checkpoint.to_tensors(SMALL, random_params(SMALL))
    less = {k: v for k, v in tensors.items() if k != "single_blocks.1.linear2.bias"}
    with pytest.raises(ValueError, match=r"missing tensors: single_blocks\.1\.linear2\.bias"):
        checkpoint.from_tensors(less)
    with pytest.raises(ValueError, match=r"unexpected tensors: img_in\.weight"):
        checkpoint.from_tensors(tensors | {"img_in.weight": np.zeros(3)})
    with pytest.raises(
        ValueError, match=r"misshapen tensors: latent_in\.bias is \(3,\), not \(32,\)"
    ):
        checkpoint.from_tensors(tensors | {"latent_in.bias": np.zeros(3)})
    with pytest.raises(ValueError, match="no diffusion transformer"):
        checkpoint.infer_config({"post_kl.weight": np.zeros((3, 2))})
    with pytest.raises(ValueError, match="does not fit into float16"):
        params = random_params(SMALL)
        params["latent_in"]["bias"][0] = 1e6
        checkpoint.to_tensors(SMALL, params)
    checkpoint.write_bundle(
        tmp_path / "vae", {"vae": {"post_kl.weight": np.zeros((3, 2), np.float32)}}
    )
    with pytest.raises(ValueError, match="has no transformer"):
        checkpoint.load(tmp_path / "vae")
    with pytest.raises(FileExistsError):
        checkpoint.write_bundle(tmp_path / "vae", {})
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "model.fp16.ckpt").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="is a pickle"):
        checkpoint.load(tmp_path / "pickle")
    with pytest.raises(FileNotFoundError, match="no file or directory"):
        checkpoint.load(tmp_path / "nowhere")
