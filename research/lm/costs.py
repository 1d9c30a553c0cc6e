"""What a decoder costs, as arithmetic on its config: parameters, FLOPs, bytes of cache.

FLOPs are those of matrix products, a multiply-add being two; norms, activations and the softmax
come on top (a few per cent, see the tests). B is the block of lightning attention's chunked form,
256 where the config leaves it open, as in the published code.
"""

import dataclasses
import math
from typing import Literal

import jax
import numpy as np

from research.lm.config import DecoderConfig
from research.lm.decoder import Decoder

BLOCK = 256

Form = Literal["softmax", "lightning", "hybrid"]


@dataclasses.dataclass(frozen=True)
class Parameters:
    """How many numbers a model learns.

    embedding: the input table, which is the output projection too if they are tied.
    head: an output projection of its own.
    layers: all the rest.
    active: of the rest, what one token passes: of the experts, its top_k.
    """

    embedding: int
    head: int
    layers: int
    active: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.layers


def parameters(config: DecoderConfig) -> Parameters:
    """By formula."""
    c = config
    expert = 3 * c.hidden_size * c.mlp_size
    number, top_k = (1, 1) if c.moe is None else (c.moe.num_experts, c.moe.top_k)
    router = 0 if c.moe is None else c.hidden_size * number
    shared = c.num_layers * (2 * c.hidden_size + router) + c.hidden_size  # norms
    shared += sum(_mixer_matrices(c, mixer) + _mixer_vectors(c, mixer) for mixer in c.layer_mixers)
    table = c.vocab_size * c.hidden_size
    return Parameters(
        embedding=table,
        head=0 if c.tie_embeddings else table,
        layers=shared + c.num_layers * number * expert,
        active=shared + c.num_layers * top_k * expert,
    )


def counted(config: DecoderConfig) -> Parameters:
    """By the arrays that the model would make; nothing is allocated."""
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), tokens)["params"]
    sizes = {
        tuple(key.key for key in path): math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    tables = {name: sum(n for path, n in sizes.items() if path[0] == name)
              for name in ("embed", "head")}
    layers = sum(sizes.values()) - sum(tables.values())
    idle = 0
    if config.moe is not None:
        experts = sum(
            n for path, n in sizes.items() if path[1:2] == ("moe",) and path[2] != "router"
        )
        idle = experts - experts * config.moe.top_k // config.moe.num_experts
    return Parameters(tables["embed"], tables["head"], layers, layers - idle)


def training_flops(config: DecoderConfig, length: int) -> float:
    """A token's share of a training step on sequences of `length`: forward, and twice that back."""
    return 3 * _forward(config, length, logits=length) / length


def prefill_flops(config: DecoderConfig, length: int) -> float:
    """A token's share of reading a prompt of `length`, with logits for its last token alone."""
    return _forward(config, length, logits=1) / length


def decode_flops(config: DecoderConfig, context: int) -> float:
    """The next token after `context` others."""
    return _forward(config, 1, logits=1, context=context)


def cache_bytes(config: DecoderConfig, context: int, itemsize: int = 2) -> tuple[int, int]:
    """Of one sequence: keys and values (of `itemsize` bytes), and the float32 states of lightning."""
    c = config
    pair = 2 * c.num_kv_heads * c.head_dim * itemsize
    state = 4 * c.num_heads * c.head_dim**2
    softmax = c.layer_mixers.count("softmax")
    return softmax * pair * context, (c.num_layers - softmax) * state


def _forward(config: DecoderConfig, tokens: int, *, logits: int, context: int = 0) -> float:
    """FLOPs of `tokens` tokens of one sequence after `context` others."""
    c = config
    width = c.num_heads * c.head_dim
    experts = 1 if c.moe is None else c.moe.top_k
    per_token = experts * 3 * c.hidden_size * c.mlp_size
    if c.moe is not None:
        per_token += c.hidden_size * c.moe.num_experts
    flops = 2 * logits * c.hidden_size * c.vocab_size
    seen = tokens * context + tokens * (tokens + 1) / 2  # pairs that causal attention makes
    for mixer in c.layer_mixers:
        flops += 2 * tokens * (_mixer_matrices(c, mixer) + per_token)
        if mixer == "softmax":
            flops += 4 * width * seen
        else:  # within blocks the product of queries and keys is made whole
            block = min(tokens, c.lightning.block or BLOCK)
            flops += 4 * width * (block + c.head_dim) * tokens
    return flops


def _mixer_matrices(c: DecoderConfig, mixer: str) -> int:
    width = c.num_heads * c.head_dim
    if mixer == "lightning":  # q, k, v, gate, output
        return 5 * c.hidden_size * width
    return 2 * c.hidden_size * (width + c.num_kv_heads * c.head_dim)


def _mixer_vectors(c: DecoderConfig, mixer: str) -> int:
    if mixer == "lightning":  # its norm
        return c.num_heads * c.head_dim
    biases = c.qkv_bias * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    return biases + c.qk_norm * 2 * c.head_dim


# MiniMax-01, Table 1: models of l layers, width d and h heads, without embeddings. The MLP has 8 d^2
# parameters, the hybrid one softmax layer in eight; lightning's gate is there of low rank, 2 d^2/h,
# while the released model's is d^2 (so the paper's scaling-law models were a little smaller than
# ours of the same width).


def table1_parameters(form: Form, *, layers: int, width: int, heads: int) -> float:
    """12 l d^2, and lightning attention's 2 l d^2 / h in all or in 7 of 8 layers."""
    share = {"softmax": 0, "lightning": 1, "hybrid": 7 / 8}[form]
    return layers * width**2 * (12 + share * 2 / heads)


def table1_flops(
    form: Form, *, batch: int, length: int, layers: int, width: int, heads: int
) -> float:
    """72 b n l d^2 (1 + attention + 5/18d) for a training step on b sequences of n tokens.

    Attention: softmax n/6d (all pairs, as if not causal), lightning 1/2h (blocks of 2 d/h tokens),
    hybrid n/48d + 7/16h.
    """
    attention = {
        "softmax": length / (6 * width),
        "lightning": 1 / (2 * heads),
        "hybrid": length / (48 * width) + 7 / (16 * heads),
    }[form]
    return 72 * batch * length * layers * width**2 * (1 + attention + 5 / (18 * width))
