"""Every file at a place is used or named as set aside; what a file is comes from its bytes as well as from its name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headtail.adapters.storage import open_storage
from headtail.adapters.storage.receipts import output_table
from headtail.core.config import TrackingConfig
from headtail.core.errors import ConfigError, InputError
from headtail.core.receipt import Receipt
from headtail.core.rows import check_side_inputs
from headtail.stages.ingest import Config, LogColumns, days, files, logfile, run, streams
from headtail.stages.ingest.result import Result
from headtail.stages.ingest.sources import Files

TEXT = b"query,n\npizza,1\ntacos,2\n"

Ingest = Callable[..., Receipt[Result]]


@pytest.fixture
def ingest(root: str) -> Ingest:
    def do(log: Path, **fields: object) -> Receipt[Result]:
        base = {"root": root, "log": str(log), "task": "query_intent", "tracking": TrackingConfig(enabled=False), "holdout_share": 0.0}
        return run(Config.model_validate(base | fields))

    return do


def queries(root: str, receipt: Receipt) -> dict[str, int]:
    table = output_table(open_storage(root), receipt, "queries")
    return dict(zip(table["query"].to_pylist(), table["count"].to_pylist(), strict=True))


def packed(data: bytes, ending: str) -> bytes:
    if ending == ".zip":
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("log.csv", data)
            archive.writestr("__MACOSX/._log.csv", b"x")
        return out.getvalue()
    if ending in (".zst", ".lz4"):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd" if ending == ".zst" else "lz4") as out:
            out.write(data)
        return bytes(sink.getvalue().to_pybytes())
    packers: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    return packers[ending](data)


def test_every_file_of_a_folder_is_used_or_named(ingest: Ingest, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, away = tmp_path / "log", tmp_path / "away"
    for folder in (log / "deep" / "deeper", log / ".git", log / "_temporary", away):
        folder.mkdir(parents=True)
    used = {"a.csv": TEXT, "deep/deeper/b.tsv": TEXT.replace(b",", b"\t"), "part-0001": TEXT, "c.csv.zst": packed(TEXT, ".zst")}
    aside = {
        ".hidden.csv": "hidden", "_SUCCESS": "hidden", "notes.md": "ending .md", "old.csv.bak": "ending .bak", "d.csv.lzo": "ending .lzo",
        "empty.csv": "empty", "part-0002": "no column 'query'", ".git/": "hidden folder", "_temporary/": "hidden folder",
        "link/": "link to a folder", "same.csv": "the same file as a.csv", "gone.csv": "a link to nothing",
    }  # fmt: skip
    for name, data in used.items():
        (log / name).write_bytes(data)
    for name in (".hidden.csv", "notes.md", "old.csv.bak", "d.csv.lzo", ".git/x.csv", "_temporary/x.csv"):
        (log / name).write_bytes(TEXT)
    (log / "_SUCCESS").touch()
    (log / "empty.csv").touch()
    (log / "part-0002").write_text("a,b\n1,2\n")
    (log / "link").symlink_to(away)
    (log / "same.csv").symlink_to(log / "a.csv")
    (log / "gone.csv").symlink_to(log / "nothing.csv")
    receipt = ingest(log, columns=LogColumns(count="n"))
    assert queries(root, receipt) == {"pizza": len(used), "tacos": 2 * len(used)}
    found = {file.name: file.reason for file in receipt.result.files_set_aside}
    assert found.keys() == aside.keys()
    assert all(text in found[name] for name, text in aside.items()), found
    assert receipt.rows["files_set_aside"] == len(aside)
    shown = capsys.readouterr().err
    assert sum(name in shown for name in aside) == 5, "five by name on the terminal"
    assert "7 more files" in shown
    (log / "late.md").touch()
    assert len(ingest(log, columns=LogColumns(count="n")).result.files_set_aside) == len(aside) + 1, "not reused: there is more to say"


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shut").mkdir()
    (tmp_path / "a.csv").write_bytes(TEXT)
    real = os.scandir

    def scandir(path: str) -> object:
        if path.endswith("shut"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # chmod does not stop root
    assert files.list_files(str(tmp_path)).skipped == [("shut/", "the folder cannot be read: Permission denied")]


def test_a_file_that_cannot_be_read_is_named_beside_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_bytes(TEXT)
    real = streams.open_plain

    def refuse(system: object, path: str, codec: str) -> object:
        if path.endswith("b.csv"):
            raise PermissionError(13, "Permission denied")
        return real(system, path, codec)

    monkeypatch.setattr(logfile, "open_plain", refuse)
    assert Files(str(tmp_path), "log", {"columns.query": "query"}).skipped == [("b.csv", "no permission to read this file")]


def test_where_nothing_can_be_used_each_file_says_why(tmp_path: Path) -> None:
    (tmp_path / "x.md").touch()
    (tmp_path / "_SUCCESS").touch()
    with pytest.raises(InputError, match="no log files here") as error:
        Files(str(tmp_path), "log", {"columns.query": "query"})
    assert "x.md: its ending .md" in str(error.value.value)


@pytest.mark.parametrize(
    "name, judged",
    [
        ("b.log.gz", ".log before .gz"),
        ("c.tar.gz", ".tar before .gz"),
        ("D.LOG.ZST", ".log before .zst"),
        ("e.log", ".log"),
        ("f.csv.1", ".1"),
    ],
)
def test_the_ending_that_was_judged_is_said(name: str, judged: str) -> None:
    reason = files.reason_to_skip(name)
    assert reason.startswith(f"its ending {judged} is not one of .parquet")
    listed = re.findall(r"[.]\w+", reason.partition("is not one of")[2].partition("(")[0])
    assert judged.split()[0] not in listed
    assert not set(listed) & set(streams.CODECS)


def test_a_delta_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "_delta_log").mkdir()
    with pytest.raises(InputError, match="Delta Lake"):
        files.list_files(str(tmp_path))


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip"])
def test_packed_files(tmp_path: Path, ending: str) -> None:
    whole = packed(TEXT, ending)
    for name, data in {
        f"log.csv{ending}": whole,
        f"log{ending}": whole,
        **({} if ending == ".zip" else {f"two.csv{ending}": whole * 2}),
    }.items():
        (tmp_path / name).write_bytes(data)
        rows = read(tmp_path / name)
        assert rows[:2] == [("pizza", "1"), ("tacos", "2")]
        assert len(rows) == (2 if "two" not in name else 4)
    (tmp_path / f"cut.csv{ending}").write_bytes(packed(b"query,n\n" + os.urandom(5000).hex().encode() + b",1\n", ending)[:-40])
    (tmp_path / f"plain.csv{ending}").write_bytes(TEXT)
    for name in ("cut", "plain"):
        with pytest.raises(InputError, match=r"damaged|cannot be read"):
            read(tmp_path / f"{name}.csv{ending}")


def read(path: Path) -> list[tuple[str, str]]:
    found, wanted, rows = Files(str(path), "log", {"columns.query": "query"}), logfile.ColumnSelection(("query", "n")), []
    for part in logfile.split_log(found.system, found.files):
        for sheet in logfile.read_split(found.system, part, wanted):
            pairs = zip(sheet.table["query"].to_pylist(), sheet.table["n"].to_pylist(), strict=True)
            rows += [(query.decode(), n.decode()) for query, n in pairs]
    return rows


def archive_of(*names: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in names:
            archive.writestr(name, TEXT)
    return out.getvalue()


def tar_of() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo("log.csv")
        member.size = len(TEXT)
        archive.addfile(member, io.BytesIO(TEXT))
    return out.getvalue()


@pytest.mark.parametrize(
    "name, data, says",
    [
        ("x.csv", gzip.compress(TEXT, mtime=0), "this file is gzip"),
        ("x.csv", packed(TEXT, ".zst"), "this file is zstd"),
        ("x.csv", archive_of("xl/workbook.xml", "b"), "this file is zip"),
        ("x.csv", b"SQLite format 3\x00" + bytes(100), "an SQLite database"),
        ("x.csv", bytes(range(256)) * 50, "binary, not text"),
        ("x.jsonl", b"%PDF-1.7 ...", "a PDF"),
        ("x.parquet", TEXT, "cannot be read"),
        ("x.zip", archive_of("a.csv", "b.csv"), "the archive holds 2 files"),
        *(
            (name, archive_of("[Content_Types].xml", "xl/workbook.xml", "b"), "this file is an Excel workbook")
            for name in ("x.xlsx", "x.zip")
        ),
        *((name, archive_of("mimetype", "content.xml", "b"), "this file is a spreadsheet") for name in ("x.ods", "x.zip")),
        ("x.xls", b"\xd0\xcf\x11\xe0" + bytes(600), "(.xls)"),
        ("x.zip", archive_of(), "the archive is empty"),
        *((name, tar_of(), "file is a tar archive") for name in ("x.tar", "x.csv", "x")),
        *((name, gzip.compress(tar_of(), mtime=0), "file is a tar archive") for name in ("x.tar.gz", "x.tgz", "x.csv.gz")),
        ("x.tar.zst", packed(tar_of(), ".zst"), "file is a tar archive"),
        ("x.csv", "query\nä\n".encode("utf-16"), "UTF-16"),
        ("x.csv", "query\npizza\n".encode("utf-16-le"), "UTF-16"),
        ("x.csv", "query\npizza\n".encode("utf-32"), "UTF-32"),
        ("x.csv", "query\npizza\n".encode("utf-32-be"), "UTF-32"),
        ("x.jsonl", json.dumps({"query": "a"}, indent=1).encode(), "no line is a JSON object"),
        ("x.csv", b"query,n,query\na,1,b\n", "two columns have the same name"),
        ("x.csv", b"query,n,n\na,1,b\n", "two columns have the same name"),
    ],
)
def test_files_that_are_not_what_they_should_be(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as error:
        Files(str(tmp_path / name), "log", {"columns.query": "query", "columns.count": "n"})
    assert says in error.value.what
    assert str(tmp_path / name) in error.value.where


def test_two_columns_of_one_name_in_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["query", "query"]), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="two columns"):
        Files(str(tmp_path / "x.parquet"), "log", {"columns.query": "query"})


@pytest.mark.parametrize("names, says", [(("count",), "headtail adds itself"), (("query_key",), "adds itself"), (("a", "b", "a"), "twice")])
def test_side_inputs_with_names_that_are_taken(names: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        check_side_inputs(names, "mine")
    assert error.value.value == names[-1]
    check_side_inputs(("businesses", "row"), "mine")


@pytest.mark.parametrize(
    "columns, says",
    [
        (LogColumns(query="count", count="count"), "columns.query and columns.count"),
        (LogColumns(time="n", labels="n"), "columns.time and columns.labels"),
        (LogColumns(query="businesses"), "columns.query and a side input of the task"),
    ],
)
def test_a_column_has_one_role(ingest: Ingest, tmp_path: Path, columns: LogColumns, says: str) -> None:
    (tmp_path / "x.csv").write_text("query,count,n,businesses\na,3,1,b\n")
    with pytest.raises(ConfigError, match="one column has two roles") as error:
        ingest(tmp_path / "x.csv", columns=columns, task="query_segmentation")
    assert error.value.where == says


def test_a_column_called_row_is_a_column(ingest: Ingest, root: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("query,row\na,3\n")
    assert queries(root, ingest(tmp_path / "x.csv", columns=LogColumns(count="row"))) == {"a": 3}


def test_folders_that_are_columns(ingest: Ingest, root: str, tmp_path: Path) -> None:
    for day in ("2024-01-01", "2024-01-02", "__HIVE_DEFAULT_PARTITION__"):
        folder = tmp_path / "log" / f"d%61y={day.replace('-', '%2D')}"
        folder.mkdir(parents=True)
        (folder / "part-0.csv").write_text(f"query\n{day[-1]}\n")
        pq.write_table(pa.table({"query": ["sushi"]}), folder / "part-1.parquet")
        (folder / "part-2.jsonl").write_text('{"query": "ramen"}\n')
    receipt = ingest(tmp_path / "log", columns=LogColumns(time="day"))
    assert queries(root, receipt) == {"1": 1, "sushi": 1, "ramen": 1}
    assert (receipt.result.first_day, receipt.result.holdout_from) == ("2024-01-01", "2024-01-02")
    assert receipt.rows["set_aside.bad_time"] == 3
    assert any(note.startswith("rows set aside: 3; columns.time takes dates") for note in receipt.notes)
    both = ingest(tmp_path / "log" / "d%61y=2024*", columns=LogColumns(time="day"))
    assert both.rows["events"] == 6
    alone = ingest(tmp_path / "log" / "d%61y=2024%2D01%2D01" / "part-0.csv", columns=LogColumns(time="day"), holdout_days=0)
    assert alone.result.first_day == "2024-01-01"


def test_folders_that_are_all_the_columns_wanted(ingest: Ingest, root: str, tmp_path: Path) -> None:
    folder = tmp_path / "query=pizza"
    folder.mkdir()
    (folder / "a.csv").write_text("x,y\n1,2\n3,4\n")
    (folder / "b.tsv").write_text("x\ty\n1\t2\n")
    (folder / "c.jsonl").write_text('{"x": [1]}\n{"y": 2}\n')
    pq.write_table(pa.table({"x": [[1], None, []]}), folder / "d.parquet")
    assert queries(root, ingest(tmp_path)) == {"pizza": 8}


def test_a_second_header_in_another_order_is_refused(ingest: Ingest, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("query,n\npizza,1\nn,query\n2,tacos\n")
    with pytest.raises(InputError, match="another order") as error:
        ingest(tmp_path / "x.csv", columns=LogColumns(count="n"))
    assert error.value.where.endswith("x.csv")


def test_quotes_are_set_where_they_cannot_be_told(ingest: Ingest, root: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('query,n\n"c:\\\\new, x",1\npizza,1\n')
    receipt = ingest(tmp_path / "x.csv", columns=LogColumns(count="n"))
    assert queries(root, receipt) == {"pizza": 1}
    assert any("set `quotes`" in note for note in receipt.notes)
    assert queries(root, ingest(tmp_path / "x.csv", columns=LogColumns(count="n"), quotes="backslash")) == {"pizza": 1, "c:\\new, x": 1}
    assert queries(root, ingest(tmp_path / "x.csv", columns=LogColumns(count="n"), quotes="doubled")) == {"pizza": 1, "c:\\\\new, x": 1}


def test_json_lines_made_to_harm_end_as_rows_set_aside(ingest: Ingest, root: str, tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    lines = [
        f'{{"query": "a", "x": {deep}}}',
        f'{{"query": {deep}}}',
        '{"query": ["a"]}',
        '{"query": {"a": 1}}',
        '{"query": "a", "query": "b"}',
    ]
    lines += [
        '{"query": "a", "n": %s}' % ("9" * 10_000),
        *('{"query": "a", "n": %s}' % ("[" * n + "]" * n) for n in (900, 985, 995)),
        '{"query": "ok", "n": 1}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    receipt = ingest(tmp_path / "x.jsonl", columns=LogColumns(count="n"))
    assert queries(root, receipt) == {"ok": 1}
    assert receipt.rows["set_aside"] == len(lines) - 1
    assert receipt.rows["set_aside.name_twice"] == 1


def test_a_zero_byte_sets_the_row_aside_in_every_format(ingest: Ingest, root: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"query\ncsv\na\0b\n" + b"\n" * 100)
    (tmp_path / "b.jsonl").write_bytes(b'{"query": "a\\u0000b"}\n{"query": "a\0b"}\n{"query": "json"}\n')
    pq.write_table(pa.table({"query": ["a\0b", "parquet", "\0" * 100_000]}), tmp_path / "c.parquet")
    receipt = ingest(tmp_path)
    assert queries(root, receipt) == {"csv": 1, "json": 1, "parquet": 1}
    assert receipt.rows["set_aside.nul"] == 5
    assert receipt.rows["set_aside"] == 5 + 100, "and the empty lines that keep the file from looking binary"


def test_json_queries_that_are_no_text(ingest: Ingest, root: str, tmp_path: Path) -> None:
    values = ["NaN", "null", "Infinity", "true", "[1]", "1.10", "1.1", "1e5", '"nan"']
    (tmp_path / "x.jsonl").write_text("".join(f'{{"query": {value}, "n": 1e2}}\n' for value in values))
    receipt = ingest(tmp_path / "x.jsonl", columns=LogColumns(count="n"))
    assert queries(root, receipt) == {"1.10": 100, "1.1": 100, "1e5": 100, "nan": 100}
    assert (receipt.rows["set_aside.empty"], receipt.rows["set_aside.bad_row"]) == (3, 2)


@pytest.mark.parametrize("kind", [pa.float64(), pa.float32()])
def test_a_column_of_floats_as_queries(ingest: Ingest, root: str, tmp_path: Path, kind: pa.DataType) -> None:
    values = [7.0, 7.5, float("nan"), None, float("inf"), 8388608.0, -3.0]
    pq.write_table(pa.table({"query": pa.array(values, kind)}), tmp_path / "x.parquet")
    receipt = ingest(tmp_path / "x.parquet")
    assert queries(root, receipt) == dict.fromkeys(["7", "7.5", "8388608", "-3"], 1)
    assert receipt.rows["set_aside.empty"] == 3


def test_a_column_of_booleans_is_no_column_of_queries(ingest: Ingest, tmp_path: Path) -> None:
    pq.write_table(pa.table({"query": [True, None]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="does not hold text"):
        ingest(tmp_path / "x.parquet")


@pytest.mark.parametrize("cell", [{"a": 1}, [{"a": 1}], [["a"]]])
def test_a_parquet_column_of_objects_is_no_side_input(ingest: Ingest, tmp_path: Path, cell: object) -> None:
    pq.write_table(pa.table({"query": ["a"], "businesses": [cell]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="column businesses does not hold text") as error:
        ingest(tmp_path / "x.parquet", task="query_segmentation")
    assert "as JSON" in error.value.fix


def test_a_tiny_parquet_file_that_unpacks_to_gigabytes_takes_little_memory(ingest: Ingest, root: str, tmp_path: Path) -> None:
    text, rows = "x" * 500_000, 5000
    codes = pa.array([0] * rows, pa.int32())
    sides = pa.DictionaryArray.from_arrays(pa.array([0] * 2 * rows, pa.int32()), [text])
    lists = pa.ListArray.from_arrays(pa.array(range(0, 2 * rows + 1, 2), pa.int32()), sides)
    table = pa.table({"query": pa.DictionaryArray.from_arrays(codes, [text]), "businesses": lists})
    pq.write_table(pa.concat_tables([table, pa.table({"query": ["ok"], "businesses": [["a"]]}).cast(table.schema)]), tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 200_000, "2.5 GB of queries and 5 GB of side inputs"
    before = pa.total_allocated_bytes()
    pool = pa.default_memory_pool()
    receipt = ingest(tmp_path / "x.parquet", task="query_segmentation")
    assert queries(root, receipt) == {"ok": 1}
    assert receipt.rows["set_aside.too_long"] == rows
    assert (pool.max_memory() or 0) - before < 700 << 20


# --- days

DAYS = st.lists(st.integers(20, 60), min_size=4, max_size=40)
WILD = st.lists(st.integers(0, 80_000), max_size=5)  # days from 1970 to 2189
START = 19_000


@settings(max_examples=400)
@given(DAYS, WILD, st.integers(1, 3))
def test_a_few_rows_of_any_dates_move_the_cut_by_a_day_at_most(sizes: list[int], wild: list[int], holdout_days: int) -> None:
    own = {START + i: size for i, size in enumerate(sizes)}

    def cut(found: dict[int, int]) -> int:
        span = days.day_span(found, today=20_000)
        return days.cut_day({day: n for day, n in found.items() if span.first <= day <= min(span.last, span.today)}, holdout_days)

    mixed = dict(own)
    for day in wild:
        mixed[day] = mixed.get(day, 0) + 1
    assert abs(cut(mixed) - cut(own)) <= 1


COUNTED = LogColumns(time="time", count="n")
OWN = "".join(f"pizza,5,2024-01-{day:02d}\n" for day in range(1, 15) for _ in range(28))


@settings(max_examples=400)
@given(DAYS, WILD, st.integers(1, 3))
def test_a_few_rows_of_any_dates_are_never_all_of_holdout_traffic(sizes: list[int], wild: list[int], holdout_days: int) -> None:
    mixed = Counter({START + i: size for i, size in enumerate(sizes)})
    mixed.update(wild)
    span = days.day_span(mixed, today=20_000)
    kept = {day: n for day, n in mixed.items() if span.first <= day <= min(span.last, span.today)}
    cut = days.cut_day(kept, holdout_days)
    assert any(START + i >= cut for i in range(len(sizes)))


@pytest.mark.parametrize("count", [1, 140, 160, 2_001, 100_000, 10**12])
@pytest.mark.parametrize("date, reason", [("2099-01-01", "after_today"), ("2024-01-25", "after_gap"), ("2024-01-15", "")])
def test_no_count_makes_one_row_the_holdout_traffic(ingest: Ingest, tmp_path: Path, count: int, date: str, reason: str) -> None:
    (tmp_path / "x.csv").write_text(f"query,n,time\n{OWN}spam,{count},{date}\n")
    receipt = ingest(tmp_path / "x.csv", columns=COUNTED)
    assert receipt.result.holdout_from == "2024-01-14"
    assert receipt.rows.get(f"set_aside.{reason}", 0) == bool(reason)
    assert receipt.rows["holdout_events"] == 140 + count * (not reason)


def test_a_few_rows_after_a_log_of_one_day_are_not_held_out(ingest: Ingest, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("query,n,time\n" + "pizza,1,2024-01-01\n" * 28 + "spam,9999,2024-01-02\n")
    with pytest.raises(InputError, match="no day is left"):
        ingest(tmp_path / "x.csv", columns=COUNTED)


@settings(max_examples=200)
@given(st.integers(10, 100), st.integers(1, 30), st.integers(3, 30))
def test_days_sampled_at_a_distance_are_all_believed(size: int, step: int, count: int) -> None:
    assert days.day_span({START + step * i: size for i in range(count)}, today=20_000)[:2] == days.EVER[:2]


def test_what_is_set_aside_by_its_date(ingest: Ingest, root: str, tmp_path: Path) -> None:
    own = [f"pizza,2024-01-{day:02d}" for day in range(1, 21) for _ in range(10)]
    wild = ["tacos,1970-01-01", "tacos,2024-02-10", "tacos,2099-01-01"]
    (tmp_path / "x.csv").write_text("\n".join(["query,time", *own, *wild]) + "\n")
    receipt = ingest(tmp_path / "x.csv", columns=LogColumns(time="time"))
    assert (receipt.result.first_day, receipt.result.last_day, receipt.result.holdout_from) == (
        "2024-01-01",
        "2024-01-20",
        "2024-01-20",
    )
    found = output_table(open_storage(root), receipt, "set_aside").to_pylist()
    assert [(row["row"], row["reason"]) for row in found] == [(201, "before_gap"), (202, "after_gap"), (203, "after_today")]
    assert "'2024-02-10' for tacos" in found[1]["text"]
    assert any("after today" in note for note in receipt.notes)


def test_a_log_that_is_mostly_in_the_future_is_not_thrown_away() -> None:
    """The clock of this machine may be what is wrong."""
    assert days.day_span({100: 5, 101: 50, 102: 50}, today=99) == days.EVER
