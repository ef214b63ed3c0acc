"""Row-parallel linears with a norm of their own in front: the sub-norms of BitNet b1.58 (arXiv 2504.12285).

An RMSNorm stands in front of the output projection of attention, and of the down projection. Its mean is
over the whole width, of which a tensor-parallel rank has a part: one all-reduce of one number a token in each
direction.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor
from torch.distributed import ProcessGroup

from spikingbrain_train.models.split_parameters import sharded_first_axes
from spikingbrain_train.ops.rms_norm import rms_norm


class SplitRMSNorm(torch.nn.Module):
    """RMSNorm over channels that tensor-parallel ranks share out.

    Args:
        config: of the model.
        width: channels of this rank.
        tp_group: the ranks that have the others.
    """

    def __init__(self, config: TransformerConfig, width: int, tp_group: ProcessGroup) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.share = 1.0
        """How far it has come in: at 0 what it is given passes as it is. Set by a schedule."""
        self.tp_group = tp_group
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(width, dtype=config.params_dtype, device=device))
        # Else gradient norms would take it for a copy that every rank has.
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same."""
        normed = rms_norm(x, self.weight, self.eps, self.tp_group)
        # Not of less at a share of 0: ranks and pipeline stages send the same in every step.
        return normed if self.share == 1.0 else x + self.share * (normed - x)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """Where this rank's part lies, as megatron-core asks for it."""
        parts = {"weight": self.weight}
        return sharded_first_axes(parts, prefix, sharded_offsets, self.tp_group, metadata)


def with_sub_norm(linear_class: Any) -> type:
    """A subclass of a row-parallel linear that normalises its input, whatever else is done to it.

    The norm is a hook in front of the forward pass, so that transforms, and whoever watches the linear,
    meet what it reads: normed inputs.

    Args:
        linear_class: of megatron-core or Transformer Engine, plain or transformed.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        linear_class.__init__(self, *args, **kwargs)
        config = next(each for each in (*args, *kwargs.values()) if isinstance(each, TransformerConfig))
        group = get_tensor_model_parallel_group_if_none(kwargs.get("tp_group"))
        self.sub_norm = SplitRMSNorm(config, self.weight.shape[1], group)
        self.register_forward_pre_hook(_normed)

    def sharded_state_dict(
        self: Any, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        sharded = linear_class.sharded_state_dict(self, prefix, sharded_offsets, metadata)
        norm = self.sub_norm.sharded_state_dict(f"{prefix}sub_norm.", sharded_offsets, metadata)
        return sharded | norm

    members = {"__init__": __init__, "sharded_state_dict": sharded_state_dict}
    return type(linear_class.__name__, (linear_class,), members)


def _normed(linear: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *others = inputs
    return (linear.sub_norm(x), *others)


def set_share(module: torch.nn.Module, share: float) -> None:
    """Let all sub-norms in a module have come in that far, 0 to 1."""
    for each in module.modules():
        if isinstance(each, SplitRMSNorm):
            each.share = share


def first_reader(linear: torch.nn.Module) -> torch.nn.Module:
    """What reads the input that a linear is called with: its norm, or itself where it has none."""
    norm = getattr(linear, "sub_norm", linear)
    assert isinstance(norm, torch.nn.Module)
    return norm


def read_by(linear: torch.nn.Module, x: Tensor) -> Tensor:
    """What a linear multiplies where it is called with ``x``, before any transform."""
    norm = getattr(linear, "sub_norm", None)
    return x if norm is None else norm(x)
