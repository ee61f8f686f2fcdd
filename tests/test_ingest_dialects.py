"""What other tools write is read exactly, or set aside or refused with a reason: never read as something else."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headtail.core.errors import InputError
from headtail.stages.ingest import delimited, dialect, files, logfile

Rows = list[tuple[str, str]]


def written(rows: Rows, **how: object) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, **{"lineterminator": "\n", **how}).writerows([("query", "n"), *rows])  # type: ignore[arg-type]
    return out.getvalue()


def excel(rows: Rows) -> str:
    return "\ufeff" + written(rows, lineterminator="\r\n")


def excel_in_berlin(rows: Rows) -> str:
    return "sep=;\r\n" + written(rows, delimiter=";", lineterminator="\r\n")


def excel_as_text(rows: Rows) -> str:
    return written(rows, delimiter="\t", lineterminator="\r\n")


def excel_on_an_old_mac(rows: Rows) -> str:
    return written([(query.replace("\r", "").replace("\n", " "), n) for query, n in rows], lineterminator="\r")


def pandas(rows: Rows) -> str:
    lines = [("", "query", "n"), *((str(i), query, n) for i, (query, n) in enumerate(rows))]
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def pandas_quoting_all(rows: Rows) -> str:
    return written(rows, quoting=csv.QUOTE_ALL)


def pandas_with_tabs(rows: Rows) -> str:
    return written(rows, delimiter="\t")


def pandas_with_an_escape(rows: Rows) -> str:
    return written(rows, doublequote=False, escapechar="\\")


def pandas_without_quotes(rows: Rows) -> str:
    return written(rows, quoting=csv.QUOTE_NONE, escapechar="\\")


def spark(rows: Rows, delimiter: str = ",") -> str:
    def cell(text: str) -> str:
        if text and not set(f'"\n\r{delimiter}') & set(text):
            return text
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'

    return "".join(delimiter.join(map(cell, row)) + "\n" for row in [("query", "n"), *rows])


def spark_with_tabs(rows: Rows) -> str:
    return spark(rows, "\t")


def mysql_enclosed(rows: Rows) -> str:
    def cell(text: str) -> str:
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\\n") + '"'

    return "query,n\n" + "".join(f"{cell(query)},{n}\n" for query, n in rows)


def mysql_batch(rows: Rows) -> str:
    def cell(text: str) -> str:
        return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n")

    return "".join(f"{cell(query)}\t{n}\n" for query, n in [("query", "n"), *rows])


def jq_tsv(rows: Rows) -> str:
    return mysql_batch(rows).replace("\r", "\\r")


def jq_csv(rows: Rows) -> str:
    return '"query","n"\n' + "".join('"{}",{}\n'.format(query.replace('"', '""'), n) for query, n in rows)


def joined_by_hand(rows: Rows, delimiter: str = "\t") -> str:
    """A program that knows of no quotes; it is not at fault where a text holds neither its delimiter nor a new line."""
    return "".join(delimiter.join(row) + "\n" for row in [("query", "n"), *rows] if not set("\r\n" + delimiter) & set(row[0]))


def with_a_trailing_delimiter(rows: Rows) -> str:
    return "query,n\n" + "".join(line + ",\n" for line in written(rows).split("\n")[1:-1]) if all("\n" not in q for q, _ in rows) else ""


def cat_of_two(rows: Rows) -> str:
    return excel(rows[: len(rows) // 2]) + excel(rows[len(rows) // 2 :])


def cat_of_spark_and_pandas(rows: Rows) -> str:
    return spark(rows[: len(rows) // 2]) + written(rows[len(rows) // 2 :])


def jq_lines(rows: Rows) -> str:
    return "".join(json.dumps({"query": query, "n": n}) + "\n" for query, n in rows)


def jq_pretty(rows: Rows) -> str:
    return "".join(json.dumps({"query": query, "n": n}, indent=2) + "\n" for query, n in rows)


TOOLS: dict[Callable[[Rows], str], str] = {
    excel: ".csv",
    excel_in_berlin: ".csv",
    excel_as_text: ".txt",
    excel_on_an_old_mac: ".csv",
    pandas: ".csv",
    pandas_quoting_all: ".csv",
    pandas_with_tabs: ".tsv",
    pandas_with_an_escape: ".csv",
    pandas_without_quotes: ".csv",
    spark: ".csv",
    spark_with_tabs: ".tsv",
    mysql_enclosed: ".csv",
    mysql_batch: ".tsv",
    jq_tsv: ".tsv",
    jq_csv: ".csv",
    joined_by_hand: ".tsv",
    with_a_trailing_delimiter: ".csv",
    cat_of_two: ".csv",
    cat_of_spark_and_pandas: ".csv",
    jq_lines: ".jsonl",
    jq_pretty: ".json",
}
HOT = st.text(alphabet='a"\\,;\t\nnt ', max_size=8)
TEXT = HOT | st.sampled_from(
    ['12" pizza', '10" pizza, large', 'say "hi"', '"near me"', "c:\\dir", "c:\\new", "a\\", "", "é", "x\\\\y", "\r\n"]
)


def read(text: str, ending: str, quotes: str = "auto", column: str = "n") -> tuple[Rows, Counter[str]]:
    """The rows that are read, and why the others are not."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"log{ending}")
        path.write_bytes(text.encode())
        system, there, _ = files.list_files(str(path))
        part = logfile.split_log(system, [logfile.probe_file(system, there[0], "query", quotes)])[0]
        sheets = list(logfile.read_split(system, part, logfile.ColumnSelection(("query", column))))
    rows = [
        (query.decode(), n.decode())
        for sheet in sheets
        for query, n in zip(*(sheet.table[c].to_pylist() for c in ("query", column)), strict=True)
    ]
    return rows, Counter(reject.reason for sheet in sheets for reject in sheet.rejects)


def numbered(texts: list[str]) -> Rows:
    return [(text, str(i)) for i, text in enumerate(texts, 1)]


def plain(rows: Rows) -> Counter[tuple[str, str]]:
    return Counter((query.replace("\r\n", "\n").replace("\n", " "), n) for query, n in rows)  # a query has no lines


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXT, min_size=1, max_size=8))
def test_rows_are_read_as_they_were_written_or_set_aside(tool: Callable[[Rows], str], texts: list[str]) -> None:
    rows = numbered(texts)
    try:
        found, aside = read(tool(rows), TOOLS[tool])
    except InputError:
        return
    assert not plain(found) - plain(rows), "rows that nobody wrote"
    assert all(aside) or not aside
    lines = tool(rows).count("\n" if "\n" in tool(rows) else "\r")
    assert len(found) + aside.total() <= lines


PSQL = " query  \n-------\n pizza\n tacos\n(2 rows)\n\n"
SQLCMD = (
    "query               ,n          \r\n--------------------,-----------\r\npizza               ,          1\r\n\r\n(1 rows affected)\r\n"
)


@pytest.mark.parametrize(
    "text, column, queries, drawn",
    [
        (PSQL, "query", ["pizza", "tacos"], 2),
        (PSQL.replace("-", "\u2500"), "query", ["pizza", "tacos"], 2),
        (PSQL.replace("-------\n", ""), "query", ["pizza", "tacos"], 1),
        (PSQL * 2, "query", ["pizza", "tacos"] * 2, 4),
        (" query | n \n-------+---\n pizza | 1\n(1 row)\n", "n", ["pizza"], 2),
        ("query\n-----\npizza\n\n(1 row(s) affected)\n", "query", ["pizza"], 2),
        (SQLCMD, "n", ["pizza"], 2),
        (SQLCMD.replace(",", "\t"), "n", ["pizza"], 2),
        (SQLCMD.replace(",", "|"), "n", ["pizza"], 2),
    ],
)
def test_lines_that_psql_and_sqlcmd_draw_are_no_queries(text: str, column: str, queries: list[str], drawn: int) -> None:
    found, aside = read(text, ".csv", column=column)
    assert Counter(query.strip() for query, _ in found if query) == Counter(queries)  # an empty line is an empty cell, set aside later
    assert aside["bad_row"] == drawn


def test_a_query_that_only_looks_drawn_is_kept() -> None:
    texts = ["-", "--", "-5", "--help", "(2 rows) of seats", "(2)", "\u2013", "--- a", "(two rows)", "\u2500\u2500"]
    found, aside = read("query\n" + "\n".join(texts) + '\n"---"\n"(2 rows)"\n', ".csv", column="query")
    assert (Counter(query for query, _ in found), aside) == (Counter([*texts, "---", "(2 rows)"]), Counter())
    found, aside = read("query,n\n---,3\n(2 rows),1\n", ".csv")
    assert (found, aside) == ([("---", "3"), ("(2 rows)", "1")], Counter())


SECOND = ["query,x", "QUERY,X", "query, x", " Query ,\tX ", '"query","x"', '"QUERY", x', "\ufeffquery,x", "query,x,", "query          ,x"]


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("first", ["query,x", '"query","x"', " query , x"])
def test_a_second_header_is_no_query_however_it_is_written(first: str, second: str) -> None:
    comma = "," * second.endswith(",")
    rows = ["pizza,1", second, "tacos,2"]
    text = "\n".join([first, *(row.removesuffix(",") + comma for row in rows)]) + "\n"
    assert read(text, ".csv", column="x") == ([("pizza", "1"), ("tacos", "2")], Counter(header=1))


def test_a_second_header_in_letters_beyond_ascii_is_no_query() -> None:
    text = "query,число\nпицца,1\nQuery,ЧИСЛО\nсуши,2\n"
    assert read(text, ".csv", column="число") == ([("пицца", "1"), ("суши", "2")], Counter(header=1))


@pytest.mark.parametrize("sep", ["sep=;", "SEP=;", '"sep=;"', "\ufeffsep=;"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("tail", ["", ";"])
def test_a_second_sep_line_is_no_query(sep: str, end: str, tail: str) -> None:
    """Files of Excel that `cat` glued together, with or without a delimiter too many."""
    part = [sep, "query;n", f"pizza;1{tail}"]
    text = end.join([*part, *part[:2], f"tacos;2{tail}", *part, ""])
    assert read(text, ".csv") == ([("pizza", "1"), ("tacos", "2"), ("pizza", "1")], Counter(header=4))


def test_a_query_that_only_looks_like_a_sep_line_is_kept() -> None:
    rows = [("sep=", "1"), ("sep=;a", "2"), ("a sep=;", "3"), ("sep=,", "4")]
    found, aside = read(excel_in_berlin(rows), ".csv")
    assert (sorted(found), aside) == (sorted(rows), Counter())


@given(
    st.lists(st.lists(st.sampled_from(['"a"', '""', "b", "", '"a,b"', '"a""b"', 'a"b', '"a" b', '"', "\r", '"\r"', "é"]), max_size=3)),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([(dialect.DOUBLED,), (dialect.DOUBLED, dialect.BACKSLASH), (dialect.DOUBLED, dialect.NONE), (dialect.NONE,)]),
)
def test_lines_that_are_cut_in_bulk_are_read_as_one_by_one(rows: list[list[str]], end: str, quotes: tuple[str, ...]) -> None:
    data = "".join(",".join(cells) + end for cells in rows).encode()
    form = dialect.Dialect(",", quotes, ("query", "n"), b"query,n")
    found = []
    for neat in (delimited._neat, lambda lines, _: np.zeros(len(lines.starts), bool)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(delimited, "_neat", neat)
            sheet, used = delimited.parse_rows(data, form, ("query", "n"), 1, True)
        found.append((sorted(sheet.table.to_pylist(), key=lambda row: row[delimited.ROW]), sheet.rejects, used))
    assert found[0][0] == found[1][0]
    assert [reject[:2] for reject in found[0][1]] == [reject[:2] for reject in found[1][1]]
    assert found[0][2] == found[1][2]
