"""Tokenizer folders of transformers: read without their model's configuration class, and without their code.

Which class a tokenizer has decides how it splits text, and transformers finds it by more than
tokenizer_config.json: a folder of model type qwen2 is read as Qwen2Tokenizer, whatever generic class it
names. The same files beside another config.json, or none, are then another tokenizer. So the class is read
here with the model type, and written where files are copied away from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from spikingbrain_train.data.quiet_transformers import quiet_transformers
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_GENERIC = "PreTrainedTokenizerFast"
"""The class that runs tokenizer.json as it is, by the name that transformers 4 and 5 know (5 calls it
TokenizersBackend)."""


def read_tokenizer_folder(folder: Path) -> Any:
    """The tokenizer in ``folder`` as ``AutoTokenizer`` reads it: a ``PreTrainedTokenizerBase``.

    Of config.json only the names are used that choose a class, so that a model that transformers does not
    know, or whose configuration it cannot read, keeps nobody from its tokenizer. No code of the folder runs.

    Raises:
        Exception: whatever transformers and tokenizers raise.
    """
    from transformers import AutoTokenizer  # takes seconds, and sentencepiece users do not need it

    with quiet_transformers():
        # False, not the default None: None asks on the terminal whether to run the folder's code.
        return AutoTokenizer.from_pretrained(
            str(folder),
            config=_names_of_model(folder),
            local_files_only=True,
            trust_remote_code=False,
            use_fast=True,
        )


def first_line(error: BaseException) -> str:
    """A library's own words, short enough to stand inside a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".:") if lines else type(error).__name__


def name_tokenizer_class(tokenizer_config: bytes, class_name: str) -> bytes:
    """A tokenizer_config.json that names the class that its tokenizer has been read as.

    Args:
        tokenizer_config: the file's content.
        class_name: of the tokenizer, in whatever version of transformers.

    Returns:
        The content itself if it names the class already.
    """
    values = json.loads(tokenizer_config)
    class_name = class_name.removesuffix("Fast")
    if class_name in ("TokenizersBackend", "PreTrainedTokenizer"):
        class_name = _GENERIC
    named = str(values.get("tokenizer_class"))
    if class_name in (named, named.removesuffix("Fast")):
        return tokenizer_config
    values["tokenizer_class"] = class_name
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def name_model_inputs(tokenizer_config: bytes) -> bytes:
    """A tokenizer_config.json of a generic class that says what models read of its texts.

    transformers 4 has such tokenizers give token types, too, with which no decoder generates; 5 does not.

    Args:
        tokenizer_config: the file's content.

    Returns:
        The content itself if it says so already, or names a class of its own.
    """
    values = json.loads(tokenizer_config)
    if values.get("tokenizer_class") != _GENERIC or "model_input_names" in values:
        return tokenizer_config
    values["model_input_names"] = ["input_ids", "attention_mask"]
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _names_of_model(folder: Path) -> Any:
    """A configuration with the model type of ``folder`` and nothing else of its config.json that matters.

    transformers looks classes up by the name of the configuration's. One of that name will do: the true one
    of many models imports nearly two seconds of modelling code.
    """
    from transformers import PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = {}
    values = values if isinstance(values, dict) else {}
    model_type = values.get("model_type")
    config = PretrainedConfig()
    if isinstance(model_type, str) and model_type in CONFIG_MAPPING_NAMES:
        name = CONFIG_MAPPING_NAMES[model_type]
        config = type(name, (PretrainedConfig,), {"model_type": model_type})()
    elif isinstance(model_type, str) and model_type in CONFIG_MAPPING:  # a plugin has registered it
        config = CONFIG_MAPPING[model_type]()
    # transformers knows some published folders by name, and what a configuration says of its tokenizer.
    config._name_or_path = str(folder)
    if isinstance(values.get("tokenizer_class"), str):
        config.tokenizer_class = values["tokenizer_class"]
    return config
