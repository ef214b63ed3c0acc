"""The files that make up an indexed dataset. Asked for before torch is there."""

from __future__ import annotations

import os
from pathlib import Path

from spikingbrain_train.storage.index_format import DOMAINS_SUFFIX
from spikingbrain_train.storage.loss_mask_format import LOSS_MASK_SUFFIX

SIDECAR_SUFFIX = ".json"
SUFFIXES = (".bin", ".idx", SIDECAR_SUFFIX)
"""The files of one dataset, in the order in which they are put in place."""
OPTIONAL_SUFFIXES = (DOMAINS_SUFFIX, LOSS_MASK_SUFFIX)
"""Files that only some datasets have; they are put in place, or older ones removed, before the others."""
ALL_SUFFIXES = (*OPTIONAL_SUFFIXES, *SUFFIXES)


def existing_files(prefix: str | Path) -> list[str]:
    """Files of a dataset that already lie at ``prefix``."""
    return [f"{prefix}{suffix}" for suffix in ALL_SUFFIXES if os.path.exists(f"{prefix}{suffix}")]
