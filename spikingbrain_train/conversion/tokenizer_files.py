"""The tokenizer of an export: the source's files, read as the class that the source's had."""

from __future__ import annotations

import json
from pathlib import Path

from spikingbrain_train.conversion.code_references import left_out, references, without_references
from spikingbrain_train.data.tokenizer_folder import (
    TOKENIZER_CONFIG_FILE,
    name_model_inputs,
    name_tokenizer_class,
    read_tokenizer_folder,
)
from spikingbrain_train.data.tokenizers import PROBES
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.storage.tokenizer_files import has_tokenizer


def drop_tokenizer_code(export: Path) -> list[str]:
    """Take out of tokenizer_config.json in ``export`` what names code.

    Returns:
        Notes for the report.
    """
    path = export / TOKENIZER_CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError):
        return [f"{TOKENIZER_CONFIG_FILE} of the source is not JSON; copy it again from its source"]
    if not isinstance(values, dict) or (kept := without_references(values)) == values:
        return []
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return left_out(TOKENIZER_CONFIG_FILE, references(values))


def keep_tokenizer_class(source: Path, export: Path) -> list[str]:
    """Make the tokenizer files in ``export`` read as those in ``source`` do, beside another config.json.

    Args:
        source: folder with config.json and tokenizer of the Hugging Face source.
        export: folder with copies of the tokenizer files and the export's own config.json;
            tokenizer_config.json is rewritten where it names another class, or leaves open what models read.

    Returns:
        Notes for the report.

    Raises:
        CheckpointError: the two still give some text different ids.
    """
    if not has_tokenizer(source):
        return []
    try:
        theirs = read_tokenizer_folder(source)
    except Exception as error:  # transformers and its Rust side raise whatever they like
        return [
            f"the tokenizer of the source cannot be loaded here ({type(error).__name__}), so nobody has "
            "checked that it gives the same ids from the export"
        ]
    described = export / TOKENIZER_CONFIG_FILE
    content = described.read_bytes() if described.is_file() else b"{}"
    named = name_model_inputs(name_tokenizer_class(content, type(theirs).__name__))
    if named != content:
        described.write_bytes(named)
    try:
        ours = read_tokenizer_folder(export)
        same = all(ours(text)["input_ids"] == theirs(text)["input_ids"] for text in PROBES)
    except Exception as error:
        raise CheckpointError(
            f"the tokenizer of {source} cannot be loaded from an export ({type(error).__name__}); put a "
            f"tokenizer there whose {TOKENIZER_CONFIG_FILE} names its class"
        ) from error
    if not same or ours.eos_token_id != theirs.eos_token_id:
        raise CheckpointError(
            f"the tokenizer of {source} gives other ids when it is loaded from an export; put a tokenizer "
            f"there whose {TOKENIZER_CONFIG_FILE} names a class that does not depend on the model"
        )
    return []
