"""A table from a user's file: each format gives the same rows; a file that is none gives an error that names it."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headtail.adapters.storage import open_storage
from headtail.adapters.storage.user_tables import read_user_table
from headtail.core.errors import InputError

TABLE = pa.table({"query": ["a b", "c"], "clicks": [3, 4]})
CSV, LINES = b"query,clicks\na b,3\nc,4\n", b'{"query": "a b", "clicks": 3}\n{"query": "c", "clicks": 4}\n'


def test_every_format(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "rows.parquet")
    files = {"rows.csv": CSV, "rows.jsonl": LINES, "rows.csv.gz": gzip.compress(CSV), "rows.jsonl.gz": gzip.compress(LINES)}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for name in ("rows.parquet", *files):
        table, data = read_user_table(str(tmp_path / name), "log")
        assert table.to_pylist() == TABLE.to_pylist(), name
        assert hashlib.sha256(data).digest() == hashlib.sha256((tmp_path / name).read_bytes()).digest()


def test_from_s3(s3_root: str) -> None:
    open_storage(s3_root).replace("rows.csv", CSV)
    table, data = read_user_table(f"{s3_root}/rows.csv", "log")
    assert (table.to_pylist(), data) == (TABLE.to_pylist(), CSV)


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.parquet", CSV),
        ("a.parquet", b""),
        ("a.csv", b""),
        ("a.csv", b"a,b\n1\n"),
        ("a.jsonl", b"{"),
        ("a.csv.gz", CSV),
        ("a.csv.gz", gzip.compress(CSV, mtime=0)[:30]),
    ],
)
def test_a_file_that_is_no_table(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match="cannot read this file") as found:
        read_user_table(str(tmp_path / name), "outcomes")
    assert (found.value.where, found.value.value) == ("outcomes", str(tmp_path / name))


@pytest.mark.parametrize(
    "name, data, said",
    [
        ("a.csv", b"a,b\n1,2\n\n3\n", "row 2: Expected 2 columns, got 1"),
        ("a.jsonl", LINES * 50 + b"{x\n", "line 101 is no JSON"),
        ("a.jsonl", LINES + b"[1]\n", "line 3 is no JSON object"),
        ("a.jsonl", LINES + b'{"clicks": "x"}\n', "changed from number to string in row 3"),
        ("a.csv", CSV.decode().encode("utf-16"), "UTF-16"),
        ("a.csv", "a,b\n1,2".encode("utf-16-le"), "UTF-16"),
        ("a.csv", b"PAR1...", "it is Parquet"),
    ],
)
def test_the_row_that_is_wrong_is_named(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=said):
        read_user_table(str(tmp_path / name), "log")


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a,b,a\n1,2,3\n")
    with pytest.raises(InputError, match="two columns of this file have one name"):
        read_user_table(str(tmp_path / "a.csv"), "log")


def test_the_header_says_what_separates_cells_and_named_columns_are_text(tmp_path: Path) -> None:
    for sign in (b",", b"\t", b";"):
        (tmp_path / "a.csv").write_bytes(b"user,n\n007,1\n7,\n".replace(b",", sign))
        table, _ = read_user_table(str(tmp_path / "a.csv"), "log", ["user", "absent"])
        assert table.to_pylist() == [{"user": "007", "n": 1}, {"user": "7", "n": None}]


def test_a_refused_file_starts_no_thread_that_may_outlive_it(tmp_path: Path) -> None:
    """A process that ends while Arrow's threads start is aborted: on a busy machine one in ten of those that refused an empty CSV."""
    program = (
        "import os, sys\nfrom headtail.adapters.storage.user_tables import read_user_table\nfrom headtail.core.errors import InputError\n"
        "before = len(os.listdir('/proc/self/task'))\ntry:\n    read_user_table(sys.argv[1], 'log')\n"
        "except InputError:\n    print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    for name, data, most in (("a.csv", b"", 0), ("a.jsonl", b"", 0), ("b.csv", b"a,b\n1\n", 1), ("c.jsonl", b"{x", 1)):
        (tmp_path / name).write_bytes(data)
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path / name)], capture_output=True, text=True, check=True)
        assert int(done.stdout) <= most, name


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_user_table(str(tmp_path / "none.csv"), "log")
