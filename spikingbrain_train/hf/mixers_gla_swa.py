"""What layers are made of: norms, the two ways of mixing a sequence with their projections, a SwiGLU.

Part of the modelling code of a checkpoint (see modeling_gla_swa.py).

A mixer is told what it is in `MixerSettings`. It reads [B, T, hidden_size], whose first
`layout.num_in_front` tokens may be sinks: learnable tokens in front of the text, which see each other and are
seen by all text (SpikingBrain, arXiv 2509.05276, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .layout_gla_swa import TokenLayout
from .ops_gla_swa import (
    attention_among_all,
    causal_attention,
    gated_linear_attention,
    lightning_log_decays,
)
from .quantization_w8aspike import int8_vectors, joint_outputs
from .rotary_gla_swa import apply_rotary
from .spikes_gla_swa import MakeEncoder, no_encoder


class GLAswaRMSNorm(nn.Module):
    """Root-mean-square norm over the last dim, computed in at least float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)


class GLAswaMLP(nn.Module):
    """Gate, up and down projection: a SwiGLU where the activation is silu.

    With `sub_norm_eps` an RMSNorm stands in front of the down projection.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        activation: str | nn.Module,
        encoder: MakeEncoder = no_encoder,
        bias: bool = False,
        sub_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.mlp_fc1_spikes = encoder("mlp_fc1", 0)
        self.gate_proj = nn.Linear(hidden_size, width, bias=bias)
        self.up_proj = nn.Linear(hidden_size, width, bias=bias)
        self.ffn_sub_norm = nn.Identity() if sub_norm_eps is None else GLAswaRMSNorm(width, sub_norm_eps)
        self.mlp_fc2_spikes = encoder("mlp_fc2", 0)
        self.down_proj = nn.Linear(width, hidden_size, bias=bias)
        self.act_fn = ACT2FN[activation] if isinstance(activation, str) else activation

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """[..., hidden_size] to the same; `weight` [..., 1] is what the output counts, None is 1."""
        x = self.mlp_fc1_spikes(x)
        gate, up = joint_outputs((self.gate_proj, self.up_proj), x)
        inside = self.ffn_sub_norm(self.act_fn(gate) * up)
        if weight is not None:
            inside = (inside * weight).to(x.dtype)
        return self.down_proj(self.mlp_fc2_spikes(inside))


class GLAswaUnbiasedLinear(nn.Linear):
    """A linear layer without a trained bias.

    Zeros are stored instead, for the published class, which always has one and would draw what it does not
    find.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        del self.bias
        self.register_buffer("bias", torch.zeros(out_features))

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, *others
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *others)
        if prefix + "bias" in missing_keys:
            missing_keys.remove(prefix + "bias")


@dataclass(frozen=True)
class MixerSettings:
    """What one mixer is."""

    hidden_size: int
    num_heads: int
    num_groups: int
    """Groups of heads that share a key, a value and a gate."""
    head_dim: int
    norm_eps: float
    cache_idx: int
    """Its place among the layers of the cache."""
    bias: str = "trained"
    """Of q, k and v projections: "trained", "zeros" (stored, but not trained) or "none"."""
    output_bias: bool = False
    """Of the output projection."""
    output_norm: bool = False
    """RMSNorm over all heads in front of the output projection."""
    qk_norm: bool = False
    """RMSNorm over head_dim on queries and keys, before rotary positions and features."""
    encoder: MakeEncoder = no_encoder
    """What stands in front of projections."""


class GLAswaAttention(nn.Module):
    """The projections that both mixers share: q, k, v and output, and norms on q and k if there are any."""

    def __init__(self, settings: MixerSettings) -> None:
        super().__init__()
        self.cache_idx = settings.cache_idx
        self.head_dim = settings.head_dim
        self.num_heads = settings.num_heads
        self.num_groups = settings.num_groups
        hidden, eps = settings.hidden_size, settings.norm_eps
        q_size, kv_size = self.num_heads * self.head_dim, self.num_groups * self.head_dim
        self.qkv_spikes = settings.encoder("qkv", 0)
        self.q_proj = _input_projection(settings.bias, hidden, q_size)
        self.k_proj = _input_projection(settings.bias, hidden, kv_size)
        self.v_proj = _input_projection(settings.bias, hidden, kv_size)
        self.attn_sub_norm = GLAswaRMSNorm(q_size, eps) if settings.output_norm else nn.Identity()
        self.attention_output_spikes = settings.encoder("attention_output", 0)
        self.o_proj = nn.Linear(q_size, hidden, bias=settings.output_bias)
        self.q_norm = GLAswaRMSNorm(self.head_dim, eps) if settings.qk_norm else nn.Identity()
        self.k_norm = GLAswaRMSNorm(self.head_dim, eps) if settings.qk_norm else nn.Identity()

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, head_dim], keys and values [B, T, G, head_dim]."""
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        x_BTD = self.qkv_spikes(x_BTD)
        q, k, v = (y.view(heads) for y in joint_outputs((self.q_proj, self.k_proj, self.v_proj), x_BTD))
        return self.q_norm(q), self.k_norm(k), v

    def output(self, o_BTD: Tensor) -> Tensor:
        """What the layer adds to its input, [B, T, hidden_size]."""
        return self.o_proj(self.attention_output_spikes(self.attn_sub_norm(o_BTD)))


def _input_projection(bias: str, in_features: int, out_features: int) -> nn.Linear:
    if bias == "zeros":
        return GLAswaUnbiasedLinear(in_features, out_features)
    return nn.Linear(in_features, out_features, bias=bias == "trained")


class GLAswaLinearAttention(GLAswaAttention):
    """Gated linear attention (eq. 10-11), its state [B, G, head_dim, head_dim] in float32.

    Args:
        settings: as of every mixer.
        gate: "low_rank": `logsigmoid(W2 W1 x + b2) / gate_logit_normalizer`; "full_rank": the same with one
            matrix; "tied": 1 - k, of sigmoid features; or "fixed": one decay a group that is stored and not
            trained.
        feature_map: what makes q and k non-negative, "relu" or "sigmoid".
        rotary: whether the features are turned by rotary positions, behind the feature map.
        output_gate: whether the normed heads are multiplied by swish(g_proj(x)).
        gate_low_rank_dim: width of W1.
        gate_logit_normalizer: a divisor of the logarithm of a low-rank gate.
        layer: 0-based number of the layer, and how many there are; fixed decays begin by it.
    """

    def __init__(
        self,
        settings: MixerSettings,
        *,
        gate: str = "low_rank",
        feature_map: str = "relu",
        rotary: bool = False,
        output_gate: bool = False,
        gate_low_rank_dim: int = 16,
        gate_logit_normalizer: float = 16.0,
        layer: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__(settings)
        self.gate = gate
        self.gate_logit_normalizer = gate_logit_normalizer
        self.feature_map = torch.sigmoid if feature_map == "sigmoid" else F.relu
        self.reads_rotary = rotary
        self.gate_spikes = settings.encoder("gate", 0)
        if gate == "fixed":
            self.log_decay: Tensor
            self.register_buffer("log_decay", lightning_log_decays(self.num_groups, *layer))
        elif gate == "low_rank":
            self.gk_proj: nn.Module = nn.Sequential(
                nn.Linear(settings.hidden_size, gate_low_rank_dim, bias=False),
                nn.Linear(gate_low_rank_dim, self.num_groups * self.head_dim, bias=True),
            )
            self.gate_up_spikes = settings.encoder("gate", 1)
        elif gate == "full_rank":
            self.gk_proj = nn.Linear(settings.hidden_size, self.num_groups * self.head_dim, bias=True)
        self.g_norm = GLAswaRMSNorm(self.head_dim, settings.norm_eps)
        self.g_proj = None
        if output_gate:
            self.g_proj = nn.Linear(settings.hidden_size, self.num_heads * self.head_dim, bias=True)

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], layout: TokenLayout, cache: Any
    ) -> Tensor:
        """Mix along the sequence.

        Args:
            x_BTD: normed input.
            rotary: cos and sin of every token, [B or 1, T, head_dim].
            layout: what the tokens are.
            cache: a `RecurrentCache`, or None.
        """
        q, k, v = self.project(x_BTD)
        log_gate = self.log_gate(x_BTD, k)
        q, k = self.feature_map(q), self.feature_map(k)
        if self.reads_rotary:
            q, k = (apply_rotary(x.transpose(1, 2), *rotary).transpose(1, 2) for x in (q, k))
        valid_BT = layout.valid_new(x_BTD.shape[1])
        if valid_BT is not None:
            # Padding leaves the state as it is: it adds nothing (v = 0) and does not decay it (log gate = 0).
            padding = ~valid_BT[:, :, None, None]
            v, log_gate = v.masked_fill(padding, 0.0), log_gate.masked_fill(padding, 0.0)
        layer = None if cache is None else cache.recurrent_state_layer(self.cache_idx)
        state = None if layer is None else layer.state_BGKV
        o_BTHV, state = self._mix(q, k, v, log_gate, state, layout)
        if layer is not None:
            layer.state_BGKV = state
        o_BTD = self.g_norm(o_BTHV).flatten(-2)
        if self.g_proj is not None:
            o_BTD = o_BTD * F.silu(self.g_proj(self.gate_spikes(x_BTD)))
        return self.output(o_BTD)

    @staticmethod
    def _mix(
        q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: Tensor | None, layout: TokenLayout
    ) -> tuple[Tensor, Tensor]:
        """Sinks are the beginning of a text; each of several documents starts from the state behind them."""
        front = layout.num_in_front
        if front == 0 or layout.starts_BT is None:
            return gated_linear_attention(q, k, v, log_gate, state, layout.starts_BT)
        q_front, k_front, v_front, log_gate_front = (x[:, :front] for x in (q, k, v, log_gate))
        o_front, state = gated_linear_attention(q_front, k_front, v_front, log_gate_front, state)
        q, k, v, log_gate = (x[:, front:] for x in (q, k, v, log_gate))
        o_text, state = gated_linear_attention(q, k, v, log_gate, state, layout.starts_BT)
        return torch.cat([o_front, o_text], dim=1), state

    def log_gate(self, x_BTD: Tensor, k_BTGK: Tensor) -> Tensor:
        """Logarithm of the decay of every channel, [B, T, G, head_dim], in at least float32.

        Args:
            x_BTD: normed input.
            k_BTGK: keys before their feature map.
        """
        if self.gate == "tied":
            # log(1 - sigmoid(x)) = logsigmoid(-x), which keeps its digits where k rounds to 1.
            return F.logsigmoid(-_at_least_float32(k_BTGK))
        if self.gate == "fixed":
            return _at_least_float32(self.log_decay)[:, None].expand(k_BTGK.shape)
        logit = self.gate_spikes(x_BTD)
        if isinstance(self.gk_proj, nn.Sequential):
            down, up = self.gk_proj
            logit = up(self.gate_up_spikes(down(logit)))
        else:
            logit = self.gk_proj(logit)
        return (F.logsigmoid(_at_least_float32(logit)) / self.gate_logit_normalizer).view_as(k_BTGK)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class GLAswaSoftmaxAttention(GLAswaAttention):
    """Causal softmax attention with rotary positions: over all tokens (eq. 1) or a sliding window (eq. 2).

    Args:
        settings: as of every mixer.
        window: tokens of text that a query sees, its own included; None means all.
        score_factor: of scores, besides the root of head_dim; some kinds of rotary scaling have one.
        dropout: on attention weights while training.
    """

    def __init__(
        self,
        settings: MixerSettings,
        window: int | None,
        score_factor: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(settings)
        self.window = window
        self.score_factor = score_factor
        self.attention_dropout = dropout
        self.int8_keys_and_values = False
        self.query_spikes = settings.encoder("queries", 0)
        self.reads_rotary = True

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], layout: TokenLayout, cache: Any
    ) -> Tensor:
        """Arguments as of `GLAswaLinearAttention.forward`."""
        q, k, v = (x.transpose(1, 2) for x in self.project(x_BTD))
        q, k = self.query_spikes(apply_rotary(q, *rotary)), apply_rotary(k, *rotary)
        if self.score_factor != 1.0:
            q = q * self.score_factor
        if self.int8_keys_and_values:
            k, v = int8_vectors(k), int8_vectors(v)
        layer = None if cache is None else cache.key_value_layer(self.cache_idx)
        sinks, outputs, front = None, [], layout.num_in_front
        if front:
            sinks, q_sinks = (k[:, :, :front], v[:, :, :front]), q[:, :, :front]
            outputs.append(attention_among_all(q_sinks, *sinks))
            q, k, v = (x[:, :, front:] for x in (q, k, v))
        if layer is not None:
            k, v = layer.update(k, v, layout.num_cached)
            sinks = layer.keep_sinks(sinks)
        valid_BS, text_index_BS = (
            None if x is None else x[:, -k.shape[2] :] for x in (layout.valid_BS, layout.text_index_BS)
        )
        dropout = self.attention_dropout if self.training else 0.0
        outputs.append(
            causal_attention(
                q, k, v, self.window, valid_BS, dropout, text_index_BS, layout.document_BT(), sinks
            )
        )
        o_BHTV = torch.cat(outputs, dim=2) if front else outputs[0]
        return self.output(o_BHTV.transpose(1, 2).flatten(-2))
