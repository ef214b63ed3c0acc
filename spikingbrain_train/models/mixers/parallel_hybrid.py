"""Several mixers over the same input: in SpikingBrain-76B softmax and gated linear attention.

    y = w1 RMSNorm(o_softmax) + w2 RMSNorm(o_linear)        (SpikingBrain, arXiv 2509.05276, eq. 6 and fig. 3)

Each branch is a whole mixer with q/k/v and output projections of its own. The report says that branch outputs
are normed and weighted. It does not say whether branches share projections, where the norms stand, and
whether w1 and w2 learn; that is decided here. The norms stand behind the output projections: a norm in front
would blow up heads that attend to nothing and undo the balance between heads that the source has learnt. w1
and w2 are parameters, so that a converted model can start as its softmax branch alone. Any mixers can stand
beside each other; names and order are those of architecture/branches.py.

Beside softmax attention training ignores a linear branch (arXiv 2510.05901), so SpikingBrain2.0 (arXiv
2604.22575) drops the former with a probability of 0.5. ``softmax_dropout`` does so for whole sequences, in
every layer by itself. A sequence that keeps the branch is computed as evaluations compute it: nothing is
scaled up, because the layers behind have to work with the sum of the branches, not with its expectation.
"""

from __future__ import annotations

import functools
import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor
from torch.distributed import ProcessGroup

from spikingbrain_train.architecture.branches import (
    branch_names,
    dropped_branches,
    initial_branch_weights,
    module_name,
    norm_name,
)
from spikingbrain_train.architecture.mixers import MixerKind
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.models.layer_build import LayerBuild
from spikingbrain_train.models.mixers import decoding
from spikingbrain_train.models.rms_norm import RMSNorm
from spikingbrain_train.ops.host_numbers import on_device


@dataclass
class ParallelHybridSubmodules:
    """The branches by name, in the order of their weights; each a drop-in for ``self_attention``."""

    branches: dict[str, ModuleSpec]


def spec(mixers: Sequence[MixerKind], build: LayerBuild) -> ModuleSpec:
    """A layer's ``self_attention`` of several branches, in the order of their weights."""
    branches = {name: build.mixer(kind) for name, kind in zip(branch_names(mixers), mixers, strict=True)}
    return ModuleSpec(
        module=ParallelHybrid,
        params={
            "initial_weights": initial_branch_weights(build.model.parallel_hybrid, mixers),
            "dropped": dropped_branches(mixers),
            "dropout": build.model.parallel_hybrid.softmax_dropout,
        },
        submodules=ParallelHybridSubmodules(branches),
    )


class ParallelHybrid(MegatronModule):
    """A drop-in for SelfAttention that mixes the outputs of its branches.

    New parameters beside those of the branches: a norm of each (one weight of hidden width), called
    ``softmax_norm`` and the like, and ``branch_weights`` [branches].
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: ParallelHybridSubmodules,
        layer_number: int,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        initial_weights: list[float],
        dropped: Sequence[str] = (),
        dropout: float = 0.0,
        **kwargs: object,
    ) -> None:
        super().__init__(config)
        self.dropped = dropped
        self.dropout = dropout if dropped else 0.0
        self.layer_number = layer_number
        self.names = list(submodules.branches)
        branch = {
            "config": config,
            "layer_number": layer_number,
            "cp_comm_type": cp_comm_type,
            "pg_collection": pg_collection,
            **kwargs,
        }
        for name, branch_spec in submodules.branches.items():
            setattr(self, module_name(name), build_module(branch_spec, **branch))
        for name in self.names:
            norm = RMSNorm(config, config.hidden_size, eps=config.layernorm_epsilon)
            norm.weight.is_new_parameter = True  # type: ignore[attr-defined]
            setattr(self, norm_name(name), norm)
        self.branch_weights = torch.nn.Parameter(torch.tensor(initial_weights, dtype=config.params_dtype))
        self.branch_weights.is_new_parameter = True  # type: ignore[attr-defined]
        # Under sequence parallelism each rank mixes its own share of the sequence: its gradient is a partial
        # sum, which this mark makes megatron-core add up.
        self.branch_weights.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: object
    ) -> tuple[Tensor, None]:
        """Mix along the sequence.

        Args:
            hidden_states: [T, B, hidden_size] normed input, as for every branch.
            attention_mask: must be None.
            kwargs: what megatron-core's layer gives to ``self_attention``, for all branches.

        Returns:
            Output of the same shape, and no bias.
        """
        outputs = [branch(hidden_states, attention_mask, **kwargs)[0] for branch in self._branches()]
        kept_B1 = self._draw(kwargs.get("packed_seq_params")) if self.training and self.dropout else None
        return self._weighted_sum(outputs, kept_B1), None

    def _draw(self, layout: Any) -> Tensor:
        """[B, 1]: 1 for sequences that keep all branches, 0 for those without the ones that are dropped."""
        seeds = None if layout is None else layout.sequence_seeds
        assert seeds is not None, "drop-out of branches draws from the layout's sequence_seeds"
        kept = [random.Random(f"{seed}/{self.layer_number}").random() >= self.dropout for seed in seeds]
        weights = self.branch_weights
        return on_device(kept, weights.device, weights.dtype).unsqueeze(1)

    def begin_decoding(
        self, hidden_states: Tensor, *, rotary_pos_emb: Tensor | None, layout: SequenceLayout
    ) -> tuple[Tensor, BranchStates]:
        """See :class:`~spikingbrain_train.models.mixers.decoding.DecodesByStep`; branches may lack a step."""
        begun = [
            decoding.begin_decoding(branch, hidden_states, rotary_pos_emb=rotary_pos_emb, layout=layout)
            for branch in self._branches()
        ]
        return self._weighted_sum([output for output, _ in begun]), BranchStates(
            [state for _, state in begun]
        )

    def decode(
        self,
        hidden_states: Tensor,
        state: BranchStates,
        *,
        rotary_pos_emb: Tensor | None,
        cp_group: ProcessGroup | None = None,
    ) -> Tensor:
        """See :class:`~spikingbrain_train.models.mixers.decoding.DecodesByStep`."""
        pairs = zip(self._branches(), state.states, strict=True)
        return self._weighted_sum(
            [
                decoding.decode(
                    branch, hidden_states, of_branch, rotary_pos_emb=rotary_pos_emb, cp_group=cp_group
                )
                for branch, of_branch in pairs
            ]
        )

    def _branches(self) -> list[torch.nn.Module]:
        return [getattr(self, module_name(name)) for name in self.names]

    def _weighted_sum(self, outputs: Sequence[Tensor], kept_B1: Tensor | None = None) -> Tensor:
        weights = [
            weight if kept_B1 is None or name not in self.dropped else weight * kept_B1
            for weight, name in zip(self.branch_weights.unbind(), self.names, strict=True)
        ]
        weighted = [
            weight * getattr(self, norm_name(name))(output)
            for weight, name, output in zip(weights, self.names, outputs, strict=True)
        ]
        return functools.reduce(operator.add, weighted)


class BranchStates(decoding.DecodingState):
    """What every branch remembers, in their order."""

    def __init__(self, states: Sequence[decoding.DecodingState]) -> None:
        self.states = states

    def size(self) -> decoding.CacheSize:
        return sum((state.size() for state in self.states), decoding.CacheSize())
