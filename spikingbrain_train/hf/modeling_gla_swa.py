"""SpikingBrain-7B in Hugging Face transformers: gated linear attention (GLA) and sliding-window attention.

SpikingBrain, arXiv 2509.05276. The modelling code of a checkpoint: configuration_gla_swa.py; this file, which
says what layers are made of; mixers_gla_swa.py (their parts), ops_gla_swa.py (the two ways of mixing a
sequence), rotary_gla_swa.py (positions), spikes_gla_swa.py (activations as spikes), decoder_gla_swa.py (the
model around the layers), cache_gla_swa.py (what is remembered while generating), layout_gla_swa.py (padding
and documents) and quantization_w8aspike.py (INT8 weights, where config.json asks for them). They need torch
and transformers >= 4.51 only; flash-linear-attention is used on CUDA where it is installed.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The model trains like any other (labels, gradient checkpointing, Trainer) and generates with a recurrent
state, so that the memory per token does not grow with the text. Padding may be on either side, or inside a
text: it writes nothing into the state, does not decay it, and windows do not count it. Packed documents
(position_ids that start again, cu_seqlens, seq_idx) do not see each other.

Tensors: model.embeddings.weight; model.layers.{i}.attn_norm.weight; .attn.{q,k,v}_proj.{weight, bias};
.attn.o_proj.weight; .mlp_norm.weight; .mlp.{gate,up,down}_proj.weight; in GLA layers .attn.gk_proj.0.weight,
.attn.gk_proj.1.{weight, bias}, .attn.g_norm.weight; model.norm.weight; lm_head.weight. With attention_bias
false the biases are zeros that are not trained; with qk_norm .attn.{q,k}_norm.weight are added, with
linear_qk_norm in GLA layers only; with linear_output_gate .attn.g_proj.{weight, bias} in GLA layers; with
linear_gate "fixed" these have .attn.log_decay, which is not trained, in the place of gk_proj; with
tie_word_embeddings save_pretrained leaves lm_head.weight out. Spikes (`spiking`) add no tensors.
"""

from __future__ import annotations

from torch import Tensor, nn

from .cache_gla_swa import GLAswaCache
from .configuration_gla_swa import GLAswaConfig
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

# transformers 4.5x copies no files but those that this one itself imports.
from .ops_gla_swa import gated_linear_attention  # noqa: F401
from .products_w8aspike import PackedWeight  # noqa: F401
from .quantization_w8aspike import quantize_modules  # noqa: F401
from .rotary_gla_swa import RotaryPositions  # noqa: F401
from .spikes_gla_swa import encoders_of
from .stored_scales_w8aspike import add_stored_scales  # noqa: F401


def _mixer(config: GLAswaConfig, layer_idx: int) -> GLAswaAttention:
    """The mixer of a layer: GLA with ReLU features, or softmax attention."""
    mixer = config.mixer_type(layer_idx)
    is_linear = mixer == "gla"
    settings = MixerSettings(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_groups=config.linear_num_key_value_heads if is_linear else config.num_key_value_heads,
        head_dim=config.head_dim,
        norm_eps=config.norm_eps,
        cache_idx=layer_idx,
        bias="trained" if config.attention_bias else "zeros",
        qk_norm=config.qk_norm or (is_linear and config.linear_qk_norm),
        encoder=encoders_of(config.spiking),
    )
    if not is_linear:
        window = config.attention_window if mixer == "swa" else None
        factor = config.rotary_positions().attention_factor ** 2
        return GLAswaSoftmaxAttention(settings, window, factor, config.attention_dropout)
    return GLAswaLinearAttention(
        settings,
        gate=config.linear_gate,
        rotary=config.linear_rotary,
        output_gate=config.linear_output_gate,
        gate_low_rank_dim=config.gate_low_rank_dim,
        gate_logit_normalizer=config.gate_logit_normalizer,
        layer=(layer_idx, config.num_hidden_layers),
    )


class GLAswaBlock(nn.Module):
    """Norm, mixer, residual, norm, feed-forward, residual."""

    def __init__(self, config: GLAswaConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn_norm = GLAswaRMSNorm(config.hidden_size, config.norm_eps)
        self.attn = _mixer(config, layer_idx)
        self.mlp_norm = GLAswaRMSNorm(config.hidden_size, config.norm_eps)
        encoder = encoders_of(config.spiking)
        self.mlp = GLAswaMLP(config.hidden_size, config.intermediate_size, config.hidden_act, encoder)

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], layout: TokenLayout, cache: GLAswaCache | None
    ) -> Tensor:
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), rotary, layout, cache)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class GLAswaPreTrainedModel(RecurrentPreTrainedModel):
    """What transformers needs to know of this family."""

    config_class = GLAswaConfig
    cache_class = GLAswaCache
    _no_split_modules = ["GLAswaBlock"]

    def __init__(self, config: GLAswaConfig) -> None:
        super().__init__(config)
        if not config.attention_bias:
            self._keys_to_ignore_on_load_missing = [r"\.attn\.[qkv]_proj\.bias$"]


class GLAswaModel(GLAswaPreTrainedModel, RecurrentModel):
    """The decoder without its output projection."""

    embedding_name = "embeddings"

    def __init__(self, config: GLAswaConfig) -> None:
        super().__init__(config)
        config.check_windows()
        self.window = config.attention_window
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GLAswaBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = GLAswaRMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()


class GLAswaForCausalLM(GLAswaPreTrainedModel, RecurrentForCausalLM):
    """The decoder with its output projection and the next-token loss."""

    model_class = GLAswaModel


# save_pretrained then copies the modelling files and names them in config.json.
GLAswaForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["GLAswaCache", "GLAswaForCausalLM", "GLAswaModel", "GLAswaPreTrainedModel"]
