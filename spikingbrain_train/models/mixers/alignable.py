"""What a mixer may offer to an align stage, which sets it in closed form before gradient descent begins.

Nothing has to be offered: what a mixer does not have is left out, and the mixer begins as it was converted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from megatron.core.transformer import TransformerConfig
from torch import Tensor

from spikingbrain_train.architecture.sequence_layout import SequenceLayout


@runtime_checkable
class HasNormedHeads(Protocol):
    """Its output projection can be fitted to what the source's attention gives.

    It is a SelfAttention of megatron-core, or has of it what is listed here.
    """

    if TYPE_CHECKING:  # from Python 3.12 on isinstance() does not find the submodules of a module
        config: TransformerConfig
        query_projection_size: int
        """Columns of the output projection, over all tensor-parallel ranks."""
        linear_proj: Any
        """The output projection, a row-parallel linear that reads this rank's part of the heads."""

    def normed_heads(self, hidden_states: Tensor, layout: SequenceLayout | None = None) -> Tensor:
        """What the output projection sees: [T, B, features of this tensor-parallel rank].

        Args:
            hidden_states: [T, B, hidden_size] normed input of the layer, this rank's share of it under
                sequence parallelism.
            layout: how the sequences lie on context-parallel ranks, and their documents.
        """
        ...


@runtime_checkable
class MeasuresDistances(Protocol):
    """The attention of a dense source, which says how far its heads look back."""

    def attention_distances(
        self, hidden_states: Tensor, *, rotary_pos_emb: Tensor | None, layout: SequenceLayout
    ) -> Tensor:
        """Sums of mean distances over the tokens of this context-parallel rank.

        Args:
            hidden_states: as in :meth:`HasNormedHeads.normed_heads`.
            rotary_pos_emb: [T, 1 or B, 1, kv_channels] rotary angles of the slice's tokens, or None.
            layout: how the sequences lie on context-parallel ranks, their sinks and documents.

        Returns:
            [query heads of this tensor-parallel rank] float64, in tokens, without what a head rests on the
            first token of a document.
        """
        ...


@runtime_checkable
class TakesHalfLives(Protocol):
    """Its heads forget with half-lives that can be set."""

    def set_half_lives(self, half_life_H: Tensor) -> None:
        """Let memories fade by half in about so many tokens.

        Args:
            half_life_H: [query heads of this tensor-parallel rank] float64, above 0. Where heads share their
                decays, or have several each, the mixer makes what suits it of them.
        """
        ...


@runtime_checkable
class ScalesChannels(Protocol):
    """What its heads give is a sum over channels, each of which can be scaled."""

    def channel_outputs(self, hidden_states: Tensor, layout: SequenceLayout, every: int) -> Tensor | None:
        """What every channel adds to its head, before any norm.

        Args:
            hidden_states: as in :meth:`HasNormedHeads.normed_heads`.
            layout: how the sequences lie on context-parallel ranks, their sinks and documents.
            every: take every so manieth token of the text.

        Returns:
            [tokens, heads of this tensor-parallel rank, channels, values] float32, row after row of the batch
            and in each the tokens at positions every - 1, 2 every - 1, ... that this rank holds. None where
            the channels of this form cannot be scaled one by one.
        """
        ...

    def scale_channels(self, scale_HC: Tensor) -> None:
        """Multiply what the channels add by so much: [heads of this rank, channels], not negative."""
        ...


@runtime_checkable
class BalancesKeys(Protocol):
    """Its channels sum up different numbers of keys, so that some drown others."""

    def balance_keys(self) -> None:
        """Scale the weights of the keys so that no channel drowns others; done once, before training."""
        ...
