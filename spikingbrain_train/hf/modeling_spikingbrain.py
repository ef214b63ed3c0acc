"""Every form of SpikingBrain models in Hugging Face transformers (arXiv 2509.05276, section 2).

A layer has one mixer or several side by side, each gated linear attention, sliding-window or full softmax
attention, and a SwiGLU or a mixture of experts; learnable sinks may stand in front of the text, and
projections may read spikes. configuration_spikingbrain.py says which. The parts are those of
SpikingBrain-7B's modelling code, whose files lie beside this one: mixers_gla_swa.py (norms, mixers, SwiGLU),
ops_gla_swa.py (the two ways of mixing a sequence), rotary_gla_swa.py (positions), spikes_gla_swa.py,
decoder_gla_swa.py (the model around the layers), cache_gla_swa.py (what is remembered while generating) and
layout_gla_swa.py (padding, documents). They need torch and transformers >= 4.51 only.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The model trains like any other (labels, gradient checkpointing, Trainer, PEFT on q_proj, gate_proj and so on)
and generates with a recurrent state. Padding may stand anywhere, and packed documents do not see each other.
There is no loss that balances experts.

Tensors of layer i, below model.layers.{i}: input_layernorm, post_attention_layernorm; below self_attn
{q,k,v,o}_proj, {q,k}_norm, and of linear attention gk_proj.0 and gk_proj.1 or log_decay, g_norm, g_proj; with
several mixers each below self_attn.<mixer>, with <mixer>_norm and branch_weights; mlp.{gate,up,down}_proj, or
mlp.router, mlp.experts.{e} and mlp.shared_experts. Around the layers: model.embed_tokens, model.sink_tokens,
model.norm, lm_head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache_gla_swa import KeyValueLayer, RecurrentCache, RecurrentStateLayer

# transformers 4.5x copies no files but those that this one itself imports.
from .configuration_gla_swa import GLAswaConfig  # noqa: F401
from .configuration_spikingbrain import SpikingBrainConfig
from .counts_w8aspike import encoded_input  # noqa: F401
from .decoder_gla_swa import RecurrentForCausalLM, RecurrentModel, RecurrentPreTrainedModel
from .kernels_w8aspike import kernels  # noqa: F401
from .layout_gla_swa import TokenLayout
from .mixers_gla_swa import (
    GLAswaAttention,
    GLAswaLinearAttention,
    GLAswaMLP,
    GLAswaRMSNorm,
    GLAswaSoftmaxAttention,
    MixerSettings,
)
from .ops_gla_swa import gated_linear_attention  # noqa: F401
from .products_w8aspike import PackedWeight  # noqa: F401
from .quantization_w8aspike import quantize_modules  # noqa: F401
from .rotary_gla_swa import RotaryPositions  # noqa: F401
from .spikes_gla_swa import encoders_of
from .stored_scales_w8aspike import add_stored_scales  # noqa: F401


def _mixer(config: SpikingBrainConfig, mixer: str, layer_idx: int, cache_idx: int) -> GLAswaAttention:
    """One mixer of a layer."""
    linear, is_linear = config.linear_attention, mixer == "linear_attention"
    settings = MixerSettings(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_groups=config.linear_num_key_value_heads if is_linear else config.num_key_value_heads,
        head_dim=config.head_dim,
        norm_eps=config.rms_norm_eps,
        cache_idx=cache_idx,
        bias="trained" if config.attention_bias else "none",
        output_bias=config.output_bias,
        qk_norm=config.qk_norm or (is_linear and linear["qk_norm"]),
        encoder=encoders_of(config.spiking),
    )
    if not is_linear:
        factor = config.rotary_positions().attention_factor ** 2
        return GLAswaSoftmaxAttention(settings, config.window_of(mixer), factor, config.attention_dropout)
    return GLAswaLinearAttention(
        settings,
        gate=linear["gate"],
        feature_map=linear["feature_map"],
        rotary=linear["rotary"],
        output_gate=linear["output_gate"],
        gate_low_rank_dim=linear["gate_low_rank_dim"],
        gate_logit_normalizer=linear["gate_logit_normalizer"],
        layer=(layer_idx, config.num_hidden_layers),
    )


class SpikingBrainParallelMixers(nn.Module):
    """Several mixers over the same input: the sum of `branch_weights[i]` RMSNorm(mixer i) (eq. 6)."""

    def __init__(self, config: SpikingBrainConfig, layer_idx: int, first_cache_idx: int) -> None:
        super().__init__()
        self.names = config.mixers[layer_idx]
        for number, name in enumerate(self.names):
            self.add_module(name, _mixer(config, name, layer_idx, first_cache_idx + number))
            self.add_module(f"{name}_norm", GLAswaRMSNorm(config.hidden_size, config.rms_norm_eps))
        self.branch_weights = nn.Parameter(torch.ones(len(self.names)))

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        layout: TokenLayout,
        cache: RecurrentCache | None,
    ) -> Tensor:
        output = torch.zeros_like(x_BTD)
        for weight, name in zip(self.branch_weights.unbind(), self.names, strict=True):
            mixed = getattr(self, name)(x_BTD, rotary, layout, cache)
            output = output + weight * getattr(self, f"{name}_norm")(mixed)
        return output


class SpikingBrainRouter(nn.Module):
    """Chooses the experts of every token, in float32."""

    def __init__(self, hidden_size: int, num_experts: int, num_chosen: int, norm: bool) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.num_chosen = num_chosen

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [N, k] of the k likeliest experts, and their indices."""
        scores_NE = F.linear(x_ND.float(), self.weight.float()).softmax(-1)
        probs_NK, experts_NK = scores_NE.topk(self.num_chosen, dim=-1)
        return probs_NK / probs_NK.sum(-1, keepdim=True) if self.norm else probs_NK, experts_NK


class SpikingBrainMoE(nn.Module):
    """Experts for some tokens each, and shared ones for all."""

    def __init__(self, config: SpikingBrainConfig) -> None:
        super().__init__()
        moe, width = config.moe, config.moe_intermediate_size
        encoder = encoders_of(config.spiking)

        def swiglu(width: int) -> GLAswaMLP:
            return GLAswaMLP(config.hidden_size, width, config.hidden_act, encoder)

        self.router = SpikingBrainRouter(
            config.hidden_size, moe["num_experts"], moe["num_experts_per_tok"], moe["norm_topk_prob"]
        )
        self.experts = nn.ModuleList(swiglu(width) for _ in range(moe["num_experts"]))
        shared = moe["num_shared_experts"]
        self.shared_experts = swiglu(shared * width) if shared else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, -2)
        probs_NK, experts_NK = self.router(x_ND)
        output = torch.zeros_like(x_ND) if self.shared_experts is None else self.shared_experts(x_ND)
        for expert in experts_NK.unique().tolist():
            token, choice = (experts_NK == expert).nonzero(as_tuple=True)
            part = self.experts[expert](x_ND[token], probs_NK[token, choice].unsqueeze(-1))
            output = output.index_add(0, token, part)
        return output.view_as(x_BTD)


class SpikingBrainBlock(nn.Module):
    """Norm, mixer or mixers, residual, norm, feed-forward, residual."""

    def __init__(self, config: SpikingBrainConfig, layer_idx: int, first_cache_idx: int) -> None:
        super().__init__()
        mixers = config.mixers[layer_idx]
        self.input_layernorm = GLAswaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = (
            _mixer(config, mixers[0], layer_idx, first_cache_idx)
            if len(mixers) == 1
            else SpikingBrainParallelMixers(config, layer_idx, first_cache_idx)
        )
        self.post_attention_layernorm = GLAswaRMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.feed_forwards[layer_idx] == "moe":
            self.mlp: nn.Module = SpikingBrainMoE(config)
        else:
            encoder = encoders_of(config.spiking)
            self.mlp = GLAswaMLP(
                *(config.hidden_size, config.intermediate_size, config.hidden_act), encoder, config.mlp_bias
            )

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        layout: TokenLayout,
        cache: RecurrentCache | None,
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotary, layout, cache)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class SpikingBrainCache(RecurrentCache):
    """What all mixers of a model remember, those of one layer after those of the layer before."""

    def __init__(self, config: SpikingBrainConfig) -> None:
        mixers = [mixer for branches in config.mixers for mixer in branches]
        super().__init__(
            [
                RecurrentStateLayer()
                if mixer == "linear_attention"
                else KeyValueLayer(config.window_of(mixer))
                for mixer in mixers
            ]
        )


class SpikingBrainPreTrainedModel(RecurrentPreTrainedModel):
    """What transformers needs to know of this family."""

    config_class = SpikingBrainConfig
    cache_class = SpikingBrainCache
    _no_split_modules = ["SpikingBrainBlock"]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SpikingBrainRouter):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, SpikingBrainParallelMixers):
            nn.init.ones_(module.branch_weights)
        elif isinstance(module, SpikingBrainModel) and module.sink_tokens is not None:
            nn.init.normal_(module.sink_tokens, mean=0.0, std=self.config.initializer_range)


class SpikingBrainModel(SpikingBrainPreTrainedModel, RecurrentModel):
    """The decoder without its output projection."""

    embedding_name = "embed_tokens"

    def __init__(self, config: SpikingBrainConfig) -> None:
        super().__init__(config)
        mixers = [mixer for branches in config.mixers for mixer in branches]
        self.window = config.sliding_window if "sliding_attention" in mixers else None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.sink_tokens = None
        if config.num_sink_tokens:
            self.sink_tokens = nn.Parameter(torch.zeros(config.num_sink_tokens, config.hidden_size))
        self.layers = nn.ModuleList()
        first_cache_idx = 0
        for layer_idx, branches in enumerate(config.mixers):
            self.layers.append(SpikingBrainBlock(config, layer_idx, first_cache_idx))
            first_cache_idx += len(branches)
        self.norm = GLAswaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def tokens_in_front(self) -> Tensor | None:
        return self.sink_tokens


class SpikingBrainForCausalLM(SpikingBrainPreTrainedModel, RecurrentForCausalLM):
    """The decoder with its output projection and the next-token loss."""

    model_class = SpikingBrainModel


# save_pretrained then copies the modelling files and names them in config.json.
SpikingBrainForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "SpikingBrainCache",
    "SpikingBrainForCausalLM",
    "SpikingBrainModel",
    "SpikingBrainPreTrainedModel",
]
