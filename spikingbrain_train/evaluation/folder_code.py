"""The modelling code that a Hugging Face folder brings along, brought in by one process at a time.

transformers copies such code, file by file, into a cache that all processes of a user share, and imports it
from there. Of several ranks that load one folder, one imports what another has written half.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub.utils import WeakFileLock
from transformers import AutoConfig, PretrainedConfig
from transformers.dynamic_module_utils import HF_MODULES_CACHE, get_class_from_dynamic_module

LOCK_FILE = "spikingbrain_train.lock"
"""In the cache."""


def load_config_and_code(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration of a folder; its code is in the cache, whole, and imported.

    Args:
        folder: of a causal language model.
        trust_remote_code: copy and run the code.

    Raises:
        Exception: whatever transformers and the code raise.
    """
    if not trust_remote_code:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    cache = Path(HF_MODULES_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(cache / LOCK_FILE):
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=True)
        model_class = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
        if model_class is not None:
            get_class_from_dynamic_module(model_class, str(folder), local_files_only=True)
    return config
