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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from spikingbrain_train.errors import CheckpointError, DataError
from spikingbrain_train.storage.index_format import DOMAINS_SUFFIX, read_header
from spikingbrain_train.storage.loss_mask_format import LOSS_MASK_SUFFIX, has_loss_mask

if TYPE_CHECKING:
    from spikingbrain_train.config.batch_size import BatchSizes
    from spikingbrain_train.config.run import RunConfig

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
    domains: str | None = None
    """The same of the domains of its documents, where they decide the order of samples and are there."""

    def describe(self) -> str:
        """The dataset in words."""
        domains = f", domains {self.domains}" if self.domains else ""
        return f"{self.tokens:,} tokens in {self.documents:,} documents, digest {self.digest}{domains}"


@dataclass(frozen=True)
class StageTokens:
    """What a stage of training has read."""

    kind: str
    """``stage.kind``."""
    tokens: int
    """Of sequences, sinks left out."""
    checkpoint: str
    """The folder that the next stage began with."""


@dataclass(frozen=True)
class TokenHistory:
    """What was read before a run began, stage after stage."""

    stages: list[StageTokens] = field(default_factory=list)
    """The oldest first; those that are known."""
    unknown: str | None = None
    """Why there may be others before them: a sentence without its full stop. None where these are all."""
    source_tokens: float | None = None
    """Tokens that the dense source was trained on, as somebody has said."""

    @property
    def tokens(self) -> int:
        """Of the stages that are known."""
        return sum(stage.tokens for stage in self.stages)


@dataclass(frozen=True)
class SamplesRead:
    """How far a run was in its data when its present global batch began to count.

    stage.global_batch_size may change where a run goes on; its position in the data is then no multiple of
    it.
    """

    iteration: int = 0
    """Optimizer steps done by then."""
    samples: int = 0
    """Sequences that they have read."""

    def at(self, iteration: int, batch_sizes: BatchSizes) -> int:
        """Sequences read by the end of a later ``iteration``."""
        return batch_sizes.read_by(iteration - self.iteration, self.samples)


@dataclass(frozen=True)
class RunRecord:
    """What wrote a checkpoint."""

    world_size: int
    """Ranks of the run."""
    training_data: list[DatasetFingerprint]
    """One for each prefix of data.train, in its order."""
    history: TokenHistory | None = None
    """What was read before; None in checkpoints of earlier releases."""
    counted_from: SamplesRead = SamplesRead()
    """Where the run was when it started or went on; the beginning in checkpoints of earlier releases, whose
    global batch could not change."""

    def all_tokens(self, own: int) -> int | None:
        """Tokens of this stage, ``own``, and of all before it; None where those are not known."""
        if self.history is None or self.history.unknown is not None:
            return None
        return self.history.tokens + own

    def source_share(self, own: int) -> float | None:
        """The same as a share of the source's tokens; None where either is not known."""
        tokens = self.all_tokens(own)
        if tokens is None or self.history is None or self.history.source_tokens is None:
            return None
        return tokens / self.history.source_tokens


def fingerprint(prefix: str, *, with_domains: bool = False) -> DatasetFingerprint:
    """Tell an indexed dataset from others, reading at most 4 MiB.

    Args:
        prefix: path without .bin/.idx.
        with_domains: also by the domains of its documents, which data.pack_by_domain reads.

    Raises:
        DataError: the index is damaged or unreadable.
    """
    masks = [prefix + LOSS_MASK_SUFFIX] if has_loss_mask(prefix) else []
    try:
        with open(f"{prefix}.idx", "rb") as index:
            header = read_header(index, prefix)
        size = os.path.getsize(f"{prefix}.bin")
        digest = _digest([f"{prefix}.idx", f"{prefix}.bin", *masks])
        domains = f"{prefix}{DOMAINS_SUFFIX}"
        of_domains = _digest([domains]) if with_domains and os.path.exists(domains) else None
    except OSError as error:
        raise DataError(f"cannot read the indexed dataset {prefix}: {error.strerror or error}") from error
    return DatasetFingerprint(
        tokens=size // header.item_bytes,
        documents=max(header.boundaries - 1, 0),
        digest=digest,
        domains=of_domains,
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


def record_of(config: RunConfig, world_size: int, history: TokenHistory | None = None) -> RunRecord:
    """The record of a run that starts or goes on now. Raises DataError."""
    return RunRecord(world_size, training_data_of(config), history)


def training_data_of(config: RunConfig) -> list[DatasetFingerprint]:
    """The tokens that a run trains on, as they lie there now. Raises DataError."""
    data = config.data
    return [fingerprint(prefix, with_domains=data.pack_by_domain) for prefix in data.train_prefixes]


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
            int(fields["world_size"]),
            [DatasetFingerprint(**each) for each in fields["training_data"]],
            _history(fields.get("history")),
            SamplesRead(**fields.get("counted_from", {})),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} does not describe a run ({error or type(error).__name__}); copy the checkpoint again"
        ) from error


def _history(fields: Any) -> TokenHistory | None:
    if fields is None:
        return None
    stages = [StageTokens(**each) for each in fields["stages"]]
    return TokenHistory(stages, fields["unknown"], fields["source_tokens"])


def blend_shares(
    weights: Sequence[float] | None, tokens: Sequence[int], seq_length: int
) -> list[float] | None:
    """The share that every dataset has in the samples. Their order depends on its last bit.

    Args:
        weights: those of data.train; None takes the datasets by their size.
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
