"""What a source's files may make transformers fetch or run: an export does not repeat it.

Whoever loads an export with ``trust_remote_code=True`` trusts the code that lies in it, not that of the
repositories that the source's config.json or tokenizer_config.json happened to name.
"""

from __future__ import annotations

from typing import Any

from spikingbrain_train.hf import CODES

_CODE = "auto_map"
_REFERENCES = (
    _CODE,
    "custom_pipelines",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
)
"""Keys whose values name code, or kernels of the Hugging Face hub, which are code."""


def without_references(values: dict[str, Any]) -> dict[str, Any]:
    """``values``, and the dictionaries inside, without what names code."""
    return {
        key: without_references(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _REFERENCES
    }


def references(values: dict[str, Any]) -> list[str]:
    """Keys that name code in ``values`` or a dictionary inside; an export's own code does not count."""
    own = (None, {}, *(code.auto_map for code in CODES))
    found = [key for key, value in values.items() if key in _REFERENCES and value not in own]
    for value in values.values():
        found += references(value) if isinstance(value, dict) else []
    return list(dict.fromkeys(found))


def left_out(file_name: str, keys: list[str]) -> list[str]:
    """The note of a report for ``keys`` of a file; none for no keys."""
    return [f"{file_name} of the source names code ({', '.join(keys)}), which is left out"] if keys else []
