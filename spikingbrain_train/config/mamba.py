"""Layers of a selective scan: sizes, options and starts."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from spikingbrain_train.config.require import require
from spikingbrain_train.config.setting import FUNCTION, START, WEIGHTS, setting


class MambaStart(str, Enum):
    """What the weights of converted layers are made of."""

    attention = "attention"
    """Values, keys, queries and output projection of the source."""
    random = "random"
    """Nothing of it: as a Mamba model begins."""


@dataclass
class MambaConfig:
    """Mamba-1 (arXiv 2312.00752). Field names are transformers'."""

    intermediate_size: int | None = setting(None, minimum=1, resume=WEIGHTS)
    """Channels, each with a state of its own; null is twice hidden_size."""
    state_size: int = setting(16, minimum=1, resume=WEIGHTS)
    """Numbers that a channel remembers."""
    conv_kernel: int = setting(4, minimum=1, resume=WEIGHTS)
    """Tokens, the current one included, that the convolution in front of the scan sees."""
    time_step_rank: int | None = setting(None, minimum=1, resume=WEIGHTS)
    """Width of the bottleneck that step sizes come from; null is a sixteenth of hidden_size, rounded up."""
    use_conv_bias: bool = setting(True, resume=WEIGHTS)
    """Whether the convolution has a bias."""
    use_bias: bool = setting(False, resume=WEIGHTS)
    """Whether the projections of the layer's input and output have biases."""
    bc_dt_norm: bool = setting(False, resume=FUNCTION)
    """RMSNorm, without weights, of B, C and the bottleneck of step sizes (Falcon-Mamba, arXiv 2410.05355)."""
    mixer_rms_eps: float = setting(1e-6, above=0, resume=FUNCTION)
    """Epsilon of those norms, added to the mean square."""
    time_step_min: float = setting(0.001, above=0, resume=START)
    """Step size that the first channel starts with for an input of zeros."""
    time_step_max: float = setting(0.1, above=0, resume=START)
    """The same of the last channel; those between lie on a geometric sequence."""

    init: MambaStart = setting(MambaStart.attention, resume=START)
    """How layers begin that take the place of attention in a conversion (docs/mamba.md)."""
    init_output_scale: float = setting(0.1, above=0, resume=START)
    """With ``init: attention``: factor of the source's output projection at first, because a scan with one B
    and one C gives more than attention does and seldom the same."""

    def check(self, prefix: str) -> None:
        """The first channel's step is the smallest. Raises ConfigurationError."""
        require(
            self.time_step_min <= self.time_step_max,
            f"{prefix}time_step_min={self.time_step_min} is above {prefix}time_step_max="
            f"{self.time_step_max}; swap them",
        )
