"""`headtail labels page` and `read`: people's answers to drawn queries become labels with their design, and reach no training set."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import loopback
from headtail import review
from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.receipts import output_table
from headtail.cli import app
from headtail.core.config import TrackingConfig
from headtail.core.errors import InputError
from headtail.core.keys import normalise, query_key
from headtail.core.task import Task, load_task
from headtail.releases.deletion import delete_query
from headtail.review.desk import Desk
from headtail.review.formats import guard
from headtail.review.label_draw import COLUMNS, Config, draw_labels, read_draws, record_draw
from headtail.review.labelling import label_desk, read_labels, serve_labels
from headtail.review.log import LABELLING, DecisionLog
from headtail.stages import ingest, plan
from headtail.stages.publish.people import people_answers
from timescale import limit

OFF = TrackingConfig(enabled=False)
BROWSE, PRICE = '{"intent":"browse"}', '{"intent":"price"}'


@pytest.fixture
def task() -> Task:
    return load_task("query_intent")


@pytest.fixture
def config(root: str) -> Config:
    record_draw(open_storage(root), "query_intent", [drawn(query) for query in ("a", "b", "c", "d", "e", "f", "g", "-5 degrees")])
    return Config(root=root, tracking=OFF, task="query_intent", who="anna")


def drawn(query: str, answer: Any = "", **cells: str) -> dict[str, Any]:
    return {
        "query": query,
        "answer": answer,
        "design": "census",
        "inclusion": "1",
        "stratum": "head",
        "events": "7",
        **key_of(query),
        **cells,
    }


def key_of(query: str) -> dict[str, str]:
    return {"query_key": query_key(normalise(query)).hex()}


def written(file: Path, *rows: dict[str, Any]) -> Path:
    """The rows as `labels draw` writes them."""
    with file.open("w", encoding="utf-8", newline="") as out:
        if file.suffix == ".jsonl":
            out.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(out, [*COLUMNS, "who"])
            writer.writeheader()
            writer.writerows({**row, "query": guard(row["query"])} for row in rows)
    return file


def answer(desk: Desk, query: str, text: str, who: str = "anna") -> None:
    """As the page does; without a text the query is skipped."""
    place = desk.queue.places[query_key(query)][0]
    desk.decide(place + 1, query_key(query).hex(), "correct" if text else "drop", text, who, "", 0)


def labels_of(file: Path) -> dict[str, dict[str, str]]:
    """The rows of a CSV by query."""
    return {row["query"]: row for row in csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"), newline=""))}


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_queries_are_drawn_answered_read_and_ingested(root: str, tmp_path: Path, ending: str) -> None:
    """Every label reaches the table of human labels under its query, with its design; `-5 degrees` is no formula."""
    log = tmp_path / "log.csv"
    words = ["-5 degrees", "@home", "=1+1", *(f"pizza place {i}" for i in range(150))]
    log.write_text("query\n" + "".join(f"{word}\n" * (1 + 300 // (i + 1)) for i, word in enumerate(words)))
    intake = {"root": root, "tracking": OFF, "task": "query_intent", "log": str(log), "holdout_share": 0.3}
    ingest.run(ingest.Config.model_validate(intake))
    plan.run(plan.Config.model_validate({"root": root, "tracking": OFF, "task": "query_intent"}))
    config = Config(root=root, tracking=OFF, task="query_intent", census=15, rows=25)
    count = draw_labels(config, file := tmp_path / f"draw{ending}", "csv" if ending == ".csv" else "jsonl")
    desk = label_desk(config, file)
    assert len(desk.queue) == count
    for place in range(count):
        answer(desk, desk.queue.item(place).query, BROWSE, f"person {place % 2}")
    report = read_labels(config, file, out := tmp_path / "labels.csv")
    assert (report.rows, report.labels, report.shares) == (count, count, {})
    receipt = ingest.run(ingest.Config.model_validate({**intake, "labels": str(out)}))
    assert receipt.rows["labels_set_aside"] == 0
    table = output_table(open_storage(root), receipt, "human_labels").to_pylist()
    assert {"-5 degrees", "@home", "=1+1"} <= {row["query"] for row in table}
    lines = labels_of(out)
    assert len(table) == count
    assert {line["who"] for line in lines.values()} == {"person 0", "person 1"}
    for row in table:
        line = lines[row["query"]]
        assert (row["answer"], row["design"]) == (BROWSE, line["design"])
        assert row["inclusion"] == pytest.approx(float(line["inclusion"]))
        assert row["count"] > 0 or line["stratum"] == "unseen"


QUERIES = st.lists(st.text(st.sampled_from("ab -+=@'\";,1é"), min_size=1, max_size=8), min_size=1, max_size=12)


@given(QUERIES, st.data(), st.sampled_from([".csv", ".jsonl"]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_row_is_a_label_or_counted(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], data: st.DataObject, ending: str
) -> None:
    """Whatever is answered: queries come back as drawn, nothing is lost, and labels stand for all that were drawn as they were."""
    folder = tmp_path_factory.mktemp("labelling")
    config = Config(root=str(folder / "store"), task="query_intent")
    queries = [query for query in dict.fromkeys(map(normalise, texts)) if query]
    strata = data.draw(st.lists(st.sampled_from(["head", "tail"]), min_size=len(queries), max_size=len(queries)))
    chance = {"head": ("census", "1"), "tail": ("by_traffic", "0.25")}
    rows = [drawn(q, stratum=s, design=chance[s][0], inclusion=chance[s][1]) for q, s in zip(queries, strata, strict=True)]
    if not rows:
        return
    record_draw(open_storage(config.root), "query_intent", rows)
    file = written(folder / f"draw{ending}", *rows)
    desk = label_desk(config, file)
    said = data.draw(st.lists(st.sampled_from(["", "open", BROWSE, PRICE]), min_size=len(queries), max_size=len(queries)))
    for query, text in zip(queries, said, strict=True):
        if text != "open":
            answer(desk, query, text)
    report = read_labels(config, file, folder / "labels.csv")
    labels = labels_of(folder / "labels.csv")
    assert {query: row["answer"] for query, row in labels.items()} == {
        q: t for q, t in zip(queries, said, strict=True) if t.startswith("{")
    }
    assert (report.rows, report.labels, report.unanswered, report.dropped) == (len(rows), len(labels), said.count("open"), said.count(""))
    for stratum, (design, inclusion) in chance.items():
        mine, of = [row for row in labels.values() if row["stratum"] == stratum], strata.count(stratum)
        if mine:  # labels stand for as many queries as all that were drawn
            assert sum(1 / float(row["inclusion"]) for row in mine) == pytest.approx(of / float(inclusion))
            whole = len(mine) == of
            assert {row["design"] for row in mine} == {design if whole or design != "census" else "by_probability"}
            assert whole == ((design, stratum) not in report.shares)


def test_what_is_wrong_is_named_and_the_others_are_written(config: Config, tmp_path: Path) -> None:
    file = written(tmp_path / "draw.csv", drawn("a"), drawn("b"), drawn("c"), drawn("d"))
    desk = label_desk(config, file)
    for query, text in (("a", BROWSE), ("b", PRICE), ("c", ""), ("d", BROWSE)):
        answer(desk, query, text, "ben")
    written(
        file,
        drawn("a", "Browse"),  # as on the page
        drawn("b", "browse"),  # not as on the page
        drawn("c", "price"),  # skipped on the page
        drawn("d"),
        drawn("e", "dance"),
        drawn("f", "price", inclusion="2"),
        drawn("call anna@example.org", "price"),
        drawn("g", "price", who="cleo"),
        drawn("", "price"),
    )
    assert [item.query for item in label_desk(config, file).queue.items(range(4))] == [
        "a",
        "b",
        "c",
        "d",
    ]  # what was decided can be changed
    report = read_labels(config, file, tmp_path / "out.csv")
    assert {query: (row["answer"], row["who"]) for query, row in labels_of(tmp_path / "out.csv").items()} == {
        "a": (BROWSE, "ben"),
        "d": (BROWSE, "ben"),
        "g": (PRICE, "cleo"),
    }
    problems = dict(report.problems)
    assert problems[2].startswith(f"answer: {BROWSE} in the file, but ben answered {PRICE} on the page")
    assert "ben skipped the query" in problems[3]
    assert [problems[n].split(":")[0] for n in (5, 6, 7, 9)] == ["answer", "inclusion '2'", "query", "query"]
    assert report.rows == report.labels + report.unanswered + report.dropped + len(problems) == 9
    answer(label_desk(config, file), "b", BROWSE)  # decided on the page as the file does
    assert 2 not in dict(read_labels(config, file, tmp_path / "out.csv").problems)


SPOILT = {"007": "7", "1-2": "02. Jan", "1e5": "100000", "null": "", "true": "TRUE"}


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_the_key_decides_what_a_spreadsheet_changed(config: Config, tmp_path: Path, ending: str) -> None:
    """The drawn query gets the label, and how many texts were changed is said; without its key such a row is wrong."""
    queries = [*SPOILT, *(f"word {i}" for i in range(15))]
    record_draw(open_storage(config.root), "query_intent", [drawn(query) for query in queries])
    rows = [drawn(query, "browse") | {"query": SPOILT.get(query, query)} for query in queries]
    report = read_labels(config, written(tmp_path / f"draw{ending}", *rows), tmp_path / "out.csv")
    assert (report.rows, report.labels, report.problems, report.shares) == (20, 20, (), {})
    assert [number for number, _ in report.notes] == [1, 2, 3, 4]  # TRUE is true after normalisation
    assert "'7' is not the one of this query_key, which is '007'" in report.notes[0][1]
    assert labels_of(tmp_path / "out.csv").keys() == set(queries)
    assert [item.query for item in label_desk(config, written(tmp_path / f"b{ending}", rows[0] | {"answer": ""})).queue.items([0])] == [
        "007"
    ]


@pytest.mark.parametrize("key", ["", "1.2E+31", "00" * 16])
def test_a_query_that_nobody_drew_is_wrong(config: Config, tmp_path: Path, key: str) -> None:
    queries = ["007", *(f"word {i}" for i in range(19))]
    record_draw(open_storage(config.root), "query_intent", [drawn(query) for query in queries])
    rows = [drawn(query, "browse", query_key=key) | {"query": SPOILT.get(query, query)} for query in queries]
    foreign = [drawn("of somebody", "price", query_key=key), drawn("of nobody", "price", design="", stratum="", query_key=key)]
    for more in (0, 1, 2):
        file = written(tmp_path / "draw.csv", *rows, *foreign[:more])
        report = read_labels(config, file, tmp_path / "out.csv")
        assert (report.rows, report.labels, report.notes) == (20 + more, 19, ())
        assert report.shares == {("census", "head"): (19, 20)}
        assert [number for number, _ in report.problems] == [1, 21, 22][: 1 + more]
        assert all("was not drawn" in problem and (key[:40] or "no query_key") in problem for _, problem in report.problems)
        assert labels_of(tmp_path / "out.csv").keys() == set(queries[1:])


def test_a_file_of_which_one_column_was_sorted_is_noticed(config: Config, tmp_path: Path) -> None:
    rows = [drawn("a", "price", **key_of("b")), drawn("b", "browse", **key_of("a")), drawn("c", "price")]
    report = read_labels(config, written(tmp_path / "draw.csv", *rows), tmp_path / "out.csv")
    assert ["sorted by one column" in problem for _, problem in report.problems] == [True, True]
    assert report.shares == {("census", "head"): (1, 3)}


def test_a_field_that_occurs_twice_is_wrong(config: Config, tmp_path: Path) -> None:
    lines = [json.dumps(drawn("a", {"intent": "price"})), json.dumps(drawn("b", {"intent": "price"})), json.dumps(drawn("c", "price"))]
    lines[0] = lines[0].replace('"intent"', '"intent": "browse", "intent"')
    lines[1] = lines[1].replace('"answer"', '"answer": "browse", "answer"')
    record_draw(open_storage(config.root), "query_intent", [drawn(query) for query in "abc"])
    (tmp_path / "draw.jsonl").write_text("\n".join(lines))
    report = read_labels(config, tmp_path / "draw.jsonl", tmp_path / "out.csv")
    assert report.problems == ((1, "the field 'intent' occurs twice"), (2, "the field 'answer' occurs twice"))
    assert report.shares == {("census", "head"): (1, 3)}


def test_a_deleted_query_is_in_no_draw(config: Config, store: Storage, tmp_path: Path) -> None:
    receipt = delete_query(store, "a", who="anna", why="asked for by its author")
    assert receipt.rows == {"labelling": 1}
    (draw,) = read_draws(store, "query_intent")
    assert {entry.query for entry in draw.values()} == {"b", "c", "d", "e", "f", "g", "-5 degrees"}
    ((_, problem),) = read_labels(config, written(tmp_path / "draw.csv", drawn("a", "price")), tmp_path / "out.csv").problems
    assert "'a' was not drawn" in problem


def test_a_store_without_a_draw_is_named(root: str, tmp_path: Path) -> None:
    config = Config(root=root, tracking=OFF, task="query_intent", who="anna")
    file = written(tmp_path / "draw.csv", drawn("a", "price"))
    for call in (lambda: read_labels(config, file, tmp_path / "out.csv"), lambda: label_desk(config, file)):
        with pytest.raises(InputError, match="no queries were drawn for this task in this store"):
            call()


def test_a_file_that_a_spreadsheet_saved_again_is_read(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "draw.csv"
    file.write_text("\ufeffstratum;events;Query;answer;design\r\nhead;5;'-5 degrees;browse;census\r\ntail;;b;;\r\n", encoding="utf-8")
    report = read_labels(config, file, tmp_path / "out.csv")
    assert (report.labels, report.unanswered, report.problems) == (1, 1, ())
    assert labels_of(tmp_path / "out.csv")["-5 degrees"]["answer"] == BROWSE
    assert label_desk(config, file).queue.item(0).count == 0


def test_json_lines_may_hold_answers_as_values(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "draw.jsonl"
    lines = [
        '{"query": "a", "answer": {"intent": "price"}, "inclusion": 0.5}',
        "{",
        "[1]",
        '{"query": 3}',
        '{"query": "b", "answer": null}',
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
    report = read_labels(config, file, tmp_path / "out.csv")
    assert (report.rows, report.labels, report.unanswered) == (5, 1, 1)
    assert [number for number, _ in report.problems] == [2, 3, 4]
    assert labels_of(tmp_path / "out.csv")["a"]["answer"] == PRICE


def test_label_studio_says_who_skipped_and_who_answered(config: Config, tmp_path: Path) -> None:
    def item(query: str, *results: list[dict[str, Any]]) -> dict[str, Any]:
        data = {"text": query, "design": "census", "inclusion": "1", "stratum": "head", "events": "3"}
        return {"data": data, "annotations": [{"completed_by": {"email": "anna@example.org"}, "result": result} for result in results]}

    chosen = [{"from_name": "label", "value": {"choices": ["price"]}}]
    skipped = [{"from_name": "verdict", "value": {"choices": ["drop"]}}]
    file = tmp_path / "export.json"
    file.write_text(json.dumps([item("a", chosen, chosen), item("b", skipped), item("c"), item("d", [])]), encoding="utf-8")
    report = read_labels(config, file, tmp_path / "out.csv")
    assert (report.rows, report.labels, report.dropped, report.unanswered, len(report.problems)) == (5, 2, 1, 1, 1)
    assert report.shares == {("census", "head"): (1, 4)}
    (row,) = labels_of(tmp_path / "out.csv").values()
    assert (row["who"], row["design"], row["inclusion"]) == ("anna@example.org", "by_probability", "0.25")
    changed = item("aa", chosen)  # its regions would point into another text
    changed["data"] |= key_of("a")
    file.write_text(json.dumps([changed, item("nobody drew this", chosen)]), encoding="utf-8")
    report = read_labels(config, file, tmp_path / "out.csv")
    assert [problem.split(";")[0] for _, problem in report.problems] == [
        "query: 'aa' is not the one of this query_key, which is 'a'",
        "query: 'nobody drew this' was not drawn, and the row has no query_key",
    ]


def test_files_that_cannot_be_are_refused(config: Config, tmp_path: Path) -> None:
    file = written(tmp_path / "draw.csv", drawn("a"))
    with pytest.raises(InputError, match="cannot go into the file"):
        read_labels(config, file, file)
    with pytest.raises(InputError, match="labels are written as CSV"):
        read_labels(config, file, tmp_path / "labels.parquet")
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    with pytest.raises(InputError, match="no query in this file"):
        read_labels(config, empty, tmp_path / "labels.csv")
    assert not list(tmp_path.glob("labels.*"))
    empty.write_text('[{"data": {"text": "pizza"}, "annotations": [{"result": 5}]}]')
    ((_, problem),) = read_labels(config, empty, tmp_path / "labels.csv").problems
    assert problem == "annotations: `result` is not a list of marks"
    (tmp_path / "tasks.json").write_text("[]")
    with pytest.raises(InputError, match="for Label Studio"):
        serve_labels(config, tmp_path / "tasks.json")
    (tmp_path / "bad.csv").write_text("text,label\na,b\n")
    with pytest.raises(InputError, match="lacks columns query, answer"):
        read_labels(config, tmp_path / "bad.csv", tmp_path / "out.csv")


def test_reviews_do_not_see_answers_to_drawn_queries(config: Config, store: Storage, task: Task, tmp_path: Path) -> None:
    """Curate and publish read reviews/<task>; what people label is for evaluation alone."""
    desk = label_desk(config, written(tmp_path / "draw.csv", drawn("a"), drawn("b")))
    answer(desk, "a", PRICE)
    answer(desk, "b", "")
    assert len(DecisionLog(store, task.name, LABELLING).current_decisions()) == 2
    assert review.decisions(store, task.name).num_rows == 0
    assert review.decision_history(store, task.name).num_rows == 0
    assert not people_answers(store, task)
    assert Counter(one.path.split("/")[0] for one in store.files("")) == {"labelling": 3}, "two answers, and what was drawn"


def test_nobody_sees_an_answer(config: Config, tmp_path: Path) -> None:
    desk = label_desk(config, written(tmp_path / "draw.csv", drawn("a"), drawn("b", "price")))
    facts, row = desk.page_facts(), desk.row(-1, 1, "open")
    assert (facts["labelling"], facts["rows"], facts["fields"]) == (True, 1, ["intent"])
    assert (row["query"], row["stratum"], row["count"], row["answer"], row["alternatives"], row["gain"]) == ("a", "head", 7, None, [], None)


@contextmanager
def page(file: Path, root: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "headtail.cli", "labels", "page", str(file), "--root", root, "--set", "task=query_intent"]
    running = subprocess.Popen([*command, "--set", "who=anna"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert running.stdout is not None
        yield running, next(word for line in running.stdout for word in line.split() if word.startswith("http://"))
    finally:
        running.kill()
        running.communicate()


@pytest.mark.slow
def test_a_kill_loses_no_answer(root: str, tmp_path: Path) -> None:
    record_draw(open_storage(root), "query_intent", [drawn("a"), drawn("b")])
    file = written(tmp_path / "draw.csv", drawn("a"), drawn("b"))
    with page(file, root) as (running, url):
        row = loopback.get(url + "row?start=0&step=0&show=all").json()
        body = {"rank": 1, "query_key": row["query_key"], "verdict": "correct", "answer": PRICE, "who": "ben", "why": "", "seen": 0}
        assert loopback.post(url + "decide", json=body).json()["number"] == 1
        os.kill(running.pid, signal.SIGKILL)
        running.wait(limit(10))
    flags = ["--root", root, "--set", "task=query_intent"]
    found = CliRunner().invoke(app, ["labels", "read", str(file), str(tmp_path / "out.csv"), *flags])
    assert found.exit_code == 0, found.output
    assert labels_of(tmp_path / "out.csv")["a"]["who"] == "ben"
    with page(file, root) as (running, url):
        assert loopback.get(url + "row?start=-1&step=1&show=open").json()["query"] == "b"
        running.send_signal(signal.SIGTERM)
        assert running.wait(limit(20)) == 0
    written(file, drawn("a", "browse"))
    assert CliRunner().invoke(app, ["labels", "read", str(file), str(tmp_path / "out.csv"), *flags]).exit_code == 1
