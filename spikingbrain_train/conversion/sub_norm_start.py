"""How sub-norms begin in front of projections of a source that has none.

BitNet b1.58 (arXiv 2504.12285) and BitNet Distillation (arXiv 2510.13998, which puts sub-norms into dense
models) normalise what the output and the down projection read. A token's size r, the root mean square of its
channels, is gone behind the norm, and the projection's weights expect it. The norm's weight gives back one
size for all tokens, the geometric mean of what the source's own projection reads,

    w = exp(mean_t log r_t)

which is nearest in the logarithm of sizes: in a plain square a few tokens that are a hundred times as large
as all others would decide. A size of every channel's own, fitted to the few tokens of a conversion, served
worse (docs/bitnet.md).
"""

from __future__ import annotations

from torch import Tensor


def nearest_size(x: Tensor, epsilon: float) -> Tensor:
    """The weight, the same for all channels, with which an RMSNorm changes its input least.

    Args:
        x: [..., channels] float32 that a projection reads.
        epsilon: of the norm, added to the mean square.

    Returns:
        [] float32.
    """
    return (x.square().mean(-1) + epsilon).log().mean().mul(0.5).exp()
