"""What a model with recurrent states remembers between tokens.

Part of the modelling code of a checkpoint (see modeling_gla_swa.py).

A GLA layer keeps one state [B, G, K, V] in float32, whatever the length of the text; a sliding-window layer
the keys and values of the last attention_window - 1 tokens of text (with the next token's own they make a
full window), and of padding between them; a full-attention layer all of them. Keys and values of sinks stay.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .configuration_gla_swa import GLAswaConfig


class RecurrentStateLayer:
    """The state of one GLA layer; `state_BGKV` is None before the first token."""

    is_compileable = False

    def __init__(self) -> None:
        self.state_BGKV: Tensor | None = None

    def reset(self) -> None:
        self.state_BGKV = None

    def select(self, indices: Tensor) -> None:
        """Keep the rows `indices` of the batch, in that order, with repetitions."""
        if self.state_BGKV is not None:
            self.state_BGKV = self.state_BGKV.index_select(0, indices.to(self.state_BGKV.device))

    def nbytes(self) -> int:
        return 0 if self.state_BGKV is None else self.state_BGKV.untyped_storage().nbytes()


class KeyValueLayer:
    """Keys (rotated at their true positions) and values of one softmax layer, [B, G, S, head_dim]."""

    is_compileable = False

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.k_BGSK: Tensor | None = None
        self.v_BGSV: Tensor | None = None
        self.sinks: tuple[Tensor, Tensor] | None = None

    def keep_sinks(self, sinks: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """Remember keys and values of sinks, [B, G, N, head_dim], if some are given; return what is kept."""
        if sinks is not None:
            self.sinks = (sinks[0].clone(), sinks[1].clone())  # views would keep the prompt's alive
        return self.sinks

    def update(self, k_BGTK: Tensor, v_BGTV: Tensor, num_kept: int | None) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens; return all that the new tokens can see.

        Args:
            num_kept: tokens to remember for the next call; a layer without a window remembers all.
        """
        if self.k_BGSK is not None and self.v_BGSV is not None:
            k_BGTK = torch.cat([self.k_BGSK, k_BGTK], dim=2)
            v_BGTV = torch.cat([self.v_BGSV, v_BGTV], dim=2)
        self.k_BGSK, self.v_BGSV = self._trim(k_BGTK, num_kept), self._trim(v_BGTV, num_kept)
        return k_BGTK, v_BGTV

    def reset(self) -> None:
        self.k_BGSK = self.v_BGSV = self.sinks = None

    def select(self, indices: Tensor) -> None:
        """Keep the rows `indices` of the batch, in that order, with repetitions."""
        if self.k_BGSK is not None and self.v_BGSV is not None:
            indices = indices.to(self.k_BGSK.device)
            self.k_BGSK = self.k_BGSK.index_select(0, indices)
            self.v_BGSV = self.v_BGSV.index_select(0, indices)
        if self.sinks is not None:
            k_sinks, v_sinks = (x.index_select(0, indices.to(x.device)) for x in self.sinks)
            self.sinks = (k_sinks, v_sinks)

    def nbytes(self) -> int:
        kept = (self.k_BGSK, self.v_BGSV)
        return self.sinks_nbytes() + sum(x.untyped_storage().nbytes() for x in kept if x is not None)

    def sinks_nbytes(self) -> int:
        """What sinks take, whatever the length of the text."""
        return sum(x.untyped_storage().nbytes() for x in self.sinks or ())

    def _trim(self, x: Tensor, num_kept: int | None) -> Tensor:
        if self.window is None or num_kept is None or x.shape[2] <= num_kept:
            return x
        # A view would keep the memory of the whole prompt alive.
        return x[:, :, x.shape[2] - num_kept :].clone()


class RecurrentCache(Cache):
    """As `past_key_values` it makes the model go on where the text stopped.

    It can be reordered (beam search), repeated and reset, but not shortened: a recurrent state does not
    remember which token contributed what.

    Args:
        layers: what every mixer remembers, in their order.
    """

    is_compileable = False
    is_croppable = False

    # Cache.__init__ differs between transformers 4.51 and 5 and knows neither kind of layer used here;
    # it is not called.
    def __init__(self, layers: list[RecurrentStateLayer | KeyValueLayer]) -> None:
        self.layers = layers
        self.layer_class_to_replicate = None
        self.offloading = False
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self.layers)

    def recurrent_state_layer(self, layer_idx: int) -> RecurrentStateLayer:
        """What GLA mixer `layer_idx` remembers."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, RecurrentStateLayer), f"layer {layer_idx} is no GLA layer"
        return layer

    def key_value_layer(self, layer_idx: int) -> KeyValueLayer:
        """What softmax mixer `layer_idx` remembers."""
        layer = self.layers[layer_idx]
        assert isinstance(layer, KeyValueLayer), f"layer {layer_idx} is no softmax layer"
        return layer

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included; the same for every layer."""
        return self.num_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no maximum."""
        return -1

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        """The name of `get_max_length` in transformers 4."""
        return -1

    def nbytes(self) -> int:
        """Bytes of memory held by all layers."""
        return sum(layer.nbytes() for layer in self.layers)

    def reset(self) -> None:
        """Forget the text."""
        self.num_tokens = 0
        for layer in self.layers:
            layer.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues what row beam_idx[i] was."""
        for layer in self.layers:
            layer.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch `repeats` times."""
        for layer in self.layers:
            kept = layer.state_BGKV if isinstance(layer, RecurrentStateLayer) else layer.k_BGSK
            if kept is not None:
                layer.select(torch.arange(kept.shape[0], device=kept.device).repeat_interleave(repeats))

    def crop(self, *args: object, **kwargs: object) -> None:
        """Not possible.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "A recurrent state cannot forget its last tokens: decode again from the start of the text."
        )


class GLAswaCache(RecurrentCache):
    """The cache of a `gla_swa` model."""

    def __init__(self, config: GLAswaConfig) -> None:
        mixers = [config.mixer_type(i) for i in range(config.num_hidden_layers)]
        window = {"swa": config.attention_window, "full": None}
        super().__init__(
            [RecurrentStateLayer() if mixer == "gla" else KeyValueLayer(window[mixer]) for mixer in mixers]
        )


__all__ = ["GLAswaCache", "RecurrentCache"]
