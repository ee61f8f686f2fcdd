"""The files that a user named: each one is used, or set aside with a reason.

In: a file, folder or glob, local or s3://. Out: LogFiles in order of name, and SkippedFile: files that are not read. A folder of
the form day=2026-11-01 in a path gives its files a column (Hive's partitions). Knows nothing of what is in a file.
"""

from __future__ import annotations

import difflib
import fnmatch
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pyarrow.fs as pafs

from headtail.adapters.storage import open_storage
from headtail.core.errors import InputError
from headtail.stages.ingest.dialect import Dialect
from headtail.stages.ingest.streams import CODECS

PARQUET, DELIMITED, LINES = "parquet", "delimited", "lines"
KINDS = {
    **dict.fromkeys((".parquet", ".pq"), PARQUET),
    **dict.fromkeys((".csv", ".tsv", ".tab", ".txt"), DELIMITED),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), LINES),
}
NO_FILE = "not a file: a link to nothing, a pipe or a socket"
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_LAKES = {"_delta_log": "Delta Lake", ".hoodie": "Hudi"}  # their folders also hold rows that were deleted or replaced


class LogFile(NamedTuple):
    """A file of the log. `name` is how its rows are cited; `rows` is known before reading for Parquet only."""

    path: str
    name: str
    bytes: int
    kind: str = ""
    columns: tuple[str, ...] = ()
    form: Dialect | None = None
    rows: int | None = None
    codec: str = ""
    unsure: bool = False  # nothing but its content says whether it is a log: set aside when it does not fit

    @property
    def partitions(self) -> dict[str, str | None]:
        """Column and value of each folder of the form column=value above the file, percent signs undone; None for Hive's null."""
        pairs = (part.split("=", 1) for part in self.path.split("/")[:-1] if "=" in part)
        return {unquote(name): None if value == NULL_PARTITION else unquote(value) for name, value in pairs if name}


class SkippedFile(NamedTuple):
    """A file or folder (its name ends in a slash) that is not read."""

    name: str
    reason: str


class FileListing(NamedTuple):
    """What is at a place."""

    system: pafs.FileSystem
    files: list[LogFile]
    skipped: list[SkippedFile]


def list_files(pattern: str, what: str = "log") -> FileListing:
    """The files at `pattern`. InputError when none of them may be read."""
    if not pattern:
        raise InputError(f"no {what} is named", where=what, fix="name a file, a folder or a glob")
    if pattern.startswith("s3://"):
        system, root, there, sizes = _find_s3(pattern)
    else:
        system = pafs.LocalFileSystem()
        root, there = _find_local(pattern, what)
        sizes = {info.path: info.size for info in system.get_file_info([path for path, reason in there.items() if not reason])}
    skipped = [SkippedFile(os.path.relpath(path, root) + "/" * path.endswith("/"), reason) for path, reason in there.items() if reason]
    paths = sorted(path for path, reason in there.items() if not reason)
    if not paths:
        raise no_file_error(pattern, what, skipped)
    found = [LogFile(p, os.path.relpath(p, root), sizes[p] or 0, unsure=suffix(p) not in KINDS) for p in paths]
    return FileListing(system, found, sorted(skipped))


def no_file_error(pattern: str, what: str, skipped: list[SkippedFile]) -> InputError:
    """The error for a place where no file can be used."""
    shown = "; ".join(f"{name}: {reason}" for name, reason in skipped[:5]) or None
    fix = f"name a file, a folder or a glob of {', '.join(KINDS)} (text also {', '.join(CODECS)})"
    return InputError(f"no {what} files here", where=pattern, value=shown, fix=fix)


def suffix(name: str) -> str:
    """The ending that tells the kind, in lower case, without one of compression."""
    path = Path(name.lower())
    return path.with_suffix("").suffix if path.suffix in CODECS else path.suffix


def reason_to_skip(name: str) -> str:
    """Why a file of this name, relative to the folder that was named, is not read; empty when it is."""
    parts = name.split("/")
    if any(_hidden(part) for part in parts):
        return "hidden: its name or its folder's begins with a dot or an underscore"
    known = suffix(parts[-1])
    if known and known not in KINDS:
        packed = "" if parts[-1].lower().endswith(known) else f" before {Path(parts[-1].lower()).suffix}"
        return f"its ending {known}{packed} is not one of {', '.join(KINDS)} (text also with {', '.join(CODECS)} after it)"
    return ""


def _hidden(part: str) -> bool:
    return part.startswith(".") or (part.startswith("_") and "=" not in part)


def _find_local(pattern: str, what: str) -> tuple[str, dict[str, str]]:
    """The folder that names are relative to, and per path why it is not read (empty: it is)."""
    path = Path(pattern).expanduser().absolute()
    if path.is_file():
        return str(path.parent), {str(path): ""}
    if path.is_dir():
        return str(path), _links(dict(_walk(str(path), str(path))))
    if glob.has_magic(pattern):
        text = str(path)
        root, there = os.path.dirname(text[: min(i for i, c in enumerate(text) if c in "*?[")]), dict[str, str]()
        for match in sorted(glob.glob(text, recursive=True)):
            if os.path.isdir(match):
                _refuse_lake(os.path.basename(match), os.path.dirname(match))
                there |= dict(_walk(match, match))
            else:
                there[match] = "" if os.path.isfile(match) else NO_FILE
        return root, _links(there)
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [], n=1)
    raise InputError(f"{what} file not found", where=str(path), fix=f"did you mean {near[0]}?" if near else "check the path")


def _walk(folder: str, root: str) -> Iterator[tuple[str, str]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield f"{folder}/", f"the folder cannot be read: {error.strerror}"
        return
    for entry in entries:
        if entry.is_dir():
            _refuse_lake(entry.name, folder)
            if _hidden(entry.name):
                yield f"{entry.path}/", "hidden folder: its name begins with a dot or an underscore"
            elif entry.is_symlink():
                yield f"{entry.path}/", "a link to a folder: name that folder itself, or a glob"
            else:
                yield from _walk(entry.path, root)
        elif entry.is_file():
            yield entry.path, reason_to_skip(os.path.relpath(entry.path, root))
        else:
            yield entry.path, NO_FILE


def _links(there: dict[str, str]) -> dict[str, str]:
    """`there` with each file read once, however many links lead to it."""
    real: dict[str, str] = {}
    for path in sorted((path for path, reason in there.items() if not reason), key=lambda path: (os.path.islink(path), path)):
        first = real.setdefault(os.path.realpath(path), path)
        if first != path:
            there[path] = f"the same file as {os.path.basename(first)}"
    return there


def _refuse_lake(name: str, folder: str) -> None:
    if name in _LAKES:
        what = f"this folder is a {_LAKES[name]} table: its Parquet files also hold rows that were deleted or replaced"
        raise InputError(what, where=folder, fix="write the table's rows to a plain folder of Parquet files and name that")


def _find_s3(pattern: str) -> tuple[pafs.FileSystem, str, dict[str, str], dict[str, int]]:
    """As `_find_local`, with the bytes of each file, since a listing says them."""
    full = pattern.removeprefix("s3://").rstrip("/")
    fixed = full if not glob.has_magic(full) else os.path.dirname(full[: min(i for i, c in enumerate(full) if c in "*?[")])
    bucket, _, key = fixed.partition("/")
    store = open_storage(f"s3://{bucket}")
    if key and store.exists(key):
        return store.filesystem, os.path.dirname(full), {full: ""}, {full: store.size(key)}
    sizes = {f"{bucket}/{one.path}": one.bytes for one in store.files(key) if not one.path.endswith("/")}  # a slash: a folder's mark
    paths = sorted(sizes)
    for path in paths:
        for part in os.path.relpath(path, fixed).split("/"):
            _refuse_lake(part, pattern)
    if fixed != full:
        paths = fnmatch.filter(paths, full)  # here `*` goes through folders
    return store.filesystem, fixed, {path: reason_to_skip(os.path.relpath(path, fixed)) for path in paths}, sizes
