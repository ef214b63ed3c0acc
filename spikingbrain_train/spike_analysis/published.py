"""What the paper states of SpikingBrain-7B, to stand beside what is measured."""

from __future__ import annotations

PUBLISHED = {
    2.0: (0.989, 0.730),
    2.5: (0.976, 0.709),
    3.0: (0.951, 0.692),
    3.5: (0.916, 0.677),
    4.0: (0.877, 0.664),
}
"""k: (share of values up to 7, sparsity); SpikingBrain, arXiv 2509.05276, table 11."""
