"""Rows of Parquet files as documents, a row group at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from spikingbrain_train.data.raw_document import RawDocument
from spikingbrain_train.errors import DataError

PARQUET_SUFFIX = ".parquet"
"""Compressed within; one document a row."""

ALL = "*"
"""What a conversation says besides may be in any column: its tools."""
_BATCH_ROWS = 1024


def parquet_documents(path: str, size: int, fields: Sequence[str]) -> Iterator[RawDocument]:
    """The documents of a file, in their order.

    Args:
        path: the file.
        size: its bytes.
        fields: columns to read: that of the text or conversation first, others, as of domains, behind it;
            ``meta.source`` is a field inside a column, and :data:`ALL` stands for all columns.

    Raises:
        DataError: damaged, no Parquet file, or without the first column.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            wanted = schema.names if ALL in fields else [_column(each, schema.names) for each in fields]
            columns = [name for name in dict.fromkeys(wanted) if name is not None]
            if fields[0] not in columns:
                raise DataError(
                    f"{path} has no column {fields[0]!r} (columns: {', '.join(sorted(schema.names)[:8])}): "
                    "name another with --text-key, or --chat-key for conversations"
                )
            kind = schema.field(fields[0]).type
            is_plain = columns == [fields[0]] and (
                pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
            )
            number, rows = 0, max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                for row in batch.column(0).to_pylist() if is_plain else batch.to_pylist():
                    number += 1
                    is_text = is_plain and row is not None
                    payload = row.encode() if is_text else _json(row if not is_plain else {fields[0]: row})
                    position = size * number // rows
                    yield RawDocument(f"{path}:{number}", payload, not is_text, position, file=path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{path} is damaged or no Parquet file ({reason}): write or copy it again") from error


def _column(field: str, names: Sequence[str]) -> str | None:
    """The column that holds a field, which may be one inside it."""
    first = field if field in names else field.split(".")[0]
    return first if first in names else None


def _json(row: dict[str, Any]) -> bytes:
    """As a line of JSON holds it; dates and the like, which JSON lacks, as text."""
    return json.dumps(row, default=str, ensure_ascii=False).encode("utf-8", "surrogatepass")
