"""Every form of SpikingBrain models in Hugging Face transformers (arXiv 2509.05276, section 2).

A layer has one mixer or several side by side and a feed-forward; learnable sinks may stand in front of the
text, and projections may read spikes. configuration_spikingbrain.py says which. Each kind of mixer,
feed-forward and linear transform is a file of its own, found by its name in config.json
(kinds_spikingbrain.py): linear_attention_spikingbrain.py, gdn_spikingbrain.py, mamba_spikingbrain.py,
softmax_attention_spikingbrain.py, mlp_spikingbrain.py, moe_spikingbrain.py, no_mlp_spikingbrain.py, and those
that a model's own kinds bring; a folder has those of its model. What they are made of are the parts of
SpikingBrain-7B's modelling code: mixers_gla_swa.py (norms, mixers, SwiGLU), ops_gla_swa.py (the two ways of
mixing a sequence), rotary_gla_swa.py (positions), spikes_gla_swa.py, decoder_gla_swa.py (the model around the
layers), cache_gla_swa.py (what is remembered while generating) and layout_gla_swa.py (padding, documents).
They need torch and transformers >= 4.51 only.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The model trains like any other (labels, gradient checkpointing, Trainer, PEFT on q_proj, gate_proj and so on)
and generates with a recurrent state. Padding may stand anywhere, and packed documents do not see each other.

Tensors of layer i, below model.layers.{i}: input_layernorm, post_attention_layernorm; below self_attn
{q,k,v,o}_proj, {q,k}_norm, and of linear attention gk_proj.0 and gk_proj.1 or log_decay, g_norm, g_proj; of
the gated delta rule a_proj, b_proj, A_log, dt_bias, {q,k,v}_conv1d, g_norm, g_proj; with several mixers each
below self_attn.<mixer>, with <mixer>_norm and branch_weights; mlp.{gate,up,down}_proj, or mlp.router,
mlp.experts.{e} and mlp.shared_experts; of other kinds what their files name. Around the layers:
model.embed_tokens, model.sink_tokens, model.norm, lm_head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .activation_spikingbrain import activation_of  # noqa: F401
from .cache_gla_swa import RecurrentCache

# transformers 4.5x copies no files but those that this one itself imports: in an export these are the kinds
# that its model is made of, and all others.
from .configuration_gla_swa import GLAswaConfig  # noqa: F401
from .configuration_spikingbrain import SpikingBrainConfig
from .counts_w8aspike import encoded_input  # noqa: F401
from .decoder_gla_swa import RecurrentForCausalLM, RecurrentModel, RecurrentPreTrainedModel
from .gated_mlp_spikingbrain import SpikingBrainMLP as GatedMLP  # noqa: F401
from .gdn_spikingbrain import GatedDeltaRule  # noqa: F401
from .int8_inputs_spikingbrain import Int8Inputs  # noqa: F401
from .kernels_w8aspike import kernels  # noqa: F401
from .kinds_spikingbrain import FEED_FORWARDS, LINEAR_TRANSFORMS, MIXERS, Mixer, Place, StateLayer
from .layout_gla_swa import TokenLayout
from .linear_attention_spikingbrain import GLAswaLinearAttention  # noqa: F401
from .linears_spikingbrain import transform_linears
from .mamba_spikingbrain import SpikingBrainMamba  # noqa: F401
from .mixer_settings_spikingbrain import mixer_settings  # noqa: F401
from .mixers_gla_swa import GLAswaRMSNorm
from .mlp_spikingbrain import SpikingBrainMLP  # noqa: F401
from .moe_spikingbrain import SpikingBrainMoE  # noqa: F401
from .no_mlp_spikingbrain import nothing  # noqa: F401
from .ops_gla_swa import gated_linear_attention  # noqa: F401
from .products_w8aspike import PackedWeight  # noqa: F401
from .q8_inputs_spikingbrain import Q8Inputs  # noqa: F401
from .quantization_w8aspike import quantize_modules  # noqa: F401
from .rotary_gla_swa import RotaryPositions  # noqa: F401
from .softmax_attention_spikingbrain import GLAswaSoftmaxAttention  # noqa: F401
from .spikes_gla_swa import encoders_of  # noqa: F401
from .stored_scales_w8aspike import add_stored_scales  # noqa: F401
from .ternary_spikingbrain import TernaryWeights  # noqa: F401
from .zeros_sparsellama import FATReLU  # noqa: F401


def _mixers(config: SpikingBrainConfig) -> list[Mixer]:
    """The kinds of all mixers, those of one layer after those of the layer before."""
    return [MIXERS[name] for branches in config.mixers for name in branches]


def _check(config: SpikingBrainConfig) -> None:
    """Raises ValueError where a configuration asks for what no file here computes."""
    feed_forwards = [FEED_FORWARDS[name] for name in config.feed_forwards]
    transforms = [LINEAR_TRANSFORMS[entry["name"]] for entry in config.linear_transforms]
    checks = [kind.check for kind in _mixers(config)]
    checks += [kind.check for kind in feed_forwards] + [kind.check for kind in transforms]
    for check in dict.fromkeys(checks):
        check(config)


def _mixer(config: SpikingBrainConfig, place: Place) -> nn.Module:
    mixer = MIXERS[place.name].make(config, place)
    transform_linears(mixer, place.name, config)
    return mixer


class SpikingBrainParallelMixers(nn.Module):
    """Several mixers over the same input: the sum of `branch_weights[i]` RMSNorm(mixer i) (eq. 6)."""

    def __init__(self, config: SpikingBrainConfig, layer_idx: int, first_cache_idx: int) -> None:
        super().__init__()
        self.names = config.mixers[layer_idx]
        for number, name in enumerate(self.names):
            self.add_module(name, _mixer(config, Place(name, layer_idx, first_cache_idx + number)))
            self.add_module(f"{name}_norm", GLAswaRMSNorm(config.hidden_size, config.rms_norm_eps))
        self.branch_weights = nn.Parameter(torch.ones(len(self.names)))

    def initialize(self, std: float) -> None:
        nn.init.ones_(self.branch_weights)

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


class SpikingBrainBlock(nn.Module):
    """Norm, mixer or mixers, residual, and, if there is one, norm, feed-forward, residual."""

    def __init__(self, config: SpikingBrainConfig, layer_idx: int, first_cache_idx: int) -> None:
        super().__init__()
        mixers = config.mixers[layer_idx]
        self.input_layernorm = GLAswaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = (
            _mixer(config, Place(mixers[0], layer_idx, first_cache_idx))
            if len(mixers) == 1
            else SpikingBrainParallelMixers(config, layer_idx, first_cache_idx)
        )
        feed_forward = config.feed_forwards[layer_idx]
        self.mlp = FEED_FORWARDS[feed_forward].make(config)
        if self.mlp is not None:
            self.post_attention_layernorm = GLAswaRMSNorm(config.hidden_size, config.rms_norm_eps)
            transform_linears(self.mlp, feed_forward, config)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        layout: TokenLayout,
        cache: RecurrentCache | None,
    ) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotary, layout, cache)
        if self.mlp is None:
            return x_BTD
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class SpikingBrainCache(RecurrentCache):
    """What all mixers of a model remember, those of one layer after those of the layer before."""

    def __init__(self, config: SpikingBrainConfig) -> None:
        super().__init__([mixer.cache_layer(config) for mixer in _mixers(config)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        for layer in self.layers:
            if isinstance(layer, StateLayer):
                layer.repeat(repeats)
        others = [layer for layer in self.layers if not isinstance(layer, StateLayer)]
        RecurrentCache(others).batch_repeat_interleave(repeats)


class SpikingBrainPreTrainedModel(RecurrentPreTrainedModel):
    """What transformers needs to know of this family."""

    config_class = SpikingBrainConfig
    cache_class = SpikingBrainCache
    _no_split_modules = ["SpikingBrainBlock"]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        initialize = getattr(module, "initialize", None)
        if initialize is not None:
            initialize(self.config.initializer_range)


class SpikingBrainModel(SpikingBrainPreTrainedModel, RecurrentModel):
    """The decoder without its output projection."""

    embedding_name = "embed_tokens"

    def __init__(self, config: SpikingBrainConfig) -> None:
        super().__init__(config)
        _check(config)
        windows = [window for mixer in _mixers(config) if (window := mixer.window(config)) is not None]
        self.window = max(windows, default=None)
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

    def initialize(self, std: float) -> None:
        if self.sink_tokens is not None:
            nn.init.normal_(self.sink_tokens, mean=0.0, std=std)

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
