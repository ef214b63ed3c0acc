"""SpikingBrain-7B in Hugging Face transformers: gated linear attention (GLA) and sliding-window attention.

SpikingBrain, arXiv 2509.05276. Five files make up the modelling code of a checkpoint:
configuration_gla_swa.py, ops_gla_swa.py (the two ways of mixing a sequence), cache_gla_swa.py (what is
remembered while generating), layout_gla_swa.py (padding and documents) and this one. They need torch and
transformers >= 4.51 only; flash-linear-attention is used on CUDA where it is installed.

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
tie_word_embeddings save_pretrained leaves lm_head.weight out.
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
from .layout_gla_swa import (
    PACKING_KEYWORDS,
    TokenLayout,
    document_starts,
    positions_in_documents,
    token_layout,
    valid_tokens,
)
from .ops_gla_swa import (
    apply_rotary,
    causal_attention,
    gated_linear_attention,
    lightning_log_decays,
    rotary_frequencies,
)

# What collators and transformers pass that changes nothing here, and what goes to the loss.
_IDLE_KEYWORDS = ("max_length_q", "max_length_k", "max_seqlen", "cache_position")
_LOSS_KEYWORDS = ("num_items_in_batch", "ignore_index", "shift_labels")


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


class GLAswaAttention(nn.Module):
    """The projections that both mixers share: q, k, v and output, and norms on q and k if there are any."""

    def __init__(self, config: GLAswaConfig, layer_idx: int, qk_norm: bool, num_groups: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_groups = num_groups
        q_size, kv_size = self.num_heads * self.head_dim, self.num_groups * self.head_dim
        linear = nn.Linear if config.attention_bias else GLAswaUnbiasedLinear
        self.q_proj = linear(config.hidden_size, q_size)
        self.k_proj = linear(config.hidden_size, kv_size)
        self.v_proj = linear(config.hidden_size, kv_size)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = GLAswaRMSNorm(self.head_dim, config.norm_eps) if qk_norm else nn.Identity()
        self.k_norm = GLAswaRMSNorm(self.head_dim, config.norm_eps) if qk_norm else nn.Identity()

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, H, head_dim], keys and values [B, T, G, head_dim]."""
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x_BTD).view(heads))
        k = self.k_norm(self.k_proj(x_BTD).view(heads))
        return q, k, self.v_proj(x_BTD).view(heads)


class GLAswaLinearAttention(GLAswaAttention):
    """Gated linear attention with ReLU features and a low-rank gate or a fixed decay (eq. 10-11).

    With linear_rotary the features are turned by rotary positions, else there are none.
    """

    def __init__(self, config: GLAswaConfig, layer_idx: int) -> None:
        super().__init__(
            config, layer_idx, config.qk_norm or config.linear_qk_norm, config.linear_num_key_value_heads
        )
        self.gate_logit_normalizer = config.gate_logit_normalizer
        self.rotary = config.linear_rotary
        self.gate_is_fixed = config.linear_gate == "fixed"
        if self.gate_is_fixed:
            decays = lightning_log_decays(self.num_groups, layer_idx, config.num_hidden_layers)
            self.log_decay: Tensor
            self.register_buffer("log_decay", decays)
        else:
            self.gk_proj = nn.Sequential(
                nn.Linear(config.hidden_size, config.gate_low_rank_dim, bias=False),
                nn.Linear(config.gate_low_rank_dim, self.num_groups * self.head_dim, bias=True),
            )
        self.g_norm = GLAswaRMSNorm(self.head_dim, config.norm_eps)
        self.g_proj = None
        if config.linear_output_gate:
            self.g_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=True)

    def forward(
        self,
        x_BTD: Tensor,
        rotary: tuple[Tensor, Tensor],
        layout: TokenLayout,
        cache: GLAswaCache | None,
    ) -> Tensor:
        q, k, v = self.project(x_BTD)
        q, k = F.relu(q), F.relu(k)
        if self.rotary:
            q, k = (apply_rotary(x.transpose(1, 2), *rotary).transpose(1, 2) for x in (q, k))
        log_gate = self.log_gate(x_BTD).view_as(k)
        if layout.valid_BS is not None:
            # Padding leaves the state as it is: it adds nothing (v = 0) and does not decay it (log gate = 0).
            valid = layout.valid_BS[:, -x_BTD.shape[1] :, None, None]
            v = v.masked_fill(~valid, 0.0)
            log_gate = log_gate.masked_fill(~valid, 0.0)
        layer = None if cache is None else cache.recurrent_state_layer(self.layer_idx)
        state = None if layer is None else layer.state_BGKV
        o_BTHV, state = gated_linear_attention(q, k, v, log_gate, state, layout.starts_BT)
        if layer is not None:
            layer.state_BGKV = state
        o_BTD = self.g_norm(o_BTHV).flatten(-2)
        if self.g_proj is not None:
            o_BTD = o_BTD * F.silu(self.g_proj(x_BTD))
        return self.o_proj(o_BTD)

    def log_gate(self, x_BTD: Tensor) -> Tensor:
        """Logarithm of the decay of every channel, [B, T, G * head_dim], in at least float32."""
        if self.gate_is_fixed:
            decay_GK = self.log_decay.to(torch.promote_types(self.log_decay.dtype, torch.float32))
            return decay_GK.repeat_interleave(self.head_dim).expand(*x_BTD.shape[:2], -1)
        logit = self.gk_proj(x_BTD)
        logit = logit.to(torch.promote_types(logit.dtype, torch.float32))
        return F.logsigmoid(logit) / self.gate_logit_normalizer


class GLAswaSoftmaxAttention(GLAswaAttention):
    """Causal softmax attention with rotary positions: over all tokens (eq. 1) or a sliding window (eq. 2)."""

    def __init__(self, config: GLAswaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx, config.qk_norm, config.num_key_value_heads)
        self.window = config.attention_window if config.mixer_type(layer_idx) == "swa" else None
        self.attention_dropout = config.attention_dropout

    def forward(
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], layout: TokenLayout, cache: GLAswaCache | None
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in self.project(x_BTD))
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if cache is not None:
            k, v = cache.key_value_layer(self.layer_idx).update(k, v, layout.num_cached)
        valid_BS, text_index_BS = (
            None if x is None else x[:, -k.shape[2] :] for x in (layout.valid_BS, layout.text_index_BS)
        )
        dropout = self.attention_dropout if self.training else 0.0
        o_BHTV = causal_attention(
            q, k, v, self.window, valid_BS, dropout, text_index_BS, layout.document_BT()
        )
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
        self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], layout: TokenLayout, cache: GLAswaCache | None
    ) -> Tensor:
        x_BTD = x_BTD + self.attn(self.attn_norm(x_BTD), rotary, layout, cache)
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

    def __init__(self, config: GLAswaConfig) -> None:
        super().__init__(config)
        if not config.attention_bias:
            self._keys_to_ignore_on_load_missing = [r"\.attn\.[qkv]_proj\.bias$"]

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
        config.check_windows()
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
            attention_mask: [B, S], 1 where a token is text and 0 where it is padding, for all S tokens: those
                in the cache and the new ones. None means no padding.
            position_ids: [B or 1, T]; None means that positions count all tokens from 0, or those of each
                document.
            past_key_values: a `GLAswaCache`, updated in place; None with use_cache makes a new one.
            use_cache: whether to return a cache; None means config.use_cache, but not while training or for
                packed documents.
            kwargs: what else packing collators pass. Several documents may stand in a row, without a cache:
                one begins where position_ids are not above those before, or at the bounds of `cu_seqlens` or
                `cu_seq_lens_q` [N + 1] (a batch of one), or where `seq_idx` [B, T] changes; its state, window
                and positions start anew.

        Raises:
            ValueError: inputs that contradict each other; the message says what is expected.
            TypeError: a keyword that means nothing here.
        """
        known = _known_keywords(kwargs, PACKING_KEYWORDS)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass either input_ids or inputs_embeds.")
        hidden = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        batch_size, num_new = hidden.shape[:2]

        wants_cache = bool(use_cache)
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
        num_past = 0 if cache is None else cache.num_tokens
        packing = {name: torch.as_tensor(x, device=hidden.device) for name, x in known.items()}
        position_ids = None if position_ids is None else position_ids.to(hidden.device)
        attention_mask = None if attention_mask is None else attention_mask.to(hidden.device)
        valid_BS = valid_tokens(attention_mask, batch_size, num_past + num_new)
        starts_BT = document_starts(packing, position_ids, valid_BS, (batch_size, num_new), num_past)
        if starts_BT is not None and (cache is not None or wants_cache):
            raise ValueError(
                "Several documents in a row cannot be remembered in a cache: pass use_cache=False and no "
                "past_key_values, or one document a row."
            )
        if use_cache and cache is None and starts_BT is None:
            cache = GLAswaCache(self.config)

        if position_ids is None and starts_BT is not None:
            position_ids = positions_in_documents(starts_BT)
        elif position_ids is None:
            position_ids = torch.arange(num_past, num_past + num_new, device=hidden.device).unsqueeze(0)
        rotary = self._rotary(position_ids, hidden)
        layout = token_layout(valid_BS, self.config.attention_window, starts_BT)

        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        all_hidden_states = []
        for block in self.layers:
            if output_hidden_states:
                all_hidden_states.append(hidden)
            if self.gradient_checkpointing and self.training:
                hidden = self._gradient_checkpointing_func(block.__call__, hidden, rotary, layout, cache)
            else:
                hidden = block(hidden, rotary, layout, cache)
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
        angle = position_ids[..., None].to(torch.float32) * frequency
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

    def generate(self, *args, **kwargs):
        """As in transformers. With `prefill_chunk_size` the prompt is read in pieces of that many tokens."""
        given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
        config = self.generation_config if given is None else given
        chunk_size = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if chunk_size is not None:
            if chunk_size < 1:
                raise ValueError(f"prefill_chunk_size must be at least 1, got {chunk_size}.")
            if kwargs.get("use_cache", config.use_cache) is False:
                raise ValueError("prefill_chunk_size reads a prompt into a cache: it needs use_cache=True.")
            if kwargs.get("past_key_values") is None:
                # transformers makes none for a model without key/value cache, and then refuses to go on.
                kwargs["past_key_values"] = GLAswaCache(self.config)
        return super().generate(*args, **kwargs)

    def _prefill_chunking(self, input_ids, generation_config, **model_kwargs):
        """transformers 4 calls this to read all of a prompt but its last token.

        Its own compiles the model, which a growing cache is not for, and counts padding in positions.
        """
        cache, mask = model_kwargs["past_key_values"], model_kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        last = input_ids.shape[1] - 1
        for start in range(cache.num_tokens, last, generation_config.prefill_chunk_size):
            stop = min(start + generation_config.prefill_chunk_size, last)
            self(
                input_ids[:, start:stop],
                attention_mask=mask[:, :stop],
                position_ids=position_ids[:, start:stop],
                past_key_values=cache,
                logits_to_keep=1,
            )
        return model_kwargs | {"cache_position": torch.tensor([last], device=input_ids.device)}

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
            kwargs: what transformers passes to the loss (`num_items_in_batch`, `shift_labels`), and packed
                documents as in `GLAswaModel.forward`. Collators set the label of a document's first token to
                -100, since the token before it does not predict it.

        The other arguments are those of `GLAswaModel.forward`.
        """
        known = _known_keywords(kwargs, (*PACKING_KEYWORDS, *_LOSS_KEYWORDS))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **{name: value for name, value in known.items() if name in PACKING_KEYWORDS},
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            for_loss = {name: value for name, value in known.items() if name in _LOSS_KEYWORDS}
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **for_loss
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()


def _known_keywords(keywords: dict, known: tuple[str, ...]) -> dict:
    """Those of `keywords` that have a value and a meaning here; what is switched off or idle is left out."""
    given = {name: x for name, x in keywords.items() if x is not None and x is not False}
    unknown = sorted(set(given) - set(known) - set(_IDLE_KEYWORDS))
    if unknown:
        raise TypeError(
            f"This model has no use for {', '.join(unknown)}: leave it out, since nothing would depend on it."
        )
    return {name: x for name, x in given.items() if name in known}


# save_pretrained then copies the modelling files and names them in config.json.
GLAswaForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["GLAswaCache", "GLAswaForCausalLM", "GLAswaModel", "GLAswaPreTrainedModel"]
