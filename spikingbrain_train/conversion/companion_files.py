"""The small files that travel with a checkpoint's weights: configuration, tokenizer, licence."""

from __future__ import annotations

import shutil
from pathlib import Path

_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def copy_companion_files(source: Path, target: Path) -> list[str]:
    """Copy configuration, tokenizer and licence files of a Hugging Face folder; return their relative names.

    Code (``*.py``) is left behind: nothing of a source is ever executed.
    """
    copied = []
    for pattern in _COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                name = path.relative_to(source)
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / name)
                copied.append(name.as_posix())
    return copied


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZERS)
