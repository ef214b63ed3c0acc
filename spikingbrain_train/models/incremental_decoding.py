"""A model that reads a text piece by piece: every layer's mixer remembers what it has seen.

See :mod:`~spikingbrain_train.models.mixers.decoding` for what a mixer does. All else in a layer works on each
token alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from spikingbrain_train.architecture.layers import mixers_of
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import KernelConfig
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.models.layer_specs import layer_build
from spikingbrain_train.models.mixers import decoding
from spikingbrain_train.models.mixers.decoding import (
    CacheSize,
    DecodingState,
    decodes_by_step,
    decodes_in_slices,
)
from spikingbrain_train.models.output_head import vocab_parallel_logits
from spikingbrain_train.parallel.context_parallel.reading_on import from_last_rank
from spikingbrain_train.parallel.forward_passes import pass_forward


def mixers_without_slices(model: ModelConfig, kernels: KernelConfig) -> list[str]:
    """Names of the model's kinds of mixers that cannot read their slice of a piece of a text.

    Args: as of :func:`mixers_without_step`.
    """
    build = layer_build(model, kernels)
    kinds = sorted(mixers_of(model), key=lambda kind: kind.name)
    return [kind.name for kind in kinds if not decodes_in_slices(build.mixer(kind).module)]


def mixers_without_step(model: ModelConfig, kernels: KernelConfig) -> list[str]:
    """Names of the model's kinds of mixers that read their whole input again for every token.

    Args:
        model: the network.
        kernels: choices with linears and experts resolved.
    """
    build = layer_build(model, kernels)
    kinds = sorted(mixers_of(model), key=lambda kind: kind.name)
    return [kind.name for kind in kinds if not decodes_by_step(build.mixer(kind).module)]


class IncrementalDecoder:
    """One text after the other, each read once.

    All ranks of the model call it together with the same tokens. Tensor, pipeline and expert parallelism
    work, and so does context parallelism where every mixer decodes in slices; sequence parallelism does not,
    because one token cannot be split.

    Context-parallel ranks split every piece into equal slices and pass states on. The first token of a text,
    with its sinks, and what is left over of a piece, such as single tokens, every rank reads by itself: all
    of them know the state behind the text, keys and values included.

    A long beginning may be read in pieces. What a layer computes with takes memory for one piece then, and
    what remains between them are recurrent states, windows, and keys and values of full attention.

    Args:
        model: this rank's pipeline stage. It is put into evaluation mode, and is good for decoding alone
            until :meth:`release`.
    """

    def __init__(self, model: HybridGPTModel | ModelChunks) -> None:
        config = model.config
        assert not config.sequence_parallel, "a token cannot be split"
        self._cp_group = model.pg_collection.cp
        self.model = model.eval()
        self._num_tokens = 0
        self._mixers = []
        for layer in model.layers:
            layer.self_attention = _RememberingMixer(layer.self_attention)
            self._mixers.append(layer.self_attention)

    def begin(self) -> None:
        """Forget the text."""
        self._num_tokens = 0
        for mixer in self._mixers:
            mixer.state = None

    def release(self) -> None:
        """Leave the model as it was, but for its mode. Nothing can be read afterwards."""
        for layer in self.model.layers:
            layer.self_attention = layer.self_attention.mixer
        self._mixers = []

    @torch.no_grad()
    def read(self, tokens_BT: Tensor, piece_length: int | None = None) -> Tensor | None:
        """Read on.

        Args:
            tokens_BT: [B, T] int64: the beginning of a text, or what follows on what was read; at least one
                token.
            piece_length: tokens that a rank reads at a time; None: all.

        Returns:
            Logits of the token that follows, [B, vocab_size] float32, on every rank of the last pipeline
            stage; None elsewhere.
        """
        begin, end = self._num_tokens, self._num_tokens + tokens_BT.shape[1]
        sinks = self.model.model_config.num_sink_tokens
        logits_BV = None
        for piece, is_split in self._pieces(range(begin, end), piece_length or end - begin):
            mine = piece
            if is_split:
                length = len(piece) // self._cp_group.size()
                mine = piece[self._cp_group.rank() * length :][:length]
            for mixer in self._mixers:
                mixer.cp_group = self._cp_group if is_split else None
            tokens = tokens_BT[:, mine.start - begin : mine.stop - begin]
            logits_BV = self._read_piece(tokens, SequenceLayout.of_piece(mine, end, sinks), is_split)
            self._num_tokens = piece.stop
        return logits_BV

    def _pieces(self, tokens: range, piece_length: int) -> Iterator[tuple[range, bool]]:
        """What is read at a time, and whether context-parallel ranks split it."""
        size = self._cp_group.size()
        if size > 1 and tokens.start == 0:
            yield tokens[:1], False
            tokens = tokens[1:]
        for first in range(0, len(tokens), piece_length * size):
            piece = tokens[first : first + piece_length * size]
            split = len(piece) // size * size if size > 1 else 0
            if split:
                yield piece[:split], True
            if split < len(piece):
                yield piece[split:], False

    def _read_piece(self, tokens_BT: Tensor, layout: SequenceLayout, is_split: bool) -> Tensor | None:
        def forward_step(iterator: Iterator[None], stage: HybridGPTModel):
            next(iterator)
            output = stage(tokens_BT, layout=layout, return_hidden_states=True)
            return output, partial(_last_logits, stage, self._cp_group if is_split else None)

        results = pass_forward(
            self.model.chunks,
            forward_step,
            iter([None]),
            1,
            # megatron-core divides by the context-parallel ranks, also where each of them has all tokens.
            seq_length=layout.slice_length * self._cp_group.size(),
            micro_batch_size=tokens_BT.shape[0],
            collect_non_loss_data=True,
        )
        return results[0] if results else None

    def cache_size(self) -> CacheSize:
        """What this rank remembers of the text."""
        states = [mixer.state for mixer in self._mixers if mixer.state is not None]
        return sum((state.size() for state in states), CacheSize())


def _last_logits(
    model: HybridGPTModel, cp_group: ProcessGroup | None, hidden_TBD: Tensor, non_loss_data: bool = True
) -> Tensor:
    """[B, vocab_size] float32, of the last token alone: no other's are asked for."""
    last_BD = hidden_TBD[-1] if cp_group is None else from_last_rank(hidden_TBD[-1], cp_group)
    return vocab_parallel_logits(
        last_BD, model.output_weight(), model.model_config.vocab_size, model.pg_collection.tp
    )


class _RememberingMixer(torch.nn.Module):
    """Stands in a layer in the place of its mixer."""

    def __init__(self, mixer: torch.nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.state: DecodingState | None = None
        self.cp_group: ProcessGroup | None = None
        """Ranks that have a slice each of what is read next; None: all of it is here."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: SequenceLayout,
        rotary_pos_emb: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        if self.state is None:
            output, self.state = decoding.begin_decoding(
                self.mixer,
                hidden_states,
                rotary_pos_emb=rotary_pos_emb,
                layout=packed_seq_params.of_piece_alone(),
            )
        else:
            output = decoding.decode(
                self.mixer,
                hidden_states,
                self.state,
                rotary_pos_emb=rotary_pos_emb,
                cp_group=self.cp_group,
            )
        return output, None
