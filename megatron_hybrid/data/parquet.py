"""Rows of Parquet files, and where such files can be divided."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_hybrid.data.sources import BATCH_BYTES, Batch, Position, Segment, Source
from megatron_hybrid.files import checksum

_ROWS = 64


def open_parquet(source: Source) -> Any:
    """Return the pyarrow.parquet.ParquetFile of a source; raises ValueError if it is not one."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(source.path, memory_map=True)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{source.path} is not a readable Parquet file: {_sentence(error)}.") from None


def read_rows(segment: Segment, at: Position, keys: list[str]) -> Iterator[Batch]:
    """Yield the rows of a segment from ``at`` on, a list of values for each key.

    The last batch is empty and has the checksum of the file, or the fault that ends it. Raises ValueError if the file
    lacks a column, or one is not text.
    """
    import pyarrow

    end = Position(at.segment + 1, 0, 0)
    try:
        file = open_parquet(segment.source)
    except ValueError as error:
        yield Batch(segment, 0, None, end, 0, error=str(error).removeprefix(f"{segment.source.path} is "))
        return
    for key in keys:
        _check_column(file, key, segment.source.path)
    groups = range(segment.start, file.metadata.num_row_groups if segment.end is None else segment.end)
    total = sum(file.metadata.row_group(group).num_rows for group in groups)
    row = at.record
    try:
        for columns, size in _columns(file, groups, keys, at.record):
            first, row = row, row + len(columns[0])
            read = segment.source.size * (row - first) // total
            yield Batch(segment, first, columns, Position(at.segment, row, row), read, size)
    except (pyarrow.ArrowException, OSError) as error:
        yield Batch(segment, row, None, end, 0, error=f"corrupt Parquet file ({_sentence(error)})")
        return
    yield Batch(segment, row, None, end, 0, checksum=checksum(Path(segment.source.path)))


def _columns(
    file: Any, groups: range, keys: list[str], skip: int
) -> Iterator[tuple[list[list[str | bytes | None]], int]]:
    """The values of the rows after the first ``skip``, in parts of about a batch, and their bytes."""
    held: list[list[str | bytes | None]] = [[] for _ in keys]
    size = 0
    for group in groups:
        rows = file.metadata.row_group(group).num_rows
        if skip >= rows:
            skip -= rows
            continue
        # Few rows at a time: how long they are is not known before they are read.
        for table in file.iter_batches(_ROWS, row_groups=[group], columns=keys):
            if skip >= len(table):
                skip -= len(table)
                continue
            for column, key in zip(held, keys, strict=True):
                column += _column(table, key, skip)
            size, skip = size + table.nbytes, 0
            if size >= BATCH_BYTES:
                yield held, size
                held, size = [[] for _ in keys], 0
    if held[0]:
        yield held, size


def _check_column(file: Any, key: str, path: str) -> None:
    import pyarrow.types as types

    schema = file.schema_arrow
    for field_name in schema.names:
        if key == field_name or key.startswith(field_name + "."):
            type_ = schema.field(field_name).type
            for name in key.removeprefix(field_name).split(".")[1:]:
                if not types.is_struct(type_) or type_.get_field_index(name) < 0:
                    break
                type_ = type_.field(name).type
            else:
                if types.is_dictionary(type_):
                    type_ = type_.value_type
                texts = (
                    types.is_string,
                    types.is_large_string,
                    types.is_string_view,
                    types.is_binary,
                    types.is_large_binary,
                )
                if any(is_text(type_) for is_text in texts):
                    return
                raise ValueError(f'{path}: the column "{key}" has the type {type_}, but a document is a string.')
    raise ValueError(
        f'{path}: no column "{key}" (the file has: {", ".join(schema.names)}). Name the one with the text with '
        "--text-key."
    )


def _column(table: Any, key: str, skip: int) -> list[str | bytes | None]:
    """A column's values from row ``skip`` on; bytes where one of them is not UTF-8."""
    import pyarrow
    import pyarrow.compute

    name = next(n for n in table.schema.names if key == n or key.startswith(n + "."))
    column = table.column(name).slice(skip)
    for part in key.removeprefix(name).split(".")[1:]:
        column = pyarrow.compute.struct_field(column, part)
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        return column.cast(pyarrow.large_string()).to_pylist()
    except (UnicodeDecodeError, pyarrow.ArrowInvalid):
        return column.cast(pyarrow.large_binary()).to_pylist()


def _sentence(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")


def row_group_at(source: Source, offset: int) -> int:
    """Return the first row group that begins at or after ``offset``, counting compressed bytes."""
    metadata = open_parquet(source).metadata
    begin = 0
    for group in range(metadata.num_row_groups):
        if begin >= offset:
            return group
        row_group = metadata.row_group(group)
        begin += sum(row_group.column(i).total_compressed_size for i in range(row_group.num_columns))
    return metadata.num_row_groups
