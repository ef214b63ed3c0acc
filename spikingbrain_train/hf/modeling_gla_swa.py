"""SpikingBrain-7B in Hugging Face transformers: gated linear attention (GLA) and sliding-window attention.

SpikingBrain, arXiv 2509.05276. Four files make up the modelling code of a checkpoint:
configuration_gla_swa.py, ops_gla_swa.py (the two ways of mixing a sequence), cache_gla_swa.py (what is
remembered while generating) and this one. They need torch and transformers >= 4.51 only; flash-linear-
attention is used on CUDA where it is installed.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The model trains like any other (labels, gradient checkpointing, Trainer) and generates with a recurrent
state, so that the memory per token does not grow with the text. Padding may be on either side: it writes
nothing into the state and does not decay it.

Tensors: model.embeddings.weight; model.layers.{i}.attn_norm.weight; .attn.{q,k,v}_proj.{weight, bias};
.attn.o_proj.weight; .mlp_norm.weight; .mlp.{gate,up,down}_proj.weight; in GLA layers .attn.gk_proj.0.weight,
.attn.gk_proj.1.{weight, bias}, .attn.g_norm.weight; model.norm.weight; lm_head.weight. With attention_bias
false there are no biases; with qk_norm .attn.{q,k}_norm.weight are added; with tie_word_embeddings
lm_head.weight is not stored.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .cache_gla_swa import GLAswaCache
from .configuration_gla_swa import GLAswaConfig
from .ops_gla_swa import apply_rotary, causal_attention, gated_linear_attention, rotary_frequencies


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
    """SwiGLU."""

    def __init__(self, config: GLAswaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class GLAswaAttention(nn.Module):
    """The projections that both mixers share: q, k, v and output, and norms on q and k if there are any."""

    def __init__(self, config: GLAswaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_groups = config.num_key_value_heads
        q_size, kv_size = self.num_heads * self.head_dim, self.num_groups * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = GLAswaRMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = GLAswaRMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, head_dim], keys and values [B, T, G, head_dim]."""
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x_BTD).view(heads))
        k = self.k_norm(self.k_proj(x_BTD).view(heads))
        return q, k, self.v_proj(x_BTD).view(heads)


class GLAswaLinearAttention(GLAswaAttention):
    """Gated linear attention with ReLU features and a low-rank gate (eq. 10-11); no positions."""

    def __init__(self, config: GLAswaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.gate_logit_normalizer = config.gate_logit_normalizer
        self.gk_proj = nn.Sequential(
            nn.Linear(config.hidden_size, config.gate_low_rank_dim, bias=False),
            nn.Linear(config.gate_low_rank_dim, self.num_groups * self.head_dim, bias=True),
        )
        self.g_norm = GLAswaRMSNorm(self.head_dim, config.norm_eps)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        valid_BS: Tensor | None,
        cache: GLAswaCache | None,
    ) -> Tensor:
        q, k, v = self.project(x_BTD)
        q, k = F.relu(q), F.relu(k)
        gate_logit = self.gk_proj(x_BTD).view_as(k)
        gate_logit = gate_logit.to(torch.promote_types(gate_logit.dtype, torch.float32))
        log_gate = F.logsigmoid(gate_logit) / self.gate_logit_normalizer
        if valid_BS is not None:
            # Padding leaves the state as it is: it adds nothing (v = 0) and does not decay it (log gate = 0).
            valid = valid_BS[:, -x_BTD.shape[1] :, None, None]
            v = v.masked_fill(~valid, 0.0)
            log_gate = log_gate.masked_fill(~valid, 0.0)
        layer = None if cache is None else cache.recurrent_state_layer(self.layer_idx)
        o_BTHV, state = gated_linear_attention(q, k, v, log_gate, None if layer is None else layer.state_BGKV)
        if layer is not None:
            layer.state_BGKV = state
        return self.o_proj(self.g_norm(o_BTHV).flatten(-2))


class GLAswaSoftmaxAttention(GLAswaAttention):
    """Causal softmax attention with rotary positions: over all tokens (eq. 1) or a sliding window (eq. 2)."""

    def __init__(self, config: GLAswaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.window = config.sliding_window if config.mixer_type(layer_idx) == "swa" else None
        self.attention_dropout = config.attention_dropout

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], valid_BS: Tensor | None, cache: GLAswaCache | None
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in self.project(x_BTD))
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if cache is not None:
            k, v = cache.key_value_layer(self.layer_idx).update(k, v)
        if valid_BS is not None:
            valid_BS = valid_BS[:, -k.shape[2] :]
        dropout = self.attention_dropout if self.training else 0.0
        o_BHTV = causal_attention(q, k, v, self.window, valid_BS, dropout)
        return self.o_proj(o_BHTV.transpose(1, 2).flatten(-2))


class GLAswaBlock(nn.Module):
    """Norm, mixer, residual, norm, feed-forward, residual."""

    def __init__(self, config: GLAswaConfig, layer_idx: int) -> None:
        super().__init__()
        mixer = GLAswaLinearAttention if config.mixer_type(layer_idx) == "gla" else GLAswaSoftmaxAttention
        self.attn_norm = GLAswaRMSNorm(config.hidden_size, config.norm_eps)
        self.attn = mixer(config, layer_idx)
        self.mlp_norm = GLAswaRMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GLAswaMLP(config)

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], valid_BS: Tensor | None, cache: GLAswaCache | None
    ) -> Tensor:
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), rotary, valid_BS, cache)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class GLAswaPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to load, initialise, checkpoint and generate."""

    config_class = GLAswaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLAswaBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    # transformers 4.51 asks for this before it passes a Cache on.
    _supports_cache_class = True
    # A recurrent state cannot be rolled back: generate() refuses assisted decoding and the like.
    _is_stateful = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, GLAswaRMSNorm):
            nn.init.ones_(module.weight)


class GLAswaModel(GLAswaPreTrainedModel):
    """The decoder without its output projection."""

    def __init__(self, config: GLAswaConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GLAswaBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = GLAswaRMSNorm(config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GLAswaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast | tuple:
        """Run the layers over new tokens.

        Args:
            input_ids: [B, T] int64; or `inputs_embeds` [B, T, hidden_size] instead.
            attention_mask: [B, S], nonzero where a token is text and zero where it is padding, for all S
                tokens: those in the cache and the new ones. None means no padding.
            position_ids: [B or 1, T]; None means that positions count all tokens from 0.
            past_key_values: a `GLAswaCache`, updated in place; None with use_cache makes a new one.
            use_cache: whether to return a cache; None means config.use_cache, but not while training.

        Raises:
            ValueError: inputs that contradict each other; the message says what is expected.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds.")
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        batch_size, num_new = hidden.shape[:2]

        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if self.gradient_checkpointing and self.training:
            if past_key_values is not None:
                raise ValueError(
                    "past_key_values cannot be used with gradient checkpointing: recomputing a layer would "
                    "feed its cache twice."
                )
            use_cache = False
        if past_key_values is not None and not isinstance(past_key_values, GLAswaCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}, but this model keeps recurrent "
                "states: pass a GLAswaCache, or None to let it make one."
            )
        cache = past_key_values
        if use_cache and cache is None:
            cache = GLAswaCache(self.config)
        num_past = 0 if cache is None else cache.num_tokens

        valid_BS = _valid_tokens(attention_mask, batch_size, num_past + num_new)
        if position_ids is None:
            position_ids = torch.arange(num_past, num_past + num_new, device=hidden.device).unsqueeze(0)
        rotary = self._rotary(position_ids, hidden)

        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        all_hidden_states = []
        for block in self.layers:
            if output_hidden_states:
                all_hidden_states.append(hidden)
            if self.gradient_checkpointing and self.training:
                hidden = self._gradient_checkpointing_func(block.__call__, hidden, rotary, valid_BS, cache)
            else:
                hidden = block(hidden, rotary, valid_BS, cache)
        hidden = self.norm(hidden)
        if output_hidden_states:
            all_hidden_states.append(hidden)
        if cache is not None:
            cache.num_tokens += num_new

        output = BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _rotary(self, position_ids: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, T, head_dim] in the dtype of `hidden`, of float32 angles as in Llama."""
        config = self.config
        frequency = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling, hidden.device)
        angle = position_ids[..., None].to(hidden.device, torch.float32) * frequency
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos().to(hidden.dtype), angle.sin().to(hidden.dtype)


class GLAswaForCausalLM(GLAswaPreTrainedModel, GenerationMixin):
    """The decoder with its output projection and the next-token loss."""

    # transformers 5 wants {tied: source}, transformers 4 the names of the tied tensors.
    _tied_weights_keys = (
        {"lm_head.weight": "model.embeddings.weight"}
        if int(transformers.__version__.split(".")[0]) >= 5
        else ["lm_head.weight"]
    )

    def __init__(self, config: GLAswaConfig) -> None:
        super().__init__(config)
        self.model = GLAswaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # generate() must not make a key/value cache: the first forward pass makes a GLAswaCache.
        return False

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embeddings = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> GLAswaModel:
        return self.model

    def set_decoder(self, decoder: GLAswaModel) -> None:
        self.model = decoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GLAswaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of new tokens, and the next-token loss.

        Args:
            labels: [B, T] int64, usually `input_ids` themselves: the shift by one happens here. -100 carries
                no loss.
            logits_to_keep: compute logits of the last n positions only (0: of all), or of the positions given
                as a tensor.

        The other arguments are those of `GLAswaModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


def _valid_tokens(attention_mask: Tensor | None, batch_size: int, num_tokens: int) -> Tensor | None:
    """The mask as bool [B, S], or None if nothing is padding."""
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch_size, num_tokens):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(batch_size, num_tokens)}: "
            "one entry for every token, those in the cache included."
        )
    valid_BS = attention_mask.bool()
    return None if bool(valid_BS.all()) else valid_BS


# save_pretrained then copies the modelling files and names them in config.json.
GLAswaForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["GLAswaCache", "GLAswaForCausalLM", "GLAswaModel", "GLAswaPreTrainedModel"]
