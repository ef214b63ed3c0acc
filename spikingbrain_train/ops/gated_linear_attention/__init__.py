"""Gated linear attention (SpikingBrain, arXiv 2509.05276, eq. 10-11).

To understand it, read ``naive`` first (the definition), then ``factored`` (what usually runs on CPU),
``chunk`` (how segments and the backward pass are put together) and ``subdivided`` (very strong decay).
"""

from spikingbrain_train.ops.gated_linear_attention.dispatch import choose_backend, gated_linear_attention
from spikingbrain_train.ops.gated_linear_attention.end_state import gated_linear_attention_end_state
from spikingbrain_train.ops.gated_linear_attention.naive import gated_linear_attention_step

__all__ = [
    "choose_backend",
    "gated_linear_attention",
    "gated_linear_attention_end_state",
    "gated_linear_attention_step",
]
