"""What the two layouts of MiniMax-Text-01 share: config.json's keys and the table of tensors.

The weights are the same in both, under the same names but for the experts, which transformers keeps
fused in memory and writes one by one, as they were published. The layouts differ in config.json's
keys, in the decays that a head count other than a power of two means, and in buffers that transformers
stores beside the weights.

Whether positions turn a part of each head (the released weights: 64 of 128 dimensions) is read from
`rotary_dim` or `partial_rotary_factor`, whichever is there, in both. transformers 5.23 reads neither
for this model and always turns whole heads (as it did for MiniMax-M2 until issue 48241), so a model
with a part gives other, worse logits there; one without gives the same. Another limit of it (5.23):
`generate` of a left-padded batch attends to the padding if the first layer is lightning attention.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from research.lm import lightning
from research.lm.config import DecoderConfig, LightningConfig, MoEConfig, Residual
from research.lm.decoder import Decoder
from research.lm.hf.dense import need, refuse_settings
from research.lm.hf.layout import Derived, Layout, Param

BUFFERS = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
BLOCK = 256  # tokens: what the published code computes with
NORM_EPS = 1e-6  # of the norm in lightning attention; no key of config.json says so


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How a layout's config.json says what both say.

    Attributes:
        types: the key of the layers' kinds, and our name of each of its values.
        factors: the keys of the residual factors of each kind of branch, for 'alpha' or 'beta'.
        slopes: the rule for the decays, see `lightning.slopes`.
        fixed: keys that have one value in every model that we can express.
        always_post_norm: there is no key `postnorm`.
        block_size: there is a key for the block, and the buffers that depend on it are stored.
        rotary_factor: a part of the head is written as a factor in `rope_parameters`.
    """

    types: tuple[str, Mapping[Any, str]]
    factors: Mapping[str, str]
    slopes: str
    fixed: Mapping[str, Any]
    always_post_norm: bool
    block_size: bool
    rotary_factor: bool


def layout(name: str, architecture: str, dialect: Dialect) -> Layout:
    def read_config(hf: Mapping[str, Any]) -> DecoderConfig:
        _refuse(hf)
        heads, hidden = need(hf, "num_attention_heads"), need(hf, "hidden_size")
        head_dim = hf.get("head_dim") or hidden // heads
        theta, rotary_dim = _read_rotary(hf, head_dim)
        block = hf.get("block_size", BLOCK) if dialect.block_size else BLOCK
        return DecoderConfig(
            vocab_size=need(hf, "vocab_size"),
            hidden_size=hidden,
            num_layers=need(hf, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=need(hf, "num_key_value_heads"),
            head_dim=head_dim,
            mlp_size=need(hf, "intermediate_size"),
            rope_theta=theta,
            norm_eps=need(hf, "rms_norm_eps"),
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            mixers=_read_mixers(hf, dialect),
            lightning=LightningConfig(dialect.slopes, NORM_EPS, 0 if block == BLOCK else block),
            moe=MoEConfig(
                num_experts=need(hf, "num_local_experts"),
                top_k=need(hf, "num_experts_per_tok"),
                aux_coef=hf.get("router_aux_loss_coef", 0.001),
                jitter=hf.get("router_jitter_noise", 0.0),
            ),
            residual=Residual(
                post_norm=dialect.always_post_norm or bool(need(hf, "postnorm")),
                **{
                    branch: tuple(float(need(hf, key.format(end))) for end in ("alpha", "beta"))
                    for branch, key in dialect.factors.items()
                },
            ),
            rotary_dim=rotary_dim,
            max_position=need(hf, "max_position_embeddings"),
            init_std=hf.get("initializer_range", 0.02),
        )

    def write_config(config: DecoderConfig) -> dict[str, Any]:
        _refuse_model(config, name, dialect)
        key, kinds = dialect.types
        called = {ours: theirs for theirs, ours in kinds.items()}
        content = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.mlp_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "num_local_experts": config.moe.num_experts,
            "num_experts_per_tok": config.moe.top_k,
            "router_aux_loss_coef": config.moe.aux_coef,
            "router_jitter_noise": config.moe.jitter,
            key: [called[mixer] for mixer in config.layer_mixers],
            "rms_norm_eps": config.norm_eps,
            "max_position_embeddings": config.max_position,
            "tie_word_embeddings": config.tie_embeddings,
            "initializer_range": config.init_std,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "sliding_window": None,
            "output_router_logits": False,
            "use_cache": True,
        }
        for branch, key in dialect.factors.items():
            for end, value in zip(("alpha", "beta"), getattr(config.residual, branch), strict=True):
                content[key.format(end)] = value
        if not dialect.always_post_norm:
            content["postnorm"] = config.residual.post_norm
        if dialect.block_size:
            content["block_size"] = config.lightning.block or BLOCK
        if dialect.rotary_factor:
            rope = {"rope_type": "default", "rope_theta": config.rope_theta}
            if config.turned_dim != config.head_dim:
                rope["partial_rotary_factor"] = config.turned_dim / config.head_dim
            content["rope_parameters"] = rope
        else:
            content |= {"rope_theta": config.rope_theta, "rotary_dim": config.turned_dim}
        return content | dialect.fixed

    def caveat(config: DecoderConfig) -> str:
        if config.turned_dim == config.head_dim or not dialect.rotary_factor:
            return ""
        return (
            f"transformers turns all {config.head_dim} dimensions of a head by its position, not "
            f"{config.turned_dim}; it will compute other logits ('minimax_text_01' is read right)"
        )

    return Layout(
        name, architecture, read_config, write_config, Decoder, _sizes, _params, _copies,
        ignored=(r"\.rotary_emb\.inv_freq$", rf"\.self_attn\.({'|'.join(BUFFERS)})$"),
        derived=_buffers if dialect.block_size else lambda config: (),
        check=_check,
        caveat=caveat,
    )


# Tensors.


def _sizes(config: DecoderConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "L": config.num_layers,
        "S": config.layer_mixers.count("softmax"),
        "R": config.layer_mixers.count("lightning"),
        "H": config.num_heads,
        "N": config.num_kv_heads,
        "G": config.group_size,
        "K": config.head_dim,
        "Q": 3,  # q, k and v of a head of lightning attention
        "E": config.moe.num_experts,
        "F": config.mlp_size,
    }


def _params(config: DecoderConfig) -> tuple[Param, ...]:
    layer = "model.layers.{L}."
    moe, fused = layer + "block_sparse_moe.", layer + "mlp."
    softmax, decaying = "model.layers.{S}.self_attn.", "model.layers.{R}.self_attn."
    layers_of = lambda kind: [i for i, m in enumerate(config.layer_mixers) if m == kind]  # noqa: E731
    numbers = {"S": layers_of("softmax"), "R": layers_of("lightning")}
    expert = moe + "experts.{E}."
    table = [
        Param("embed/embedding", "VD", ("model.embed_tokens.weight", "V,D")),
        Param("layers/attn_norm/scale", "LD", (layer + "input_layernorm.weight", "D")),
        Param("layers/mlp_norm/scale", "LD", (layer + "post_attention_layernorm.weight", "D")),
        Param(
            "layers/moe/router/kernel", "LDE", (moe + "gate.weight", "E,D"),
            otherwise=[((fused + "gate.weight", "E,D"),)],
        ),
        Param(
            "layers/moe/gate/kernel", "LEDF", (expert + "w1.weight", "F,D"),
            otherwise=[((fused + "experts.gate_up_proj", "(E),(0/2)F,D"),)],
        ),
        Param(
            "layers/moe/up/kernel", "LEDF", (expert + "w3.weight", "F,D"),
            otherwise=[((fused + "experts.gate_up_proj", "(E),(1/2)F,D"),)],
        ),
        Param(
            "layers/moe/down/kernel", "LEFD", (expert + "w2.weight", "D,F"),
            otherwise=[((fused + "experts.down_proj", "(E),D,F"),)],
        ),
        Param("final_norm/scale", "D", ("model.norm.weight", "D")),
    ]
    if numbers["S"]:
        table += [
            Param(
                "layers/attn/qkv/kernel", "SDNJK",
                (softmax + "q_proj.weight", "NGK,D"),
                (softmax + "k_proj.weight", "NK,D"),
                (softmax + "v_proj.weight", "NK,D"),
                numbers=numbers,
            ),
            Param(
                "layers/attn/o/kernel", "SNGKD", (softmax + "o_proj.weight", "D,NGK"),
                numbers=numbers,
            ),
        ]
    if numbers["R"]:
        parts = {
            # by head: its q, its k, its v
            "qkv/kernel": ("RDHQK", (decaying + "qkv_proj.weight", "HQK,D")),
            "gate/kernel": ("RDHK", (decaying + "output_gate.weight", "HK,D")),
            "norm/scale": ("RHK", (decaying + "norm.weight", "HK")),
            "o/kernel": ("RHKD", (decaying + "out_proj.weight", "D,HK")),
        }
        table += [
            Param(f"layers/lightning/{path}", axes, part, numbers=numbers)
            for path, (axes, part) in parts.items()
        ]
    if not config.tie_embeddings:
        table.append(Param("head/kernel", "DV", ("lm_head.weight", "V,D")))
    return tuple(table)


def _copies(config: DecoderConfig) -> dict[str, str]:
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_embeddings else {}


def _buffers(config: DecoderConfig) -> Iterator[Derived]:
    """The decays and their powers within a block: transformers misses them if they are not stored."""
    H, B = config.num_heads, config.lightning.block or BLOCK
    tokens = np.arange(1, B + 1, dtype=np.float32)
    apart = tokens[:, None] - tokens
    decays = lightning.slopes(H, config.num_layers, config.lightning.slopes)
    formulas = {
        "slope_rate": ((H, 1, 1), lambda s: s),
        "query_decay": ((H, B, 1), lambda s: np.exp(-s * tokens[:, None])),
        "key_decay": ((H, B, 1), lambda s: np.exp(-s * (B - tokens[:, None]))),
        "diagonal_decay": (
            (1, H, B, B),
            lambda s: np.exp(np.where(apart >= 0, -s * apart, np.float32(-np.inf)))[None],
        ),
    }
    for i, mixer in enumerate(config.layer_mixers):
        if mixer == "lightning":
            slope_H11 = decays[i].astype(np.float32).reshape(H, 1, 1)
            for name, (shape, formula) in formulas.items():
                make = lambda formula=formula, slope_H11=slope_H11: formula(slope_H11)  # noqa: E731
                yield Derived(f"model.layers.{i}.self_attn.{name}", shape, make)


def _check(config: DecoderConfig, stored: Mapping[str, Any]) -> list[str]:
    """Layers of another kind, another number of experts, and other decays than config.json's."""
    problems = []
    marks = {"softmax": "q_proj", "lightning": "qkv_proj"}
    for i, mixer in enumerate(config.layer_mixers):
        for kind, mark in marks.items():
            if kind != mixer and f"model.layers.{i}.self_attn.{mark}.weight" in stored:
                problems.append(
                    f"config.json makes layer {i} {mixer} attention, its tensors are of {kind} attention"
                )
    experts, want = _num_experts(stored), config.moe.num_experts
    if experts not in (None, want):
        problems.append(f"config.json means {want} experts (num_local_experts), there are {experts}")
    decays = lightning.slopes(config.num_heads, config.num_layers, config.lightning.slopes)
    for i, mixer in enumerate(config.layer_mixers):
        slope = stored.get(f"model.layers.{i}.self_attn.slope_rate")
        if slope is None or mixer != "lightning":
            continue
        tolerance = 1e-4 if slope.dtype == "F32" else 2**-7  # of bfloat16: half of 2^-7
        values = slope.read().astype(np.float64).ravel()
        if values.shape != decays[i].shape or not np.allclose(values, decays[i], tolerance, 1e-7):
            problems.append(
                f"layer {i} stores decays (slope_rate) {_short(values)}, config.json's "
                f"{config.num_heads} heads and {config.num_layers} layers mean {_short(decays[i])}"
            )
    return problems


def _num_experts(stored: Mapping[str, Any]) -> int | None:
    for name, tensor in stored.items():
        if name.endswith(".mlp.experts.down_proj"):
            return tensor.shape[0]
    found = [re.search(r"\.experts\.(\d+)\.", name) for name in stored]
    return max((int(match[1]) + 1 for match in found if match), default=None)


def _short(values: np.ndarray) -> str:
    shown = ", ".join(f"{value:.4g}" for value in values[:3])
    return f"[{shown}{', ...' if len(values) > 3 else ''}]"


# Configs.


def _refuse(hf: Mapping[str, Any]) -> None:
    """Raises ValueError for settings that would change what the model computes."""
    refuse_settings(hf)
    if hf.get("shared_intermediate_size"):
        raise ValueError(
            f"shared_intermediate_size={hf['shared_intermediate_size']}: a shared expert is not supported"
        )
    if hf.get("sliding_window") is not None:
        raise ValueError(f"sliding_window={hf['sliding_window']}: only whole contexts are attended to")


def _read_mixers(hf: Mapping[str, Any], dialect: Dialect) -> tuple[str, ...]:
    """The smallest pattern that the layers repeat."""
    key, kinds = dialect.types
    types, layers = need(hf, key), need(hf, "num_hidden_layers")
    if len(types) != layers:
        raise ValueError(f"{key} has {len(types)} entries for num_hidden_layers={layers}")
    if unknown := [kind for kind in types if kind not in kinds]:
        raise ValueError(f"{key} has {unknown[0]!r}; the kinds are {', '.join(map(repr, kinds))}")
    for period in range(1, layers + 1):
        if layers % period == 0 and types == types[:period] * (layers // period):
            break
    return tuple(kinds[kind] for kind in types[:period])


def _read_rotary(hf: Mapping[str, Any], head_dim: int) -> tuple[float, int | None]:
    """theta, and how many dimensions of a head turn (None: all)."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"rope scaling {rope} is not supported for this architecture")
    theta = rope.get("rope_theta") or need(hf, "rope_theta")
    dims = {}
    if hf.get("rotary_dim") is not None:
        dims["rotary_dim"] = hf["rotary_dim"]
    for where in (rope, hf):
        if where.get("partial_rotary_factor") is not None:
            dims["partial_rotary_factor"] = round(head_dim * where["partial_rotary_factor"])
    if len(set(dims.values())) > 1:
        raise ValueError(f"{' and '.join(dims)} disagree: {dims} dimensions of {head_dim}")
    turned = next(iter(dims.values()), head_dim)
    return float(theta), None if turned == head_dim else turned


def _refuse_model(config: DecoderConfig, name: str, dialect: Dialect) -> None:
    """Raises ValueError for what the layout has no words for."""
    has = lambda what: ValueError(f"layout {name!r} cannot express {what}")  # noqa: E731
    if config.moe is None:
        raise has("a model without experts")
    for switch in ("qkv_bias", "qk_norm", "rope_scaling"):
        if getattr(config, switch):
            raise has(f"{switch}={getattr(config, switch)}")
    if dialect.always_post_norm and not config.residual.post_norm:
        raise has("residual.post_norm=False")
    decaying = np.array([mixer == "lightning" for mixer in config.layer_mixers])
    if not decaying.any():
        return
    if config.lightning.norm_eps != NORM_EPS:
        raise has(f"lightning.norm_eps={config.lightning.norm_eps}; it means {NORM_EPS}")
    ours, theirs = (
        lightning.slopes(config.num_heads, config.num_layers, rule)[decaying]
        for rule in (config.lightning.slopes, dialect.slopes)
    )
    if not np.allclose(ours, theirs, rtol=1e-4, atol=0):
        raise has(
            f"the decays lightning.slopes={config.lightning.slopes!r} for {config.num_heads} heads: "
            "only with a power of two, and softmax attention last, are they the same"
        )
