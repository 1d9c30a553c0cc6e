"""Shapes of known decoders, by name.

Sources: the config.json of each published model (base models, not their instruction-tuned kin).
The distillations of DeepSeek-R1 are Qwen2.5-Math-1.5B and -7B, Qwen2.5-14B and -32B, Llama-3.1-8B
and Llama-3.3-70B (the 3.1 shape); the 1.5B one is published untied.

MiniMax-01 (its paper gives names and sizes alone, but for the released model):

* `minimax-{size}-{softmax,lightning,hybrid}`, the scaling-law family of Tables 1 and 2. Widths, from
  410M on also layers, and vocabulary are those of the GPT-style family with the same names (Biderman
  et al. 2023, "Pythia", Table 1), with the paper's head size 128 from 1B on and its MLP of 8 d^2
  parameters. The two smallest differ: hybrids have softmax attention in every eighth layer, so they
  take 8 and 16 layers (of 512 and 640) for Pythia's 6 of 512 and 12 of 768. Sizes are with both
  embeddings, in the softmax form; lightning's gate adds d^2 a layer.
* `minimax-moe-28b-*`, `minimax-moe-60b-*`, `minimax-moe-24b`: the ablations of Table 5 (hybrid attention;
  where the norm is, with 48 layers) and of Figure 4 (experts against the dense
  `minimax-7b-softmax`). The dimensions are ours; they meet the published total and active
  parameters, the active ones without embeddings.
* `study-hybrid`, `quickstart-hybrid`: for a CPU, like `study` and `quickstart`.
"""

import dataclasses
import math

import jax
import numpy as np

from research.lm.config import DecoderConfig, Llama3Scaling, MoEConfig, Residual
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


HYBRID = ("lightning",) * 7 + ("softmax",)
_FORMS = {"softmax": ("softmax",), "lightning": ("lightning",), "hybrid": HYBRID}


def _scaling_law(name, layers, width, heads):
    """One size in the three forms: multi-head attention, and 3 d F = 8 d^2 (F rounded up to 64)."""
    mlp = -(-8 * width // (3 * 64)) * 64
    return {
        f"minimax-{name}-{form}": DecoderConfig(
            vocab_size=50304, hidden_size=width, num_layers=layers, num_heads=heads,
            num_kv_heads=heads, head_dim=width // heads, mlp_size=mlp, mixers=mixers,
            norm_eps=1e-5, rotary_dim=width // heads // 2, max_position=8192,
        )
        for form, mixers in _FORMS.items()
    }  # fmt: skip


def _minimax(
    hidden, layers, heads, kv_heads, mlp, experts, *, mixers=HYBRID, post_norm=True, **other
):
    """Like the released model: head size 128, half of it turned, DeepNorm, top-2 of the experts."""
    return DecoderConfig(
        **{
            "vocab_size": 200064,
            "hidden_size": hidden,
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_dim": 128,
            "mlp_size": mlp,
            "norm_eps": 1e-5,
            "mixers": mixers,
            "moe": MoEConfig(experts),
            "residual": Residual.deepnorm(layers) if post_norm else Residual(),
            "init": "deepnorm" if post_norm else "normal",
            "rotary_dim": 64,
            "max_position": 8192,
        }
        | other
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
    "text_01": _minimax(
        6144, 80, 64, 8, 9216, 32, moe=MoEConfig(32, aux_coef=0.001),
        rope_theta=1e7, max_position=10_240_000,
    ),
    **_scaling_law("70m", 8, 512, 8),
    **_scaling_law("160m", 16, 640, 10),
    **_scaling_law("410m", 24, 1024, 16),
    **_scaling_law("1b", 16, 2048, 16),
    **_scaling_law("3b", 32, 2560, 20),
    **_scaling_law("7b", 32, 4096, 32),
    "minimax-moe-28b-softmax": _minimax(
        3072, 40, 24, 8, 4224, 16, mixers=("softmax",), post_norm=False
    ),
    "minimax-moe-28b-hybrid": _minimax(3072, 40, 24, 8, 4224, 16, post_norm=False),
    "minimax-moe-60b-pre": _minimax(3072, 48, 24, 8, 8064, 16, post_norm=False),
    "minimax-moe-60b-post": _minimax(3072, 48, 24, 8, 8064, 16),
    "minimax-moe-24b": _minimax(
        2048, 24, 16, 16, 4864, 32, mixers=("softmax",), post_norm=False
    ),
    "study-hybrid": DecoderConfig(  # 15.4 M: seven lightning layers and a softmax one, 8 experts
        vocab_size=512, hidden_size=256, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=64,
        mlp_size=256, norm_eps=1e-5, mixers=HYBRID, moe=MoEConfig(8),
        residual=Residual.deepnorm(8), init="deepnorm", rotary_dim=32, max_position=2**18,
    ),
    "quickstart-hybrid": dataclasses.replace(
        _small(vocab=40, layers=3), mixers=("lightning", "lightning", "softmax"), mlp_size=176,
        moe=MoEConfig(4), rotary_dim=16,
    ),
}  # fmt: skip
