"""A tiny random Qwen2 as a published directory, for trying any experiment end to end anywhere.

    python -m research.lm.hf.tiny DIRECTORY
"""

import pathlib
import sys

import jax
import jax.numpy as jnp

from research.lm import hf
from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder
from research.lm.tokenizer import Tokenizer

CHAT = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write(
    directory: str | pathlib.Path,
    *,
    tokenizer: Tokenizer | None = None,
    hidden_size: int = 64,
    num_layers: int = 2,
    max_position: int = 4096,
    seed: int = 0,
) -> pathlib.Path:
    """Writes config.json, model.safetensors and the tokenizer; returns the directory.

    Args:
        tokenizer: default, one of bytes with Qwen's chat markers.
        hidden_size: a multiple of 32; heads have 16 dimensions, two of them share keys.
        seed: of the random parameters.
    """
    if tokenizer is None:
        tokenizer = Tokenizer.byte(["<|im_start|>", "<|im_end|>"], chat_template=CHAT)
    config = DecoderConfig(
        vocab_size=-(-tokenizer.vocab_size // 64) * 64,  # padded, as published models are
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=hidden_size // 16,
        num_kv_heads=hidden_size // 32,
        head_dim=16,
        mlp_size=3 * hidden_size,
        rope_theta=1e6,
        tie_embeddings=True,
        qkv_bias=True,
        max_position=max_position,
        init_std=0.1,
    )
    model = Decoder(config)
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
    hf.save(directory, model, params, "qwen2", tokenizer=tokenizer)
    return pathlib.Path(directory)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(write(sys.argv[1]))
