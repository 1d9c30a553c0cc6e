"""The model that the benchmarks share: 0.76 M parameters, small enough to show every overhead."""

from research.lm.config import DecoderConfig

STUDY = DecoderConfig(
    vocab_size=128,
    hidden_size=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    mlp_size=352,
    tie_embeddings=True,
    qkv_bias=True,  # so that Qwen2 is the same model
    scan_layers=False,
    init_std=0.1,
)
