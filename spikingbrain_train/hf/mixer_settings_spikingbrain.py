"""What the attention mixers of a `spikingbrain` model have in common: sizes, biases, norms and spikes.

Part of the modelling code of a checkpoint.
"""

from __future__ import annotations

from .configuration_spikingbrain import SpikingBrainConfig
from .kinds_spikingbrain import Place
from .mixers_gla_swa import MixerSettings
from .spikes_gla_swa import encoders_of


def mixer_settings(
    config: SpikingBrainConfig, place: Place, num_groups: int | None = None, qk_norm: bool = False
) -> MixerSettings:
    """Settings of `GLAswaAttention`.

    Args:
        config: of the model.
        place: of the mixer.
        num_groups: heads of keys and values; None has the model's.
        qk_norm: whether it has norms on queries and keys where the model has none elsewhere.
    """
    return MixerSettings(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_groups=num_groups or config.num_key_value_heads,
        head_dim=config.head_dim,
        norm_eps=config.rms_norm_eps,
        cache_idx=place.cache_idx,
        bias="trained" if config.attention_bias else "none",
        output_bias=config.output_bias,
        output_norm=config.attn_sub_norm,
        qk_norm=config.qk_norm or qk_norm,
        encoder=encoders_of(config.spiking),
    )


__all__ = ["mixer_settings"]
