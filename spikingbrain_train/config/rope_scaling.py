"""How rotary positions are scaled for contexts that are longer than those of pretraining."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from spikingbrain_train.config.require import require
from spikingbrain_train.config.setting import FUNCTION, setting


class RopeType(str, Enum):
    """How the rotary frequencies are scaled; names and arithmetic are those of transformers."""

    default = "default"
    """Not at all."""
    linear = "linear"
    """Every frequency divided by ``factor`` (position interpolation, arXiv 2306.15595)."""
    dynamic = "dynamic"
    """A larger base for texts beyond the original context, from the length of each text ("dynamic NTK");
    shorter texts are turned as ever."""
    yarn = "yarn"
    """Slow frequencies divided by ``factor``, fast ones kept, a ramp between, sharper softmax (YaRN, arXiv
    2309.00071): Qwen2.5 beyond 32k."""
    llama3 = "llama3"
    """Long wavelengths slowed down by ``factor``, short ones kept, a ramp between: Llama 3.1 and later."""
    longrope = "longrope"
    """Each frequency divided by a factor of its own, one list for texts within the original context and one
    for those beyond, and a sharper softmax (LongRoPE, arXiv 2402.13753)."""


@dataclass
class RopeScalingConfig:
    """Scaling of the rotary frequencies, in the words of transformers' ``rope_parameters``."""

    rope_type: RopeType = setting(RopeType.default, resume=FUNCTION)
    """Which kind of scaling; ``default`` is none, and reads nothing else here."""
    factor: float = setting(1.0, minimum=1, resume=FUNCTION)
    """How many times longer than the original context the scaled one is (Llama 3.1: 8)."""
    original_max_position_embeddings: int = setting(8192, minimum=1, resume=FUNCTION)
    """Context length (tokens) that the frequencies were trained for; all kinds but linear."""
    low_freq_factor: float = setting(1.0, above=0, resume=FUNCTION)
    """llama3: frequencies with wavelengths above original / low_freq_factor are scaled in full."""
    high_freq_factor: float = setting(4.0, above=0, resume=FUNCTION)
    """llama3: frequencies with wavelengths below original / high_freq_factor are left alone."""
    beta_fast: float = setting(32.0, above=0, resume=FUNCTION)
    """yarn: frequencies that turn more often than this in the original context are left alone."""
    beta_slow: float = setting(1.0, above=0, resume=FUNCTION)
    """yarn: frequencies that turn less often than this in the original context are scaled in full."""
    truncate: bool = setting(True, resume=FUNCTION)
    """yarn: whether the ramp begins and ends at whole channels."""
    attention_factor: float | None = setting(None, above=0, resume=FUNCTION)
    """yarn, longrope: what turned queries and keys are multiplied by, each; null is the kind's own function
    of factor (and, for longrope, of the original context)."""
    short_factor: list[float] = setting(default_factory=list, above=0, resume=FUNCTION)
    """longrope: divisor of each of the kv_channels / 2 frequencies in texts within the original context."""
    long_factor: list[float] = setting(default_factory=list, above=0, resume=FUNCTION)
    """longrope: the same in longer texts."""

    def check(self, prefix: str) -> None:
        """What a kind needs is there, and ramps rise. Raises ConfigurationError."""
        require(
            self.rope_type is not RopeType.default or self.factor == 1,
            f"{prefix}factor={self.factor} has no effect with {prefix}rope_type=default; choose a kind, e.g. "
            f"{prefix}rope_type=llama3, or leave the factor out",
        )
        require(
            self.rope_type is not RopeType.llama3 or self.low_freq_factor < self.high_freq_factor,
            f"{prefix}high_freq_factor={self.high_freq_factor} must be greater than "
            f"{prefix}low_freq_factor={self.low_freq_factor}",
        )
        require(
            self.rope_type is not RopeType.yarn or self.beta_slow < self.beta_fast,
            f"{prefix}beta_fast={self.beta_fast} must be greater than {prefix}beta_slow={self.beta_slow}",
        )
        require(
            self.rope_type is not RopeType.longrope or self.original_max_position_embeddings > 1,
            f"{prefix}original_max_position_embeddings={self.original_max_position_embeddings} must be at "
            f"least 2 with {prefix}rope_type=longrope, which takes its logarithm",
        )
