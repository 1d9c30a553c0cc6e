"""MiniMax-Text-01 as published, with code of its own (`MiniMaxAI/MiniMax-Text-01`); vLLM reads it."""

from research.lm.hf import hybrid

LAYOUT = hybrid.layout(
    "minimax_text_01",
    "MiniMaxText01ForCausalLM",
    hybrid.Dialect(
        types=("attn_type_list", {0: "lightning", 1: "softmax"}),
        factors={
            "softmax": "layernorm_full_attention_{}",
            "lightning": "layernorm_linear_attention_{}",
            "mlp": "layernorm_mlp_{}",
        },
        slopes="remote",
        fixed={"shared_intermediate_size": 0, "shared_moe_mode": "sigmoid"},
        always_post_norm=False,
        block_size=False,
        rotary_factor=False,
    ),
)

# The model's chat format, in plain characters: its own markers around "role name=...".
CHAT = (
    "{% for message in messages %}"
    "{% set who = {'system': 'system ai_setting=assistant', 'user': 'user name=user',"
    " 'assistant': 'ai name=assistant'}[message.role] %}"
    "{% set text = message.content if message.content is string"
    " else message.content | map(attribute='text') | join %}"
    "{{ '<beginning_of_sentence>' + who + '\\n' + text + '<end_of_sentence>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<beginning_of_sentence>ai name=assistant\\n' }}{% endif %}"
)
