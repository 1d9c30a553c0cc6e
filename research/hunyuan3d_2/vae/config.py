"""The shape VAE's sizes, and those of every released one."""

import dataclasses
from typing import Literal

POINT_FEATURES = 4  # unit normal (3) and the sharp-edge flag


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Hunyuan3D 2.0's ShapeVAE (Hunyuan3D 2.0, section 3.1).

    num_tokens: L, latent tokens at most; fewer may be asked for at any time.
    latent_dim: channels of a latent token.
    width, heads: of the transformer; a head has width / heads channels.
    encoder_layers, decoder_layers: self-attention blocks.
    num_freqs: octaves of the Fourier features.
    uniform_points, sharp_points: M and N, which set the share of queries that each cloud gives.
    downsample_ratio: surface points that farthest point sampling chooses one query from.
    queries: 'fps' samples the encoder's queries from the surface; 'learned' has a table of them, as
      3DShape2VecSet (for the ablation; no released model has it).
    field_downsample, field_mlp_ratio, field_ln_post: of the cross-attention that reads the field off
      the tokens: its width is width / field_downsample, its MLP field_mlp_ratio times that. Without
      its last norm it normalises no queries and keys either ('turbo').
    scale_factor: z * scale_factor has unit variance: what the diffusion model learns.
    dtype: of matrix products; parameters, norms and softmaxes are float32.
    remat: recompute each block in the backward pass.
    """

    num_tokens: int = 3072
    latent_dim: int = 64
    width: int = 1024
    heads: int = 16
    encoder_layers: int = 8
    decoder_layers: int = 16
    num_freqs: int = 8
    uniform_points: int = 30720
    sharp_points: int = 30720
    downsample_ratio: int = 20
    queries: Literal["fps", "learned"] = "fps"
    field_downsample: int = 1
    field_mlp_ratio: int = 4
    field_ln_post: bool = True
    scale_factor: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    def __post_init__(self):
        least = {"encoder_layers": 0, "decoder_layers": 0, "num_freqs": 0, "sharp_points": 0}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < least.get(field.name, 1):
                raise ValueError(
                    f"{field.name} must be at least {least.get(field.name, 1)}, got {value}"
                )
        if self.width % self.heads:
            raise ValueError(f"width={self.width} does not divide into heads={self.heads}")
        if self.width % self.field_downsample or self.heads % self.field_downsample:
            raise ValueError(
                f"width={self.width} and heads={self.heads} must be multiples of "
                f"field_downsample={self.field_downsample}"
            )
        if not self.scale_factor > 0:
            raise ValueError(f"scale_factor must be positive, got {self.scale_factor}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def field_width(self) -> int:
        return self.width // self.field_downsample

    @property
    def field_heads(self) -> int:
        return self.heads // self.field_downsample

    @property
    def point_dim(self) -> int:
        """Channels of a position's Fourier features."""
        return 3 * (1 + 2 * self.num_freqs)

    def query_counts(self, num_tokens: int) -> tuple[int, int]:
        """(n_u, n_s): queries from the uniform and from the sharp cloud; n_u = L M / (M + N), rounded."""
        share = self.uniform_points / (self.uniform_points + self.sharp_points)
        uniform = round(num_tokens * share)
        return uniform, num_tokens - uniform


_V2 = VAEConfig(scale_factor=0.9990943042622529)
_MINI = dataclasses.replace(
    _V2, num_tokens=512, uniform_points=5120, sharp_points=5120, scale_factor=1.0188137142395404
)
_TURBO = {"field_downsample": 2, "field_mlp_ratio": 1, "field_ln_post": False}

# Those of 2.0 but "-withencoder" were released as decoders alone; 'tiny' and 'small' are ours.
PRESETS = {
    "v2-0": _V2,
    "v2-0-turbo": dataclasses.replace(_V2, **_TURBO),
    "v2-0-withencoder": _V2,
    "v2-mini": _MINI,
    "v2-mini-turbo": dataclasses.replace(_MINI, **_TURBO),
    "v2-1": dataclasses.replace(
        _V2, num_tokens=4096, uniform_points=81920, sharp_points=0, scale_factor=1.0039506158752403
    ),
    "small": VAEConfig(
        num_tokens=64, latent_dim=16, width=96, heads=3, encoder_layers=1, decoder_layers=3,
        uniform_points=320, sharp_points=320, downsample_ratio=10,
    ),
    "tiny": VAEConfig(
        num_tokens=16, latent_dim=8, width=32, heads=2, encoder_layers=1, decoder_layers=2,
        num_freqs=6, uniform_points=128, sharp_points=128, downsample_ratio=4,
    ),
}  # fmt: skip
