"""The head of ``<prefix>.loss_mask``: which tokens of an indexed dataset carry loss. Without torch or numpy.

Behind it lie, for every example (a document of the dataset), the position of its first token with loss int32
and that of its last int32, then one bit a token, the first token in the highest bit of the first byte.
"""

from __future__ import annotations

import os
import struct
from array import array
from dataclasses import dataclass
from typing import BinaryIO

from spikingbrain_train.errors import DataError

LOSS_MASK_SUFFIX = ".loss_mask"

_HEADER = struct.Struct("<8s4Q16s32s")
"""Magic; version, examples, tokens, tokens with loss; digest of .idx and .bin; SHA-256 of what follows."""
HEADER_BYTES = _HEADER.size
_MAGIC = b"SBTLOSS\x00"
_VERSION = 1


@dataclass(frozen=True)
class LossMaskHeader:
    """What a loss mask says before its lists."""

    examples: int
    tokens: int
    """Of the dataset, with and without loss."""
    loss_tokens: int
    tokens_digest: str
    """Of the dataset's .idx and .bin, as config/run_record.py takes it: 16 hexadecimal digits."""
    sha256: bytes
    """Of everything behind the header."""

    @property
    def size(self) -> int:
        """Bytes of a file with this header."""
        return HEADER_BYTES + 8 * self.examples + -(-self.tokens // 8)

    def pack(self) -> bytes:
        """The header as it stands in the file."""
        counts = (_VERSION, self.examples, self.tokens, self.loss_tokens)
        return _HEADER.pack(_MAGIC, *counts, self.tokens_digest.encode("ascii"), self.sha256)


@dataclass(frozen=True)
class LossPositions:
    """Where in its example the first and the last token with loss stands, counted from 0; at least 1."""

    first: array[int]
    last: array[int]


def has_loss_mask(prefix: str) -> bool:
    """Whether the dataset says which tokens carry loss."""
    return os.path.isfile(prefix + LOSS_MASK_SUFFIX)


def read_loss_mask_header(file: BinaryIO, prefix: str) -> LossMaskHeader:
    """Read the head of ``prefix``.loss_mask, which ``file`` is at the start of and is behind afterwards.

    Raises:
        DataError: it is cut short, or no loss mask.
        OSError: the file cannot be read.
    """
    path, head = prefix + LOSS_MASK_SUFFIX, file.read(HEADER_BYTES)
    found = os.fstat(file.fileno()).st_size
    if len(head) < HEADER_BYTES:
        raise _damaged(path, f"it has {found} bytes and its head alone takes {HEADER_BYTES}")
    magic, version, examples, tokens, loss_tokens, digest, sha256 = _HEADER.unpack(head)
    if magic != _MAGIC or version != _VERSION:
        raise DataError(f"{path} is no loss mask that this release reads: preprocess again with --overwrite")
    header = LossMaskHeader(examples, tokens, loss_tokens, digest.decode("ascii", "replace"), sha256)
    if found != header.size:
        raise _damaged(path, f"it is {found} bytes long instead of {header.size}")
    return header


def read_loss_positions(prefix: str) -> LossPositions:
    """The two lists of ``prefix``.loss_mask, without a look at the bits behind them.

    Raises:
        DataError: there is no loss mask, or it is damaged.
    """
    path = prefix + LOSS_MASK_SUFFIX
    try:
        with open(path, "rb") as file:
            header = read_loss_mask_header(file, prefix)
            first, last = array("i"), array("i")
            first.frombytes(file.read(4 * header.examples))
            last.frombytes(file.read(4 * header.examples))
    except FileNotFoundError as error:
        raise no_loss_mask(prefix) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return LossPositions(first, last)


def no_loss_mask(prefix: str) -> DataError:
    """The error of a dataset whose tokens all carry loss, where one of examples is wanted."""
    return DataError(
        f"{prefix} has no {prefix}{LOSS_MASK_SUFFIX}, which says where the answers are: make it of "
        "conversations, with spikingbrain-preprocess --chat-key messages --loss-on assistant"
    )


def not_of_these_tokens(prefix: str) -> DataError:
    """The error of a loss mask that was made for other tokens."""
    return DataError(
        f"{prefix}{LOSS_MASK_SUFFIX} belongs to other tokens than {prefix}.bin holds: preprocess again with "
        "--overwrite, or copy all files of the dataset"
    )


def damaged_bits(prefix: str) -> DataError:
    """The error of a loss mask whose content is not what was written."""
    return _damaged(prefix + LOSS_MASK_SUFFIX, "its content does not have the hash that its head names")


def _damaged(path: str, reason: str) -> DataError:
    return DataError(f"{path} is damaged ({reason}): copy it again, or preprocess again with --overwrite")
