"""Whether a cache of the teacher's logits is of the samples that a run reads. Pure Python: no torch.

Its identity is what decides the samples (tokens, blend, seed, length, how documents are kept apart), their
tokenizer, the teacher's weights and the temperature. A run that reads it is held to all of it at its start.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from spikingbrain_train.config.run import DataConfig, RunConfig
from spikingbrain_train.config.run_record import blend_shares, fingerprint
from spikingbrain_train.config.setting import leaves
from spikingbrain_train.config.shown import shown
from spikingbrain_train.errors import DataError
from spikingbrain_train.storage.checkpoint_folder import latest_checkpoint
from spikingbrain_train.storage.checkpoint_manifest import checksums, read_manifest
from spikingbrain_train.storage.teacher_cache import (
    CacheLayout,
    check_shard,
    read_cache_file,
    shard_path,
    shards_of,
)

TEACHER = "weights of stage.teacher"
SHARES = "shares of data.train"
_EARLIER_NAMES = {SHARES: "data.train_weights"}
"""What caches of earlier releases call it."""
_WEIGHT_FILES = ".distcp"
_NO_PART = ("data.train", "data.valid", "data.tokenizer", "data.num_workers")
"""Settings of the data that are known by something else, or decide nothing that a sample holds."""
_MOST_RANGES = 3


def cache_identity(config: RunConfig) -> dict[str, Any]:
    """What decides the samples of a run and the teacher's distributions over them, but for its weights.

    Raises:
        DataError: a dataset cannot be read.
    """
    stage, data = config.stage, config.data
    prints = [fingerprint(prefix) for prefix in data.train_prefixes]
    shares = blend_shares(data.train_weights, [each.tokens for each in prints], stage.seq_length)
    others = {f"data.{name}": value for name, value in leaves(data).items()}
    return {
        "data.train": [each.describe() for each in prints],
        SHARES: shares,
        "seed": config.seed,
        "stage.seq_length": stage.seq_length,
        **{name: _plain(value) for name, value in others.items() if name not in _NO_PART},
        "tokenizer of data.train": [_tokenizer_of(prefix) for prefix in data.train_prefixes],
        "model.vocab_size": config.model.vocab_size,
        "stage.distillation.temperature": stage.distillation.temperature,
    }


def teacher_digest(folder: str) -> str:
    """Of the weights of the newest checkpoint in ``folder``: of the sums in its manifest, or of its files.

    Raises:
        CheckpointError: there is no complete checkpoint.
    """
    checkpoint = latest_checkpoint(folder, "stage.teacher")
    manifest = read_manifest(checkpoint)
    if manifest is not None:
        files = [parts for name, parts in manifest.files.items() if name.endswith(_WEIGHT_FILES)]
        parts = [part for each in files for part in each.values()]
    else:
        weights = sorted(checkpoint.glob(f"*{_WEIGHT_FILES}"))
        parts = [(length, crc) for path in weights for _, length, crc in checksums(path)]
    return hashlib.sha256(json.dumps(sorted(parts)).encode()).hexdigest()[:16]


def check_identity(stored: dict[str, Any], ours: dict[str, Any], named: str) -> None:
    """Refuse a cache of something else.

    Args:
        stored: what the cache is of.
        ours: what the run reads.
        named: the cache, for the sentence.

    Raises:
        DataError: names the first thing that differs, with both values.
    """
    usual = {f"data.{name}": _plain(value) for name, value in leaves(DataConfig()).items()}
    for name, value in ours.items():
        was = stored.get(name, stored.get(_EARLIER_NAMES.get(name, name), usual.get(name)))
        if was != value:
            raise DataError(
                f"{named} was written with {name}={shown(was)}, but this run has {shown(value)}; restore it, "
                f"or write another cache with spikingbrain-cache-teacher"
            )


def check_cache(config: RunConfig, samples: range) -> None:
    """The cache that a run names is of its samples, and has those that it will read.

    Args:
        config: the run.
        samples: those that it reads, behind those of the steps that are done.

    Raises:
        DataError, CheckpointError: one sentence that says what differs, or which samples are missing.
    """
    cache = config.stage.distillation.cache
    if cache is None:
        return
    named, folder = f"stage.distillation.cache={cache}", Path(cache)
    stored, layout = read_cache_file(folder, named)
    ours = cache_identity(config)
    if config.stage.teacher is not None:
        ours[TEACHER] = teacher_digest(config.stage.teacher)
    check_identity(stored, ours, named)
    _check_samples(folder, layout, samples, named)


def _check_samples(folder: Path, layout: CacheLayout, wanted: range, named: str) -> None:
    there = shards_of(folder)
    missing: list[range] = []
    for shard in layout.shards(wanted.stop):
        if shard.stop <= wanted.start:
            continue
        found = there.get(shard.start, range(shard.start, shard.start))
        if len(found) > 0:
            check_shard(shard_path(folder, found), layout, found)
        first = max(found.stop, wanted.start)
        if first < shard.stop:
            if missing and missing[-1].stop == first:
                first = missing.pop().start
            missing.append(range(first, shard.stop))
    if missing:
        ranges = ", ".join(f"{each.start} to {each.stop - 1}" for each in missing[:_MOST_RANGES])
        more = f" and {len(missing) - _MOST_RANGES} more stretches" if len(missing) > _MOST_RANGES else ""
        raise DataError(
            f"{named} lacks samples {ranges}{more} of the {wanted.stop:,} that this run reads; go on with "
            f"spikingbrain-cache-teacher --output {folder} and this run's settings"
        )


def _tokenizer_of(prefix: str) -> str | None:
    """Fingerprint of the tokenizer that made a dataset; None where its sidecar does not say."""
    try:
        return str(json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))["tokenizer_fingerprint"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value, default=str))
