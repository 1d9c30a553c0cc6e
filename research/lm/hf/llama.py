"""Llama 2 and 3, and DeepSeek-R1's Llama distillations: no biases."""

from research.lm.hf import dense

LAYOUT = dense.layout("llama", "LlamaForCausalLM", max_position=2048)
