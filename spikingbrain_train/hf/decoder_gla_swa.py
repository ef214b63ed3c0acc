"""What all decoders with recurrent caches have in common: a model of layers, and one that predicts tokens.

Part of the modelling code of a checkpoint. A subclass says of which layers a model is made, and names its
configuration and its cache.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .cache_gla_swa import RecurrentCache
from .layout_gla_swa import (
    PACKING_KEYWORDS,
    TokenLayout,
    document_starts,
    positions_in_documents,
    token_layout,
    valid_tokens,
)
from .mixers_gla_swa import GLAswaRMSNorm
from .quantization_w8aspike import quantize_modules
from .rotary_gla_swa import text_lengths
from .stored_scales_w8aspike import add_stored_scales

# What collators and transformers pass that changes nothing here, and what goes to the loss.
# generate() of transformers 5 hands the tokenizer that it looks for stop strings with to the model, too.
_IDLE_KEYWORDS = ("max_length_q", "max_length_k", "max_seqlen", "cache_position", "tokenizer")
_LOSS_KEYWORDS = ("num_items_in_batch", "ignore_index", "shift_labels")


class RecurrentPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to load, initialise, checkpoint and generate."""

    cache_class: ClassVar[type[RecurrentCache]]
    """Made with the configuration."""
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
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


class RecurrentModel(RecurrentPreTrainedModel):
    """A decoder without its output projection: token embeddings, `layers` and `norm`.

    A layer is called with the hidden states, the cos and sin of rotary positions, a `TokenLayout` and the
    cache, and returns hidden states.
    """

    window: int | None = None
    """Tokens that window layers see, the current one included; None if there are none."""
    embedding_name: ClassVar[str]
    """Attribute of the token embeddings."""

    def tokens_in_front(self) -> Tensor | None:
        """Learnable tokens in front of every text, [N, hidden_size]; None if there are none."""
        return None

    def get_input_embeddings(self) -> nn.Embedding:
        return getattr(self, self.embedding_name)

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        setattr(self, self.embedding_name, value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
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
            past_key_values: a cache of this model, updated in place; None with use_cache makes a new one.
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
        hidden = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
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
        if past_key_values is not None and not isinstance(past_key_values, RecurrentCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}, but this model keeps recurrent "
                f"states: pass a {self.cache_class.__name__}, or None to let it make one."
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
            cache = self.cache_class(self.config)

        if position_ids is None and starts_BT is not None:
            position_ids = positions_in_documents(starts_BT)
        elif position_ids is None:
            position_ids = torch.arange(num_past, num_past + num_new, device=hidden.device).unsqueeze(0)
        layout = token_layout(valid_BS, self.window, starts_BT)
        front_ND = self.tokens_in_front() if num_past == 0 else None
        if front_ND is not None:
            front_BND = front_ND.to(hidden.dtype).expand(batch_size, -1, -1)
            hidden = torch.cat([front_BND, hidden], dim=1)
            layout = replace(layout, num_in_front=len(front_ND))
        front = layout.num_in_front
        rotary = self._rotary(position_ids, hidden, layout)

        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        all_hidden_states = []
        for block in self.layers:
            if output_hidden_states:
                all_hidden_states.append(hidden[:, front:])
            if self.gradient_checkpointing and self.training:
                hidden = self._gradient_checkpointing_func(block.__call__, hidden, rotary, layout, cache)
            else:
                hidden = block(hidden, rotary, layout, cache)
        hidden = self.norm(hidden[:, front:])
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

    def _rotary(self, position_ids: Tensor, hidden: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """cos and sin [B or 1, T, head_dim] in the dtype of `hidden`; tokens in front are not turned."""
        positions, length_BT = self.config.rotary_positions(), None
        if positions.depends_on_length:
            valid_BT = None if layout.valid_BS is None else layout.valid_BS[:, -position_ids.shape[1] :]
            length_BT = text_lengths(position_ids, valid_BT, layout.document_BT())
        cos, sin = positions.cos_sin(position_ids, hidden.dtype, length_BT)
        in_front = (0, 0, layout.num_in_front, 0)
        return F.pad(cos, in_front, value=1.0), F.pad(sin, in_front)


class RecurrentForCausalLM(RecurrentPreTrainedModel, GenerationMixin):
    """A decoder with its output projection `lm_head` and the next-token loss."""

    model_class: ClassVar[type[RecurrentModel]]

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        embedding = f"model.{cls.model_class.embedding_name}.weight"
        # transformers 5 wants {tied: source}, transformers 4 the names of the tied tensors.
        names_sources = int(transformers.__version__.split(".")[0]) >= 5
        cls._tied_weights_keys = {"lm_head.weight": embedding} if names_sources else ["lm_head.weight"]

    def __init__(self, config) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        w8aspike = getattr(config, "w8aspike", None)
        if w8aspike:
            published = w8aspike.get("layout") == "published"
            (add_stored_scales if published else quantize_modules)(self, w8aspike)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # generate() must not make a key/value cache: the first forward pass makes one of its own.
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
                kwargs["past_key_values"] = self.cache_class(self.config)
        return super().generate(*args, **kwargs)

    def _prefill_chunking(self, input_ids, generation_config, **model_kwargs):
        """transformers 4 calls this to read all of a prompt but its last token.

        Its own compiles the model, which a growing cache is not for, and counts padding in positions.
        """
        cache, mask = model_kwargs["past_key_values"], _padding_in(model_kwargs.get("attention_mask"))
        position_ids = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
        last = input_ids.shape[1] - 1
        for start in range(cache.num_tokens, last, generation_config.prefill_chunk_size):
            stop = min(start + generation_config.prefill_chunk_size, last)
            self(
                input_ids[:, start:stop],
                attention_mask=None if mask is None else mask[:, :stop],
                position_ids=None if position_ids is None else position_ids[:, start:stop],
                past_key_values=cache,
                logits_to_keep=1,
            )
        return model_kwargs | {"cache_position": torch.tensor([last], device=input_ids.device)}

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """Without padding none: the cache knows them, and those of a very long prompt are memory."""
        if _padding_in(model_kwargs.get("attention_mask")) is None:
            return None
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> RecurrentModel:
        return self.model

    def set_decoder(self, decoder: RecurrentModel) -> None:
        self.model = decoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
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
                documents as in `RecurrentModel.forward`. Collators set the label of a document's first token
                to -100, since the token before it does not predict it.

        The other arguments are those of `RecurrentModel.forward`.
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


def _padding_in(attention_mask: Tensor | None) -> Tensor | None:
    """The mask, if it hides a token (or holds numbers that are refused later)."""
    return None if attention_mask is None or bool((attention_mask == 1).all()) else attention_mask


def _known_keywords(keywords: dict, known: tuple[str, ...]) -> dict:
    """Those of `keywords` that have a value and a meaning here; what is switched off or idle is left out."""
    given = {name: x for name, x in keywords.items() if x is not None and x is not False}
    unknown = sorted(set(given) - set(known) - set(_IDLE_KEYWORDS))
    if unknown:
        raise TypeError(
            f"This model has no use for {', '.join(unknown)}: leave it out, since nothing would depend on it."
        )
    return {name: x for name, x in given.items() if name in known}
