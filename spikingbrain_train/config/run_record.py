"""What a checkpoint says of its run besides the config: how many ranks there were, and which tokens.

``iter_0000100/run_record.json``. A path can hold other tokens tomorrow; with them the order of all that is
still to be read would be another one. Without torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.errors import CheckpointError, DataError
from spikingbrain_train.storage.index_format import read_header
from spikingbrain_train.storage.loss_mask_format import LOSS_MASK_SUFFIX, has_loss_mask

RUN_RECORD_FILE = "run_record.json"

_SAMPLES, _SAMPLE_BYTES = 16, 1 << 16


@dataclass(frozen=True)
class DatasetFingerprint:
    """An indexed dataset as it can be told from another one without reading all of it."""

    tokens: int
    documents: int
    digest: str
    """Of the sizes of its files and of 16 stretches of 64 KiB, spread evenly over each; a change between
    those is not seen unless it moves what lies behind it. A loss mask counts as one of them."""

    def describe(self) -> str:
        """The dataset in words."""
        return f"{self.tokens:,} tokens in {self.documents:,} documents, digest {self.digest}"


@dataclass(frozen=True)
class RunRecord:
    """What wrote a checkpoint."""

    world_size: int
    """Ranks of the run."""
    training_data: list[DatasetFingerprint]
    """One for each prefix of data.train, in its order."""


def fingerprint(prefix: str) -> DatasetFingerprint:
    """Tell an indexed dataset from others, reading at most 3 MiB.

    Raises:
        DataError: the index is damaged or unreadable.
    """
    masks = [prefix + LOSS_MASK_SUFFIX] if has_loss_mask(prefix) else []
    try:
        with open(f"{prefix}.idx", "rb") as index:
            header = read_header(index, prefix)
        size = os.path.getsize(f"{prefix}.bin")
        digest = _digest([f"{prefix}.idx", f"{prefix}.bin", *masks])
    except OSError as error:
        raise DataError(f"cannot read the indexed dataset {prefix}: {error.strerror or error}") from error
    return DatasetFingerprint(
        tokens=size // header.item_bytes, documents=max(header.boundaries - 1, 0), digest=digest
    )


def tokens_digest(prefix: str) -> str:
    """The digest of a dataset's tokens alone, without a loss mask: 16 hexadecimal digits.

    Raises:
        DataError: a file is missing or unreadable.
    """
    try:
        return _digest([f"{prefix}.idx", f"{prefix}.bin"])
    except OSError as error:
        raise DataError(f"cannot read the indexed dataset {prefix}: {error.strerror or error}") from error


def _digest(paths: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            _add_samples(digest, file)
    return digest.hexdigest()[:16]


def _add_samples(digest: Any, file: BinaryIO) -> None:
    size = os.fstat(file.fileno()).st_size
    digest.update(str(size).encode())
    last = max(size - _SAMPLE_BYTES, 0)
    for offset in sorted({last * sample // (_SAMPLES - 1) for sample in range(_SAMPLES)}):
        file.seek(offset)
        digest.update(file.read(_SAMPLE_BYTES))


def record_of(config: RunConfig, world_size: int) -> RunRecord:
    """The record of a run that starts or goes on now. Raises DataError."""
    return RunRecord(world_size, [fingerprint(prefix) for prefix in config.data.train])


def write_record(record: RunRecord, checkpoint: Path) -> None:
    """Put it into a checkpoint folder that is being written."""
    (checkpoint / RUN_RECORD_FILE).write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")


def read_record(checkpoint: Path) -> RunRecord | None:
    """The record in a checkpoint folder, None in checkpoints of earlier releases.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = checkpoint / RUN_RECORD_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return RunRecord(
            int(fields["world_size"]), [DatasetFingerprint(**each) for each in fields["training_data"]]
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} does not describe a run ({error or type(error).__name__}); copy the checkpoint again"
        ) from error


def blend_shares(
    weights: Sequence[float] | None, tokens: Sequence[int], seq_length: int
) -> list[float] | None:
    """The share that every dataset has in the samples. Their order depends on its last bit.

    Args:
        weights: data.train_weights; None takes the datasets by their size.
        tokens: of each dataset.
        seq_length: tokens of a sample.

    Returns:
        Numbers whose sum is 1, or None where weights and datasets do not fit or no dataset has a sample.
    """
    if weights is not None and len(weights) != len(tokens):
        return None
    if weights is None:
        weights = [float(max(number - 1, 0) // seq_length) for number in tokens]
    total = math.fsum(weights)
    return [weight / total for weight in weights] if total > 0 else None
