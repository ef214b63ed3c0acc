"""Linear attention that forgets at a fixed rate, one for each head of keys and values. Without torch.

    S_t = exp(-slope) S_{t-1} + k_t^T v_t,   o_t = K^-0.5 q_t S_t,   y = W_o RMSNorm(o)

The recurrence of RetNet (Sun et al., arXiv 2307.08621) and Lightning attention (Qin et al., arXiv
2401.04658), without positions and with keys and values shared by the heads of a query group. It is gated
linear attention with a gate that is a constant, so that op, its kernels and its context parallelism do the
work.
"""

from __future__ import annotations

from dataclasses import dataclass

from spikingbrain_train.architecture.backends.gated_linear_attention import (
    GATED_LINEAR_ATTENTION,
    LinearAttentionCall,
)
from spikingbrain_train.architecture.gated_linear_attention import (
    linear_attention_bytes,
    linear_attention_flops,
)
from spikingbrain_train.architecture.initializers import Constant
from spikingbrain_train.architecture.mixers import MIXERS, MixerKind, attention_weights
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.architecture.sizes import FP32, bytes_per_element, heads_and_groups, torch_name
from spikingbrain_train.architecture.split_checks import check_linear_attention_split
from spikingbrain_train.architecture.weights import Split, Weight
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.require import require
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.setting import FUNCTION, START, setting


@dataclass
class FixedDecayConfig:
    """How fast the heads forget."""

    max_slope: float = setting(0.5, above=0, resume=FUNCTION)
    """Slope of the first query group, the fastest to forget: it keeps exp(-max_slope) at every step."""
    min_slope: float = setting(0.004, above=0, resume=FUNCTION)
    """Slope of the last one; those between lie on a geometric sequence."""
    init_out_norm: float = setting(0.3, resume=START)
    """Initial weight of the per-head RMSNorm behind the recurrence."""

    def check(self, prefix: str) -> None:
        """The first group is the fastest. Raises ConfigurationError."""
        require(
            self.min_slope <= self.max_slope,
            f"{prefix}min_slope={self.min_slope} is above {prefix}max_slope={self.max_slope}; swap them",
        )

    def slopes(self, num_groups: int) -> list[float]:
        """Of every query group."""
        ratio = self.min_slope / self.max_slope
        return [self.max_slope * ratio ** (group / max(num_groups - 1, 1)) for group in range(num_groups)]


class FixedDecayKind(MixerKind):
    """New to a dense source is the norm behind the recurrence alone."""

    name = "fixed_decay"
    words = "linear attention layers of fixed decay"
    spec = f"{__package__}.fixed_decay_module:spec"
    section = "fixed_decay"
    section_type = FixedDecayConfig
    backends = GATED_LINEAR_ATTENTION
    export_module = f"{__package__}.fixed_decay_export"
    tensor_names = {"out_norm": "g_norm.weight"}

    def check_split(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        check_linear_attention_split(model, parallel)

    def weights(self, model: ModelConfig, group: str = "attention") -> tuple[Weight, ...]:
        norm = Weight(
            "out_norm.weight",
            ("out_norm",),
            ((model.kv_channels,),),
            "fixed decay output norm",
            Split.none,
            init=Constant(self.own_settings(model).init_out_norm),
        )
        return (*attention_weights(model, group), norm)

    def core_flops(self, model: ModelConfig, seq_length: int) -> float:
        return linear_attention_flops(model, seq_length)

    def op_call(
        self, config: RunConfig, model: ModelConfig, layout: SequenceLayout, has_documents: bool
    ) -> LinearAttentionCall:
        return LinearAttentionCall(torch_name(config.precision))

    def activation_bytes(self, config: RunConfig) -> float:
        """Queries, the output before and after its norm, and what the op keeps."""
        heads, groups = heads_and_groups(config)
        width = config.model.kv_channels * bytes_per_element(config.precision)
        kept = 3 * heads * width + heads * FP32 + linear_attention_bytes(config)
        return kept + (heads + groups) * width if config.model.qk_layernorm else kept

    def describe(self, model: ModelConfig) -> str | None:
        settings = self.own_settings(model)
        return f"slopes {settings.max_slope:g} to {settings.min_slope:g}"


MIXERS.register(FixedDecayKind())
