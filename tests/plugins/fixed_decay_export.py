"""The mixer "fixed_decay" in exports, which carry this file; its settings are `config.kinds["fixed_decay"]`.

It is gated linear attention with a constant gate, without features: what that does about caches, padding,
documents and sinks holds here, too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .cache_gla_swa import RecurrentStateLayer
from .kinds_spikingbrain import MIXERS, Mixer, Place
from .mixer_settings_spikingbrain import mixer_settings
from .mixers_gla_swa import GLAswaLinearAttention


class FixedDecayAttention(GLAswaLinearAttention):
    """Of a configuration and a place, as `Mixer.make` has them."""

    def __init__(self, config, place: Place) -> None:
        super().__init__(mixer_settings(config, place), gate="tied")  # which has no parameters
        self.feature_map = nn.Identity()
        fastest, slowest = (config.kinds["fixed_decay"][name] for name in ("max_slope", "min_slope"))
        steps = max(self.num_groups - 1, 1)
        self.slopes = [fastest * (slowest / fastest) ** (group / steps) for group in range(self.num_groups)]

    def log_gate(self, x_BTD: Tensor, k_BTGK: Tensor) -> Tensor:
        slopes_G = torch.tensor(self.slopes, device=k_BTGK.device)
        return -slopes_G[:, None].expand(k_BTGK.shape)


MIXERS.register(Mixer("fixed_decay", FixedDecayAttention, cache_layer=lambda config: RecurrentStateLayer()))
