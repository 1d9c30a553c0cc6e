"""Equations of the diffusion transformer in NumPy float64, written from the paper's sheet and not from the code."""

import math

import jax
import numpy as np

from research.hunyuan3d_2.dit import model


def random_params(config, seed=0):
    """Parameters of which none is zero or one, so that nothing can hide."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        scale = 0.3 / math.sqrt(leaf.shape[-2]) * 3 if leaf.ndim > 1 else 0.2
        values = rng.normal(size=leaf.shape) * scale
        return (values + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, model.shapes(config))


def linear(p, x):
    return x @ p["kernel"].astype(np.float64) + p["bias"].astype(np.float64)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def rms(x, scale):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def embed(p, value, max_period=1000.0):
    """MLP([cos(1000 t w), sin(1000 t w)]), w_i = max_period^(-i/128), i < 128."""
    w = max_period ** (-np.arange(128) / 128)
    angles = 1000.0 * value[:, None] * w
    e = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    return linear(p["out_layer"], silu(linear(p["in_layer"], e)))


def heads(qkv, H):
    """[q|k|v][head][K] → three lists of heads [T, K]."""
    D = qkv.shape[-1] // 3
    return [
        [part[:, h * D // H : (h + 1) * D // H] for h in range(H)]
        for part in np.split(qkv, 3, axis=-1)
    ]


def attend(q, k, v):
    """Per head softmax(q kᵀ / √K) v, heads side by side."""
    out = []
    for qh, kh, vh in zip(q, k, v, strict=True):
        logits = qh @ kh.T / math.sqrt(qh.shape[1])
        p = np.exp(logits - logits.max(-1, keepdims=True))
        out.append(p / p.sum(-1, keepdims=True) @ vh)
    return np.concatenate(out, axis=1)


def layer(tree, i):
    return jax.tree.map(lambda x: x[i].astype(np.float64), tree)


def double_stream(config, params, x, t, cond, guidance=None):
    """The whole network for one row: x [L, C], cond [T, E], t and guidance scalars."""
    H, D, T = config.num_heads, config.hidden_size, len(cond)
    vec = embed(params["time_in"], np.asarray([t], np.float64))
    if config.guidance_embed:
        vec = vec + embed(params["guidance_in"], np.asarray([guidance], np.float64))
    img, txt = linear(params["latent_in"], x), linear(params["cond_in"], cond)
    for i in range(config.depth):
        block = layer(params["double_blocks"], i)
        streams = []
        for p, y in ((block["cond"], txt), (block["latent"], img)):
            shift1, scale1, gate1, shift2, scale2, gate2 = np.split(
                linear(p["mod"], silu(vec))[0], 6
            )
            q, k, v = heads(linear(p["qkv"], (1 + scale1) * norm(y) + shift1), H)
            q = [rms(h, p["query_norm"]["scale"]) for h in q]
            k = [rms(h, p["key_norm"]["scale"]) for h in k]
            streams.append((p, y, q, k, v, gate1, shift2, scale2, gate2))
        joint = [
            [np.concatenate(pair) for pair in zip(streams[0][n], streams[1][n], strict=True)]
            for n in (2, 3, 4)
        ]
        attended = attend(*joint)
        done = []
        for (p, y, *_, gate1, shift2, scale2, gate2), a in zip(
            streams, (attended[:T], attended[T:]), strict=True
        ):
            y = y + gate1 * linear(p["proj"], a)
            h = gelu_tanh(linear(p["mlp_in"], (1 + scale2) * norm(y) + shift2))
            done.append(y + gate2 * linear(p["mlp_out"], h))
        txt, img = done
    x = np.concatenate([txt, img])
    for i in range(config.single_depth):
        p = layer(params["single_blocks"], i)
        shift, scale, gate = np.split(linear(p["mod"], silu(vec))[0], 3)
        h = linear(p["linear1"], (1 + scale) * norm(x) + shift)
        q, k, v = heads(h[:, : 3 * D], H)
        q = [rms(y, p["query_norm"]["scale"]) for y in q]
        k = [rms(y, p["key_norm"]["scale"]) for y in k]
        x = x + gate * linear(
            p["linear2"], np.concatenate([attend(q, k, v), gelu_tanh(h[:, 3 * D :])], axis=1)
        )
    shift, scale = np.split(linear(params["final"]["mod"], silu(vec))[0], 2)
    return linear(params["final"]["linear"], (1 + scale) * norm(x[T:]) + shift)
