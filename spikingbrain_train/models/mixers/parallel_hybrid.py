"""Two branches over the same input: softmax attention beside gated linear attention, as in SpikingBrain-76B.

    y = w1 RMSNorm(o_softmax) + w2 RMSNorm(o_linear)        (SpikingBrain, arXiv 2509.05276, eq. 6 and fig. 3)

Each branch is a whole mixer with q/k/v and output projections of its own. The report says that branch outputs
are normed and weighted. It does not say whether branches share projections, where the norms stand, and
whether w1 and w2 learn; that is decided here. The norms stand behind the output projections: a norm in front
would blow up heads that attend to nothing and undo the balance between heads that the source has learnt. w1
and w2 are parameters, so that a converted model can start as its softmax branch alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor

from spikingbrain_train.config.model import ParallelHybridConfig
from spikingbrain_train.models.rms_norm import RMSNorm


@dataclass
class ParallelHybridSubmodules:
    """The two branches, each a drop-in for ``self_attention``."""

    softmax_attention: ModuleSpec
    linear_attention: ModuleSpec


class ParallelHybrid(MegatronModule):
    """A drop-in for SelfAttention that mixes a softmax and a linear branch.

    New parameters beside those of the branches: ``softmax_norm`` and ``linear_norm`` (one weight of hidden
    width each) and ``branch_weights`` [2] = (w1, w2).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: ParallelHybridSubmodules,
        layer_number: int,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        parallel_hybrid: ParallelHybridConfig,
        **kwargs: object,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        branch = {
            "config": config,
            "layer_number": layer_number,
            "cp_comm_type": cp_comm_type,
            "pg_collection": pg_collection,
            **kwargs,
        }
        self.softmax_attention = build_module(submodules.softmax_attention, **branch)
        self.linear_attention = build_module(submodules.linear_attention, **branch)
        self.softmax_norm = RMSNorm(config, config.hidden_size, eps=config.layernorm_epsilon)
        self.linear_norm = RMSNorm(config, config.hidden_size, eps=config.layernorm_epsilon)
        self.branch_weights = torch.nn.Parameter(
            torch.tensor(
                [parallel_hybrid.init_softmax_weight, parallel_hybrid.init_linear_weight],
                dtype=config.params_dtype,
            )
        )
        # Under sequence parallelism each rank mixes its own share of the sequence: its gradient is a partial
        # sum, which this mark makes megatron-core add up.
        self.branch_weights.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        for parameter in (self.softmax_norm.weight, self.linear_norm.weight, self.branch_weights):
            parameter.is_new_parameter = True  # type: ignore[attr-defined]

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: object
    ) -> tuple[Tensor, None]:
        """Mix along the sequence.

        Args:
            hidden_states: [T, B, hidden_size] normed input, as for either branch.
            attention_mask: must be None.
            kwargs: what megatron-core's layer gives to ``self_attention``, for both branches.

        Returns:
            Output of the same shape, and no bias.
        """
        o_softmax, _ = self.softmax_attention(hidden_states, attention_mask, **kwargs)
        o_linear, _ = self.linear_attention(hidden_states, attention_mask, **kwargs)
        w_softmax, w_linear = self.branch_weights.unbind()
        return w_softmax * self.softmax_norm(o_softmax) + w_linear * self.linear_norm(o_linear), None
