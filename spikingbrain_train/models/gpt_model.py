"""The decoder: megatron-core's GPTModel with one spec per layer, exact loss over the unpadded vocabulary."""

from __future__ import annotations

import math

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from spikingbrain_train.config.model import ModelConfig, RopeScalingConfig
from spikingbrain_train.config.parallel import KernelConfig
from spikingbrain_train.models.layer_specs import block_spec
from spikingbrain_train.models.output_head import vocab_parallel_linear_cross_entropy
from spikingbrain_train.ops.linear_cross_entropy import TokenLosses


class HybridGPTModel(GPTModel):
    """GPTModel whose layers differ in their mixers.

    Two things are added to megatron-core's model: the loss is computed from hidden states in chunks of
    tokens, so the float32 logits of a whole sequence never exist and padded vocabulary rows take no part in
    the softmax; and the final hidden states can be returned instead, for distillation.

    Args:
        model: architecture.
        config: megatron-core's view of it.
        kernels: resolved kernel choices.
        pre_process: this stage embeds tokens.
        post_process: this stage computes logits and losses.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        kernels: KernelConfig,
        *,
        pre_process: bool = True,
        post_process: bool = True,
    ) -> None:
        layers_per_stage = config.num_layers // config.pipeline_model_parallel_size
        first_layer = parallel_state.get_pipeline_model_parallel_rank() * layers_per_stage
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(model, kernels, first_layer, layers_per_stage),
            vocab_size=model.padded_vocab_size(config.tensor_model_parallel_size),
            max_sequence_length=model.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=model.rotary_base,
        )
        self.model_config = model
        self._stop_at_hidden_states = False
        if model.rope_scaling.factor != 1.0:
            self.rotary_pos_emb.inv_freq = scale_rotary_frequencies(
                self.rotary_pos_emb.inv_freq, model.rope_scaling
            )

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        *,
        return_hidden_states: bool = False,
    ) -> Tensor | tuple[Tensor, TokenLosses]:
        """Run this pipeline stage.

        Args:
            tokens: [B, T] int64 token ids.
            position_ids: [B, T] int64.
            labels: [B, T] int64 next tokens; None asks for logits.
            loss_weights: [B, T] float32 weight of each token's loss; None weighs all 1.
            return_hidden_states: on the last stage, stop at the final hidden states.

        Returns:
            Before the last stage: hidden states [T, B, hidden_size]. On the last stage: with labels the
            weighted sum of losses (scalar float32) and the per-token losses; the final hidden states [T, B,
            hidden_size] if asked for; else logits [B, T, padded vocabulary of this tensor-parallel rank].
            Under sequence parallelism the T of hidden states is this rank's share.
        """
        if loss_weights is None and labels is not None:
            loss_weights = torch.ones_like(labels, dtype=torch.float32)
        self._stop_at_hidden_states = return_hidden_states
        return super().forward(
            input_ids=tokens,
            position_ids=position_ids,
            attention_mask=None,
            labels=labels,
            loss_mask=loss_weights,
        )

    def output_weight(self) -> Tensor:
        """This rank's output projection: [padded vocab_size / tensor_model_parallel_size, hidden_size]."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _postprocess(
        self,
        hidden_states: Tensor,
        *args: object,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        **kwargs: object,
    ) -> Tensor | tuple[Tensor, TokenLosses]:
        if not self.post_process or self._stop_at_hidden_states:
            return hidden_states
        if labels is None:
            return super()._postprocess(hidden_states, *args, labels=None, **kwargs)
        assert loss_mask is not None  # forward() gives labels without weights a weight of 1
        return vocab_parallel_linear_cross_entropy(
            hidden_states,
            self.output_weight(),
            labels,
            loss_mask,
            vocab_size=self.model_config.vocab_size,
            sequence_parallel=self.config.sequence_parallel,
            tp_group=self.pg_collection.tp,
        )


def scale_rotary_frequencies(inv_freq: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Llama-3 frequency scaling: long wavelengths slow down by ``factor``, short ones stay, a ramp between.

    Args:
        inv_freq: [kv_channels / 2] float32 angular frequencies per token.
        scaling: its parameters.
    """
    original = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq


def build_model(
    model: ModelConfig,
    config: TransformerConfig,
    kernels: KernelConfig,
    device: torch.device,
) -> HybridGPTModel:
    """Build this rank's pipeline stage on ``device``. Process groups must be initialised."""
    with torch.device(device):
        built = HybridGPTModel(
            model,
            config,
            kernels,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        ).to(device)
    _mark_split_weights(built)
    return built


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
