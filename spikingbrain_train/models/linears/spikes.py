"""Linears that read spikes.

The encoding (SpikingBrain, arXiv 2509.05276, eq. 19-21; :mod:`spikingbrain_train.ops.spike_encoding`) needs
the mean magnitude of a token over the whole input of the projection. Where ranks hold a part of every token's
channels, their sums of |x| are added up in one all-reduce of one number a token, float32 for bfloat16
activations and float64 for float32 ones. The backward pass communicates nothing more than the plain linear's,
because the gradient is straight-through.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.models.linears.linear_transform import LinearTransform, Shard
from spikingbrain_train.models.linears.spike_statistics import SpikeStatistics
from spikingbrain_train.ops.spike_encoding import magnitude_sum, spike_counts, spike_encoding
from spikingbrain_train.reporting.progress import Shown


class Spikes(LinearTransform):
    """The input as spikes.

    Args:
        model: whose ``spiking.k`` is the first k.

    Attributes:
        k: spikes of an average channel.
    """

    statistics: SpikeStatistics | None = None
    counts_few_tokens = True
    shown = {"k": Shown("k", "{:.3g}"), "sparsity": Shown("sparsity", "{:.1%}")}

    def __init__(self, model: ModelConfig) -> None:
        self.k = model.spiking.k

    def input(self, x: Tensor, shard: Shard) -> Tensor:
        """See :func:`~spikingbrain_train.ops.spike_encoding.spike_encoding`."""
        magnitudes, width = shard.sum(magnitude_sum(x)), x.shape[-1] * shard.parts
        if self.statistics is not None and shard.counts_here:
            of_tokens, sums = self.counted(x, magnitudes)
            if len(of_tokens):
                counts, _ = spike_counts(of_tokens, self.k, magnitudes=sums, width=width)
                self.statistics.add(counts)
        return spike_encoding(x, self.k, magnitudes=magnitudes, width=width)

    @classmethod
    def new_statistics(cls, device: torch.device) -> SpikeStatistics:
        return SpikeStatistics(device)
