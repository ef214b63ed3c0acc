"""Experts that most tokens go to, computed on every rank that would send tokens to them.

One rank's experts get several times an even load while its peers wait. An expert above
``parallel.replicate_expert_load`` times the mean is replicated (hot-expert replication: SpikingBrain, arXiv
2509.05276, section 4.1; the shadow experts of FasterMoE, PPoPP 2022, section 4.1): for one micro-batch its
owner broadcasts its weights over the expert-parallel ranks, each of these computes its own tokens with them,
and the gradients of the copies are added up at the owner. Which experts that are is seen in the counts of the
micro-batch, the same on all ranks of a group. A copy is an activation: no parameter, not in checkpoints,
without optimizer state.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor
from torch.distributed import ProcessGroup

from spikingbrain_train.config.parallel import Recompute
from spikingbrain_train.models.feed_forwards.moe.busy_experts import computed_again
from spikingbrain_train.models.feed_forwards.moe.experts import SequentialExperts
from spikingbrain_train.models.transformer_config import HybridTransformerConfig
from spikingbrain_train.ops.host_numbers import on_device


class _Dispatcher(MoEAlltoAllTokenDispatcher):
    """megatron-core's for a routing map that leaves tokens out, whose number it takes to be fixed."""

    def preprocess(self, routing_map: Tensor) -> Tensor:
        counts: Tensor = super().preprocess(routing_map)
        self.num_out_tokens = routing_map.sum()
        self._maybe_update_cuda_sync_point("before_permutation_1")
        return counts


class _FromOwner(torch.autograd.Function):
    """The owner's tensor on every rank of a group; backwards the sum of all gradients at the owner."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, owner: int, group: ProcessGroup) -> Tensor:
        ctx.owner, ctx.group = torch.distributed.get_global_rank(group, owner), group
        copy = tensor.detach().clone()
        torch.distributed.broadcast(copy, ctx.owner, group=group)
        return copy

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        grad = grad.contiguous().clone()
        torch.distributed.reduce(grad, ctx.owner, group=ctx.group)
        return (grad if torch.distributed.get_rank() == ctx.owner else None), None, None


class ReplicatingMoELayer(MoELayer):
    """A mixture of experts whose busiest experts stand on every expert-parallel rank for a micro-batch."""

    config: HybridTransformerConfig
    experts: SequentialExperts
    load_sums: Tensor
    weights_have_other_uses = True
    """Experts' weights are sent to other ranks: see :mod:`spikingbrain_train.models.weight_gradients`."""

    def __init__(
        self,
        config: HybridTransformerConfig,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,  # 0.19 adds some
    ) -> None:
        super().__init__(config, submodules, layer_number, pg_collection, **kwargs)
        self._replicated: Tensor | None = None
        self.token_dispatcher = _Dispatcher(
            *(self.num_local_experts, self.local_expert_indices),
            config=self.config,
            pg_collection=pg_collection or get_default_pg_collection(),
        )
        self.register_buffer("load_sums", torch.zeros(5, dtype=torch.float64), persistent=False)

    def preprocess(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> Any:
        """Compute the replicated experts here, and leave the others to the dispatcher.

        Args:
            hidden_states: [T, B, hidden_size] of this rank.
            probs: [T * B, num_experts] float32.
            routing_map: [T * B, num_experts] bool.
        """
        self._replicated = None
        if chosen := self._chosen(routing_map):
            tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
            self._replicated = sum(
                (self._computed_here(expert, tokens, probs, routing_map) for expert in chosen),
                torch.zeros_like(tokens),
            ).view_as(hidden_states)
            routing_map = routing_map.index_fill(1, on_device(chosen, routing_map.device, torch.int64), False)
        return super().preprocess(hidden_states, probs, routing_map)

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """The output of the layer, [T, B, hidden_size]."""
        whole: Tensor = super().postprocess(output, shared_expert_output)
        replicated, self._replicated = self._replicated, None
        return whole if replicated is None else whole + replicated

    def _chosen(self, routing_map: Tensor) -> list[int]:
        """Experts above the threshold, the same ones on all ranks of the group."""
        most = self.config.replicate_expert_load
        assert most is not None, "a layer that replicates is built where the setting is there"
        counts = routing_map.sum(0)
        by_rank = [torch.empty_like(counts) for _ in range(self.ep_group.size())]
        torch.distributed.all_gather(by_rank, counts, group=self.ep_group)
        sent = torch.stack(by_rank)
        loads = sent.sum(0)
        hot = loads > most * loads.double().mean()
        # Recomputation runs this twice, and only the second time with gradients: nothing counts double.
        if self.training and torch.is_grad_enabled():
            before = loads.view(len(sent), -1).sum(1)
            after = (loads * ~hot).view(len(sent), -1).sum(1) + (sent * hot).sum(1)
            numbers = (before.max(), after.max(), before.double().mean(), hot.sum(), hot.new_ones(()))
            self.load_sums += torch.stack([each.double() for each in numbers])
        chosen: list[int] = hot.nonzero().flatten().tolist()
        return chosen

    def _computed_here(self, expert: int, tokens: Tensor, probs: Tensor, routing_map: Tensor) -> Tensor:
        """[tokens, hidden_size]: what one expert adds to the tokens of this rank."""
        owner, index = divmod(expert, self.num_local_experts)
        is_mine = owner == self.ep_group.rank()
        like = self.experts.local_experts[index]
        weights = {
            name: _FromOwner.apply(
                weight if is_mine else torch.empty_like(weight, requires_grad=weight.requires_grad),
                owner,
                self.ep_group,
            )
            for name, weight in like.named_parameters()
        }
        rows = routing_map[:, expert].nonzero().flatten()
        here = tokens[rows], probs[rows, expert]

        def compute(hidden: Tensor, scale: Tensor) -> Tensor:
            output: Tensor = torch.func.functional_call(like, weights, (hidden, scale))[0]
            return output

        again = self._is_computed_again(len(rows))
        output = computed_again(like, compute, *here) if again else compute(*here)
        return torch.zeros_like(tokens).index_add(0, rows, output)

    def _is_computed_again(self, tokens: int) -> bool:
        """Levels that compute a part of an expert again compute all of a copy."""
        most, level = self.config.most_expert_tokens, self.config.recompute
        levels = (Recompute.moe_activation, Recompute.moe_feed_forward)
        return self.training and (level in levels or (most is not None and tokens > most))
