"""VAE checkpoints: released names and layouts, in and out, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from research.hunyuan3d_2.vae import checkpoint
from research.hunyuan3d_2.vae.config import PRESETS, VAEConfig

TINY = dataclasses.replace(PRESETS["tiny"], num_freqs=8, scale_factor=1.25)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(draw, checkpoint.shapes(TINY))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_released_names_and_shapes():
    """Section 2.7 of the released state dicts, written out."""

    def block(prefix, packed, norms):
        made = {f"{prefix}.{name}": shape for name, shape in packed.items()}
        for name in ("q_norm", "k_norm"):
            made |= {f"{prefix}.attn.attention.{name}.{x}": (64,) for x in ("weight", "bias")}
        for name in norms:
            made |= {f"{prefix}.{name}.{x}": (1024,) for x in ("weight", "bias")}
        return made | {
            f"{prefix}.attn.c_proj.weight": (1024, 1024), f"{prefix}.attn.c_proj.bias": (1024,),
            f"{prefix}.mlp.c_fc.weight": (4096, 1024), f"{prefix}.mlp.c_fc.bias": (4096,),
            f"{prefix}.mlp.c_proj.weight": (1024, 4096), f"{prefix}.mlp.c_proj.bias": (1024,),
        }  # fmt: skip

    own = {"attn.c_qkv.weight": (3072, 1024)}
    other = {"attn.c_q.weight": (1024, 1024), "attn.c_kv.weight": (2048, 1024)}
    wanted = {
        "post_kl.weight": (1024, 64), "post_kl.bias": (1024,),
        "geo_decoder.query_proj.weight": (1024, 51), "geo_decoder.query_proj.bias": (1024,),
        "geo_decoder.ln_post.weight": (1024,), "geo_decoder.ln_post.bias": (1024,),
        "geo_decoder.output_proj.weight": (1, 1024), "geo_decoder.output_proj.bias": (1,),
    }  # fmt: skip
    wanted |= block("geo_decoder.cross_attn_decoder", other, ("ln_1", "ln_2", "ln_3"))
    for i in range(16):
        wanted |= block(f"transformer.resblocks.{i}", own, ("ln_1", "ln_2"))
    assert checkpoint.tensor_shapes(PRESETS["v2-0"], encoder=False) == wanted
    wanted |= {
        "pre_kl.weight": (128, 1024), "pre_kl.bias": (128,),
        "encoder.input_proj.weight": (1024, 55), "encoder.input_proj.bias": (1024,),
        "encoder.ln_post.weight": (1024,), "encoder.ln_post.bias": (1024,),
    }  # fmt: skip
    wanted |= block("encoder.cross_attn", other, ("ln_1", "ln_2", "ln_3"))
    for i in range(8):
        wanted |= block(f"encoder.self_attn.resblocks.{i}", own, ("ln_1", "ln_2"))
    assert checkpoint.tensor_shapes(PRESETS["v2-0-withencoder"]) == wanted

    turbo = checkpoint.tensor_shapes(PRESETS["v2-0-turbo"], encoder=False)
    assert turbo["geo_decoder.latents_proj.weight"] == (512, 1024)
    assert turbo["geo_decoder.cross_attn_decoder.mlp.c_fc.weight"] == (512, 512)
    assert not [name for name in turbo if name.startswith("geo_decoder") and "_norm" in name]
    assert "geo_decoder.ln_post.weight" not in turbo


def test_there_and_back(tmp_path, params):
    checkpoint.save(tmp_path / "a", TINY, params, "float32")
    config, loaded = checkpoint.load(tmp_path / "a")
    assert config == TINY
    assert_same(loaded, params)
    stored = load_file(tmp_path / "a" / "model.safetensors")
    kernel = params["transformer"]["resblocks_1"]["attn"]["c_qkv"]["kernel"]
    np.testing.assert_array_equal(stored["transformer.resblocks.1.attn.c_qkv.weight"], kernel.T)

    decoder = {k: v for k, v in params.items() if k not in ("encoder", "pre_kl")}
    checkpoint.save(tmp_path / "b", TINY, decoder)  # a decoder alone, in half precision
    assert load_file(tmp_path / "b" / "model.fp16.safetensors")["post_kl.bias"].dtype == np.float16
    config, loaded = checkpoint.load(tmp_path / "b")
    assert (config.num_tokens, config.scale_factor) == (16, 1.25)
    assert_same(loaded, jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), decoder))

    decoder["post_kl"] = {**decoder["post_kl"], "bias": np.full(32, 1e5, np.float32)}
    with pytest.raises(ValueError, match="post_kl.bias is not finite in float16"):
        checkpoint.save(tmp_path / "c", TINY, decoder)


def test_a_bundle_and_a_run(tmp_path, params):
    checkpoint.save(tmp_path, TINY, params, "float32")
    path = tmp_path / "model.safetensors"
    tensors = {f"vae.{name}": x for name, x in load_file(path).items()}
    save_file(tensors | {"model.latent_in.weight": np.zeros((2, 2), np.float32)}, path)
    entry = yaml.safe_load((tmp_path / "config.yaml").read_text())
    everything = {"model": {"params": {"depth": 16}}, "vae": entry, "conditioner": {}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(everything))
    config, loaded = checkpoint.load(tmp_path)
    assert config == TINY
    assert_same(loaded, params)

    checkpoint.describe(tmp_path / "run", TINY)
    with pytest.raises(Exception, match="No readable checkpoint"):
        checkpoint.load(tmp_path / "run")


def test_the_configuration_of_the_released_decoder():
    """The arguments as third-party ports quote them for hunyuan3d-vae-v2-0."""
    arguments = {
        "num_latents": 3072, "embed_dim": 64, "num_freqs": 8, "include_pi": False, "heads": 16,
        "width": 1024, "num_decoder_layers": 16, "qkv_bias": False, "qk_norm": True,
        "scale_factor": 0.9990943042622529,
    }  # fmt: skip
    small = {"uniform_points": 5120, "sharp_points": 5120}  # the class's defaults
    wanted = dataclasses.replace(PRESETS["v2-0"], **small)
    assert checkpoint.from_arguments(arguments, encoder=False) == wanted
    for change, message in (
        ({"include_pi": True}, "include_pi=True"),
        ({"qk_norm": False}, "qk_norm=False"),
        ({"depth": 3}, "no argument depth"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.from_arguments(arguments | change, encoder=False)
    with pytest.raises(ValueError, match="point_feats=3"):
        checkpoint.from_arguments(arguments, encoder=True)
    del arguments["width"]
    with pytest.raises(ValueError, match="lack width"):
        checkpoint.from_arguments(arguments, encoder=False)


def test_what_does_not_fit_is_named(tmp_path, params):
    checkpoint.save(tmp_path, TINY, params, "float32")
    path = tmp_path / "model.safetensors"
    whole = load_file(path)
    tensors = dict(whole)
    del tensors["pre_kl.bias"]
    tensors["fourier.frequencies"] = np.zeros(8, np.float32)
    tensors["encoder.input_proj.weight"] = np.zeros((32, 54), np.float32)
    save_file(tensors, path)
    with pytest.raises(ValueError) as error:
        checkpoint.load(tmp_path)
    for part in (
        "1 missing: pre_kl.bias", "1 not expected: fourier.frequencies",
        "encoder.input_proj.weight is 32x54, not 32x55",
    ):  # fmt: skip
        assert part in str(error.value)

    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(tmp_path)
    path.rename(tmp_path / "model.fp16.ckpt")
    with pytest.raises(FileNotFoundError, match="model.fp16.ckpt is a pickle"):
        checkpoint.load(tmp_path)
    with pytest.raises(ValueError, match="is no VAE"):
        checkpoint.load(tmp_path / "nowhere")


def test_configurations_that_make_no_sense():
    for change, message in (
        ({"width": 33}, "does not divide into heads"),
        ({"field_downsample": 3}, "multiples of"),
        ({"num_tokens": 0}, "num_tokens must be at least 1"),
        ({"scale_factor": 0.0}, "scale_factor"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **change)
    assert VAEConfig() == dataclasses.replace(PRESETS["v2-0"], scale_factor=1.0)
