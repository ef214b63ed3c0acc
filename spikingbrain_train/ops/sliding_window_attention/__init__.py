"""Causal softmax attention, full or over a sliding window (SpikingBrain, arXiv 2509.05276, eq. 1-2).

To understand it, read ``reference`` first (the definition), then ``blocked`` (what runs on CPU).
"""

from spikingbrain_train.ops.sliding_window_attention.dispatch import sliding_window_attention

__all__ = ["sliding_window_attention"]
