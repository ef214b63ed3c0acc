"""A plug-in of vLLM: models in the format ``gla_swa``, as ``spikingbrain-export`` writes them.

vLLM calls :func:`register` in every process that it starts (entry point ``vllm.general_plugins``).
"""

from __future__ import annotations

ARCHITECTURE = "GLAswaForCausalLM"
"""As config.json of an export names it."""


def register() -> None:
    """Tell vLLM's registry of the model; nothing of it is imported before it is asked for."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, "vllm_spikingbrain.model:GLAswaForCausalLM")
