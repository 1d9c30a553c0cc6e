"""MiniMax-Text-01 as transformers knows it (`MiniMaxAI/MiniMax-Text-01-hf`)."""

from research.lm.hf import hybrid

LAYOUT = hybrid.layout(
    "minimax",
    "MiniMaxForCausalLM",
    hybrid.Dialect(
        types=("layer_types", {"linear_attention": "lightning", "full_attention": "softmax"}),
        factors={
            "softmax": "full_attn_{}_factor",
            "lightning": "linear_attn_{}_factor",
            "mlp": "mlp_{}_factor",
        },
        slopes="native",
        fixed={},
        always_post_norm=True,
        block_size=True,
        rotary_factor=True,
    ),
)
