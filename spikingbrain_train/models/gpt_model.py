"""The decoder: megatron-core's GPTModel with one spec per layer, sinks in front of the text, an exact loss.

The loss is over the unpadded vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from torch import Tensor

from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.architecture.trained_weights import trains_in_part
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import (
    ContextParallelConfig,
    KernelConfig,
    TokenPermutationBackend,
)
from spikingbrain_train.models.layer_specs import block_spec, layer_build
from spikingbrain_train.models.output_head import vocab_parallel_linear_cross_entropy
from spikingbrain_train.models.rotary import RotaryPositions
from spikingbrain_train.models.transformer_config import HybridTransformerConfig
from spikingbrain_train.ops.linear_cross_entropy import TokenLosses


class SinkEmbedding(torch.nn.Module):
    """Learnable tokens in front of every sequence (SpikingBrain, arXiv 2509.05276, section 2.2)."""

    def __init__(self, num_sink_tokens: int, config: TransformerConfig) -> None:
        super().__init__()
        weight = torch.empty(num_sink_tokens, config.hidden_size, dtype=config.params_dtype)
        self.weight = torch.nn.Parameter(weight)
        self.weight.is_new_parameter = True  # type: ignore[attr-defined]
        if config.perform_initialization:
            torch.nn.init.normal_(self.weight, std=config.init_method_std)

    def forward(self, embeddings_TBD: Tensor, layout: SequenceLayout) -> Tensor:
        """Text embeddings of this rank with the sinks in front where it holds them: [slice_length, B, D]."""
        if layout.local_sink_tokens == 0:
            # Other context-parallel ranks have no sinks, but their data-parallel buckets wait for a gradient.
            return embeddings_TBD + 0.0 * self.weight.sum()
        sinks_NBD = self.weight.unsqueeze(1).expand(-1, embeddings_TBD.shape[1], -1)
        return torch.cat((sinks_NBD, embeddings_TBD))


class HybridGPTModel(GPTModel):
    """GPTModel whose layers differ in their mixers and feed-forwards.

    Added to megatron-core's model: sequences may start with sinks, hold several documents and be split in
    contiguous slices over context-parallel ranks; the loss is computed from hidden states in chunks of
    tokens, so the float32 logits of a whole sequence never exist and padded vocabulary rows take no part in
    the softmax; and the final hidden states can be returned instead, for distillation.

    Args:
        model: architecture.
        config: megatron-core's view of it.
        kernels: resolved kernel choices.
        context_parallel: how mixers work on split sequences.
        pre_process: this stage embeds tokens.
        post_process: this stage computes logits and losses.
        vp_stage: number of this stage among the virtual ones of its rank; None where there are none.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: HybridTransformerConfig,
        kernels: KernelConfig,
        context_parallel: ContextParallelConfig | None = None,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(
                layer_build(
                    *(model, kernels, context_parallel),
                    replicates_experts=config.replicate_expert_load is not None,
                ),
                get_transformer_layer_offset(config, vp_stage),
                get_num_layers_to_build(config, vp_stage),
                config.fp8_linears,
            ),
            vocab_size=model.padded_vocab_size(config.tensor_model_parallel_size),
            max_sequence_length=model.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            scatter_embedding_sequence_parallel=False,  # sinks join before the sequence is split
            vp_stage=vp_stage,
        )
        self.model_config = model
        self.kernels = kernels
        self.rotary_pos_emb = RotaryPositions(model, on_cpu=config.use_cpu_initialization)
        if pre_process and model.num_sink_tokens > 0:
            self.sink_embedding = SinkEmbedding(model.num_sink_tokens, config)
        self._stop_at_hidden_states = False

    @property
    def chunks(self) -> list[HybridGPTModel]:
        """This stage as a list: see :class:`ModelChunks`."""
        return [self]

    @property
    def layers(self) -> list[TransformerLayer]:
        """The decoder layers of this stage."""
        return list(self.decoder.layers)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        *,
        layout: SequenceLayout | None = None,
        return_hidden_states: bool = False,
    ) -> Tensor | tuple[Tensor, TokenLosses]:
        """Run this pipeline stage.

        Args:
            tokens: [B, T] int64 token ids: the text that this rank holds.
            labels: [B, T] int64 next tokens; None asks for logits.
            loss_weights: [B, T] float32 weight of each token's loss; None weighs all 1.
            layout: how the sequences lie on context-parallel ranks, their sinks and documents; None is one
                document a row, all of it here.
            return_hidden_states: on the last stage, stop at the final hidden states.

        Returns:
            Before the last stage: hidden states [layout.slice_length, B, hidden_size], sinks included. On the
            last stage: with labels the weighted sum of losses (scalar float32) and the per-token losses; the
            final hidden states [layout.slice_length, B, hidden_size] if asked for; else logits [B, T, padded
            vocabulary of this tensor-parallel rank]. Under sequence parallelism the first dimension of hidden
            states is this rank's share.
        """
        if layout is None:
            layout = SequenceLayout(tokens.shape[1], self.model_config.num_sink_tokens)
        if loss_weights is None and labels is not None:
            loss_weights = torch.ones_like(labels, dtype=torch.float32)
        self._stop_at_hidden_states = return_hidden_states
        return super().forward(
            input_ids=tokens,
            position_ids=None,
            attention_mask=None,
            decoder_input=self.embed(tokens, layout) if self.pre_process else None,
            labels=labels,
            loss_mask=loss_weights,
            packed_seq_params=layout,
        )

    def embed(self, tokens: Tensor, layout: SequenceLayout) -> Tensor:
        """Hidden states [slice_length, B, hidden_size] in front of the first layer.

        Under sequence parallelism a share of them.
        """
        embeddings = self.embedding(tokens, None)
        if torch.is_grad_enabled() and trains_in_part(self.model_config) and not embeddings.requires_grad:
            # Where the embedding is frozen: layers that are computed again need an input with a gradient.
            embeddings.requires_grad_()
        if self.model_config.num_sink_tokens > 0:
            embeddings = self.sink_embedding(embeddings, layout)
        elif layout.local_sink_tokens > 0:
            assert layout.sinks_are_padding, "the layout has sinks but the model has none"
            padding = embeddings.new_zeros(layout.local_sink_tokens, *embeddings.shape[1:])
            embeddings = torch.cat((padding, embeddings))
        if self.config.sequence_parallel:
            return scatter_to_sequence_parallel_region(embeddings, group=self.pg_collection.tp)
        return embeddings

    def output_weight(self) -> Tensor:
        """This rank's output projection: [padded vocab_size / tensor_model_parallel_size, hidden_size]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _postprocess(
        self,
        hidden_states: Tensor,
        *args: object,
        packed_seq_params: SequenceLayout,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor | tuple[Tensor, TokenLosses]:
        if not self.post_process or self._stop_at_hidden_states:
            return hidden_states
        sinks = packed_seq_params.local_sink_tokens
        if labels is None:
            logits = super()._postprocess(
                hidden_states, *args, labels=None, packed_seq_params=packed_seq_params, **kwargs
            )
            return logits[:, sinks:]
        assert loss_mask is not None  # forward() gives labels without weights a weight of 1
        return vocab_parallel_linear_cross_entropy(
            hidden_states,
            self.output_weight(),
            labels,
            loss_mask,
            num_sink_tokens=sinks,
            vocab_size=self.model_config.vocab_size,
            sequence_parallel=self.config.sequence_parallel,
            tp_group=self.pg_collection.tp,
        )


class ModelChunks(torch.nn.ModuleList):
    """The virtual pipeline stages of a rank, with stages of other ranks in between.

    It has what a :class:`HybridGPTModel` has but for a forward pass, which megatron-core's interleaved
    schedule makes through one chunk after the other. Names of weights begin with the number of their chunk;
    in a checkpoint they are those of the whole model.
    """

    def __init__(self, chunks: Sequence[HybridGPTModel]) -> None:
        super().__init__(chunks)

    @property
    def chunks(self) -> list[HybridGPTModel]:
        """In the order of the model: the first rank's first one embeds, the last rank's last has the loss."""
        return [cast(HybridGPTModel, chunk) for chunk in self]

    @property
    def layers(self) -> list[TransformerLayer]:
        """The decoder layers of this rank."""
        return [layer for chunk in self.chunks for layer in chunk.layers]

    @property
    def model_config(self) -> ModelConfig:
        """Of the whole model."""
        return self.chunks[0].model_config

    @property
    def config(self) -> TransformerConfig:
        """megatron-core's view of it, which all chunks share."""
        return self.chunks[0].config

    @property
    def kernels(self) -> KernelConfig:
        """Resolved kernel choices."""
        return self.chunks[0].kernels

    @property
    def pg_collection(self) -> ProcessGroupCollection:
        """megatron-core's process groups."""
        return self.chunks[0].pg_collection

    @property
    def rotary_pos_emb(self) -> RotaryPositions:
        """The same of all chunks."""
        return self.chunks[0].rotary_pos_emb

    def output_weight(self) -> Tensor:
        """See :meth:`HybridGPTModel.output_weight`; on the last rank."""
        return self.chunks[-1].output_weight()

    def sharded_state_dict(self, *, metadata: dict[str, Any]) -> dict[str, Any]:
        """Name -> its share of a tensor of the checkpoint, of all chunks."""
        return {
            f"{number}.{name}": share
            for number, chunk in enumerate(self.chunks)
            for name, share in chunk.sharded_state_dict(metadata=dict(metadata)).items()
        }


def build_model(
    model: ModelConfig,
    config: HybridTransformerConfig,
    kernels: KernelConfig,
    device: torch.device,
    context_parallel: ContextParallelConfig | None = None,
) -> HybridGPTModel | ModelChunks:
    """Build this rank's pipeline stage, or its virtual ones, on ``device``.

    Process groups must be initialised.
    """
    config.moe_permute_fusion = kernels.token_permutation is TokenPermutationBackend.transformer_engine
    virtual = config.virtual_pipeline_model_parallel_size
    stages: list[int | None] = [None] if virtual is None else list(range(virtual))
    with torch.device(device):
        chunks = [
            HybridGPTModel(
                model,
                config,
                kernels,
                context_parallel,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                vp_stage=stage,
            ).to(device)
            for stage in stages
        ]
    for chunk in chunks:
        _mark_split_weights(chunk)
    return chunks[0] if virtual is None else ModelChunks(chunks)


def _mark_split_weights(model: HybridGPTModel) -> None:
    """Say which weights are split over tensor-parallel ranks.

    megatron-core marks them while it fills them with random numbers, so a model that skips initialisation
    because a checkpoint follows would count only rank 0's share in the gradient norm.
    """
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            partition_dim = 0
        elif isinstance(module, RowParallelLinear):
            partition_dim = 1
        else:
            continue
        weight = module.weight
        if weight is not None and not getattr(weight, "tensor_model_parallel", False):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=partition_dim, stride=1)
