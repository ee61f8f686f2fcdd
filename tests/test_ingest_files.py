"""Files to cells: every row accounted for, whatever is in the file and however it is cut into blocks."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import os
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headtail.core.errors import InputError
from headtail.stages.ingest import files, jsonlines, logfile
from headtail.stages.ingest.delimited import ROW, LongLine, Sheet, delimited_sheets
from headtail.stages.ingest.detect import detect
from headtail.stages.ingest.dialect import DOUBLED, NONE, Dialect

COMMA = Dialect(",", (DOUBLED,), ("q", "n"))
TAB = Dialect("\t", (NONE,), ("q", "n"))


def read(data: bytes, form: Dialect = COMMA, block: int = 1 << 30) -> tuple[list[tuple[int, bytes, bytes]], list[tuple[int, str]]]:
    """(row, q, n) of what was read and (row, reason) of the rest; cut into blocks of about `block` bytes of whole lines."""
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10] if block < len(data) else []
    cuts = [0]
    for end in [*ends, len(data)]:
        if end - cuts[-1] >= block or end == len(data):
            cuts.append(end)
    blocks = [data[a:b] for a, b in itertools.pairwise(cuts)]
    return collect(list(delimited_sheets([b for b in blocks if b], form, ["q", "n"])))


def collect(found: list[Sheet]) -> tuple[list[tuple[int, bytes, bytes]], list[tuple[int, str]]]:
    rows = [tuple(row.values()) for sheet in found for row in sheet.table.to_pylist()]
    return sorted(rows), sorted((r.row, r.reason) for sheet in found for r in sheet.rejects)


CELL = st.text(alphabet="ab\",\n\té '", max_size=8)


@given(st.lists(st.tuples(CELL, CELL), max_size=30), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.integers(1, 200))
def test_what_the_csv_module_writes_is_read_back(rows: list[tuple[str, str]], quoting: Literal[0, 1], block: int) -> None:
    out = io.StringIO(newline="")
    csv.writer(out, quoting=quoting, lineterminator="\n").writerows(rows)
    found, rejects = read(out.getvalue().encode(), block=block)
    assert found == [(i + 1, a.encode(), b.encode()) for i, (a, b) in enumerate(rows)]
    assert rejects == []


@given(st.text(alphabet='a",\n', max_size=200), st.integers(1, 50))
def test_any_text_is_accounted_for_and_cut_alike(text: str, block: int) -> None:
    data = text.encode()
    whole = read(data)
    assert read(data, block=block) == whole
    rows, rejects = whole
    numbers = sorted([row for row, *_ in rows] + [row for row, _ in rejects])
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) <= data.count(b"\n") + 1


@given(st.binary(max_size=300).map(lambda b: b.replace(b"\r", b"")))
def test_any_bytes_are_accounted_for_without_quoting(data: bytes) -> None:
    rows, rejects = read(data, TAB)
    lines = data.split(b"\n")[:-1] if data.endswith(b"\n") or not data else data.split(b"\n")
    assert len(rows) + len(rejects) == len(lines)
    for row, q, n in rows:
        assert lines[row - 1] == q + b"\t" + n
    for row, reason in rejects:
        line = lines[row - 1]
        assert reason == ("empty" if not line.strip() else "nul" if b"\0" in line else "bad_row")


def test_a_stray_quote_costs_nothing_but_its_own_cell() -> None:
    data = b'5" pipe,1\n"lost,2\nplain,3\n6" pipe,4\n"say ""hi""",5\na "b" c,6\n"two\nlines",7\n5" x,"8\nend,9\n'
    rows, rejects = read(data)
    assert rejects == []
    assert [(q, n) for _, q, n in rows] == [
        (b'5" pipe', b"1"), (b'"lost', b"2"), (b"plain", b"3"), (b'6" pipe', b"4"), (b'say "hi"', b"5"),
        (b'a "b" c', b"6"), (b"two\nlines", b"7"), (b'5" x', b'"8'), (b"end", b"9"),
    ]  # fmt: skip
    assert [row for row, *_ in rows] == list(range(1, 10))


def test_a_quote_never_closed_does_not_swallow_the_file() -> None:
    data = b'"open,0\n' + b"".join(b"q%d,%d\n" % (i, i) for i in range(1, 100_000))
    rows, rejects = read(data)
    assert (len(rows), rejects) == (100_000, [])


def test_line_ends_of_all_kinds() -> None:
    assert read(b"a,1\r\nb,2\r\n")[0] == [(1, b"a", b"1"), (2, b"b", b"2")]
    assert read(b"a\rb,1\r\nc,2\r\n") == ([(2, b"c", b"2")], [(1, "bad_row")]), "two files of two systems may have been joined"
    assert read(b'"a\rb",1\r\n')[0] == [(1, b"a\rb", b"1")]
    assert read(b"a,1\n\nb,2")[0] == [(1, b"a", b"1"), (3, b"b", b"2")]
    assert read(b"a,1\n\nb,2")[1] == [(2, "empty")]


def test_a_line_too_long_to_hold_is_one_row_set_aside() -> None:
    rows, rejects = collect(list(delimited_sheets([b"a,1\n", LongLine(b"xxx"), b"b,2\n"], COMMA, ["q", "n"])))
    assert rows == [(1, b"a", b"1"), (3, b"b", b"2")]
    assert rejects == [(2, "too_long")]


def test_the_delimiter_is_the_one_that_gives_the_column() -> None:
    assert detect(b"query;count\r\n", True, "query", ".csv", "auto").delimiter == ";"
    assert detect(b"\xef\xbb\xbfquery,count", True, "query", ".csv", "auto").names == ("query", "count")
    assert detect(b"a,b\tquery", True, "query", ".tsv", "auto")[::2][:2] == ("\t", ("a,b", "query"))
    assert detect(b"a,b,c", True, "query", ".csv", "auto").names == ("a", "b", "c")


def found(path: Path, query: str = "query", lists: tuple[str, ...] = ()) -> list[dict[str, object]]:
    system, there, _ = files.list_files(str(path))
    rows: list[dict[str, object]] = []
    for part in logfile.split_log(system, [logfile.probe_file(system, file, query) for file in there]):
        for sheet in logfile.read_split(system, part, logfile.ColumnSelection((query, "n", *lists), lists)):
            names = ["row" if name == ROW else name for name in sheet.table.column_names]
            rows += sheet.table.rename_columns(names).to_pylist() + [{"row": r.row, "reason": r.reason} for r in sheet.rejects]
    return sorted(rows, key=lambda row: row["row"])  # type: ignore[arg-type, return-value]


def test_the_same_rows_from_every_format(tmp_path: Path) -> None:
    queries, counts = ["a", "b é", 'c "d"', ""], [1, 2, 3, 4]
    text = "query\tn\n" + "".join(f"{q}\t{n}\n" for q, n in zip(queries, counts, strict=True))
    (tmp_path / "x.tsv").write_text(text, encoding="utf-8")
    (tmp_path / "x.tsv.gz").write_bytes(gzip.compress(text.encode()))
    with (tmp_path / "x.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([("query", "n"), *zip(queries, counts, strict=True)])
    (tmp_path / "x.jsonl").write_text(
        "".join(json.dumps({"query": q, "n": n}) + "\n" for q, n in zip(queries, counts, strict=True)), encoding="utf-8"
    )
    pq.write_table(pa.table({"query": queries, "n": counts}), tmp_path / "x.parquet", row_group_size=1)
    for name in ("x.tsv", "x.tsv.gz", "x.csv", "x.jsonl", "x.parquet"):
        rows = found(tmp_path / name)
        assert [row["row"] for row in rows] == [1, 2, 3, 4], name
        texts = [row["query"].encode() if isinstance(row["query"], str) else row["query"] for row in rows]
        assert texts == [q.encode() for q in queries], name


def test_json_lines_set_aside_what_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b'{"query": "a", "side": ["x", null, 3]}\nnot json\n{"query": "\xff"}\n\n[1]\n'
        b'{"query": 2020, "side": "x|y"}\n{"query": "\\ud800"}\n{"query": null}'
    )
    rows = found(path, lists=("side",))
    assert [row.get("reason") for row in rows] == [None, "bad_row", "not_utf8", "empty", "bad_row", None, None, None]
    assert rows[0]["side"] == [b"x", None, b"3"]
    assert rows[5] == {"row": 6, "query": b"2020", "n": None, "side": [b"x", b"y"]}
    with pytest.raises(UnicodeDecodeError):
        rows[6]["query"].decode("utf-8")  # type: ignore[attr-defined]


WRITTEN = ["1.10", "1.1", "1e5", "100000000000000000000.5", "12345678901234567890123", "-5", "0.30", "9" * 5000]


def test_numbers_in_json_lines_are_read_as_they_are_written(tmp_path: Path) -> None:
    lines = [f'{{"query": {n}, "side": [{n}, {{"a": {n}}}], "n": 2e0}}' for n in WRITTEN]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    rows = found(tmp_path / "x.jsonl", lists=("side",))
    assert [row["query"] for row in rows] == [n.encode() for n in WRITTEN]
    assert [row["side"] for row in rows] == [[n.encode(), b'{"a": %s}' % n.encode()] for n in WRITTEN]
    assert {row["n"] for row in rows} == {b"2.0"}


@pytest.mark.parametrize(
    "value, reason",
    [("NaN", None), ("Infinity", None), ("-Infinity", None), ("null", None), *((v, "bad_row") for v in ("true", "false", "[]", "{}"))],
)
def test_json_values_that_are_no_query(tmp_path: Path, value: str, reason: str | None) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"query": {value}, "n": 1}}\n{{"query": "ok"}}\n')
    rows = found(tmp_path / "x.jsonl")
    assert rows[0] == ({"row": 1, "reason": reason} if reason else {"row": 1, "query": None, "n": b"1"})
    assert rows[1]["query"] == b"ok"


@pytest.mark.parametrize(
    "side, items",
    [
        ('{"a|b": [1, NaN, null, "é"]}', ['{"a|b": [1, NaN, null, "\\u00e9"]}']),
        ("true", ["true"]),
        ("7.50", ["7.50"]),
        ('[true, NaN, {"a": 1}, ["x"], ""]', ["true", None, '{"a": 1}', '["x"]', ""]),
        ("NaN", None),
        ("null", None),
    ],
)
def test_side_inputs_of_json_lines_are_their_json(tmp_path: Path, side: str, items: list[str | None] | None) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"query": "a", "side": {side}}}\n')
    wanted = items if items is None else [None if item is None else item.encode() for item in items]
    assert found(tmp_path / "x.jsonl", lists=("side",))[0]["side"] == wanted


NAMES = st.sampled_from(["query", "n", "side", "other"])


@given(st.lists(st.tuples(NAMES, st.booleans()), min_size=1, max_size=4))
def test_a_name_written_twice_is_seen_in_whatever_escapes(pairs: list[tuple[str, bool]]) -> None:
    names = [name for name, _ in pairs]
    cells = [f'"{"".join(f"{chr(92)}u{ord(c):04x}" for c in name) if escaped else name}": "{i}"' for i, (name, escaped) in enumerate(pairs)]
    block = ("{" + ", ".join(cells) + "}").encode()
    sheet = next(jsonlines.json_sheets(iter([block]), ("query", "n", "side"), ("side",), "query", "|"))
    twice = any(names.count(name) > 1 for name in ("query", "n", "side"))
    assert [reject.reason for reject in sheet.rejects] == ["name_twice"] * twice


def test_a_name_twice_within_a_cell_stays_there_twice(tmp_path: Path) -> None:
    """The cell's reader says what is wrong with it; a text that looks like names is text."""
    lines = ['{"query": "a", "n": {"x": [{"y": 1, "y": 2, "z": {}}], "t": "a: b"}}', '{"query": "b", "n": {"x": 1, "t": "{\\"x\\": 1}"}}']
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    cells = [str(row["n"], "utf-8") for row in found(tmp_path / "x.jsonl") if isinstance(row["n"], bytes)]
    assert json.loads(cells[0], object_pairs_hook=list) == [("x", [[("y", 1), ("y", 2), ("z", [])]]), ("t", "a: b")]
    assert json.loads(cells[1]) == {"x": 1, "t": '{"x": 1}'}


def test_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b.csv", "a/a.csv", "_hidden.csv", ".x.csv", "readme.md", "c.tsv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("query\nx\n")
    assert [file.name for file in files.list_files(str(tmp_path))[1]] == ["a/a.csv", "b.csv", "c.tsv"]
    assert [file.name for file in files.list_files(str(tmp_path / "*.csv"))[1]] == ["_hidden.csv", "b.csv"]
    assert [file.name for file in files.list_files(str(tmp_path / "**" / "a.csv"))[1]] == ["a/a.csv"]
    assert [file.name for file in files.list_files(str(tmp_path / "b.csv"))[1]] == ["b.csv"]
    (tmp_path / "gone.csv").symlink_to(tmp_path / "nothing.csv")
    os.mkfifo(tmp_path / "pipe.csv")
    _, used, skipped = files.list_files(str(tmp_path / "*.csv"))
    assert [file.name for file in used] == ["_hidden.csv", "b.csv"]
    assert skipped == [files.SkippedFile("gone.csv", files.NO_FILE), files.SkippedFile("pipe.csv", files.NO_FILE)]
    (tmp_path / "_delta_log").mkdir()
    for place in ("", "*"):
        with pytest.raises(InputError, match="Delta"):
            files.list_files(str(tmp_path / place))
    with pytest.raises(InputError, match="did you mean"):
        files.list_files(str(tmp_path / "b.cvs"))
    with pytest.raises(InputError, match="no log files here"):
        files.list_files(str(tmp_path / "*.parquet"))


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("x.csv", b"", "file is empty"),
        ("x.csv", b" \n\n", "file is empty"),
        ("x.csv", "query\nä\n".encode("utf-16"), "UTF-16"),
        ("x.json", b'[{"query": "a"}]', "JSON array"),
        ("x.csv.gz", b"no gzip at all", "damaged gzip"),
        ("x.csv.gz", gzip.compress(b"query\n" + b"a\n" * 100_000, mtime=0)[:-20], "damaged gzip"),
        ("x.parquet", b"PAR1 and no more", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as error:
        found(tmp_path / name)
    assert says in error.value.what
    assert str(tmp_path / name) in error.value.where


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl", "x"])
def test_parquet_is_read_whatever_its_name(tmp_path: Path, name: str) -> None:
    pq.write_table(pa.table({"query": ["a", "b"]}), tmp_path / name)
    assert [row["query"] for row in found(tmp_path / name)] == ["a", "b"]
    system, there, _ = files.list_files(str(tmp_path / name))
    assert logfile.probe_file(system, there[0], "query").kind == files.PARQUET


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.csv").write_text("query\na\n")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    system, there, _ = files.list_files(str(tmp_path / "x.csv"))
    monkeypatch.setattr(logfile, "open_plain", refuse)  # chmod does not stop root
    with pytest.raises(InputError, match="no permission"):
        logfile.probe_file(system, there[0], "query")


def test_a_megabyte_in_a_cell_and_blocks_smaller_than_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logfile, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(logfile, "MAX_LINE", 200_000)
    data = b"query,n\na,1\n" + b"x" * 100_000 + b",2\n" + b"y" * 1_000_000 + b",3\n" + b'"' + b"z" * 5000 + b'",4\nb,5'
    (tmp_path / "x.csv").write_bytes(data)
    rows = found(tmp_path / "x.csv")
    assert [row["row"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[2]["reason"] == "too_long"
    assert [len(row["query"]) for row in rows if "query" in row] == [1, 100_000, 5000, 1]  # type: ignore[arg-type]


@pytest.mark.parametrize("count, read", [("2e0", b"2.0"), ("1e5", b"100000.0"), ("-5", b"-5"), ("3", b"3"), ("1.50", b"1.5")])
def test_numbers_beside_queries_have_no_exponent(tmp_path: Path, count: str, read: bytes) -> None:
    (tmp_path / "x.jsonl").write_text(f'{{"query": "a", "n": {count}}}\n')
    assert found(tmp_path / "x.jsonl")[0]["n"] == read
