"""What a decoder is made of: the frozen dataclass every other module of `research.lm` reads."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama-3.1's stretching of the rotary wavelengths (`rope_type: llama3` in its config.json).

    Wavelengths (in tokens) below `original_max_position / high_freq_factor` stay, those above
    `original_max_position / low_freq_factor` grow by `factor`, the ones between are blended.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A pre-norm decoder with grouped-query attention and SwiGLU: Qwen2, Qwen3, Llama and kin."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    rope_theta: float = 1e4
    rope_scaling: Llama3Scaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    max_position: int = 4096  # longest context, in tokens
    dtype: str = "float32"  # of activations; norms, softmax and logits are float32 always
    param_dtype: str = "float32"
    scan_layers: bool = True  # one compiled layer, or (False) unrolled: faster for small models
    remat: Literal["none", "full", "dots"] = "none"  # what backward recomputes; dots: all but matmuls
    init_std: float = 0.02

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads",
                     "head_dim", "mlp_size", "max_position"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads}): every key-value head serves the same number of query heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary pairs), got {self.head_dim}")
        if self.remat not in ("none", "full", "dots"):
            raise ValueError(f"remat must be 'none', 'full' or 'dots', got {self.remat!r}")

    @property
    def group_size(self) -> int:
        """Query heads per key-value head."""
        return self.num_heads // self.num_kv_heads
