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
class MoEConfig:
    """Experts in place of the one SwiGLU; each has the width `mlp_size` (MiniMax-01, section 2.1).

    capacity_factor: in training an expert takes at most ceil(factor * top_k * tokens / num_experts) of the tokens that
      a device computes together, and the rest pass it by; 0: it takes all. With a cache it takes all always.
    aux_coef, aux_form: weight and form of the load-balancing loss, see `moe.aux_loss`.
    jitter: in training the router's input is multiplied by uniform numbers in 1 ± jitter.
    """

    num_experts: int = 32
    top_k: int = 2
    capacity_factor: float = 0.0
    aux_coef: float = 0.01
    aux_form: Literal["paper", "switch"] = "switch"
    jitter: float = 0.0

    def __post_init__(self):
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k} must lie between 1 and num_experts={self.num_experts}")
        if self.aux_form not in ("paper", "switch"):
            raise ValueError(f"aux_form must be 'paper' or 'switch', got {self.aux_form!r}")
        if self.capacity_factor < 0 or not 0 <= self.jitter < 1:
            raise ValueError(
                f"capacity_factor={self.capacity_factor} must not be negative, and jitter={self.jitter} lies in [0, 1)"
            )


@dataclasses.dataclass(frozen=True)
class LightningConfig:
    """Linear attention with decay (MiniMax-01, section 2.2).

    slopes: which released code's decays, see `lightning.slopes`; they differ in the last layer, and for head counts
      that are no power of two.
    norm_eps: of the norm of its output.
    block: tokens per block of the chunked form; 0: as suits the machine. It changes no result.
    """

    slopes: Literal["remote", "native"] = "remote"
    norm_eps: float = 1e-6
    block: int = 0

    def __post_init__(self):
        if self.slopes not in ("remote", "native"):
            raise ValueError(f"slopes must be 'remote' or 'native', got {self.slopes!r}")


@dataclasses.dataclass(frozen=True)
class Residual:
    """x becomes alpha * r + beta * branch(norm(x)), with r = norm(x) if `post_norm`, else x.

    softmax, lightning, mlp: (alpha, beta) around each kind of branch.
    """

    post_norm: bool = False
    softmax: tuple[float, float] = (1.0, 1.0)
    lightning: tuple[float, float] = (1.0, 1.0)
    mlp: tuple[float, float] = (1.0, 1.0)

    @classmethod
    def deepnorm(cls, num_layers: int) -> "Residual":
        """Post-norm with alpha = (2L)^(1/4) (Wang et al. 2022, "DeepNet"; MiniMax-01, section 4.2)."""
        scales = ((2 * num_layers) ** 0.25, 1.0)
        return cls(True, scales, scales, scales)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder: Qwen2, Qwen3, Llama and kin, or a hybrid of lightning and softmax attention with experts.

    mixers: the repeating pattern of the layers' token mixers.
    rotary_dim: leading dimensions of a head that rotary positions turn; None: all of them.
    init: 'normal' draws every matrix with `init_std`; 'deepnorm' is Xavier's, with the gain (8L)^(-1/4) on value,
      output and MLP projections (Wang et al. 2022); embeddings are normal in both.
    """

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
    mixers: tuple[Literal["softmax", "lightning"], ...] = ("softmax",)
    lightning: LightningConfig = LightningConfig()
    moe: MoEConfig | None = None
    residual: Residual = Residual()
    rotary_dim: int | None = None
    max_position: int = 4096  # longest context, in tokens
    dtype: str = "float32"  # of activations; norms, softmax and logits are float32 always
    param_dtype: str = "float32"
    scan_layers: bool = True  # one compiled layer, or (False) unrolled: faster for small models
    remat: Literal["none", "full", "dots"] = "none"  # what backward recomputes; dots: all but matmuls
    kernels: Literal["auto", "reference", "xla", "pallas"] = "auto"  # implementation of every op of `pallas_kernels`
    init: Literal["normal", "deepnorm"] = "normal"
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
        if not self.mixers or set(self.mixers) - {"softmax", "lightning"}:
            raise ValueError(f"mixers must be a pattern of 'softmax' and 'lightning', got {self.mixers}")
        if self.num_layers % len(self.mixers):
            raise ValueError(
                f"num_layers ({self.num_layers}) must be a multiple of the {len(self.mixers)} layers of the pattern "
                "`mixers`"
            )
        if self.turned_dim % 2:
            name = "head_dim" if self.rotary_dim is None else "rotary_dim"
            raise ValueError(f"{name} must be even (rotary pairs), got {self.turned_dim}")
        if not 0 < self.turned_dim <= self.head_dim:
            raise ValueError(f"rotary_dim ({self.rotary_dim}) must lie in 2..head_dim ({self.head_dim})")
        if self.init not in ("normal", "deepnorm"):
            raise ValueError(f"init must be 'normal' or 'deepnorm', got {self.init!r}")
        if self.remat not in ("none", "full", "dots"):
            raise ValueError(f"remat must be 'none', 'full' or 'dots', got {self.remat!r}")
        if self.kernels not in ("auto", "reference", "xla", "pallas"):
            raise ValueError(f"kernels must be 'auto', 'reference', 'xla' or 'pallas', got {self.kernels!r}")

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        """The mixer of every layer."""
        return self.mixers * (self.num_layers // len(self.mixers))

    @property
    def implementation(self) -> str | None:
        """`kernels` as the ops take it."""
        return None if self.kernels == "auto" else self.kernels

    @property
    def turned_dim(self) -> int:
        """Dimensions of a head that rotary positions turn."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def group_size(self) -> int:
        """Query heads per key-value head."""
        return self.num_heads // self.num_kv_heads
