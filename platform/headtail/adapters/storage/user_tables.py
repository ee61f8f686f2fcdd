"""A table in a file that the user names: CSV (also .csv.gz), JSON Lines or Parquet, on a disk or on S3.

In: a path or s3:// address, and which columns of a CSV are text whatever they look like. Out: the table and the file's bytes, which say
which table it was. Held in memory whole. Read in one thread, an empty file in none: a process that ends while Arrow starts threads is
aborted (apache/arrow issue 34314), and one that refuses a file ends at once. Knows nothing of columns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from headtail.adapters.storage.s3 import open_object
from headtail.core.errors import InputError

_DELIMITERS = (",", "\t", ";")  # the first that the header has


def read_user_table(path: str, where: str, texts: Sequence[str] = ()) -> tuple[pa.Table, bytes]:
    """The table and the bytes of a file. `where`: the field that names it. InputError when it is not there, or no table.

    `texts`: columns of a CSV that are not guessed to be numbers: as text 007 and 7 are two.
    """
    try:
        data = _bytes(path, where)
        table = _table(data, path, texts)
        twice = [name for name in dict.fromkeys(table.column_names) if table.column_names.count(name) > 1]
        if twice:
            raise InputError("two columns of this file have one name", where=f"{where}, {path}", value=twice[0], fix="rename one")
        return table, data
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        fix = "CSV with a header, JSON Lines, or Parquet; text as UTF-8"
        raise InputError(f"cannot read this file: {_reason(error)}", where=where, value=path, fix=fix) from error


def _bytes(path: str, where: str) -> bytes:
    if path.startswith("s3://"):
        data: bytes = open_object(path.removeprefix("s3://")).read_buffer().to_pybytes()
        return data
    local = Path(path).expanduser()
    if not local.is_file():
        raise InputError("this file does not exist", where=where, value=path, fix="name a CSV, JSON Lines or Parquet file")
    return local.read_bytes()


def _table(data: bytes, path: str, texts: Sequence[str]) -> pa.Table:
    if path.endswith(".parquet"):
        return pq.read_table(pa.BufferReader(data))
    text = pa.CompressedInputStream(pa.BufferReader(data), "gzip").read() if path.endswith(".gz") else data
    if not text or text.isspace():
        raise pa.ArrowInvalid("it is empty")
    if text[:4] == b"PAR1":
        raise pa.ArrowInvalid("its name says text, and it is Parquet: name it .parquet")
    if text[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in text[:1000]:
        raise pa.ArrowInvalid("it is not UTF-8 text but UTF-16 or binary")
    if path.removesuffix(".gz").endswith(".jsonl"):
        return _json_lines(text)
    header = text[: text.find(b"\n")].decode() if b"\n" in text else text.decode()
    return pa_csv.read_csv(
        pa.BufferReader(text),
        pa_csv.ReadOptions(use_threads=False),
        pa_csv.ParseOptions(delimiter=next((sign for sign in _DELIMITERS if sign in header), ",")),
        pa_csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string())),
    )


def _json_lines(text: bytes) -> pa.Table:
    try:
        block = min(len(text) + 1, 2**31 - 1)  # Arrow counts rows within a block
        return pa_json.read_json(pa.BufferReader(text), pa_json.ReadOptions(use_threads=False, block_size=block))
    except pa.ArrowException:
        for number, line in enumerate(text.splitlines(), 1):
            try:
                is_object = not line.strip() or isinstance(json.loads(line), dict)
            except ValueError as error:
                raise pa.ArrowInvalid(f"line {number} is no JSON: {error}") from None
            if not is_object:
                raise pa.ArrowInvalid(f"line {number} is no JSON object") from None
        raise


def _reason(error: Exception) -> str:
    """Arrow's words, with rows counted from 1 and without the header: it counts a CSV's header, and JSON's rows from 0."""
    text = re.sub(r"Row #(\d+)", lambda found: f"row {int(found[1]) - 1}", str(error))
    return re.sub(r" in row (\d+)$", lambda found: f" in row {int(found[1]) + 1}", text)
