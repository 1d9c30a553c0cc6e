"""Qwen3, dense: RMS norms on the heads of q and k, no biases."""

from research.lm.hf import dense

LAYOUT = dense.layout("qwen3", "Qwen3ForCausalLM", qk_norm=True, head_dim=128, max_position=32768)
