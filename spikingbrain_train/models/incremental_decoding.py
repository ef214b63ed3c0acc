"""A model that reads a text piece by piece: every layer's mixer remembers what it has seen.

See :mod:`~spikingbrain_train.models.mixers.decoding` for what a mixer does. All else in a layer works on each
token alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from spikingbrain_train.architecture.layers import mixers_of
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import KernelConfig
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.models.layer_specs import layer_build
from spikingbrain_train.models.mixers import decoding
from spikingbrain_train.models.mixers.decoding import CacheSize, DecodingState, decodes_by_step
from spikingbrain_train.models.output_head import vocab_parallel_logits
from spikingbrain_train.parallel.forward_passes import pass_forward


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
    work; context and sequence parallelism do not, because one token cannot be split.

    A long beginning may be read in pieces. What a layer computes with takes memory for one piece then, and
    what remains between them are recurrent states, windows, and keys and values of full attention.

    Args:
        model: this rank's pipeline stage. It is put into evaluation mode, and is good for decoding alone
            until :meth:`release`.
    """

    def __init__(self, model: HybridGPTModel | ModelChunks) -> None:
        config = model.config
        assert config.context_parallel_size == 1 and not config.sequence_parallel, "a token cannot be split"
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
            piece_length: tokens that are read at a time; None: all.

        Returns:
            Logits of the token that follows, [B, vocab_size] float32, on every rank of the last pipeline
            stage; None elsewhere.
        """
        end = self._num_tokens + tokens_BT.shape[1]
        logits_BV = None
        for piece_BT in tokens_BT.split(piece_length or tokens_BT.shape[1], dim=1):
            piece = range(self._num_tokens, self._num_tokens + piece_BT.shape[1])
            sinks = self.model.model_config.num_sink_tokens
            logits_BV = self._read_piece(piece_BT, SequenceLayout.of_piece(piece, end, sinks))
            self._num_tokens = piece.stop
        return logits_BV

    def _read_piece(self, tokens_BT: Tensor, layout: SequenceLayout) -> Tensor | None:
        def forward_step(iterator: Iterator[None], stage: HybridGPTModel):
            next(iterator)
            output = stage(tokens_BT, layout=layout, return_hidden_states=True)
            return output, partial(_last_logits, stage)

        results = pass_forward(
            self.model.chunks,
            forward_step,
            iter([None]),
            1,
            seq_length=layout.slice_length,
            micro_batch_size=tokens_BT.shape[0],
            collect_non_loss_data=True,
        )
        return results[0] if results else None

    def cache_size(self) -> CacheSize:
        """What this rank remembers of the text."""
        states = [mixer.state for mixer in self._mixers if mixer.state is not None]
        return sum((state.size() for state in states), CacheSize())


def _last_logits(model: HybridGPTModel, hidden_TBD: Tensor, non_loss_data: bool = True) -> Tensor:
    """[B, vocab_size] float32, of the last token alone: no other's are asked for."""
    return vocab_parallel_logits(
        hidden_TBD[-1], model.output_weight(), model.model_config.vocab_size, model.pg_collection.tp
    )


class _RememberingMixer(torch.nn.Module):
    """Stands in a layer in the place of its mixer."""

    def __init__(self, mixer: torch.nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.state: DecodingState | None = None

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
            output = decoding.decode(self.mixer, hidden_states, self.state, rotary_pos_emb=rotary_pos_emb)
        return output, None
