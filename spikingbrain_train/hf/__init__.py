"""The standalone transformers modelling code that an exported checkpoint carries.

An export is a folder with model.safetensors (or shards), a config.json whose `auto_map` and `architectures`
are those of its format, the tokenizer of the source, and a copy of every file of `Code.files`. Nothing in
those files imports this package. The format of every form adds a file for each kind of mixer, feed-forward
and linear transform that the model is made of, and its modelling file imports those
(conversion/export_code.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

QUANTIZATION_FILE = "quantization_w8aspike.py"
_ZEROS = "zeros_sparsellama.py"
_SHARED = (
    *(f"{name}_gla_swa.py" for name in ("mixers", "spikes", "decoder", "ops", "rotary", "cache", "layout")),
    QUANTIZATION_FILE,
    *(f"{name}_w8aspike.py" for name in ("counts", "kernels", "products", "stored_scales")),
)


@dataclass(frozen=True)
class Code:
    """The modelling code of one format."""

    architectures: list[str]
    """As in config.json."""
    auto_map: dict[str, str]
    """As in config.json: where transformers finds the classes."""
    file_names: tuple[str, ...]

    @property
    def files(self) -> list[Path]:
        """The Python files that must lie next to config.json in an exported folder."""
        folder = Path(__file__).resolve().parent
        return [folder / name for name in self.file_names]


GLA_SWA_CODE = Code(
    ["GLAswaForCausalLM"],
    {
        "AutoConfig": "configuration_gla_swa.GLAswaConfig",
        "AutoModelForCausalLM": "modeling_gla_swa.GLAswaForCausalLM",
    },
    ("configuration_gla_swa.py", "modeling_gla_swa.py", *_SHARED),
)
"""Of the published SpikingBrain-7B format."""

SPIKINGBRAIN_CODE = Code(
    ["SpikingBrainForCausalLM"],
    {
        "AutoConfig": "configuration_spikingbrain.SpikingBrainConfig",
        "AutoModelForCausalLM": "modeling_spikingbrain.SpikingBrainForCausalLM",
    },
    (
        "configuration_spikingbrain.py",
        "modeling_spikingbrain.py",
        "activation_spikingbrain.py",
        "kinds_spikingbrain.py",
        "linears_spikingbrain.py",
        "mixer_settings_spikingbrain.py",
        "gated_mlp_spikingbrain.py",
        _ZEROS,
        "configuration_gla_swa.py",
        *_SHARED,
    ),
)
"""Of this project's own format, which holds every form. The files of a model's kinds come to it."""

SPARSE_LLAMA_CODE = Code(
    ["SparseLlamaForCausalLM"],
    {
        "AutoConfig": "configuration_sparsellama.SparseLlamaConfig",
        "AutoModelForCausalLM": "modeling_sparsellama.SparseLlamaForCausalLM",
    },
    ("configuration_sparsellama.py", "modeling_sparsellama.py", _ZEROS),
)
"""Of Llama models with FATReLU."""

CODES = (GLA_SWA_CODE, SPIKINGBRAIN_CODE, SPARSE_LLAMA_CODE)
"""All that exports carry."""
QUANT_METHOD = "w8aspike"
"""What `quantization_config` of a config.json calls INT8 weights and spikes."""
DEFAULT_ROPE_THETA = 1000000.0
"""What `GLAswaConfig` takes where config.json names no rotary base; here for readers without transformers."""
