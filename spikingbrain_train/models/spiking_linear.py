"""Linear layers that read spikes: subclasses of a parallel linear that encode their input first.

The encoding (SpikingBrain, arXiv 2509.05276, eq. 19-21; :mod:`spikingbrain_train.ops.spike_encoding`) needs
the mean magnitude of a token over the whole input of the projection. What that takes:

- Column-parallel linears see whole tokens, under sequence parallelism those of this rank's share of the
  sequence: nothing is communicated, and a gather of the input that follows moves encoded values.
- Row-parallel linears see a part of every token's channels: the sums of |x| are added up over the linear's
  tensor-parallel group (of experts: their own) in one all-reduce of one number a token, float32 for bfloat16
  activations and float64 for float32 ones. The backward pass communicates nothing more than the plain
  linear's, because the gradient is straight-through.
- An expert without tokens is without tokens on every rank of its group, and all of them skip the all-reduce.

Parameters, their names and ``sharded_state_dict`` are the plain linear's, so checkpoints fit both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor
from torch.distributed import ProcessGroup

from spikingbrain_train.ops.spike_encoding import magnitude_sum, spike_counts, spike_encoding
from spikingbrain_train.spiking.statistics import SpikeStatistics


class SpikingInput(torch.nn.Module):
    """What :func:`spiking` adds to a linear class.

    Attributes:
        spike_k: spikes of an average channel; set it for a whole model with :func:`set_spike_k`.
        row_parallel: the input is split over tensor-parallel ranks.
        statistics: counts of what is encoded, while somebody collects them; see
            :func:`collect_spike_statistics`.
    """

    spike_k: float
    row_parallel: bool
    statistics: SpikeStatistics | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = [value for value in (*args, *kwargs.values()) if isinstance(value, ModelParallelConfig)]
        assert settings, f"{type(self).__name__} is built without megatron-core's config"
        self._is_expert = bool(kwargs.get("is_expert", False))
        # The token dispatcher gives all ranks of an expert's tensor-parallel group the same tokens.
        self._input_is_replicated = self._is_expert or not settings[0].sequence_parallel

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The linear's own forward pass on the encoded input; further arguments are the linear's.

        Args:
            input_: [..., input_size], or this rank's part of it for a row-parallel linear.
        """
        magnitudes, width = self._magnitudes(input_)
        if self.statistics is not None and self._counts_here:
            counts, _ = spike_counts(input_, self.spike_k, magnitudes=magnitudes, width=width)
            self.statistics.add(counts)
        encoded = spike_encoding(input_, self.spike_k, magnitudes=magnitudes, width=width)
        return super().forward(encoded, *args, **kwargs)

    def _magnitudes(self, x: Tensor) -> tuple[Tensor, int]:
        """Sum of |x| over the whole input [..., 1], and the width of that input."""
        sums = magnitude_sum(x)
        if not self._input_is_split:
            return sums, x.shape[-1]
        group = self._tensor_parallel_group()
        if group.size() > 1 and x.numel() > 0:
            torch.distributed.all_reduce(sums, group=group)
        return sums, x.shape[-1] * group.size()

    @property
    def _input_is_split(self) -> bool:
        # megatron-core's RowParallelLinear can also be built to split a whole input itself.
        return self.row_parallel and getattr(self, "input_is_parallel", True)

    @property
    def _counts_here(self) -> bool:
        """Whether this rank counts its input, so that summed over all ranks every spike counts once."""
        if self._input_is_split or not self._input_is_replicated:
            return True
        return self._tensor_parallel_group().rank() == 0

    def _tensor_parallel_group(self) -> ProcessGroup:
        # Transformer Engine's own tp_group is None for experts; megatron-core keeps the real one beside it.
        group = getattr(self, "_tp_group", None) or getattr(self, "tp_group", None)
        return get_tensor_model_parallel_group_if_none(group, is_expert=self._is_expert)


@cache
def spiking(linear_class: type, *, k: float, row_parallel: bool = False) -> type:
    """A subclass of a linear class that encodes its input as spikes.

    Args:
        linear_class: a parallel linear of megatron-core or Transformer Engine (single or grouped), or any
            module that is built with megatron-core's config and whose ``forward`` takes the input first.
        k: initial ``spike_k``.
        row_parallel: the input is split over tensor-parallel ranks.
    """
    attributes = {"spike_k": k, "row_parallel": row_parallel, "__doc__": linear_class.__doc__}
    return type(f"Spiking{linear_class.__name__}", (SpikingInput, linear_class), attributes)


def spiking_modules(model: torch.nn.Module) -> list[SpikingInput]:
    """All linears of a model that read spikes."""
    return [module for module in model.modules() if isinstance(module, SpikingInput)]


def set_spike_k(model: torch.nn.Module, k: float) -> None:
    """Set k of every linear of a model that reads spikes."""
    assert k > 0, f"k={k} must be greater than 0"
    for module in spiking_modules(model):
        module.spike_k = k


@contextmanager
def collect_spike_statistics(model: torch.nn.Module, device: torch.device) -> Iterator[SpikeStatistics]:
    """Count the spikes of everything that a model encodes while the context lasts.

    Every rank counts its part: sum ``histogram`` over all ranks for the whole model's.

    Args:
        model: this rank's part of a model.
        device: where counts are kept.
    """
    statistics = SpikeStatistics(device)
    modules = spiking_modules(model)
    for module in modules:
        module.statistics = statistics
    try:
        yield statistics
    finally:
        for module in modules:
            module.statistics = None
