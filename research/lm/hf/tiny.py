"""A tiny random model as a published directory, for trying any experiment end to end anywhere.

    python -m research.lm.hf.tiny DIRECTORY [--layout=minimax]

The default is a Qwen2; 'minimax' (or 'minimax_text_01') is a hybrid of four layers, three with
lightning attention, with four experts.
"""

import argparse
import dataclasses
import pathlib

import jax
import jax.numpy as jnp

from research.lm import hf
from research.lm.config import DecoderConfig, LightningConfig, MoEConfig, Residual
from research.lm.decoder import Decoder
from research.lm.hf import minimax_text_01
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
    layout: str = "qwen2",
    tokenizer: Tokenizer | None = None,
    hidden_size: int = 64,
    num_layers: int | None = None,
    max_position: int = 4096,
    seed: int = 0,
) -> pathlib.Path:
    """Writes config.json, model.safetensors and the tokenizer; returns the directory.

    Args:
        layout: 'qwen2', 'minimax' or 'minimax_text_01'.
        tokenizer: default, one of bytes with the family's chat markers.
        hidden_size: a multiple of 32; heads have 16 dimensions, two of them share keys.
        num_layers: default 2, and 4 for MiniMax, of which it is a multiple.
        seed: of the random parameters.
    """
    hybrid = layout != "qwen2"
    if tokenizer is None and hybrid:
        markers = ["<beginning_of_sentence>", "<end_of_sentence>"]
        tokenizer = Tokenizer.byte(markers, chat_template=minimax_text_01.CHAT)
    elif tokenizer is None:
        tokenizer = Tokenizer.byte(["<|im_start|>", "<|im_end|>"], chat_template=CHAT)
    num_layers = num_layers or (4 if hybrid else 2)
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
    if hybrid:
        config = dataclasses.replace(
            config,
            qkv_bias=False,
            tie_embeddings=False,
            norm_eps=1e-5,
            mixers=("lightning",) * 3 + ("softmax",),
            lightning=LightningConfig(slopes="native" if layout == "minimax" else "remote"),
            moe=MoEConfig(num_experts=4),
            residual=Residual.deepnorm(num_layers),
            rotary_dim=None if layout == "minimax" else 8,  # see hybrid.py
        )
    model = Decoder(config)
    params = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]
    hf.save(directory, model, params, layout, tokenizer=tokenizer)
    return pathlib.Path(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--layout", default="qwen2", choices=["qwen2", "minimax", "minimax_text_01"])
    arguments = parser.parse_args()
    print(write(arguments.directory, layout=arguments.layout))
