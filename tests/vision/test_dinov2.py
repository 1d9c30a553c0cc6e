"""The tower against its equations in NumPy float64, its sizes, and directories in and out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from research.vision import dinov2, hf
from research.vision.vit import ViT, ViTConfig, resize_positions

SMALL = {"hidden_size": 24, "num_layers": 2, "num_heads": 3, "patch_size": 4, "image_size": 12}
CONFIGS = {
    "gelu": ViTConfig(mlp_size=96, **SMALL),
    "swiglu": ViTConfig(mlp_size=64, mlp="swiglu", **SMALL),
}


def random_params(config, seed=0):
    """Parameters that all matter: none is 0 or 1."""
    shapes = jax.eval_shape(ViT(config).init, jax.random.key(0), jnp.zeros((1, 12, 12, 3)))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape) + 0.1, jnp.float32), shapes)


def count(config):
    image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(ViT(config).init, jax.random.key(0), image)))


def test_presets_have_the_published_sizes():
    assert round(count(dinov2.PRESETS["giant"]) / 1e6, 1) == 1136.5
    # The released files hold a mask token more, of hidden_size numbers.
    for name, published in (("large", 304_368_640), ("base", 86_580_480), ("small", 22_056_576)):
        config = dinov2.PRESETS[name]
        assert count(config) + config.hidden_size == published
    assert count(dinov2.PRESETS["tiny"]) < 1e6
    assert dinov2.PRESETS["giant"].num_tokens == 1370


def by_hand(config, tensors, pixels):
    """The tower of published tensors in float64, from its definition; pixels [H, W, 3] of the table's size."""
    from scipy.special import erf

    t = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
    p, D, N = config.patch_size, config.hidden_size, config.num_heads

    def linear(x, name):
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_eps)
        return x * t[f"{name}.weight"] + t[f"{name}.bias"]

    kernel, bias = (t[f"embeddings.patch_embeddings.projection.{k}"] for k in ("weight", "bias"))
    patches = [
        np.einsum("yxc,dcyx->d", pixels[i : i + p, j : j + p], kernel) + bias
        for i in range(0, pixels.shape[0], p)
        for j in range(0, pixels.shape[1], p)
    ]
    x = np.stack([t["embeddings.cls_token"][0, 0], *patches]) + t["embeddings.position_embeddings"][0]
    for i in range(config.num_layers):
        layer = f"encoder.layer.{i}"
        y = norm(x, f"{layer}.norm1")
        q, k, v = (
            linear(y, f"{layer}.attention.attention.{n}").reshape(-1, N, D // N).swapaxes(0, 1)
            for n in ("query", "key", "value")
        )
        scores = q @ k.swapaxes(1, 2) / np.sqrt(D // N)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = linear((weights @ v).swapaxes(0, 1).reshape(-1, D), f"{layer}.attention.output.dense")
        x = x + t[f"{layer}.layer_scale1.lambda1"] * y
        y = norm(x, f"{layer}.norm2")
        if config.mlp == "swiglu":
            gate, up = np.split(linear(y, f"{layer}.mlp.weights_in"), 2, -1)
            y = linear(gate / (1 + np.exp(-gate)) * up, f"{layer}.mlp.weights_out")
        else:
            y = linear(y, f"{layer}.mlp.fc1")
            y = linear(y * 0.5 * (1 + erf(y / np.sqrt(2))), f"{layer}.mlp.fc2")
        x = x + t[f"{layer}.layer_scale2.lambda1"] * y
    return norm(x, "layernorm")


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_tower_is_its_equations(kind):
    config = CONFIGS[kind]
    params = random_params(config)
    pixels = np.random.default_rng(1).normal(size=(2, 12, 12, 3)).astype(np.float32)
    with jax.default_matmul_precision("highest"):
        got = ViT(config).apply({"params": params}, pixels)
    tensors = dict(hf.to_tensors(config, params))
    assert got.shape == (2, 10, 24)
    for row in range(2):
        np.testing.assert_allclose(got[row], by_hand(config, tensors, pixels[row].astype(float)), atol=2e-5)


def test_unrolled_or_recomputed_is_the_same():
    config = CONFIGS["swiglu"]
    params = random_params(config)
    pixels = np.random.default_rng(1).normal(size=(1, 12, 12, 3)).astype(np.float32)

    def gradient(config):
        return jax.jit(jax.grad(lambda p: (ViT(config).apply({"params": p}, pixels) ** 3).mean()))(params)

    want = gradient(config)
    got = gradient(ViTConfig(**vars(config) | {"unroll": 2, "remat": True}))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), want, got)


def test_positions_of_other_sizes_are_interpolated():
    # Bicubic interpolation reproduces a constant; and far from the edges a line, with pixels' centres aligned.
    grid = np.arange(8)
    table = np.stack([np.repeat(grid, 8), np.tile(grid, 8), np.ones(64)], 1)
    positions = np.concatenate([[[7, 8, 9]], table]).astype(np.float32)
    out = np.asarray(resize_positions(positions, 16, 12))
    assert out.shape == (1 + 16 * 12, 3) and (out[0] == [7, 8, 9]).all()
    rows, columns, ones = out[1:].reshape(16, 12, 3).transpose(2, 0, 1)
    np.testing.assert_allclose(ones, 1, atol=1e-6)
    # The kernel with a = -0.75 bends a line a little, by at most 0.04 of a step.
    np.testing.assert_allclose(rows[4:12, 0], (np.arange(4, 12) + 0.5) / 2 - 0.5, atol=0.05)
    np.testing.assert_allclose(columns[0, 3:9], (np.arange(3, 9) + 0.5) * 8 / 12 - 0.5, atol=0.05)
    assert resize_positions(positions, 8, 8) is positions


def test_images_are_normalised_as_imagenet_s():
    white = np.ones((1, 20, 20, 3), np.float32)
    out = dinov2.preprocess(white, 28)
    assert out.shape == (1, 28, 28, 3)
    np.testing.assert_allclose(out[0, 3, 5], (1 - dinov2.MEAN) / dinov2.STD, rtol=1e-5)
    np.testing.assert_allclose(dinov2.preprocess(-white, 20)[0, 0, 0], -dinov2.MEAN / dinov2.STD, rtol=1e-5)
    # Antialiased: a fine checkerboard, shrunk five times, is about its mean; not every fifth square.
    board = np.where(np.indices((40, 40)).sum(0) % 2, 1.0, -1.0)[None, ..., None].repeat(3, -1)
    middle = dinov2.preprocess(board, 8)[0, 2:6, 2:6] * dinov2.STD + dinov2.MEAN
    np.testing.assert_allclose(middle, 0.5, atol=2e-3)
    with pytest.raises(ValueError, match="square"):
        dinov2.preprocess(white[:, :10], 28)


def newer(tensors):
    """Published names as newer transformers write them."""
    out = {}
    for name, x in tensors.items():
        for old, new in (
            ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"),
            ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("mlp.weights_out", "mlp.down_proj"),
        ):
            name = name.replace(old, new)
        if "mlp.weights_in" in name:
            for new, half in zip(("mlp.gate_proj", "mlp.up_proj"), np.split(x, 2), strict=True):
                out[name.replace("mlp.weights_in", new)] = half
        else:
            out[name] = x
    return out


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("kind", CONFIGS)
def test_directories_go_out_and_in_under_either_names(kind, tmp_path):
    config = CONFIGS[kind]
    params = random_params(config)
    hf.save(tmp_path / "tower", ViT(config), params)
    model, loaded = hf.load(tmp_path / "tower")
    assert model.config == config
    same(loaded, params)
    tensors = safetensors.numpy.load_file(tmp_path / "tower" / hf.WEIGHTS)
    safetensors.numpy.save_file(newer(tensors), tmp_path / "tower" / hf.WEIGHTS)
    same(hf.load(tmp_path / "tower")[1], params)
    _, half = hf.load(tmp_path / "tower", dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(half)} == {"bfloat16"}


def test_shards_and_towers_inside_of_others_are_read(tmp_path):
    config = CONFIGS["swiglu"]
    params = random_params(config)
    hf.save(tmp_path, ViT(config), params)
    tensors = safetensors.numpy.load_file(tmp_path / hf.WEIGHTS)
    names = sorted(tensors)
    where = {name: f"{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in ("0.safetensors", "1.safetensors"):
        safetensors.numpy.save_file({n: tensors[n] for n in names if where[n] == file}, tmp_path / file)
    (tmp_path / hf.WEIGHTS).unlink()
    (tmp_path / hf.INDEX).write_text(json.dumps({"weight_map": where}))
    same(hf.load(tmp_path)[1], params)
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="1.safetensors; complete the download"):
        hf.load(tmp_path)
    prefix = "conditioner.main_image_encoder.model."
    bundle = {prefix + name: x for name, x in tensors.items()} | {"vae.post_kl.weight": np.zeros(3)}
    same(hf.from_tensors(config, bundle, prefix), params)


def test_what_is_not_the_tower_is_refused_by_name(tmp_path):
    config = CONFIGS["gelu"]
    hf.save(tmp_path, ViT(config), random_params(config))
    tensors = safetensors.numpy.load_file(tmp_path / hf.WEIGHTS)
    absent = "encoder.layer.1.attention.attention.key.bias"
    for change, message in (
        ({absent: None}, f"{absent} \\[24\\] is missing"),
        ({"head.weight": np.zeros(3, np.float32)}, "head.weight is unexpected"),
        ({"encoder.layer.2.norm1.bias": np.zeros(24, np.float32)}, "layer.2.norm1.bias is unexpected"),
        ({"layernorm.bias": np.zeros(25, np.float32)}, r"layernorm.bias is \[25\], the tower means \[24\]"),
    ):
        changed = {name: x for name, x in (tensors | change).items() if x is not None}
        safetensors.numpy.save_file(changed, tmp_path / hf.WEIGHTS)
        with pytest.raises(ValueError, match=message):
            hf.load(tmp_path)
    (tmp_path / hf.WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=str(tmp_path)):
        hf.load(tmp_path)
    for change, message in (
        ({"architectures": ["ViTModel"]}, "ViTModel is not supported"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not supported"),
    ):
        content = hf.write_config(config) | change
        (tmp_path / hf.CONFIG).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            hf.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a directory of a published model"):
        hf.load(tmp_path / "absent")
    params = random_params(config)
    with pytest.raises(ValueError, match="not the tower's parameters: class_token"):
        hf.save(tmp_path / "other", ViT(config), {k: v for k, v in params.items() if k != "class_token"})


def test_sizes_that_do_not_fit_are_refused():
    for change, message in (
        ({"num_heads": 5}, "multiple of num_heads"),
        ({"image_size": 13}, "multiple of patch_size"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ViTConfig(mlp_size=96, **SMALL | change)
    config = CONFIGS["gelu"]
    with pytest.raises(ValueError, match="multiples of 4"):
        ViT(config).apply({"params": random_params(config)}, jnp.zeros((1, 12, 14, 3)))
