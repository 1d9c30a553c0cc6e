"""Lightning attention as a token mixer: linear attention with decay, gated (MiniMax-01, section 2.2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import lightning_attention as op
from research.lm.config import DecoderConfig
from research.lm.layers import Kernel, deepnorm_gain, dense, xavier


def slopes(num_heads: int, num_layers: int, rule: str) -> np.ndarray:
    """Decay of each layer's heads in nats per token, float64 `[L, H]`; the memory is 1/slope tokens long.

    2^(-8(h+1)/H) f_l: the slopes of ALiBi (Press et al. 2022), falling with depth.

    rule 'remote' (the code published with the weights): f_l = 1 - l/(L-1) + 1e-5, and for H that is no power of two the
      slopes of the power below, then every second one of twice that power.
    rule 'native' (transformers): f_l = 1 - l/(L-1+1e-5) + 1e-5, and the closed form for every H.

    They differ by 1e-5 relative, but in the last layer, and for H that is no power of two. One layer has f_0 = 1.
    """
    if rule == "native":
        heads = 2.0 ** (-8.0 * np.arange(1, num_heads + 1) / num_heads)
        layers = 1 - np.arange(num_layers) / (num_layers - 1 + 1e-5) + 1e-5
    else:
        power = 1 << (num_heads.bit_length() - 1)
        first = 2.0 ** (-8.0 * np.arange(1, power + 1) / power)
        second = 2.0 ** (-8.0 * np.arange(1, 2 * power + 1, 2) / (2 * power))
        heads = np.concatenate([first, second])[:num_heads]
        layers = 1 - np.arange(num_layers) / max(num_layers - 1, 1) + 1e-5
    if num_layers == 1:
        layers = np.ones(1)
    return layers[:, None] * heads


class Lightning(nn.Module):
    """o(sigmoid(gate(x)) * norm(lightning_attention(silu(q), silu(k), silu(v)))), one norm over all heads."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x_BTD, slopes_H, segment_ids=None, valid_BT=None, state=None):
        """`state` float32 [B H, K, K] is what a cache holds; returns (y_BTD, the state after these tokens).

        With a state, tokens where `valid_BT` is false leave no trace in it; they must stand before the others of their
        row, because they do make the state fade.
        """
        c = self.config
        B, T, D = x_BTD.shape
        H, K = c.num_heads, c.head_dim
        gain = deepnorm_gain(c)
        qk, v = xavier(D, H * K), xavier(D, H * K, gain)
        qkv_DH3K, _ = Kernel(c, (D, H, 3, K), stds=(qk, qk, v), name="qkv")()
        gate_DHK, _ = Kernel(c, (D, H, K), stds=(qk,), name="gate")()
        scale_HK = _Scale(c, name="norm")()
        out_HKD, _ = Kernel(c, (H, K, D), stds=(xavier(H * K, D, gain),), name="o")()

        qkv_BTH3K = jax.nn.silu(dense(x_BTD, qkv_DH3K.reshape(D, -1))).reshape(B, T, H, 3, K)
        q, k, v = (x[:, :, :, 0] for x in jnp.split(qkv_BTH3K, 3, axis=3))
        how = {"block": c.lightning.block, "implementation": c.implementation}
        if state is None:
            y_BTHK, _ = op.lightning_attention(
                q, k, v, slopes_H, segment_ids=segment_ids, **how
            )
        else:
            v = jnp.where(valid_BT[:, :, None, None], v, 0)
            state_BHKK = state.reshape(B, H, K, K)
            if T == 1:
                y_BHK, state_BHKK = op.step(q[:, 0], k[:, 0], v[:, 0], slopes_H, state_BHKK)
                y_BTHK = y_BHK[:, None]
            else:
                y_BTHK, state_BHKK = op.lightning_attention(
                    q, k, v, slopes_H, initial_state=state_BHKK, **how
                )
            state = state_BHKK.reshape(B * H, K, K)
        y = y_BTHK.astype(jnp.float32).reshape(B, T, -1)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + c.lightning.norm_eps)
        y = (y * scale_HK.reshape(-1)).astype(c.dtype)
        y = jax.nn.sigmoid(dense(x_BTD, gate_DHK.reshape(D, -1))) * y
        return dense(y, out_HKD.reshape(-1, D)), state


class _Scale(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self):
        c = self.config
        return self.param("scale", nn.initializers.ones, (c.num_heads, c.head_dim), c.param_dtype)
