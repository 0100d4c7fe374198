"""Reads parquet files as records, a batch of rows at a time, and only the columns that are needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blt.data.records import Document, Fields
from blt_runtime.errors import InputError, MissingExtra

ROWS = 1024
"""Rows decoded at a time."""


def read_parquet(path: Path, fields: Fields) -> Iterator[Document]:
    """One document per row; columns of strings become UTF-8, columns of bytes are used unchanged.

    Raises InputError for a damaged file and for a row without text, MissingExtra without pyarrow.
    """
    pyarrow, parquet = _libraries(path)
    damage = (pyarrow.ArrowException, OSError, EOFError)
    try:
        with parquet.ParquetFile(path) as file:
            columns = [key for key in fields.keys if key in file.schema_arrow.names]
            number = 0
            for batch in file.iter_batches(batch_size=ROWS, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield fields.document(record, f"{path}, row {number}")
    except damage as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read as parquet ({reason}); is the file complete?") from error


def _libraries(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra(f"{path} cannot be read: pyarrow", "parquet") from error
    return pyarrow, pyarrow.parquet
