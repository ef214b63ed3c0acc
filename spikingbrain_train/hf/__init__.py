"""The standalone transformers modelling code that an exported checkpoint carries.

An export is a folder with model.safetensors (or shards), a config.json whose `auto_map` is `AUTO_MAP` and
whose `architectures` is `ARCHITECTURES`, the tokenizer of the source, and a copy of every file of
`modelling_files()`. Nothing in those files imports this package.
"""

from __future__ import annotations

from pathlib import Path

ARCHITECTURES = ["GLAswaForCausalLM"]
AUTO_MAP = {
    "AutoConfig": "configuration_gla_swa.GLAswaConfig",
    "AutoModelForCausalLM": "modeling_gla_swa.GLAswaForCausalLM",
}
DEFAULT_ROPE_THETA = 1000000.0
"""What `GLAswaConfig` takes where config.json names no rotary base; here for readers without transformers."""


def modelling_files() -> list[Path]:
    """The Python files that must lie next to config.json in an exported folder."""
    folder = Path(__file__).resolve().parent
    names = ("configuration", "modeling", "ops", "cache", "layout")
    return [folder / f"{name}_gla_swa.py" for name in names]
