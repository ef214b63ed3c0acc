"""Causal softmax attention, full or over a sliding window (SpikingBrain, arXiv 2509.05276, eq. 1-2).

A sequence may begin with sink tokens and hold several documents.

To understand it, read ``naive`` first (the definition), then ``blocked`` (what runs on CPU).
"""

from spikingbrain_train.ops.softmax_attention.dispatch import (
    choose_backend,
    softmax_attention,
)
from spikingbrain_train.ops.softmax_attention.torch_sdpa import bidirectional_attention

__all__ = ["bidirectional_attention", "choose_backend", "softmax_attention"]
