"""How a dense source becomes a hybrid: the recipe that `tools/convert_checkpoint.py import` follows."""

from __future__ import annotations

from dataclasses import dataclass, field

from spikingbrain_train.config.model import GatedLinearAttentionConfig, Mixer


@dataclass
class ConversionConfig:
    """The swap of sequence mixers. Everything else of the source is kept as it is."""

    mixers: list[Mixer] = field(default_factory=lambda: [Mixer.gla, Mixer.swa])
    """Mixer of each layer, repeated until the layers are filled: [gla, swa] is SpikingBrain-7B, [full] keeps
    the source dense."""
    sliding_window: int = 4096
    """Keys (the current token included) that a sliding-window layer sees."""
    gla: GatedLinearAttentionConfig = field(default_factory=GatedLinearAttentionConfig)
    """Shape and initial values of the new gate and norm of linear attention layers."""
    seed: int = 1234
    """Seed of the new parameters: a name and this seed decide a tensor's values, in any order or topology."""
