"""Qwen2 and Qwen2.5, and DeepSeek-R1's Qwen distillations: biases on q, k and v."""

from research.lm.hf import dense

LAYOUT = dense.layout("qwen2", "Qwen2ForCausalLM", qkv_bias=True, max_position=32768)
