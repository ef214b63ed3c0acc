"""The selective scan of Mamba-1 (Gu and Dao, arXiv 2312.00752, section 3.2).

To understand it, read ``naive`` first (the definition), then ``linear_scan`` (the recurrence alone) and
``chunk`` (what runs on CPU).
"""

from spikingbrain_train.ops.selective_scan.dispatch import choose_backend, selective_scan
from spikingbrain_train.ops.selective_scan.naive import selective_scan_step

__all__ = ["choose_backend", "selective_scan", "selective_scan_step"]
