"""The files of a log: which there are, and their rows in batches, whatever the format.

In: a file, folder or glob (local or s3://) and the columns wanted. Out: Sheets: raw cells with row numbers, and the rows that
no cells could be read from, with a reason. Formats: Parquet, delimited text (CSV, TSV), JSON Lines; text also as .gz.
Memory is bounded by one batch. Knows nothing of what a cell means.
"""

from __future__ import annotations

import difflib
import fnmatch
import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from headtail.errors import InputError
from headtail.querylog.delimited import Dialect, LongLine, Reject, Sheet, dialect, sheets
from headtail.storage import open_storage

PARQUET, DELIMITED, LINES = "parquet", "delimited", "lines"
KINDS = {
    **dict.fromkeys((".parquet", ".pq"), PARQUET),
    **dict.fromkeys((".csv", ".tsv", ".tab", ".txt"), DELIMITED),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), LINES),
}
BATCH_ROWS = 1 << 18
BLOCK_BYTES = 16 << 20
HEAD_BYTES = 1 << 20  # looked at to tell what a file is
MAX_LINE = 32 << 20  # bytes; a longer line of text is set aside without being held
SPLIT_ROWS = 1 << 20
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class LogFile(NamedTuple):
    """A file of the log. `name` is how its rows are cited; `rows` is known before reading for Parquet only."""

    path: str
    name: str
    bytes: int
    kind: str = ""
    columns: tuple[str, ...] = ()
    form: Dialect | None = None
    rows: int | None = None


class Split(NamedTuple):
    """What one worker reads: some row groups of a Parquet file, or a whole text file. `place`: in the order of the log."""

    file: LogFile
    place: int
    groups: tuple[int, ...] = ()
    first_row: int = 1


class Wanted(NamedTuple):
    """Columns to read. `lists`: those of them that hold several values; `separator`: between these in text."""

    columns: tuple[str, ...]
    lists: tuple[str, ...] = ()
    separator: str = "|"


def find(pattern: str, what: str = "log") -> tuple[pafs.FileSystem, list[LogFile]]:
    """The files at `pattern`, in order of name. InputError when there is none."""
    if not pattern:
        raise InputError(f"no {what} is named", where=what, fix="name a file, a folder or a glob")
    if pattern.startswith("s3://"):
        system, root, paths = _find_s3(pattern)
    else:
        system = pafs.LocalFileSystem()
        root, paths = _find_local(pattern, what)
    if not paths:
        raise InputError(
            f"no {what} files here", where=pattern, fix=f"name a file, a folder or a glob of {', '.join(KINDS)} (text also .gz)"
        )
    infos = system.get_file_info(paths)
    return system, [LogFile(p, os.path.relpath(p, root), int(i.size or 0)) for p, i in zip(paths, infos, strict=True)]


def _find_local(pattern: str, what: str) -> tuple[str, list[str]]:
    path = Path(pattern).expanduser().absolute()
    if path.is_file():
        return str(path.parent), [str(path)]
    if path.is_dir():
        return str(path), sorted(str(p) for p in path.rglob("*") if p.is_file() and _is_data(str(p.relative_to(path))))
    if glob.has_magic(pattern):
        found = sorted(p for p in glob.glob(str(path), recursive=True) if os.path.isfile(p))
        return os.path.commonpath([os.path.dirname(p) for p in found]) if found else "", found
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [], n=1)
    raise InputError(f"{what} file not found", where=str(path), fix=f"did you mean {near[0]}?" if near else "check the path")


def _find_s3(pattern: str) -> tuple[pafs.FileSystem, str, list[str]]:
    full = pattern.removeprefix("s3://").rstrip("/")
    with readable(pattern):
        system = open_storage("s3://" + full.split("/")[0]).filesystem
        fixed = full if not glob.has_magic(full) else os.path.dirname(full[: min(i for i, c in enumerate(full) if c in "*?[")])
        info = system.get_file_info(fixed)
        if info.type == pafs.FileType.File:
            return system, os.path.dirname(full), [full]
        inside = system.get_file_info(pafs.FileSelector(fixed, recursive=True, allow_not_found=True))
    paths = sorted(i.path for i in inside if i.type == pafs.FileType.File)
    chosen = fnmatch.filter(paths, full) if fixed != full else [p for p in paths if _is_data(os.path.relpath(p, full))]
    return system, fixed, chosen


def _is_data(name: str) -> bool:
    return _suffix(name) in KINDS and not any(part.startswith((".", "_")) for part in name.split(os.sep))


def _suffix(name: str) -> str:
    return Path(name.lower().removesuffix(".gz")).suffix


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Faults of reading as InputError."""
    try:
        yield
    except PermissionError:
        raise InputError("no permission to read this file", where=where, fix="check its permissions (ls -l) or copy it") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"damaged gzip file: {error}", where=where, fix="fetch it again; gzip -t tells whether it is whole") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(
            f"file cannot be read: {error}", where=where, fix="check that it is whole and of the kind its name says"
        ) from error


def sha256(system: pafs.FileSystem, file: LogFile) -> str:
    """Hex SHA-256 of the file's bytes as stored."""
    digest = hashlib.sha256()
    with readable(file.path), system.open_input_stream(file.path) as stream:
        while data := stream.read(1 << 22):
            digest.update(data)
    return digest.hexdigest()


def probe(system: pafs.FileSystem, file: LogFile, query: str) -> LogFile:
    """`file` with its kind and columns. `query` helps to tell the delimiter. InputError when it is empty or of no known kind."""
    with readable(file.path):
        with _open(system, file) as stream:
            head = stream.read(HEAD_BYTES)
        if not head.strip():
            raise InputError("file is empty", where=file.path, fix="leave it out, or check the job that writes it")
        kind = (
            PARQUET
            if head.startswith(b"PAR1")
            else KINDS.get(_suffix(file.name)) or (LINES if head.lstrip().startswith(b"{") else DELIMITED)
        )
        if kind == PARQUET:
            with system.open_input_file(file.path) as source:
                meta = pq.ParquetFile(source)
                return file._replace(kind=kind, columns=tuple(meta.schema_arrow.names), rows=meta.metadata.num_rows)
    if head.startswith(_UTF16):
        raise InputError("file is UTF-16", where=file.path, fix="convert it: iconv -f UTF-16 -t UTF-8")
    lines = head.replace(b"\r", b"\n").split(b"\n") if b"\n" not in head else head.split(b"\n")
    if kind == LINES:
        if head.lstrip().startswith(b"["):
            raise InputError(
                "file is one JSON array, not JSON Lines", where=file.path, fix="write one object per line, for example: jq -c '.[]'"
            )
        return file._replace(kind=kind, columns=_keys(lines[:-1] or lines))
    form = dialect(lines[0], query, _suffix(file.name))
    if len(set(form.names)) < len(form.names) and form.names.count(query) > 1:
        raise InputError("two columns have the same name", where=file.path, value=query, fix="rename one of them in the header")
    return file._replace(kind=kind, columns=form.names, form=form)


def _keys(lines: Sequence[bytes]) -> tuple[str, ...]:
    keys: dict[str, None] = {}
    for line in lines[:1000]:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            keys.update(dict.fromkeys(found))
    return tuple(keys)


def split(system: pafs.FileSystem, files: Sequence[LogFile]) -> list[Split]:
    """The log in parts that can be read apart from one another: Parquet by row groups of about a million rows, text by file."""
    found: list[Split] = []
    for file in files:
        if file.kind != PARQUET:
            found.append(Split(file, len(found)))
            continue
        with readable(file.path), system.open_input_file(file.path) as source:
            meta = pq.ParquetFile(source).metadata
            sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
        groups: list[int] = []
        first = row = 1
        for i, rows in enumerate(sizes):
            groups.append(i)
            row += rows
            if row - first >= SPLIT_ROWS or i == len(sizes) - 1:
                found.append(Split(file, len(found), tuple(groups), first))
                groups, first = [], row
    return found


def read(system: pafs.FileSystem, part: Split, wanted: Wanted) -> Iterator[Sheet]:
    """The rows of `part` in batches; columns that the file lacks are left out."""
    file = part.file
    names = tuple(name for name in dict.fromkeys(wanted.columns) if name in file.columns or file.kind == LINES)
    with readable(file.path):
        if file.kind == PARQUET:
            yield from _read_parquet(system, part, names)
            return
        with _open(system, file) as stream:
            if file.kind == LINES:
                yield from _read_lines(_blocks(stream, False), names, wanted)
            elif file.form is not None:
                yield from sheets(_blocks(stream, True), file.form, names)


def _open(system: pafs.FileSystem, file: LogFile) -> Any:
    stream = system.open_input_stream(file.path, compression=None)
    if not file.name.lower().endswith(".gz"):
        return stream
    return gzip.GzipFile(fileobj=io.BufferedReader(stream, 1 << 20), mode="rb")


def _read_parquet(system: pafs.FileSystem, part: Split, names: Sequence[str]) -> Iterator[Sheet]:
    row = part.first_row
    with system.open_input_file(part.file.path) as source:
        batches = pq.ParquetFile(source).iter_batches(BATCH_ROWS, row_groups=list(part.groups), columns=list(names))
        for batch in batches:
            rows = pa.array(np.arange(row, row + batch.num_rows), pa.int64())
            yield Sheet(pa.table([rows, *(batch.column(name) for name in names)], names=["row", *names]), [])
            row += batch.num_rows


def _blocks(stream: Any, header: bool) -> Iterator[bytes | LongLine]:
    """Whole lines, about BLOCK_BYTES at a time, without byte order mark and header line."""
    carry, first, long = b"", True, False
    while data := stream.read(BLOCK_BYTES):
        if first:
            data = data.removeprefix(b"\xef\xbb\xbf")
            old_mac = b"\n" not in data and b"\r" in data
            first = False
        data = carry + (data.replace(b"\r", b"\n") if old_mac else data)
        carry = b""
        if long:  # the rest of a line that was given up
            cut = data.find(b"\n")
            if cut < 0:
                continue
            data, long = data[cut + 1 :], False
        if header:
            _, _, data = data.partition(b"\n")
            header = False
        end = data.rfind(b"\n") + 1
        if end:
            yield data[:end]
        carry = data[end:]
        if len(carry) > MAX_LINE:
            yield LongLine(carry[:1000])
            carry, long = b"", True
    if carry:
        yield carry


def _read_lines(blocks: Iterator[bytes | LongLine], names: Sequence[str], wanted: Wanted) -> Iterator[Sheet]:
    row = 1
    for block in blocks:
        if isinstance(block, LongLine):
            yield Sheet(_json_table([], names, wanted, []), [Reject(row, "too_long", block.start)])
            row += 1
            continue
        found: list[dict[str, Any]] = []
        numbers: list[int] = []
        rejects: list[Reject] = []
        for line in block.removesuffix(b"\n").split(b"\n"):
            try:
                value = json.loads(line)
                reason = "" if isinstance(value, dict) else "bad_row"
            except UnicodeDecodeError:
                reason = "not_utf8"
            except (ValueError, RecursionError):
                reason = "bad_row" if line.strip() else "empty"
            if reason:
                rejects.append(Reject(row, reason, line))
            else:
                found.append(value)
                numbers.append(row)
            row += 1
        yield Sheet(_json_table(found, names, wanted, numbers), rejects)


def _json_table(found: Sequence[dict[str, Any]], names: Sequence[str], wanted: Wanted, numbers: Sequence[int]) -> pa.Table:
    """JSON values as cells: text as bytes, lists as lists of text, other values as their JSON text."""
    arrays = [pa.array(numbers, pa.int64())]
    for name in names:
        values = [item.get(name) for item in found]
        if name in wanted.lists:
            arrays.append(pa.array([_items(value, wanted.separator) for value in values], pa.list_(pa.binary())))
        else:
            arrays.append(pa.array([_bytes(value) for value in values], pa.binary()))
    return pa.table(arrays, names=["row", *names])


def _bytes(value: Any) -> bytes | None:
    if value is None:
        return None
    return (value if isinstance(value, str) else json.dumps(value)).encode("utf-8", "surrogatepass")


def _items(value: Any, separator: str) -> list[bytes | None] | None:
    if value is None:
        return None
    return [_bytes(item) for item in (value if isinstance(value, list) else str(value).split(separator))]
