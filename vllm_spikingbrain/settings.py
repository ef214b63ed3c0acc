"""What of an export this plug-in computes, by its configuration. Imports nothing."""

from __future__ import annotations

from typing import Any


def check(config: Any, tensor_parallel_size: int = 1) -> None:
    """Refuse what would be computed as another model.

    Args:
        config: the configuration that the export brings (configuration_gla_swa.py).
        tensor_parallel_size: ranks that share the heads.

    Raises:
        ValueError: one sentence that names the key.
    """
    refused = {
        "spiking": bool(getattr(config, "spiking", None)),
        "w8aspike": bool(getattr(config, "w8aspike", None)),
        "linear_rotary": bool(getattr(config, "linear_rotary", False)),
        f"linear_gate {getattr(config, 'linear_gate', 'low_rank')}": getattr(
            config, "linear_gate", "low_rank"
        )
        != "low_rank",
        f"hidden_act {config.hidden_act}": config.hidden_act not in ("swish", "silu"),
    }
    kind = config.rotary_positions().kind
    refused[f"rope_parameters of type {kind}"] = kind in ("dynamic", "longrope")
    found = [name for name, wrong in refused.items() if wrong]
    if found:
        raise ValueError(
            f"vllm_spikingbrain does not compute {', '.join(found)} of this export's config.json; "
            "spikingbrain-serve does"
        )
    for name in ("num_key_value_heads", "linear_num_key_value_heads"):
        if getattr(config, name) % tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size {tensor_parallel_size} does not divide {name} {getattr(config, name)} "
                "of this export; give a divisor"
            )
