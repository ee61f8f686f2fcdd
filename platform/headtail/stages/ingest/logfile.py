"""The files of a log: their columns, and their rows in batches, whatever the format.

In: the files found at a place and the columns wanted. Out: Sheets: raw cells with row numbers, and the rows that no cells could be
read from, with a reason. Formats: Parquet, delimited text (CSV, TSV), JSON Lines; text also packed. Memory is bounded by one batch,
however small the file is from which it comes. Knows nothing of what a cell means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from headtail.adapters.storage import open_file
from headtail.core.errors import InputError
from headtail.core.keys import sha256_stream
from headtail.stages.ingest import jsonlines
from headtail.stages.ingest.delimited import ROW, LongLine, Reject, Sheet, delimited_sheets
from headtail.stages.ingest.detect import detect
from headtail.stages.ingest.files import DELIMITED, KINDS, LINES, PARQUET, LogFile, suffix
from headtail.stages.ingest.streams import UnusableFile, check_text, codec_of, open_plain, readable

BATCH_ROWS = 1 << 19
LIST_ROWS = 1 << 12  # of lists whose size is not known before they are read
BATCH_BYTES = 64 << 20  # of cells of Parquet at once: a value that stands once in a file may stand in a million rows
CELL_BYTES = 1 << 20  # of Parquet; a row with a longer cell is set aside
PACKED_BYTES, PACKED_TIMES = 1 << 30, 200  # of a column's part that is refused when both are passed; text packs 5 to 50 times
BLOCK_BYTES = 16 << 20
HEAD_BYTES = 1 << 20  # looked at to tell what a file is
MAX_LINE = 32 << 20  # bytes; a longer line of text is set aside without being held
SPLIT_ROWS = 1 << 20
_BOM = b"\xef\xbb\xbf"


class LogSplit(NamedTuple):
    """What one worker reads: some row groups of a Parquet file, or a whole text file. `place`: in the order of the log."""

    file: LogFile
    place: int
    groups: tuple[int, ...] = ()
    first_row: int = 1


class ColumnSelection(NamedTuple):
    """Columns to read, the query's first. `lists`: those of them that hold several values; `separator`: between these in text."""

    columns: tuple[str, ...]
    lists: tuple[str, ...] = ()
    separator: str = "|"


def log_digest(system: pafs.FileSystem, file: LogFile) -> str:
    """Hex SHA-256 of the file's bytes as stored."""
    with readable(file.path), open_file(system, file.path) as stream:
        return sha256_stream(stream, 1 << 22)


def probe_file(system: pafs.FileSystem, file: LogFile, query: str, quotes: str = "auto") -> LogFile:
    """`file` with its kind and columns. `query` helps to tell the delimiter. InputError when it is empty or not of a known kind."""
    with readable(file.path):
        file = file._replace(codec=codec_of(system, file.path, file.unsure))
        with open_plain(system, file.path, file.codec) as stream:
            head = stream.read(HEAD_BYTES)
        if not head.strip():
            raise UnusableFile("file is empty", where=file.path, fix="leave it out, or check the job that writes it")
        named = KINDS.get(suffix(file.name))
        if head.startswith(b"PAR1") or named == PARQUET:
            if file.codec:
                raise InputError(f"a Parquet file packed with {file.codec}", where=file.path, fix="unpack it: Parquet packs its own pages")
            with open_file(system, file.path) as source:
                meta = pq.ParquetFile(source)
                return file._replace(kind=PARQUET, columns=tuple(meta.schema_arrow.names), rows=meta.metadata.num_rows)
    check_text(head, file.path)
    if (named or (LINES if head.lstrip().startswith(b"{") else DELIMITED)) == LINES:
        if head.lstrip().startswith(b"["):
            raise InputError(
                "file is one JSON array, not JSON Lines", where=file.path, fix="write one object per line, for example: jq -c '.[]'"
            )
        lines = head.removeprefix(_BOM).replace(b"\r", b"\n").split(b"\n")
        columns = jsonlines.keys_of((lines[:-1] or lines)[:1000])
        if not columns:
            raise InputError("no line is a JSON object", where=file.path, fix="write one object per line, for example: jq -c '.'")
        return file._replace(kind=LINES, columns=columns)
    form = detect(head, len(head) < HEAD_BYTES, query, suffix(file.name), quotes)
    return file._replace(kind=DELIMITED, columns=form.names, form=form)


def split_log(system: pafs.FileSystem, files: Sequence[LogFile]) -> list[LogSplit]:
    """The log in parts that can be read apart from one another: Parquet by row groups of about a million rows, text by file."""
    splits: list[LogSplit] = []
    for file in files:
        if file.kind != PARQUET:
            splits.append(LogSplit(file, len(splits)))
            continue
        with readable(file.path), open_file(system, file.path) as source:
            meta = pq.ParquetFile(source).metadata
            sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        groups: list[int] = []
        first = row = 1
        for i, rows in enumerate(sizes):
            groups.append(i)
            row += rows
            if row - first >= SPLIT_ROWS or i == len(sizes) - 1:
                splits.append(LogSplit(file, len(splits), tuple(groups), first))
                groups, first = [], row
    return splits


def read_split(system: pafs.FileSystem, part: LogSplit, selection: ColumnSelection) -> Iterator[Sheet]:
    """The rows of `part` in batches; columns that the file lacks are left out, those of its folders are filled in."""
    file = part.file
    above = {name: value for name, value in file.partitions.items() if name in selection.columns and name not in file.columns}
    names = tuple(n for n in dict.fromkeys(selection.columns) if n not in above and (n in file.columns or file.kind == LINES))
    if not names and file.kind != LINES:
        names = file.columns[:1]  # all wanted columns are in the folders' names: any column gives the number of rows
    with readable(file.path):
        if file.kind == PARQUET:
            found = _read_parquet(system, part, names)
        elif file.kind == LINES:
            lists = tuple(name for name in selection.lists if name in names)
            found = jsonlines.json_sheets(_text(system, file), names, lists, selection.columns[0], selection.separator)
        else:
            assert file.form is not None
            found = delimited_sheets(_text(system, file), file.form, names)
        try:
            for sheet in found:
                yield sheet._replace(table=_fill(sheet.table, above)) if above else sheet
        except InputError as error:
            raise type(error)(error.what, where=error.where or file.path, value=error.value, fix=error.fix) from None


def _fill(table: pa.Table, above: dict[str, str | None]) -> pa.Table:
    for name, value in above.items():
        cell = pa.scalar(None if value is None else value.encode(), pa.binary())
        table = table.append_column(name, pa.repeat(cell, table.num_rows))
    return table


def _read_parquet(system: pafs.FileSystem, part: LogSplit, names: Sequence[str]) -> Iterator[Sheet]:
    """Text is read as codes into a dictionary, so that its size is known before it is spread out over the rows."""
    row = part.first_row
    with open_file(system, part.file.path) as source:
        meta = pq.ParquetFile(source).metadata
        paths = [meta.schema.column(i).path for i in range(meta.num_columns)]
        _check_packing(part, meta, paths, names)
        coded = [path for path in paths if path.split(".")[0] in names]
        for batch in _batches(source, part, names, coded):
            columns = [batch.column(name) for name in names]
            if sum(map(_most, columns)) * batch.num_rows <= BATCH_BYTES:  # nearly always: no need to look at each row
                yield Sheet(pa.table([pa.array(np.arange(row, row + batch.num_rows)), *columns], names=[ROW, *names]), [])
                row += batch.num_rows
                continue
            sizes = np.sum([_sizes(column) for column in columns], axis=0).astype(np.int64)
            long = sizes > CELL_BYTES
            rows = np.arange(row, row + batch.num_rows)
            rejects = [Reject(int(number), "too_long", b"") for number in rows[long]]
            table = pa.table([pa.array(rows, pa.int64()), *columns], names=[ROW, *names])
            table = table.filter(pa.array(~long)) if long.any() else table
            bounds = np.cumsum(sizes[~long]) // BATCH_BYTES
            if not bounds.any():  # no need to spread it out here
                yield Sheet(table, rejects)
                row += batch.num_rows
                continue
            starts = np.flatnonzero(np.diff(bounds, prepend=-1))
            for start, end in zip(starts, [*starts[1:], table.num_rows], strict=True):
                piece = table.slice(start, end - start)
                yield Sheet(pa.table([_spread(column) for column in piece.columns], names=piece.column_names), rejects)
                rejects = []
            row += batch.num_rows


def _batches(source: Any, part: LogSplit, names: Sequence[str], coded: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Batches with text as codes. Arrow cannot read lists so where codes change midway: these in few rows at once, spread out."""
    whole, flat = pq.ParquetFile(source, read_dictionary=coded), [path for path in coded if "." not in path]
    if flat == coded:
        yield from whole.iter_batches(BATCH_ROWS, row_groups=list(part.groups), columns=list(names))
        return
    for group in part.groups:
        done = 0
        try:
            for batch in whole.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(names)):
                yield batch
                done += batch.num_rows
        except pa.ArrowNotImplementedError:
            for batch in pq.ParquetFile(source, read_dictionary=flat).iter_batches(LIST_ROWS, row_groups=[group], columns=list(names)):
                skip = min(done, batch.num_rows)
                done -= skip
                yield batch.slice(skip)


def _check_packing(part: LogSplit, meta: Any, paths: Sequence[str], names: Sequence[str]) -> None:
    """InputError for a column that unpacks to far more than text can: a page of it is held as a whole."""
    for group in part.groups:
        for i, path in enumerate(paths):
            chunk = meta.row_group(group).column(i)
            large, packed = chunk.total_uncompressed_size, max(1, chunk.total_compressed_size)
            if path.split(".")[0] in names and large > PACKED_BYTES and large > PACKED_TIMES * packed:
                raise InputError(
                    f"column {path} unpacks to {large / packed:,.0f} times its size",
                    value=f"{large:,} bytes in row group {group}",
                    fix="this is not text; leave the file out",
                )


def _most(column: pa.Array) -> int:
    """Bytes that no cell has more of."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind, column = kind.value_type, column.dictionary
    if pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_string(kind):
        return pc.max(pc.binary_length(column)).as_py() or 0
    return BATCH_BYTES if pa.types.is_nested(kind) else 0


def _sizes(column: pa.Array) -> Any:
    """Bytes of text in each cell, when it is spread out."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        inner, parents = _sizes(pc.list_flatten(column)), np.asarray(pc.list_parent_indices(column))
        return np.bincount(parents, weights=inner, minlength=len(column))
    if not pa.types.is_dictionary(kind):
        return np.zeros(len(column), np.int64)
    values = column.dictionary
    if pa.types.is_string(values.type) or pa.types.is_binary(values.type) or pa.types.is_large_string(values.type):
        lengths = np.append(np.asarray(pc.fill_null(pc.binary_length(values), 0)), 0)
        return lengths[np.asarray(pc.fill_null(column.indices, len(values)))]
    return np.zeros(len(column), np.int64)


def _spread(column: pa.ChunkedArray) -> pa.Array:
    """One array of a piece, its dictionary undone, also within lists."""
    kind = column.type
    if pa.types.is_list(kind) and pa.types.is_dictionary(kind.value_type):
        column = column.cast(pa.list_(kind.value_type.value_type))
    elif pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    return column


def _text(system: pafs.FileSystem, file: LogFile) -> Iterator[bytes | LongLine]:
    """Whole lines, about BLOCK_BYTES at a time, without byte order mark and header."""
    with open_plain(system, file.path, file.codec) as stream:
        yield from _blocks(stream, file.form.skip if file.form else None, file.form.returns if file.form else None)


def _blocks(stream: Any, skip: int | None, returns: bool | None) -> Iterator[bytes | LongLine]:
    """The blocks after the first `skip` bytes (None: a mark, if there is one). `returns`: lines end in a carriage return alone."""
    carry, long = b"", False
    if skip:
        stream.read(skip)
    while data := stream.read(BLOCK_BYTES):
        if skip is None:
            data, skip = data.removeprefix(_BOM), 0
        if returns is None:
            returns = b"\n" not in data and b"\r" in data
        data = carry + (data.replace(b"\r", b"\n") if returns else data)
        carry = b""
        if long:  # the rest of a line that was given up
            cut = data.find(b"\n")
            if cut < 0:
                continue
            data, long = data[cut + 1 :], False
        end = data.rfind(b"\n") + 1
        if end:
            yield data[:end]
        carry = data[end:]
        if len(carry) > MAX_LINE:
            yield LongLine(carry[:1000])
            carry, long = b"", True
    if carry:
        yield carry
