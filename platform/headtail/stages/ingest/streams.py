"""A file's bytes, unpacked by its ending or its first bytes.

In: a path in a file system. Out: a stream of plain bytes, and InputErrors that name what a file is instead. Reads as a stream,
so that a file that unpacks to a thousand times its size takes no more memory. Knows nothing of rows.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from headtail.adapters.storage import open_file
from headtail.core.errors import InputError

CODECS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".lz4": "lz4", ".zip": "zip"}
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh91AY&SY": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
    b"\xd0\xcf\x11\xe0": "an Excel workbook of the old kind (.xls)",
    b"SQLite format 3\x00": "an SQLite database",
    b"%PDF-": "a PDF",
    b"Obj\x01": "Avro",
    b"ARROW1\x00": "an Arrow file",
}
_MARKS = {b"\xff\xfe\x00\x00": "UTF-32", b"\x00\x00\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_BOOKS = {
    ".xlsx": "an Excel workbook",
    ".xlsm": "an Excel workbook",
    ".xlsb": "an Excel workbook",
    ".ods": "a spreadsheet",
    ".numbers": "a spreadsheet",
}
_EMPTY_ZIP = b"PK\x05\x06"  # the end of an archive, where files should begin
_SAVE = "save it as CSV (UTF-8)"
_TAR_AT, _TAR = 257, b"ustar"  # where the first header of a tar archive holds its mark
_LOOKED_AT = 1 << 16
_BUFFER = 1 << 20  # of packed bytes: each read of S3 is a call


@contextmanager
def readable(where: str) -> Iterator[None]:
    """Faults of reading as InputError."""
    try:
        yield
    except PermissionError:
        raise UnusableFile("no permission to read this file", where=where, fix="check its permissions (ls -l) or copy it") from None
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise InputError(
            f"damaged {_packing(where)} file: {error}",
            where=where,
            fix="fetch it again, and check that it is complete and of the kind that its name says",
        ) from None
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(
            f"file cannot be read: {error}", where=where, fix="check that it is complete and of the kind that its name says"
        ) from error


class UnusableFile(InputError):
    """A file that is set aside when there are others: no permission, or nothing in it."""


def _packing(where: str) -> str:
    return CODECS.get(Path(where.lower()).suffix, "packed")


def codec_of(system: pafs.FileSystem, path: str, unsure: bool) -> str:
    """What the file is packed with, empty for nothing. InputError when its name and its first bytes disagree."""
    named = CODECS.get(Path(path.lower()).suffix, "")
    if named:
        return named
    with open_file(system, path) as stream:
        start = stream.read(16)
    by_magic = next((name for magic, name in _MAGIC.items() if start.startswith(magic)), "")
    book = _BOOKS.get(Path(path.lower()).suffix, "") if by_magic == "zip" else ""
    if book:
        raise InputError(f"this file is {book}", where=path, fix=_SAVE)
    if by_magic and not (unsure and by_magic in CODECS.values()):
        ending = next((ending for ending, codec in CODECS.items() if codec == by_magic), "")
        fix = f"give it the ending {ending}, or unpack it" if ending else "export it as CSV (UTF-8), JSON Lines or Parquet"
        if by_magic == "zip":
            fix = "an Excel workbook (.xlsx) is one: export it as CSV (UTF-8); else give it the ending .zip"
        raise InputError(f"this file is {by_magic}" + ("" if unsure else ", not what its name says"), where=path, fix=fix)
    return by_magic


def open_plain(system: pafs.FileSystem, path: str, codec: str) -> Any:
    """A stream over the unpacked bytes."""
    stream = open_file(system, path)
    if codec == "zip":
        return _open_zip(stream, path)
    if not codec:
        return stream
    if codec in ("zstd", "lz4"):
        return pa.CompressedInputStream(pa.BufferedInputStream(stream, _BUFFER), codec)
    raw: Any = io.BufferedReader(stream, _BUFFER)
    if codec == "gzip":
        return gzip.GzipFile(fileobj=raw, mode="rb")
    return (bz2.BZ2File if codec == "bzip2" else lzma.LZMAFile)(raw)


def _open_zip(source: Any, path: str) -> Any:
    """The one file in a zip archive."""
    empty = source.read(len(_EMPTY_ZIP)) == _EMPTY_ZIP  # Arrow's stream does not let zipfile look before its beginning
    source.seek(0)
    archive = None if empty else zipfile.ZipFile(source)
    members = [info for info in archive.infolist() if not info.is_dir() and not info.filename.startswith("__MACOSX/")] if archive else []
    if archive is None or not members:
        raise UnusableFile("the archive is empty", where=path, fix="leave it out, or check the job that writes it")
    if len(members) != 1:
        book = _book_of(archive)
        if book:
            raise InputError(f"this file is {book}", where=path, fix=_SAVE)
        shown = ", ".join(info.filename for info in members[:5])
        raise InputError(
            f"the archive holds {len(members)} files, one is read", where=path, value=shown, fix="unpack it and name the folder"
        )
    try:
        return archive.open(members[0])
    except (RuntimeError, NotImplementedError) as error:  # a password, or a compression that Python lacks
        raise InputError(f"the archive cannot be read: {error}", where=path, fix="unpack it and name the file") from None


def _book_of(archive: zipfile.ZipFile) -> str:
    """The kind of spreadsheet that an archive is; empty for another archive."""
    names = archive.namelist()
    if any(name.startswith("xl/") for name in names):
        return _BOOKS[".xlsx"]
    return _BOOKS[".ods"] if "content.xml" in names and "mimetype" in names else ""


def check_text(head: bytes, path: str) -> None:
    """InputError when the first bytes of what should be text are a tar archive, UTF-16, UTF-32 or no text at all."""
    if head[_TAR_AT:].startswith(_TAR):
        raise InputError("file is a tar archive", where=path, fix="unpack it (tar -xf) and name the folder")
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "")
    sample = head[:_LOOKED_AT]
    nuls = sample.count(0)
    if not encoding and nuls * 5 > len(sample):  # letters of UTF-16 have a zero byte on one side, of UTF-32 three
        even = sample[::2].count(0)
        if nuls * 5 > 3 * len(sample):
            encoding = "UTF-32"
        elif max(even, nuls - even) > 0.9 * nuls:
            encoding = "UTF-16"
    if encoding:
        raise InputError(f"file is {encoding}", where=path, fix=f"convert it: iconv -f {encoding} -t UTF-8")
    controls = sum(sample.count(byte) for byte in (*range(2, 9), *range(14, 27), 28, 29, 30, 31))
    first = sample.split(b"\n", 1)[0]
    if b"\0" in first or (nuls + controls) * 20 > len(sample):
        raise InputError("file is binary, not text", where=path, fix="export it as CSV (UTF-8), JSON Lines or Parquet")
