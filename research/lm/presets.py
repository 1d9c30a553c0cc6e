"""Shapes of known decoders, by name.

Sources: the config.json of each published model (base models, not their instruction-tuned kin).
The distillations of DeepSeek-R1 are Qwen2.5-Math-1.5B and -7B, Qwen2.5-14B and -32B, Llama-3.1-8B
and Llama-3.3-70B (the 3.1 shape); the 1.5B one is published untied.
"""

import dataclasses
import math

import jax
import numpy as np

from research.lm.config import DecoderConfig, Llama3Scaling
from research.lm.decoder import Decoder


def num_params(config: DecoderConfig) -> int:
    """How many numbers the model learns; nothing is allocated."""
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _qwen2(hidden, layers, heads, kv_heads, mlp, *, vocab=151936, head_dim=128, **other):
    return DecoderConfig(
        **{
            "vocab_size": vocab,
            "hidden_size": hidden,
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": head_dim,
            "mlp_size": mlp,
            "rope_theta": 1e6,
            "norm_eps": 1e-6,
            "qkv_bias": True,
            "max_position": 131072,
        }
        | other
    )


def _qwen3(hidden, layers, heads, mlp, *, tie=False):
    return _qwen2(
        hidden, layers, heads, 8, mlp,
        qkv_bias=False, qk_norm=True, tie_embeddings=tie, max_position=32768,
    )


def _llama31(hidden, layers, heads, mlp):
    return _qwen2(
        hidden, layers, heads, 8, mlp, vocab=128256,
        qkv_bias=False, rope_theta=5e5, rope_scaling=Llama3Scaling(), norm_eps=1e-5,
    )


def _small(vocab, layers):
    """The CPU models: 128 wide, two key-value heads of 32."""
    return DecoderConfig(
        vocab_size=vocab, hidden_size=128, num_layers=layers, num_heads=4, num_kv_heads=2,
        head_dim=32, mlp_size=352, tie_embeddings=True, max_position=1024, init_std=0.1,
        scan_layers=False,
    )


_MATH_1_5B = _qwen2(1536, 28, 12, 2, 8960, tie_embeddings=True, rope_theta=1e4, max_position=4096)
_MATH_7B = _qwen2(3584, 28, 28, 4, 18944, vocab=152064, rope_theta=1e4, max_position=4096)

PRESETS: dict[str, DecoderConfig] = {
    "study": _small(vocab=128, layers=4),  # 0.76 M: timing studies on a CPU
    "quickstart": _small(vocab=40, layers=3),  # 0.559 M: R1-Zero on two cores
    "qwen2.5-0.5b": _qwen2(
        896, 24, 14, 2, 4864, head_dim=64, tie_embeddings=True, max_position=32768
    ),
    "qwen2.5-1.5b": _qwen2(1536, 28, 12, 2, 8960, tie_embeddings=True),
    "qwen2.5-3b": _qwen2(2048, 36, 16, 2, 11008, tie_embeddings=True, max_position=32768),
    "qwen2.5-7b": _qwen2(3584, 28, 28, 4, 18944, vocab=152064),
    "qwen2.5-14b": _qwen2(5120, 48, 40, 8, 13824, vocab=152064, norm_eps=1e-5),
    "qwen2.5-32b": _qwen2(5120, 64, 40, 8, 27648, vocab=152064, norm_eps=1e-5),
    "qwen2.5-math-1.5b": _MATH_1_5B,
    "qwen2.5-math-7b": _MATH_7B,
    "r1-distill-qwen-1.5b": dataclasses.replace(
        _MATH_1_5B, tie_embeddings=False, max_position=131072
    ),
    "r1-distill-qwen-7b": dataclasses.replace(_MATH_7B, max_position=131072),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tie=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tie=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tie=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288),
    "qwen3-14b": _qwen3(5120, 40, 40, 17408),
    "qwen3-32b": _qwen3(5120, 64, 64, 25600),
    "llama-3.1-8b": _llama31(4096, 32, 32, 14336),
    "llama-3.1-70b": _llama31(8192, 80, 64, 28672),
}
