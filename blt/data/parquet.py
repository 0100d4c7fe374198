"""Reads parquet files as records, a batch of rows at a time, and only the columns that are needed."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

from blt.data.parquet_pages import pages
from blt.data.records import NOT_UTF8, NULL, Document, Reading
from blt_runtime.errors import InputError, MissingExtra

ROWS = 1024
"""Most rows decoded at a time."""
BATCH_BYTES = 32 << 20
"""Decoded at a time, by the sizes that the file declares."""
DICTIONARY_BYTES = 32 << 20
READ_BYTES = 1 << 20
"""Of a column, read at a time; by default pyarrow reads a whole row group."""


def read_parquet(path: Path, reading: Reading) -> Iterator[Document]:
    """One document per row; columns of strings become UTF-8, columns of bytes are used unchanged.

    Raises InputError for a damaged file, for a row without text and for a repeated name of a column, and MissingExtra
    without pyarrow.
    """
    pyarrow, parquet = _libraries(path)
    damage = (pyarrow.ArrowException, OSError, EOFError, ValueError)  # ValueError: a name that is not UTF-8
    fields = reading.fields
    try:
        with parquet.ParquetFile(path, buffer_size=READ_BYTES) as file:
            if not file.metadata.num_rows:
                return
            _check_metadata(file.metadata, path)
            paths = [_path(file.schema_arrow, key, reading, path) for key in fields.keys]
            rows = _batch_rows(file.metadata, paths, reading.max_memory, path)
            number = 0
            for batch in file.iter_batches(batch_size=rows, columns=[".".join(names) for names in paths]):
                columns = [_column(batch, names, number, reading, path) for names in paths]
                for texts in zip(*columns, strict=True):
                    number += 1
                    if any(text is None for text in texts):
                        reading.note(NULL, f"{path}, row {number}")
                    else:
                        yield fields.document(list(texts))
    except damage as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read as parquet ({reason}); is the file complete?") from error


def _path(schema: Any, key: str, reading: Reading, path: Path) -> list[str]:
    """The names that lead to a column: one, or those of a struct and of its fields. Raises InputError."""
    names = [key] if key in schema.names else key.split(".")
    inside = schema
    for name in names:
        known = inside.names if hasattr(inside, "names") else [inside.field(i).name for i in range(_width(inside))]
        if known.count(name) > 1:
            raise InputError(f"{path}: {known.count(name)} columns are named {name!r}; rename all but one")
        if name not in known:
            raise reading.fields.no_text(key, f"{path}, row 1")
        inside = inside.field(name).type
    return names


def _width(kind: Any) -> int:
    """The number of fields of a struct; 0 for another type."""
    import pyarrow

    return int(kind.num_fields) if pyarrow.types.is_struct(kind) else 0


def _batch_rows(metadata: Any, paths: list[list[str]], max_memory: int, path: Path) -> int:
    """Rows to decode at a time: batches of average rows have BATCH_BYTES, and those of the longest value that a
    dictionary may hold DICTIONARY_BYTES. Raises InputError if a row or a page has more than `max_memory`."""
    wanted = {".".join(names) for names in paths}
    largest = longest_value = 1
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        chunks = [group.column(i) for i in range(group.num_columns)]
        n_bytes = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in wanted)
        largest = max(largest, n_bytes // max(1, group.num_rows))
    for page in pages(path, metadata, wanted):
        if page.uncompressed > max_memory:
            raise InputError(f"{path}: a page of {page.uncompressed:,} bytes; give more memory with --max-memory")
        longest_value = max(longest_value, page.uncompressed if page.dictionary else 1)
    if largest > max_memory:
        raise InputError(f"{path}: rows of {largest:,} bytes; give more memory with --max-memory")
    return max(1, min(ROWS, BATCH_BYTES // largest, DICTIONARY_BYTES // longest_value))


def _column(batch: Any, names: list[str], before: int, reading: Reading, path: Path) -> Iterator[bytes | None]:
    """The values of one column of a batch, whose first row has the number `before` + 1."""
    import pyarrow
    from pyarrow import compute

    array = batch.column(names[0])
    for name in names[1:]:
        array = compute.struct_field(array, [name])
    types = pyarrow.types
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if types.is_null(array.type):
        return repeat(None, len(array))
    text = types.is_string(array.type) or types.is_large_string(array.type)
    if not text and not (types.is_binary(array.type) or types.is_large_binary(array.type)):
        first = next((i for i, valid in enumerate(array.is_valid().to_pylist()) if valid), None)
        if first is None:
            return repeat(None, len(array))
        raise reading.fields.no_text(".".join(names), f"{path}, row {before + first + 1}")
    bytes_of = array.cast(pyarrow.large_binary())
    if text:
        _check_utf8(array, bytes_of, before, reading, path)
    return (value.as_py() for value in bytes_of)


def _check_utf8(strings: Any, bytes_of: Any, before: int, reading: Reading, path: Path) -> None:
    """Counts the strings that are not UTF-8, which no reader of the format checks."""
    import pyarrow

    try:
        strings.validate(full=True)
    except pyarrow.ArrowInvalid:
        for index, value in enumerate(bytes_of):
            if value.is_valid and not _is_utf8(value.as_py()):
                reading.note(NOT_UTF8, f"{path}, row {before + index + 1}")


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _check_metadata(metadata: Any, path: Path) -> None:
    """Raises InputError if pyarrow ends the process where it reads the sizes of a column, as it does for damaged ones
    (pyarrow 26). A child process reads them first, in a few milliseconds."""
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            for index in range(metadata.num_row_groups):
                group = metadata.row_group(index)
                for number in range(group.num_columns):
                    group.column(number)
        finally:
            os._exit(0)  # an exception of Python is raised again, in this process
    if os.waitpid(child, 0)[1]:
        raise InputError(
            f"{path}: cannot be read as parquet (the sizes of a column are damaged); is the file complete?"
        )


def _libraries(path: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra(f"{path} cannot be read: pyarrow", "parquet") from error
    return pyarrow, pyarrow.parquet
