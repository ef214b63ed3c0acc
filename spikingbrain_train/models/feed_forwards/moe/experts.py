"""The feed-forwards of a mixture-of-experts layer, with the recomputation levels of SpikingBrain.

Routed experts come in three forms with the same mathematics and the same keys in checkpoints: one after the
other (any platform), Transformer Engine's grouped GEMM, and the grouped_gemm package's through megatron-core
0.16's GroupedMLP (GPUs without Transformer Engine).

Levels (SpikingBrain, arXiv 2509.05276, section 4.1). ``moe_activation`` keeps the output of the first
projection and computes the activation again; ``moe_feed_forward`` keeps only an expert's input. The router,
computed again in both, is in router.py beside this file, and what is computed again because many tokens came
in busy_experts.py; the shared expert's part of the second level, dense feed-forwards and whole layers are
megatron-core's ``recompute_modules`` (see transformer_config). Where the
second projection reads spikes, it keeps them, so that the first level frees nothing but the router's part.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl, weighted_bias_swiglu_impl
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe import experts as megatron_experts
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor
from torch.distributed import ProcessGroup

from spikingbrain_train.config.parallel import Recompute
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.models.feed_forwards.gated_activation import with_activation
from spikingbrain_train.models.feed_forwards.moe.busy_experts import Grouped, computed_again, in_two_groups
from spikingbrain_train.models.transformer_config import HybridTransformerConfig
from spikingbrain_train.runtime.megatron_versions import HAS_GROUPED_MLP


def _activation(gate_up: Tensor, scale: Tensor | None, *, mlp: MLP) -> Tensor:
    """act(gate) * up, times ``scale`` [tokens] where tokens are weighted, in the dtype of ``gate_up``."""
    fused = mlp.config.bias_activation_fusion
    if fused and scale is not None:
        return weighted_bias_swiglu_impl(gate_up, None, scale.unsqueeze(-1), False)
    if fused:
        return bias_swiglu_impl(gate_up, None)
    if mlp.config.use_te_activation_func:
        activation = mlp.activation_func(gate_up)
    else:
        gate, up = gate_up.chunk(2, dim=-1)
        activation = torch.nn.functional.silu(gate) * up
    return activation if scale is None else (activation * scale.unsqueeze(-1)).to(gate_up.dtype)


def _forward_with_recomputed_activation(mlp: MLP, hidden: Tensor, scale: Tensor | None = None) -> Tensor:
    """``mlp(hidden, scale)`` whose activation is freed after use and computed again for the backward pass."""
    gate_up, _ = mlp.linear_fc1(hidden)
    # None says "no FP8": megatron-core asks `fp8 is not None`.
    checkpoint = CheckpointWithoutOutput(fp8=None)
    activation = checkpoint.checkpoint(partial(_activation, mlp=mlp), gate_up, scale)
    output, _ = mlp.linear_fc2(activation)
    checkpoint.discard_output_and_register_recompute(output)
    return output


class _RoutedExperts(torch.nn.Module):
    """What all forms of routed experts have in common; stands before megatron-core's class."""

    config: HybridTransformerConfig
    ep_group: ProcessGroup
    num_local_experts: int
    activation_recompute: bool = False
    """Of grouped experts: megatron-core's own word for the first level."""

    def forward(
        self, hidden: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The experts of this rank on the tokens sent to it.

        Args:
            hidden: [tokens, hidden_size], sorted by expert.
            tokens_per_expert: [local experts] int64, on the CPU.
            probs: [tokens] float32 weight of each token's output.
        """
        if self.config.recompute is Recompute.moe_feed_forward and self.training:
            return tensor_parallel.checkpoint(super().forward, False, hidden, tokens_per_expert, probs)
        most_tokens = self.config.most_expert_tokens
        if most_tokens is None or not self.training:
            return super().forward(hidden, tokens_per_expert, probs)
        again = partial(self._wholly_again, super().forward)
        return in_two_groups(super().forward, again, hidden, tokens_per_expert, probs, most_tokens), None

    def _wholly_again(self, grouped: Grouped, hidden: Tensor, sizes: Tensor, probs: Tensor) -> Tensor:
        def whole(hidden: Tensor, probs: Tensor) -> Tensor:
            level, self.activation_recompute = self.activation_recompute, False  # it would be done twice
            try:
                return grouped(hidden, sizes, probs)[0]
            finally:
                self.activation_recompute = level

        return computed_again(self, whole, hidden, probs)

    def weights_of_experts(self, numbers: Collection[int]) -> Iterator[torch.nn.Parameter]:
        """See :class:`~spikingbrain_train.models.feed_forwards.routing.HoldsExperts`."""
        first = self.ep_group.rank() * self.num_local_experts
        for local in range(self.num_local_experts):
            if first + local in numbers:
                yield from self._weights_of(local)

    def _weights_of(self, expert: int) -> Iterable[torch.nn.Parameter]:
        """The weights of one expert of this rank, counted from 0."""
        raise NotImplementedError

    def _mark_parameters(self) -> None:
        """Hand the weights to megatron-core's expert data-parallel groups and expert optimizer.

        megatron-core does so only where experts are spread over ranks. Doing it always gives optimizer states
        of the same form at every degree, and sums the gradients over tensor-parallel ranks that hold the same
        whole experts (expert_tensor_parallel_size=1).
        """
        for parameter in self.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]


class SequentialExperts(_RoutedExperts, SequentialMLP):
    """One expert after the other.

    On the CPU their initial weights do not depend on how experts are spread: every rank draws those of all
    experts and keeps its own. On GPUs each rank draws its own, as it does for its share of a dense layer.
    """

    local_experts: torch.nn.ModuleList

    def __init__(
        self,
        num_local_experts: int,
        config: HybridTransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection,
        **kwargs: Any,  # 0.19 adds a name
    ) -> None:
        draws_all = config.use_cpu_initialization and config.perform_initialization
        number = config.num_moe_experts if draws_all else num_local_experts
        super().__init__(number, with_activation(config), submodules, pg_collection=pg_collection, **kwargs)
        if draws_all:
            first = pg_collection.ep.rank() * num_local_experts
            own = list(self.local_experts)[first : first + num_local_experts]
            self.local_experts = torch.nn.ModuleList(own)
            self.num_local_experts = num_local_experts
        self._mark_parameters()

    def _weights_of(self, expert: int) -> Iterable[torch.nn.Parameter]:
        return self.local_experts[expert].parameters()

    def forward(
        self, hidden: Tensor, tokens_per_expert: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`_RoutedExperts`."""
        level, most_tokens = self.config.recompute, self.config.most_expert_tokens
        by_itself = level is Recompute.moe_activation or most_tokens is not None
        if not by_itself or not self.training:
            return super().forward(hidden, tokens_per_expert, probs)
        sizes = tokens_per_expert.tolist()
        inputs = zip(self.local_experts, hidden.split(sizes), probs.split(sizes), strict=True)
        return torch.cat([self._one_expert(*each) for each in inputs]), None

    def _one_expert(self, expert: MLP, hidden: Tensor, probs: Tensor) -> Tensor:
        most_tokens = self.config.most_expert_tokens
        if most_tokens is not None and len(hidden) > most_tokens:
            return computed_again(expert, lambda *inputs: expert(*inputs)[0], hidden, probs)
        if self.config.recompute is Recompute.moe_activation:
            return _forward_with_recomputed_activation(expert, hidden, probs)
        output: Tensor = expert(hidden, probs)[0]
        return output


class TEGroupedExperts(_RoutedExperts, TEGroupedMLP):
    """All experts of a rank in one grouped GEMM of Transformer Engine."""

    def __init__(
        self, num_local_experts: int, config: HybridTransformerConfig, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(num_local_experts, with_activation(config), *args, **kwargs)
        self.activation_recompute = self.config.recompute is Recompute.moe_activation
        # They multiply twice in a micro-batch, and Transformer Engine's first product of a step overwrites
        # the gradient of the second, which comes before it (models/weight_gradients.py).
        self.weights_have_other_uses = self.config.most_expert_tokens is not None
        self._mark_parameters()

    def _weights_of(self, expert: int) -> Iterable[torch.nn.Parameter]:
        return [getattr(linear, f"weight{expert}") for linear in (self.linear_fc1, self.linear_fc2)]


if HAS_GROUPED_MLP:

    class GroupedGemmExperts(_RoutedExperts, megatron_experts.GroupedMLP):
        """All experts of a rank in one grouped GEMM of the grouped_gemm package.

        Holds the weights itself, so it has no linears whose inputs or weights could be transformed.
        """

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.activation_recompute = self.config.recompute is Recompute.moe_activation
            self._mark_parameters()
            if not self.config.perform_initialization:
                # megatron-core marks split weights while it fills them; the gradient norm asks for the mark.
                for weight, dim in ((self.weight1, 1), (self.weight2, 0)):
                    set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)

        def _weights_of(self, expert: int) -> Iterable[torch.nn.Parameter]:
            raise ConfigurationError(
                "model.moe.trained trains some experts alone, but cluster.kernels.experts=grouped_gemm has "
                "all of a rank in one parameter; choose sequential, or transformer_engine where it is there"
            )


class SharedExperts(SharedExpertMLP):
    """The experts of every token, as one wide feed-forward whose output no gate weighs."""

    config: HybridTransformerConfig

    def __init__(self, config: HybridTransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(with_activation(config), *args, **kwargs)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[T, B, hidden_size] -> the same shape."""
        if self.config.recompute is Recompute.moe_activation and self.training:
            return _forward_with_recomputed_activation(self, hidden_states)
        return super().forward(hidden_states)
