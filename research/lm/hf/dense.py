"""What the dense layouts share: config.json's keys and the table of tensors.

Qwen2, Qwen3 and Llama differ in three switches: biases on q, k and v; norms on q and k; and the
head size that an absent key stands for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from research.lm.config import DecoderConfig, Llama3Scaling, Residual
from research.lm.decoder import Decoder
from research.lm.hf.layout import Layout, Param

_LLAMA3_KEYS = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position": "original_max_position_embeddings",
}


def layout(
    name: str,
    architecture: str,
    *,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    head_dim: int | None = None,
    max_position: int,
) -> Layout:
    """A dense layout; `head_dim` (None: hidden / heads) and `max_position` are what absent keys
    of config.json mean."""

    def read_config(hf: Mapping[str, Any]) -> DecoderConfig:
        _refuse(hf)
        theta, scaling = _read_rope(hf)
        heads, hidden = need(hf, "num_attention_heads"), need(hf, "hidden_size")
        return DecoderConfig(
            vocab_size=need(hf, "vocab_size"),
            hidden_size=hidden,
            num_layers=need(hf, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or head_dim or hidden // heads,
            mlp_size=need(hf, "intermediate_size"),
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            max_position=hf.get("max_position_embeddings", max_position),
            init_std=hf.get("initializer_range", 0.02),
        )

    def write_config(config: DecoderConfig) -> dict[str, Any]:
        for switch, ours in (("qkv_bias", qkv_bias), ("qk_norm", qk_norm)):
            if getattr(config, switch) != ours:
                raise ValueError(f"layout {name!r} means {switch}={ours}, this model has {not ours}")
        others = "lightning" in config.mixers or config.moe or config.residual != Residual()
        if others or config.turned_dim != config.head_dim:
            raise ValueError(
                f"layout {name!r} has softmax attention with rotary positions in whole heads, "
                "one MLP and plain residuals in every layer; this model has others"
            )
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.mlp_size,
            "hidden_act": "silu",
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,
            "rope_scaling": _write_scaling(config.rope_scaling),
            "max_position_embeddings": config.max_position,
            "tie_word_embeddings": config.tie_embeddings,
            "initializer_range": config.init_std,
            "use_cache": True,
        }

    return Layout(
        name, architecture, read_config, write_config, Decoder, _sizes, _params, _copies,
        ignored=(r"\.rotary_emb\.inv_freq$",),
    )


def _sizes(config: DecoderConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "L": config.num_layers,
        "N": config.num_kv_heads,
        "G": config.group_size,
        "K": config.head_dim,
        "F": config.mlp_size,
    }


def _params(config: DecoderConfig) -> tuple[Param, ...]:
    attn, mlp = "model.layers.{L}.self_attn.", "model.layers.{L}.mlp."
    table = [
        Param("embed/embedding", "VD", ("model.embed_tokens.weight", "V,D")),
        Param("layers/attn_norm/scale", "LD", ("model.layers.{L}.input_layernorm.weight", "D")),
        Param(
            "layers/attn/qkv/kernel", "LDNHK",
            (attn + "q_proj.weight", "NGK,D"),
            (attn + "k_proj.weight", "NK,D"),
            (attn + "v_proj.weight", "NK,D"),
        ),
        Param("layers/attn/o/kernel", "LNGKD", (attn + "o_proj.weight", "D,NGK")),
        Param(
            "layers/mlp_norm/scale", "LD", ("model.layers.{L}.post_attention_layernorm.weight", "D")
        ),
        Param("layers/mlp/gate/kernel", "LDF", (mlp + "gate_proj.weight", "F,D")),
        Param("layers/mlp/up/kernel", "LDF", (mlp + "up_proj.weight", "F,D")),
        Param("layers/mlp/down/kernel", "LFD", (mlp + "down_proj.weight", "D,F")),
        Param("final_norm/scale", "D", ("model.norm.weight", "D")),
    ]
    if config.qkv_bias:
        table.append(
            Param(
                "layers/attn/qkv/bias", "LNHK",
                (attn + "q_proj.bias", "NGK"),
                (attn + "k_proj.bias", "NK"),
                (attn + "v_proj.bias", "NK"),
            )
        )
    if config.qk_norm:
        table.append(Param("layers/attn/q_norm/scale", "LK", (attn + "q_norm.weight", "K")))
        table.append(Param("layers/attn/k_norm/scale", "LK", (attn + "k_norm.weight", "K")))
    if not config.tie_embeddings:
        table.append(Param("head/kernel", "DV", ("lm_head.weight", "V,D")))
    return tuple(table)


def _copies(config: DecoderConfig) -> dict[str, str]:
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_embeddings else {}


def need(hf: Mapping[str, Any], key: str) -> Any:
    if hf.get(key) is None:
        raise ValueError(f"the key {key!r} is missing")
    return hf[key]


def refuse_settings(hf: Mapping[str, Any]) -> None:
    """Raises ValueError for settings that no family here supports."""
    off = {
        "attention_bias": "a bias on the output projection",
        "mlp_bias": "biases in the MLP",
        "quantization_config": "quantised weights",
    }
    for key, what in off.items():
        if hf.get(key):
            raise ValueError(f"{key}={hf[key]!r}: {what} are not supported")
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"hidden_act={hf['hidden_act']!r}: only 'silu' is supported")


def _refuse(hf: Mapping[str, Any]) -> None:
    """Raises ValueError for settings that would change what the model computes."""
    refuse_settings(hf)
    kinds = set(hf.get("layer_types") or ()) - {"full_attention"}
    if kinds or (hf.get("use_sliding_window") and hf.get("sliding_window")):
        raise ValueError(
            "sliding-window attention is not supported; set use_sliding_window to false (and "
            "layer_types to full_attention) if contexts shorter than the window are enough"
        )


def _read_rope(hf: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None]:
    """theta and scaling, from `rope_parameters` (transformers 5) or the two older keys."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 1e4)
    if (share := rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))) not in (None, 1):
        raise ValueError(f"partial_rotary_factor={share}: only whole heads are rotated here")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" and not any(isinstance(value, Mapping) for value in rope.values()):
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope scaling {rope} is not supported; 'default' and 'llama3' are")
    missing = [key for key in _LLAMA3_KEYS.values() if key not in rope]
    if missing:
        raise ValueError(f"rope scaling {rope} lacks {', '.join(missing)}")
    return theta, Llama3Scaling(**{ours: rope[theirs] for ours, theirs in _LLAMA3_KEYS.items()})


def _write_scaling(scaling: Llama3Scaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values = {theirs: getattr(scaling, ours) for ours, theirs in _LLAMA3_KEYS.items()}
    return {"rope_type": "llama3"} | values
