"""The router of mixture-of-experts layers: softmax, then top-k, with losses that no topology changes."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, apply_router_token_dropping
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from spikingbrain_train.config.model import RouterWeights
from spikingbrain_train.config.parallel import Recompute
from spikingbrain_train.models.feed_forwards.routing import RouterStatistics
from spikingbrain_train.models.transformer_config import HybridTransformerConfig


class SequenceBalancedRouter(TopKRouter):
    """megatron-core's TopKRouter whose losses are those of whole sequences.

    A token's probabilities are the softmax over all experts in float32; its experts are the top k of them and
    their outputs are weighted by those probabilities as they are: with a zero router every weight is
    1 / num_experts. Logits are ``W x``, or ``W tanh(H x)`` of a router with a hidden layer
    (``router_hidden_size``; MoEfication, arXiv 2110.01786), plus a bias of each expert that no gradient
    changes (``router_bias``). With ``norm_topk_prob`` they are made to add up to 1; with
    ``router_weights=ones`` every weight is 1, and has the gradient of the probability.

    Losses (weights ``moe_aux_loss_coeff`` and ``moe_z_loss_coeff``; Fedus et al., arXiv 2101.03961, eq. 4;
    Zoph et al., arXiv 2202.08906, eq. 5). For one sequence of T routed tokens, sinks included::

        aux = num_experts * sum_e f_e P_e,  f_e = assignments to e / (T k),  P_e = mean probability of e
        z   = mean over tokens of logsumexp(logits)^2

    ``f`` is counted over the tensor- and context-parallel ranks that share a sequence, so the losses do not
    depend on the topology or the micro-batch size; megatron-core's own ``aux_loss`` is over a micro-batch,
    and in 0.16 its weight shrinks with tensor x context ranks. A sequence weighs in as many times as it has
    tokens, like the cross entropy, of which the training step takes the mean per token; a stage where few
    tokens carry loss scales them (:meth:`scale_auxiliary_loss`).

    With a capacity factor every rank drops on its own share of the micro-batch, so that all send the same
    shapes: which tokens are dropped then depends on how sequences are split (TP with sequence parallelism,
    CP) and batched, and only on that.
    """

    auxiliary_metric = None
    """Its losses are reported without their weights (training/callbacks/expert_load.py)."""

    def __init__(
        self,
        config: HybridTransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        **kwargs: Any,  # 0.19 adds some
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **kwargs)
        self._add_weights()
        for weight in self.parameters(recurse=False):
            weight.is_new_parameter = True
        size = self.num_experts + RouterStatistics.NUM_SCALARS
        self.register_buffer("statistics_sums", torch.zeros(size, dtype=torch.float64), persistent=False)
        self._loss_scale: Tensor | None = None

    def _add_weights(self) -> None:
        """The hidden layer and biases, for those routers that have them."""
        hidden_size: int | None = self.config.router_hidden_size
        self.hidden_weight: torch.nn.Parameter | None = None
        if hidden_size is not None:
            self.weight = self._parameter(self.num_experts, hidden_size)
            self.hidden_weight = self._parameter(hidden_size, self.config.hidden_size)
        if self.config.router_bias:
            del self.bias  # megatron-core's, which is None
            # float32 in every precision: it moves by small steps.
            zeros = torch.zeros(self.num_experts, dtype=torch.float32, device=self.weight.device)
            self.register_buffer("bias", zeros)

    def _parameter(self, rows: int, columns: int) -> torch.nn.Parameter:
        """As megatron-core makes the weight of a router: on every rank, whole."""
        values = torch.empty(rows, columns, dtype=torch.float32, device=self.weight.device)
        if self.config.perform_initialization:
            self.config.init_method(values)
        parameter = torch.nn.Parameter(values.to(self.config.params_dtype))
        parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        return parameter

    def step_done(self, step: int) -> None:
        """Biases go to zero in equal steps, the last of which is ``router_bias_decay_iters``.

        Args:
            step: that is done, counted from 1.
        """
        left = self.config.router_bias_decay_iters - step
        if self.bias is not None and left >= 0:
            self.bias.mul_(left / (left + 1))

    def scale_auxiliary_loss(self, scale: Tensor) -> None:
        """Weigh both losses by ``scale``, [], from the next forward pass on."""
        self._loss_scale = scale

    def reset_statistics(self) -> None:
        """Start counting anew; called at the start of every training step."""
        self.statistics_sums.zero_()

    def statistics(self) -> Tensor:
        """Sums since then: [num_experts + RouterStatistics.NUM_SCALARS], float64."""
        return self.statistics_sums

    def auxiliary_loss(self) -> Tensor:
        """[] float64: what both losses, weighted, add to the sum of token losses; this rank's share."""
        sums = RouterStatistics.unpack(self.statistics_sums)
        return self._weighted(sums.aux_loss, sums.z_loss)

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route the tokens of this rank.

        Args:
            input: [T, B, hidden_size].
            padding_mask: must be None; every token is routed.

        Returns:
            Probabilities [T * B, num_experts] float32, zero where a token is not routed to an expert, and the
            bool routing map. Under padding to capacity the map also holds tokens of probability 0.
        """
        assert padding_mask is None, "tokens are never masked out of routing"
        levels = (Recompute.moe_activation, Recompute.moe_feed_forward)
        if self.config.recompute in levels and self.training:
            return tensor_parallel.checkpoint(self._route, False, input)
        return self._route(input)

    def _route(self, hidden_TBD: Tensor) -> tuple[Tensor, Tensor]:
        return self.routing(self.gating(hidden_TBD))

    def gating(self, input: Tensor) -> Tensor:
        """Logits [T, B, num_experts] float32, whatever the dtype of input and weight."""
        inside: Tensor = input
        if self.hidden_weight is not None:
            inside = torch.tanh(_Float32Linear.apply(input, self.hidden_weight))
        logits: Tensor = _Float32Linear.apply(inside, self.weight)
        return logits if self.bias is None else logits + self.bias

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts from logits [T, B, num_experts]; see :meth:`forward`."""
        scores_TBE = torch.softmax(logits, dim=-1)
        chosen = scores_TBE.detach().topk(self.topk, dim=-1).indices
        map_TBE = torch.zeros_like(scores_TBE, dtype=torch.bool).scatter_(-1, chosen, True)
        probs, routing_map = (scores_TBE * map_TBE).flatten(0, 1), map_TBE.flatten(0, 1)
        if self.config.norm_topk_prob:
            probs = probs / probs.sum(-1, keepdim=True)
        if self.config.router_weights is RouterWeights.ones:
            # Exactly 1 or 0, with the gradient of the probability: x - x is 0.
            probs = routing_map + (probs - probs.detach())
        if self.config.moe_expert_capacity_factor is not None:
            probs, routing_map = apply_router_token_dropping(
                probs,
                routing_map,
                router_topk=self.topk,
                capacity_factor=self.config.moe_expert_capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
                pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
            )
        # Recomputation runs this twice, and only the second time with gradients: nothing counts double.
        if self.training and torch.is_grad_enabled():
            aux_loss, z_loss = self._losses(logits, scores_TBE, map_TBE)
            probs = MoEAuxLossAutoScaler.apply(probs, self._weighted(aux_loss, z_loss))
            kept = (routing_map & map_TBE.flatten(0, 1)).sum()
            self._count(map_TBE, kept, aux_loss.detach(), z_loss.detach())
        return probs, routing_map

    def _weighted(self, aux_loss: Tensor, z_loss: Tensor) -> Tensor:
        loss = self.config.moe_aux_loss_coeff * aux_loss + self.config.moe_z_loss_coeff * z_loss
        return loss if self._loss_scale is None else loss * self._loss_scale

    def _losses(self, logits_TBE: Tensor, scores_TBE: Tensor, map_TBE: Tensor) -> tuple[Tensor, Tensor]:
        """This rank's share of both losses, each sequence weighted by its number of tokens."""
        assignments_BE = map_TBE.sum(0, dtype=torch.float32)
        if self.tp_cp_group.size() > 1:
            torch.distributed.all_reduce(assignments_BE, group=self.tp_cp_group)
        tokens = logits_TBE.shape[0] * self.tp_cp_group.size()  # of one sequence, over all its ranks
        share_BE = assignments_BE / (tokens * self.topk)
        # tokens * aux = num_experts * sum_e f_e (sum of probabilities of e): a sum over ranks.
        aux_loss = self.num_experts * (share_BE * scores_TBE.sum(0)).sum()
        return aux_loss, logits_TBE.logsumexp(-1).square().sum()

    def _count(self, map_TBE: Tensor, kept: Tensor, aux_loss: Tensor, z_loss: Tensor) -> None:
        assignments_E = map_TBE.sum((0, 1))
        tokens = assignments_E.new_full((), map_TBE[..., 0].numel())
        scalars = torch.stack([x.double() for x in (assignments_E.sum() - kept, tokens, aux_loss, z_loss)])
        self.statistics_sums += torch.cat((assignments_E.double(), scalars))


class _Float32Linear(torch.autograd.Function):
    """``x W^T`` in float32 that keeps ``x`` and ``W`` in their own dtype for the backward pass.

    megatron-core's RouterGatingLinearFunction does the same but in 0.16 needs Transformer Engine to be
    installed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.linear(x.float(), weight.float())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2).float()
        return (grad @ weight.float()).to(x.dtype), grad_weight.to(weight.dtype)
