"""An indexed dataset against the checksums that were written with it."""

from __future__ import annotations

from spikingbrain_train.data.indexed import open_indexed_dataset, read_info
from spikingbrain_train.data.token_file import crc32_of
from spikingbrain_train.errors import DataError


def verify_dataset(prefix: str) -> str:
    """Read all files of a dataset and hold them to their sizes, types and checksums.

    A run looks at sizes and types alone, at its start.

    Returns:
        What was found to be right, in a line.

    Raises:
        DataError: names the first file that is not what was written.
    """
    dataset = open_indexed_dataset(prefix)
    found = f"{dataset.num_tokens:,} tokens as {dataset.dtype.name}"
    info = read_info(prefix)
    if info is None or info.checksums is None:
        return f"{prefix}: {found}; sizes fit, and no checksums were written with it"
    read = 0
    for suffix, (size, crc) in info.checksums.items():
        try:
            other = crc32_of(f"{prefix}{suffix}")
        except OSError as error:
            raise DataError(f"cannot read {prefix}{suffix}: {error.strerror or error}") from error
        if other != crc:
            raise DataError(
                f"{prefix}{suffix} is as long as it was written, but its bytes are others (CRC-32 "
                f"{other:08x} instead of {crc:08x}): copy it again, or preprocess again with --overwrite"
            )
        read += size
    return f"{prefix}: {found}; {len(info.checksums)} files, {read:,} bytes, are as they were written"
