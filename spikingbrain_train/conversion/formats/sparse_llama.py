"""Llama models with FATReLU, which transformers does not have: their exports carry code for it.

Named as ProSparse's published folders are (arXiv 2402.13516). With ReLU a model is exported as Llama itself.
"""

from __future__ import annotations

from typing import Any

from spikingbrain_train.config.model import ActivationFunc, ModelConfig
from spikingbrain_train.conversion.export_code import code_of_export
from spikingbrain_train.conversion.formats.config_keys import OWN_KEYS
from spikingbrain_train.conversion.formats.dense import DenseFormat
from spikingbrain_train.hf import SPARSE_LLAMA_CODE


class SparseLlamaFormat(DenseFormat):
    """Llama's form, gates of feed-forwards through FATReLU (or ReLU)."""

    holds = "dense models with FATReLU"
    activations = {ActivationFunc.fatrelu: "fatrelu", ActivationFunc.relu: "relu"}

    def __init__(self) -> None:
        super().__init__(
            *(SPARSE_LLAMA_CODE.architectures[0], "sparsellama"),
            groups_default_to_heads=True,
            attention_bias=True,
            mlp_bias=True,
        )

    def keys_for_readers(self, model: ModelConfig, source: dict[str, Any], dtype: str) -> dict[str, Any]:
        """Where the code is; and the empty model type that keeps AutoTokenizer without it from warning."""
        return {
            **super().keys_for_readers(model, source, dtype),
            "auto_map": dict(SPARSE_LLAMA_CODE.auto_map),
            OWN_KEYS: {"model_type": ""},
        }

    def code_files(self, model: ModelConfig) -> dict[str, str]:
        return code_of_export(SPARSE_LLAMA_CODE)

    def notes_on_export(self, model: ModelConfig) -> list[str]:
        return [
            "transformers' Llama has no FATReLU: load the folder with the code that it carries "
            "(trust_remote_code=True)"
        ]


SPARSE_LLAMA = SparseLlamaFormat()
