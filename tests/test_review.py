"""Review: decisions are never lost or guessed, files come back exactly, the server talks to its own page only."""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import loopback
from conftest import keep
from headtail import review
from headtail.adapters import append_log
from headtail.adapters.storage import Storage, open_storage
from headtail.core.errors import ConfigError, InputError, StorageError
from headtail.core.keys import normalise, query_key
from headtail.core.rows import REVIEWED, SUSPECT, with_side_inputs
from headtail.core.task import Task, load_task
from headtail.review import formats, labelstudio
from headtail.review.decision import (
    ACCEPT,
    CORRECT,
    DROP,
    Decision,
    canonical_answer,
    current_moment,
    read_moment,
    read_person,
    resolve_verdict,
)
from headtail.review.desk import Desk, DeskRefusal
from headtail.review.log import PAGE, DecisionLog
from headtail.review.queue import Queue, load_queue, make_queue
from headtail.review.server import ReviewServer
from timescale import limit

MARK = "ab12cd34ab12cd34"
REF = f"curate/{MARK}:suspects"


def intent(label: str) -> str:
    return json.dumps({"intent": label}, separators=(",", ":"))


def spans(*pairs: tuple[str, str]) -> str:
    found = [{"label": label, "text": text} for text, label in pairs]
    return json.dumps({"segments": found}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def suspect(query: str, answer: str | None, gain: float | None = 1.0, **fields: Any) -> dict[str, Any]:
    query = normalise(query)
    row: dict[str, Any] = {
        "query_key": query_key(query),
        "query": query,
        "answer": answer,
        "stratum": "head",
        "count": 3,
        "score": 0.9,
        "gain": gain,
    }
    row |= {"answer_key": query_key(f"{query}\n{answer}"), "reasons": ["low confidence"], "alternatives": []}
    return {**row, "confidence": 0.4, "agreement": 0.5, **fields}


def suspects(*rows: dict[str, Any], side: Sequence[str] = ()) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=with_side_inputs(SUSPECT, side))


INTENTS = [
    suspect("pizza price", intent("browse"), 30.0, alternatives=[intent("price"), intent("browse"), intent("how_to")]),
    suspect("=1+1 opening", intent("price"), 20.0, count=7),
    suspect("sushi near me", intent("near_me"), 10.0),
    suspect("never answered", None, 5.0, answer_key=None, confidence=None, agreement=None),
    suspect("no gain known", intent("browse"), None),
]


@pytest.fixture
def config(root: str, store: Storage) -> review.Config:
    keep(store, "curate", MARK, {"suspects": suspects(*INTENTS)}, task="query_intent")
    return review.Config(root=root, task="query_intent", who="anna")


def decided(store: Storage) -> dict[str, tuple[str, str | None, str]]:
    rows = review.decisions(store, "query_intent").to_pylist()
    return {row["query"]: (row["verdict"], row["answer"], row["who"]) for row in rows}


def decision(query: str, verdict: str = ACCEPT, who: str = "anna", at: str = "", **fields: Any) -> Decision:
    base = Decision(query_key(query), query, verdict, intent("browse"), intent("browse"), b"k" * 16, who, at or current_moment(), "")
    return base._replace(**fields)


# --- the log


def test_the_latest_decision_holds_and_history_stays(any_root: str) -> None:
    store = open_storage(any_root)
    log = DecisionLog(store, "query_intent")
    assert review.decisions(store, "query_intent").num_rows == 0
    log.record([decision("a"), decision("b", who="ben", why="clear")], "import:csv:x.csv:00")
    log.record([decision("a", CORRECT, "ben", answer=intent("price"))], PAGE)
    log.record([decision("b", DROP, answer=None)], PAGE)
    table = review.decisions(store, "query_intent")
    assert table.schema.equals(REVIEWED)
    assert table["query_key"].to_pylist() == sorted([query_key("a"), query_key("b")])
    assert decided(store) == {"a": (CORRECT, intent("price"), "ben"), "b": (DROP, None, "anna")}
    past = review.decision_history(store, "query_intent")
    assert past.schema.equals(review.HISTORY)
    assert past["query"].to_pylist() == ["a", "b", "a", "b"]
    assert past["holds"].to_pylist() == [False, False, True, True]
    assert [append_log.entry_path("reviews/query_intent", n) for n in (1, 2, 3)] == [
        f"reviews/query_intent/0000000{n}.json" for n in (1, 2, 3)
    ]
    assert append_log.last_number(store, "reviews/query_intent") == 3


def test_a_decision_made_earlier_does_not_override_one_made_later(store: Storage) -> None:
    log = DecisionLog(store, "query_intent")
    log.record([decision("a", DROP, answer=None, at="2026-02-01T00:00:00.000+00:00")], PAGE)
    log.record([decision("a", at="2026-01-01T00:00:00.000+00:00")], "import:csv:old.csv:00")
    assert decided(store)["a"][0] == DROP
    log.record([decision("a", who="ben", at="2026-02-01T00:00:00.000+00:00")], PAGE)  # at the same time: who came last
    assert decided(store)["a"] == (ACCEPT, intent("browse"), "ben")


def test_two_people_at_the_same_time_are_both_recorded(any_root: str) -> None:
    logs = [DecisionLog(open_storage(any_root), "query_intent") for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda i: logs[i % 4].record([decision(f"q{i % 5}", who=f"p{i}")], PAGE), range(24)))
    assert sorted(numbers) == list(range(1, 25))
    assert sorted(review.decision_history(open_storage(any_root), "query_intent")["who"].to_pylist()) == sorted(f"p{i}" for i in range(24))
    for log in logs:
        log.refresh()
    assert len({tuple(kept.decision for kept in log.current_decisions()) for log in logs}) == 1  # all see the same


def test_a_decision_is_taken_back_by_an_entry_of_its_own(store: Storage) -> None:
    log = DecisionLog(store, "query_intent")
    log.record([decision("a")], PAGE)
    log.record([decision("a", DROP, "ben", answer=None)], PAGE)
    log.record([decision("b", who="ben")], PAGE)
    undone = [log.undo("ben"), log.undo("ben"), log.undo("ben")]
    assert [kept.decision.query if kept else None for kept in undone] == ["b", "a", None]
    assert decided(store) == {"a": (ACCEPT, intent("browse"), "anna")}
    assert review.decision_history(store, "query_intent")["withdrawn"].to_pylist() == [False, True, True]
    assert append_log.last_number(store, "reviews/query_intent") == 5
    assert log.undo("nobody") is None


def test_undo_leaves_imports_alone(store: Storage) -> None:
    log = DecisionLog(store, "query_intent")
    log.record([decision("a"), decision("b")], "import:csv:x.csv:00")
    assert log.undo("anna") is None


@pytest.mark.parametrize(
    "damage", ['{"version": 1}', "[]", '{"version": 2, "decisions": []}', '{"version": 1, "undoes": [9, 0]}', "{"], ids=str
)
def test_a_damaged_entry_is_named(store: Storage, damage: str) -> None:
    DecisionLog(store, "query_intent").record([decision("a")], PAGE)
    store.replace("reviews/query_intent/00000002.json", damage.encode())
    with pytest.raises(StorageError) as caught:
        review.decisions(store, "query_intent")
    assert "00000002.json" in caught.value.where


def test_the_digest_is_of_what_is_learnt_from(store: Storage) -> None:
    def after(*found: Decision) -> str:
        DecisionLog(store, "query_intent").record(found, PAGE)
        return review.digest(review.decisions(store, "query_intent"))

    first = after(decision("a"))
    assert after(decision("a", who="ben", why="the same")) == first
    assert after(decision("a", CORRECT, answer=intent("price"))) != first


# --- what may be recorded


@pytest.mark.parametrize(
    "verdict, answer, before, holds, problem",
    [
        (ACCEPT, None, intent("price"), intent("price"), ""),
        (ACCEPT, '{ "intent" : "price" }', intent("price"), intent("price"), ""),
        (ACCEPT, intent("browse"), intent("price"), None, "call it correct"),
        (ACCEPT, None, None, None, "there is no answer"),
        (ACCEPT, None, '{"intent":"gone"}', None, "schema: intent"),  # the schema has changed since
        (CORRECT, ' {"intent": "browse"}', intent("price"), intent("browse"), ""),
        (CORRECT, "browse", intent("price"), intent("browse"), ""),  # the bare label, as in a file of labels
        (CORRECT, intent("browse"), None, intent("browse"), ""),
        (CORRECT, intent("price"), intent("price"), None, "unchanged"),
        (CORRECT, None, intent("price"), None, "needs one"),
        (CORRECT, '{"intent": "dance"}', intent("price"), None, "schema: intent"),
        (CORRECT, '{"intent": "browse"', intent("price"), None, "not JSON"),
        (CORRECT, "NaN", intent("price"), None, "schema: intent"),
        (DROP, None, intent("price"), None, ""),
        (DROP, intent("price"), intent("price"), None, "has none"),
        ("", None, intent("price"), None, "verdict: empty"),
        ("agree", None, intent("price"), None, "'agree' is not one of accept, correct, drop"),
    ],
)
def test_what_may_be_decided(verdict: str, answer: str | None, before: str | None, holds: str | None, problem: str) -> None:
    found, said = resolve_verdict(load_task("query_intent"), verdict, answer, before)
    assert found == holds
    assert (problem in said) if problem else said == ""


def test_what_cannot_be_stored_is_refused(segmentation: Task) -> None:
    assert "cannot be stored" in canonical_answer(segmentation, '{"segments":[{"label":"topic","text":"\\ud800"}]}')[1]
    assert "at most" in canonical_answer(segmentation, " " * 200_000)[1]
    assert "not JSON" in canonical_answer(segmentation, "[" * 50_000)[1]


def test_who_when_and_why() -> None:
    assert read_person(" anna ", " typo ") == ("anna", "typo", "")
    assert [bool(read_person(*bad)[2]) for bad in (("", ""), ("a\nb", ""), ("x" * 101, ""), ("a", "y" * 2001), ("a", "\ud800"))] == [
        True
    ] * 5
    assert read_moment("2026-01-31T13:00:00+01:00") == ("2026-01-31T12:00:00.000+00:00", "")
    assert read_moment("2026-01-31T12:00:00.123456Z")[0] == "2026-01-31T12:00:00.123+00:00"
    assert read_moment("2026-01-31") == ("2026-01-31T00:00:00.000+00:00", "")
    ahead = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)).isoformat()
    assert "future" in read_moment(ahead)[1]
    assert "not a time" in read_moment("yesterday")[1]
    assert "not a time" in read_moment("0001-01-01T00:00:00+14:00")[1]


# --- the queue


def test_the_queue_is_ranked_by_gain(config: review.Config, store: Storage) -> None:
    queue = load_queue(store, "curate:suspects", load_task("query_intent"))
    assert [item.query for item in queue.items(range(len(queue)))] == [row["query"] for row in INTENTS]
    assert queue.item(0).rank == 1
    assert queue.item(0).score == 0.9  # not 0.8999999761581421
    assert queue.ref == REF
    shuffled = make_queue(suspects(*INTENTS[::-1], suspect("tie", intent("browse"), 10.0)), REF)
    assert [item.gain for item in shuffled.items(range(6))] == [30.0, 20.0, 10.0, 10.0, 5.0, None]
    assert np.array_equal(shuffled.gain, [30.0, 20.0, 10.0, 10.0, 5.0, 0.0])


def test_a_queue_of_another_task_is_refused(config: review.Config, store: Storage) -> None:
    with pytest.raises(InputError, match="another task"):
        load_queue(store, "curate:suspects", load_task("query_segmentation"))
    with pytest.raises(InputError, match="has not been run"):
        review.export_reviews(config.model_copy(update={"suspects": "evaluate:suspects"}), Path("never.csv"))


def test_side_inputs_are_shown() -> None:
    row = suspect("joes barber", spans(("joes barber", "name")), businesses=["Joe's Barber Shop"])
    queue = make_queue(suspects(row, side=["businesses"]), REF, ["businesses", "absent"])
    assert queue.item(0).side == {"businesses": ["Joe's Barber Shop"]}


# --- files

HOT = st.text(alphabet="=-@＝;|\t\r\n'\" a", max_size=8)  # dense in what spreadsheets and CSV make something of
WILD = HOT | st.text(alphabet=st.sampled_from("=+,＋{}[]:\\b1\u2028😀") | st.characters(codec="utf-8"), max_size=24)
LABELS = st.sampled_from(["topic", "name", "location", "time", "question", "none"])


@st.composite
def queues(draw: st.DrawFn) -> Queue:
    """Suspects whose texts are anything that UTF-8 can hold, some of their answers made of words of the query."""
    rows = []
    for i in range(draw(st.integers(1, 4))):
        query = f"{draw(WILD)}{i}"
        texts = draw(st.lists(st.one_of(st.sampled_from(query.split() or ["x"]), WILD), max_size=4))
        answers = [spans(*((text, draw(LABELS)) for text in texts)), spans((query, "topic"))]
        number = draw(st.none() | st.floats(allow_nan=False, allow_infinity=False, width=32))
        row = suspect(query, draw(st.sampled_from([answers[0], None])), number, score=number)
        row |= {"query": query, "query_key": query_key(query)}
        row |= {
            "alternatives": answers,
            "reasons": draw(st.lists(WILD, max_size=2)),
            "count": draw(st.integers(0, 2**62)),
            "confidence": number,
        }
        rows.append(row)
    return make_queue(suspects(*rows), REF)


def sent(queue: Queue, decision: Decision | None) -> list[formats.Sent]:
    return [
        (item, decision if decision and decision.query_key.hex() == item.query_key else None) for item in queue.items(range(len(queue)))
    ]


@st.composite
def decisions_on(draw: st.DrawFn, queue: Queue) -> Decision | None:
    item = queue.item(0)
    verdict = draw(st.sampled_from([ACCEPT, CORRECT, DROP]))
    answer = {ACCEPT: item.answer, CORRECT: spans((draw(WILD), draw(LABELS))), DROP: None}[verdict]
    made = Decision(bytes.fromhex(item.query_key), item.query, verdict, answer, item.answer, None, draw(WILD), current_moment(), draw(WILD))
    return draw(st.sampled_from([made, None]))


EXACT = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@EXACT
@given(st.data())
def test_csv_and_jsonl_come_back_exactly(data: st.DataObject) -> None:
    queue = data.draw(queues())
    rows = sent(queue, data.draw(decisions_on(queue)))
    text = "".join(formats.write_csv(iter(rows), REF))
    back = [list(formats.read_csv(text.encode(), "x.csv")), list(formats.read_jsonl("".join(formats.write_jsonl(rows, REF)).encode(), "x"))]
    for found in back:
        assert len(found) == len(rows)
        for row, (item, holds) in zip(found, rows, strict=True):
            assert row.problem == ""
            assert (row.query, row.query_key, row.answer_key, row.queue) == (item.query, item.query_key, item.answer_key or "", REF)
            assert (json.loads(row.before) if row.before else None) == (json.loads(item.answer) if item.answer else None)
            wanted = (holds.verdict, holds.who, holds.at, holds.why) if holds else ("", "", "", "")
            assert (row.verdict, row.who, row.at, row.why) == wanted
            answer = holds.answer if holds and holds.verdict == CORRECT else None
            assert (json.loads(row.answer) if row.answer else None) == (json.loads(answer) if answer else None)
    cells = {
        name: [formats.unguard(cell) for cell in column]
        for name, *column in zip(*csv.reader(io.StringIO(text[1:], newline="")), strict=True)
    }
    items = [item for item, _ in rows]
    assert cells["before"] == [item.answer or "" for item in items]  # in CSV to the letter
    assert cells["reasons"] == [json.dumps(item.reasons, ensure_ascii=False) for item in items]
    assert [cell.split("\n") for cell in cells["alternatives"]] == [list(item.alternatives) for item in items]
    assert cells["count"] == [str(item.count) for item in items]
    numbers = [[float(cell) if cell else None for cell in cells[name]] for name in ("score", "gain", "confidence")]
    assert numbers == [[item.score for item in items], [item.gain for item in items], [item.confidence for item in items]]


@EXACT
@given(WILD, WILD)
def test_no_cell_begins_a_formula_wherever_a_program_cuts(text: str, other: str) -> None:
    assert formats.unguard(formats.guard(text)) == text
    buffer = io.StringIO()
    csv.writer(buffer, quoting=csv.QUOTE_ALL).writerow([formats.guard(text), formats.guard(other)])
    for delimiter in ",;\t|":  # half of Europe cuts at semicolons, whatever the file says; some importers heed no quotes
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
            for line in csv.reader(io.StringIO(buffer.getvalue(), newline=""), delimiter=delimiter, quoting=quoting):
                for cell in line if delimiter != "," or quoting == csv.QUOTE_MINIMAL else []:
                    shown = cell.lstrip(' "').rstrip('"\r\n')
                    assert not shown.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")), (delimiter, line)


@EXACT
@given(queues())
def test_an_answer_drawn_for_label_studio_gives_the_answer_back(queue: Queue) -> None:
    task = load_task("query_segmentation")
    for item in queue.items(range(len(queue))):
        for answer in item.alternatives:
            marks = labelstudio.result_list(task, item.query, answer, "r")
            assert labelstudio.answer_of(task, item.query, marks, item.answer) == (answer, "")
            ids = [(mark["id"], mark["from_name"]) for mark in marks]
            assert len(set(ids)) == len(ids)
            for mark in marks:
                if mark["from_name"] == labelstudio.SPANS:
                    assert mark["value"]["text"] == item.query[mark["value"]["start"] : mark["value"]["end"]]


def test_spans_stand_where_they_are_in_the_query() -> None:
    assert labelstudio.align_texts("pizza near me", ["pizza", "near me"]) == [(0, 5), (6, 13)]
    assert labelstudio.align_texts("joes barber shop sunday", ["joe's barber shop", "sunday"]) == [
        (0, 16),
        (17, 23),
    ]  # corrected: what lies between
    assert labelstudio.align_texts("piza nere me tonight", ["pizza", "near me", "tonight"]) == [(0, 4), (5, 12), (13, 20)]
    assert labelstudio.align_texts("art in start up art", ["art", "start up", "art"]) == [(0, 3), (7, 15), (16, 19)]  # not within a word
    assert labelstudio.align_texts("a 😀 b", ["😀"]) == [(2, 3)]  # code points
    assert labelstudio.align_texts("pizza", ["pizza", "near me"]) is None  # the teacher invented it
    assert labelstudio.align_texts("b a", ["a", "b"]) is None
    assert labelstudio.align_texts("pizza", [""]) is None


def test_labels_are_found_in_any_schema(segmentation: Task) -> None:
    assert labelstudio.label_choices(load_task("query_intent"))[:2] == ["find_business", "browse"]
    assert labelstudio.label_choices(segmentation) == ["topic", "name", "location", "time", "question", "none"]
    item = {"type": "object", "properties": {"text": {"type": "string"}, "label": {"$ref": "#/$defs/Label"}}}
    schema = {"properties": {"segments": {"type": "array", "items": {"$ref": "#/$defs/Segment"}}}}
    schema["$defs"] = {"Segment": item, "Label": {"enum": ["x", "y"]}}  # as pydantic writes it
    assert labelstudio.label_choices(Task(segmentation.file, segmentation.folder, schema, "")) == ["x", "y"]
    for odd in ({"enum": [1, 2]}, {"type": "string"}, {"$ref": "#/$defs/Ring"}, {"$ref": "#/nowhere"}):
        item["properties"] = {"label": odd}
        schema["$defs"]["Ring"] = {"$ref": "#/$defs/Ring"}
        assert labelstudio.label_choices(Task(segmentation.file, segmentation.folder, schema, "")) == []


def test_the_labelling_config_fits_the_tasks(segmentation: Task) -> None:
    for task, answer in ((segmentation, spans(("piza", "topic"))), (load_task("query_intent"), intent("price"))):
        tree = ET.fromstring(labelstudio.labelling_config(task))
        controls = {node.get("name"): node for node in tree if node.get("name")}
        assert controls["text"].get("value") == "$text"
        for mark in labelstudio.result_list(task, "piza", answer, "r") + labelstudio.result_list(task, "zzz", answer, "r"):
            control = controls[mark["from_name"]]
            assert control.tag.lower() == mark["type"]
            assert control.get("toName") == mark["to_name"] == "text"
            allowed = {node.get("value") for node in control}
            assert set(mark["value"].get(mark["type"], [])) <= allowed or mark["type"] == "textarea"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "labelstudio"])
def test_a_file_goes_out_is_decided_and_comes_back(config: review.Config, store: Storage, tmp_path: Path, kind: str) -> None:
    file = tmp_path / {"csv": "q.csv", "jsonl": "q.jsonl", "labelstudio": "q.json"}[kind]
    made = review.export_reviews(config, file, rows=4)
    assert (made.rows, made.left_out, made.decided) == (4, 1, 0)
    with pytest.raises(InputError, match="this file exists"):
        review.export_reviews(config, file)
    assert review.import_reviews(config, file).undecided == 4  # nobody has looked at it yet
    fill(file, kind)
    first = review.import_reviews(config, file)
    assert (first.rows, first.recorded, first.known, first.undecided, first.problems) == (4, 3, 0, 1, ())
    who = "ben@x.org" if kind == "labelstudio" else "anna"
    assert decided(store) == {
        "pizza price": (CORRECT, intent("price"), who),
        "=1+1 opening": (DROP, None, who),
        "sushi near me": (ACCEPT, intent("near_me"), who),
    }
    row = next(r for r in review.decisions(store, "query_intent").to_pylist() if r["query"] == "pizza price")
    assert (row["before"], row["answer_key"], row["why"]) == (intent("browse"), INTENTS[0]["answer_key"], "asks what it costs")
    entries = append_log.last_number(store, "reviews/query_intent")

    again = review.import_reviews(config.model_copy(update={"who": "someone else"}), file)
    assert (again.recorded, again.known, again.undecided) == (0, 3, 1)
    assert append_log.last_number(store, "reviews/query_intent") == entries  # the same file twice changes nothing

    rest = review.export_reviews(config, tmp_path / f"rest{file.suffix}", kind=kind)
    assert (rest.rows, rest.decided) == (2, 3)
    everything = tmp_path / f"all{file.suffix}"
    assert review.export_reviews(config, everything, decided=True).rows == 5
    back = review.import_reviews(config, everything)
    assert back.recorded == 0
    assert back.known == (0 if kind == "labelstudio" else 3)  # Label Studio shows old decisions, it does not repeat them


def fill(file: Path, kind: str) -> None:
    """What a reviewer does with the file: correct, drop, accept, and leave the fourth."""
    if kind == "csv":
        table = list(csv.reader(io.StringIO(file.read_bytes().decode("utf-8-sig"), newline="")))
        verdict, answer, why = (table[0].index(name) for name in ("verdict", "answer", "why"))
        table[1][verdict], table[1][answer], table[1][why] = "Correct", "price", "asks what it costs"
        table[2][verdict], table[3][verdict] = "drop", " accept "
        out = io.StringIO()
        csv.writer(out, delimiter=";", lineterminator="\n").writerows(table)  # as a spreadsheet in Berlin saves it
        file.write_text("\ufeff" + out.getvalue(), encoding="utf-8", newline="")
    elif kind == "jsonl":
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        lines[0] |= {"verdict": "correct", "answer": {"intent": "price"}, "why": "asks what it costs"}
        lines[1] |= {"verdict": "drop"}
        lines[2] |= {"verdict": "accept"}
        file.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    else:
        tasks = json.loads(file.read_text(encoding="utf-8"))
        for i, (item, result) in enumerate(
            zip(tasks, [chosen("price"), [DROPPED], tasks[2]["predictions"][0]["result"], None], strict=True)
        ):
            base = {"id": i, "was_cancelled": result is None, "completed_by": {"id": 7, "email": "ben@x.org"}, "lead_time": 4.2}
            item["annotations"] = [{**base, "result": result or [], "updated_at": "2026-01-02T03:04:05.678901Z"}]
        file.write_text(json.dumps(tasks), encoding="utf-8")


WHY = {"from_name": "why", "to_name": "text", "type": "textarea", "value": {"text": ["asks what it costs"]}}
DROPPED = {"from_name": "verdict", "to_name": "text", "type": "choices", "value": {"choices": ["drop"]}}


def chosen(label: str) -> list[dict[str, Any]]:
    return [{"from_name": "label", "to_name": "text", "type": "choices", "value": {"choices": [label]}}, WHY]


def lines_of(config: review.Config, tmp_path: Path) -> list[dict[str, Any]]:
    file = tmp_path / "template.jsonl"
    review.export_reviews(config, file)
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    file.unlink()
    return found


def give(config: review.Config, file: Path, *lines: object) -> review.ImportReport:
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return review.import_reviews(config, file)


def twice(line: dict[str, Any], field: str, other: str) -> str:
    """The line with another value of a field before that field: readers of JSON keep the last."""
    text = json.dumps(line)
    assert field in text
    return text.replace(field, f"{other}, {field}", 1)


def test_the_bare_label_is_a_correction_in_json_lines_too(config: review.Config, store: Storage, tmp_path: Path) -> None:
    first, second, third, *_ = lines_of(config, tmp_path)
    rows = [
        {**first, "verdict": "correct", "answer": "price"},
        {**second, "verdict": "correct", "answer": "Near_Me"},
        {**third, "verdict": "correct", "answer": {"intent": "browse"}},
    ]
    made = give(config, tmp_path / "a.jsonl", *rows)
    assert (made.recorded, made.problems) == (3, ())
    assert [answer for _, answer, _ in decided(store).values()].count(intent("price")) == 1
    assert decided(store)["pizza price"][:2] == ("correct", intent("price"))
    assert give(config, tmp_path / "b.jsonl", *rows).known == 3


def test_a_query_that_is_left_out_is_no_changed_text(config: review.Config, tmp_path: Path) -> None:
    """A file may lack the column; a cell that was emptied is noted in each format."""
    first, second, third, *_ = lines_of(config, tmp_path)
    without = {name: value for name, value in first.items() if name != "query"}
    rows = [without, {**second, "query": None}, {**third, "query": ""}]
    made = give(config, tmp_path / "a.jsonl", *({**row, "verdict": "drop"} for row in rows))
    assert (made.recorded, [number for number, _ in made.notes]) == (3, [2, 3])
    assert "which is '=1+1 opening'" in made.notes[0][1]


def test_wrong_rows_are_set_aside_with_a_reason_and_the_others_recorded(config: review.Config, store: Storage, tmp_path: Path) -> None:
    first, second, third, none, _ = lines_of(config, tmp_path)
    accept = {"verdict": "accept"}
    wrong: list[tuple[object, str]] = [
        ({**first, "verdict": "agree"}, "verdict: 'agree'"),
        ({**first, "answer": {"intent": "price"}}, "verdict: empty"),
        ({**first, "verdict": "correct", "answer": {"intent": "dance"}}, "schema: intent"),
        ({**first, **accept, "query_key": "00" * 16}, "query_key: '0000"),
        ({**first, **accept, "query_key": "1.2E+31"}, "query_key: '1.2E+31'"),  # what a spreadsheet makes of digits
        ({**first, **accept, "answer_key": second["answer_key"]}, "answer_key: "),
        ({**first, **accept, "query": second["query"]}, "sorted by one column"),
        ({**first, **accept, "before": {"intent": "price"}}, "before: "),
        ({**first, **accept, "before": None}, "before: "),
        ({**first, **accept, "at": "2999-01-01"}, "future"),
        ({**first, **accept, "who": "a\nb"}, "who: "),
        ({**first, **accept, "queue": "curate/0000:suspects"}, "cannot be read"),
        ({**first, **accept, "queue": "../../etc:passwd"}, "is not stage/fingerprint:output"),
        ({**first, **accept, "why": 3}, "why: not text"),
        ({**none, **accept}, "there is no answer"),
        ({name: value for name, value in first.items() if name != "before"}, "before: missing"),
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        (twice({**first, "verdict": "drop"}, '"verdict": "drop"', '"verdict": "accept"'), "'verdict' occurs twice"),
        (twice({**first, "verdict": "correct", "answer": {"intent": "price"}}, '"answer"', '"answer": null'), "'answer' occurs twice"),
        (
            twice({**first, "verdict": "correct", "answer": {"intent": "price"}}, '"intent": "price"', '"intent": "how_to"'),
            "'intent' occurs",
        ),
        (twice({**first, **accept}, '"intent": "browse"', '"intent": "price"'), "'intent' occurs twice"),
        ({**first, "verdict": "correct", "answer": '"dance"'}, "answer: "),
    ]
    file = tmp_path / "back.jsonl"
    made = give(config, file, *(line for line, _ in wrong), {**third, **accept, "why": "call +49 171 1234567"})
    assert (made.rows, made.recorded, made.known, made.undecided) == (len(wrong) + 1, 1, 0, 0)
    assert [number for number, _ in made.problems] == list(range(1, len(wrong) + 1))
    for (_, problem), (_, wanted) in zip(made.problems, wrong, strict=True):
        assert wanted in problem
    listed = [json.loads(line) for line in Path(made.aside).read_text(encoding="utf-8").splitlines()]
    assert [(row["file"], row["row"], row["reason"]) for row in listed] == [("back.jsonl", n, problem) for n, problem in made.problems]
    assert list(decided(store)) == ["sushi near me"]


def test_an_old_file_does_not_bring_old_decisions_back(config: review.Config, store: Storage, tmp_path: Path) -> None:
    first, second, *_ = lines_of(config, tmp_path)
    file = tmp_path / "a.jsonl"
    give(config, file, {**first, "verdict": "drop"})
    Desk(store, load_task("query_intent"), load_queue(store, REF, load_task("query_intent")), "ben").decide(
        1, first["query_key"], ACCEPT, "", "ben", "", 0
    )
    assert review.import_reviews(config, file).known == 1
    assert give(config, file, {**first, "verdict": "drop"}, {**second, "verdict": "drop"}).recorded == 1  # one row more: only that one
    assert decided(store)["pizza price"] == (ACCEPT, intent("browse"), "ben")
    other = give(config.model_copy(update={"who": "cleo"}), tmp_path / "b.jsonl", {**first, "verdict": "drop"}, second)
    assert other.recorded == 1  # somebody else says the same: that is worth knowing
    assert decided(store)["pizza price"] == (DROP, None, "cleo")


def test_an_import_that_was_killed_goes_on(config: review.Config, store: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{**line, "verdict": "drop"} for line in lines_of(config, tmp_path)]
    monkeypatch.setattr("headtail.review.transfer._BATCH", 2)
    real = DecisionLog.record

    def record(log: DecisionLog, found: Sequence[Decision], source: str, queue: str = "") -> int:
        if log.number == 1:
            raise StorageError("no space")
        return real(log, found, source, queue)

    monkeypatch.setattr(DecisionLog, "record", record)
    with pytest.raises(StorageError):
        give(config, tmp_path / "a.jsonl", *lines)
    monkeypatch.setattr(DecisionLog, "record", real)
    assert len(decided(store)) == 2
    made = review.import_reviews(config, tmp_path / "a.jsonl")
    assert (made.recorded, made.known) == (3, 2)
    assert len(review.decision_history(store, "query_intent")) == 5


def test_decisions_on_an_earlier_queue_are_checked_against_that_queue(config: review.Config, store: Storage, tmp_path: Path) -> None:
    first = lines_of(config, tmp_path)[0]
    changed = suspect("pizza price", intent("how_to"))
    keep(store, "curate", "ffff0000ffff0000", {"suspects": suspects(changed)}, task="query_intent")
    assert give(config, tmp_path / "a.jsonl", {**first, "verdict": "accept"}).recorded == 1
    made = give(config, tmp_path / "b.jsonl", {**first, "verdict": "accept", "queue": ""})  # without the name it is the latest
    assert "answer_key" in made.problems[0][1]
    desk = Desk(store, load_task("query_intent"), load_queue(store, "curate:suspects", load_task("query_intent")), "anna")
    assert desk.row(0, 0, "all")["about_another"] is True


@pytest.mark.parametrize(
    "name, data, wanted",
    [
        ("a.csv", b"", "lacks columns query_key"),
        ("a.csv", b"query_key,verdict\n1,2\n", "lacks columns answer_key, before, answer"),
        ("a.csv", b"\xff\xfe", "not UTF-8"),
        ("a.csv", b'query_key,answer_key,before,verdict,answer\n"a"b,,,,\n', "not a CSV"),
        ("a.csv", b"query_key,answer_key,before,verdict,answer,answer\n", "names a column twice"),
        ("a.json", b"{", "not JSON"),
        ("a.json", b'[{"text": "x", "label": "y"}]', "not a list of Label Studio tasks"),
        ("a.xlsx", b"", "format of a review file is not known"),
    ],
)
def test_a_file_that_is_none_is_named(config: review.Config, tmp_path: Path, name: str, data: bytes, wanted: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=wanted):
        review.import_reviews(config, tmp_path / name)
    with pytest.raises(InputError, match="cannot read"):
        review.import_reviews(config, tmp_path / "absent.csv")


def test_a_row_with_too_many_cells_is_set_aside(config: review.Config, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("query_key,answer_key,before,verdict,answer\na,b,c,accept,d,e\n\n,,,,\n", encoding="utf-8")
    made = review.import_reviews(config, tmp_path / "a.csv")
    assert (made.rows, made.problems) == (1, ((1, "6 cells, the header has 5"),))


NUMBERS = ["007", "1-2", "null", "=1+1", "12,5 tv", "true", "1e5"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("sep_line", [True, False])
def test_what_a_spreadsheet_does_to_a_file(store: Storage, root: str, tmp_path: Path, delimiter: str, sep_line: bool) -> None:
    """Keys decide: numbers and dates made of queries, words for nothing, case, blanks, columns moved, added and left out."""
    keep(
        store,
        "curate",
        MARK,
        {"suspects": suspects(*(suspect(q, intent("browse"), 9.0 - i) for i, q in enumerate(NUMBERS)))},
        task="query_intent",
    )
    config = review.Config(root=root, task="query_intent", who="anna")
    review.export_reviews(config, tmp_path / "q.csv")
    table = list(csv.DictReader(io.StringIO((tmp_path / "q.csv").read_text(encoding="utf-8-sig"), newline="")))
    changed = {"007": "7", "1-2": "02.01.2026", "null": "", "'=1+1": "2", "true": "TRUE", "1e5": "1,00E+05"}
    for row in table:
        row |= {
            "query": changed.get(row["query"], row["query"]),
            "verdict": "\u00a0Accept ",
            "answer": "NaN",
            "at": "#N/A",
            "queue": "null",
        }
    names = ["answer_key", " Verdict", "notes", "before", "at", "answer", "query", "query_key", "queue", "", ""]
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\r\n")
    writer.writerow(names)
    for i, row in enumerate(table):
        cells = [row.get(name.strip().lower(), "mine") for name in names[:-2]]
        writer.writerow([*cells, "", "", "", ""][: len(cells) + (i % 3) * 2])
    (tmp_path / "back.csv").write_text(
        "\ufeff" + (f"sep={delimiter}\r\n" if sep_line else "") + out.getvalue(), encoding="utf-8", newline=""
    )
    made = review.import_reviews(config, tmp_path / "back.csv")
    assert (made.recorded, made.problems) == (len(NUMBERS), ())
    assert [number for number, _ in made.notes] == [1, 2, 3, 4, 6, 7]
    assert "'7' is not the one of this query_key, which is '007'" in made.notes[0][1]
    assert set(decided(store)) == set(NUMBERS)


def test_a_label_may_be_called_null(store: Storage, root: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("query_key,answer_key,before,verdict,answer\na,b,c,correct,null\na,b,c,drop,null\n", encoding="utf-8")
    assert [row.answer for row in formats.read_csv((tmp_path / "a.csv").read_bytes(), "a.csv")] == ["null", ""]


def test_numbers_that_are_two_queries_are_not_taken_for_one_another(store: Storage, root: str, tmp_path: Path) -> None:
    rows = [suspect(query, intent("browse"), 1.0) for query in ("sushi", "pizza")]
    keep(store, "curate", MARK, {"suspects": suspects(*rows)}, task="query_intent")
    config = review.Config(root=root, task="query_intent", who="anna")
    first, second = lines_of(config, tmp_path)
    made = give(config, tmp_path / "a.jsonl", {**first, "verdict": "accept", "query": second["query"]})
    assert "sorted by one column" in made.problems[0][1]


@pytest.mark.parametrize(
    "query, start, end, text, found",
    [
        ("pizza near me", 0, 6, "pizza ", "pizza"),
        ("pizza near me", 5, 13, " near me", "near me"),
        ("pizza near me", 0, 6, None, "pizza"),
        ("pizza near me", 5, 6, " ", None),
        ("💩 pizza", 2, 7, None, None),  # either `pizza` or ` pizz`: nothing says in what was counted
        ("💩 pizza", 2, 7, "pizza", "pizza"),
        ("💩 pizza", 3, 8, "pizza", "pizza"),
        ("💩 pizza", 3, 8, None, "pizza"),  # beyond the text in code points
        ("💩 pizza", 1, 7, None, "pizza"),  # in the middle of a character in UTF-16
        ("pizza", 3, 99, None, None),
        ("pizza", -2, 4, None, None),
    ],
)
def test_where_a_region_is(query: str, start: int, end: int, text: str | None, found: str | None) -> None:
    piece, problem = labelstudio._region(query, start, end, text)
    assert (piece or None) == found
    assert bool(problem) == (found is None)


def test_blanks_at_the_ends_of_regions_are_counted(segmentation: Task) -> None:
    data = {"text": "pizza near me", "query_key": "aa", "answer_key": "bb", "before": spans(("pizza near me", "topic")), "queue": REF}
    marks = [region(0, 6, "pizza ", ["topic"], "a"), region(5, 13, " near me", ["location"], "b")]
    (row,) = labelstudio.read_annotations(json.dumps([{"data": data, "annotations": [{"result": marks}]}]).encode(), "x.json", segmentation)
    assert (row.answer, row.note) == (spans(("pizza", "topic"), ("near me", "location")), "blanks at the ends of 2 regions were left out")


def region(start: int, end: int, text: str | None, label: list[str], mark: str) -> dict[str, Any]:
    value = {"start": start, "end": end, "labels": label, **({"text": text} if text is not None else {})}
    return {"value": value, "id": mark, "from_name": "spans", "to_name": "text", "type": "labels", "origin": "manual"}


def area(name: str, text: str | list[str], mark: str = "z", **value: int) -> dict[str, Any]:
    return {"value": {**value, "text": text}, "id": mark, "from_name": name, "to_name": "text", "type": "textarea"}


@pytest.mark.parametrize(
    "result, answer, problem",
    [
        (
            [region(6, 13, "near me", ["location"], "b"), region(0, 5, "pizza", ["topic"], "a")],
            [("pizza", "topic"), ("near me", "location")],
            "",
        ),
        ([region(0, 5, None, ["topic"], "a")], [("pizza", "topic")], ""),
        ([region(0, 5, "pizza", ["name"], "a"), area("corrected", ["Pizza!"], "a", start=0, end=5)], [("Pizza!", "name")], ""),
        ([area("answer", '{"segments": []}')], [], ""),
        ([area("answer", "{}")], None, "schema"),
        ([area("answer", "{}"), region(0, 5, "pizza", ["topic"], "a")], None, "remove one"),
        ([], None, "nothing is marked"),
        ([region(0, 5, "pizza", ["topic", "name"], "a")], None, "2 labels"),
        ([region(0, 5, "pasta", ["topic"], "a")], None, "'pasta'"),
        ([region(0, 5, "pizza", ["dish"], "a")], None, "schema"),
        ([{"from_name": "spans", "value": {"labels": ["topic"]}}], None, "without start"),
    ],
)
def test_annotations_become_answers(segmentation: Task, result: list[Any], answer: list[tuple[str, str]] | None, problem: str) -> None:
    data = {"text": "pizza near me", "query_key": "aa", "answer_key": "bb", "before": spans(("pizza near me", "topic")), "queue": REF}
    export = [{"id": 3, "data": data, "annotations": [{"result": result, "completed_by": 4}], "predictions": [], "total_annotations": 1}]
    (row,) = labelstudio.read_annotations(json.dumps(export).encode(), "x.json", segmentation)
    assert problem in row.problem
    assert bool(row.problem) == bool(problem)
    assert (row.verdict, row.answer) == ((CORRECT, spans(*answer)) if answer is not None else ("", ""))
    assert row.who == "label studio user 4"


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["drop", "topic", "pizza"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["text", "choices", "labels", "id", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def json_places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from json_places(value[key], (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(value[path[0]], path[1:], new)
    return copy


@settings(max_examples=300)
@given(st.data())
def test_an_export_with_any_json_in_any_place_is_read_or_set_aside(segmentation: Task, data: st.DataObject) -> None:
    data_part = {"text": "piza near me", "query_key": "aa", "answer_key": "bb", "before": spans(("piza", "topic")), "queue": REF}
    marks = [
        region(0, 4, "piza", ["topic"], "a"),
        area("corrected", ["pizza"], "a", start=0, end=4),
        area("why", ["typo"]),
        {"from_name": labelstudio.VERDICT, "value": {"choices": ["keep"]}},
    ]
    annotation = {"result": marks, "completed_by": {"email": "a@b"}, "created_at": "2026-01-01T00:00:00Z"}
    export = [{"data": data_part, "annotations": [annotation]}]
    deep: list[Any] = []
    for _ in range(300):  # deeper than the validator goes
        deep = [deep]
    changed = put(export, data.draw(st.sampled_from(sorted(json_places(export), key=str))), data.draw(ANY_JSON | st.just(deep)))
    with contextlib.suppress(InputError):
        for row in labelstudio.read_annotations(json.dumps(changed).encode(), "x.json", segmentation):
            assert row.problem or row.verdict in ("", ACCEPT, CORRECT, DROP)
            assert row.verdict != CORRECT or segmentation.parse(row.answer)[1] == ""


def test_offsets_of_older_versions_are_understood(segmentation: Task) -> None:
    """They counted UTF-16 units: github.com/HumanSignal/label-studio/issues/1347."""
    marks, wanted = [region(13, 23, "annotation", ["topic"], "a")], (spans(("annotation", "topic")), "")
    assert labelstudio.answer_of(segmentation, "💩this is an annotation", marks, None) == wanted
    assert labelstudio.answer_of(segmentation, "💩 this is an annotation", marks, None) == wanted  # and newer ones: code points


def test_several_annotators_are_all_recorded(config: review.Config, store: Storage, tmp_path: Path) -> None:
    review.export_reviews(config, tmp_path / "q.json", rows=1)
    tasks = json.loads((tmp_path / "q.json").read_text(encoding="utf-8"))
    made = [
        ("ben", "how_to", "2026-01-02T00:00:00Z"),
        ("cleo", "price", "2026-01-03T00:00:00Z"),
        ("dora", "browse", "2026-01-01T00:00:00Z"),
    ]
    tasks[0]["annotations"] = [{"result": chosen(label), "completed_by": {"email": who}, "created_at": at} for who, label, at in made]
    tasks += [{"data": 3}, {"data": {"query_key": 3}}, {"data": tasks[0]["data"], "annotations": {}}]
    (tmp_path / "back.json").write_text(json.dumps(tasks), encoding="utf-8")
    found = review.import_reviews(config, tmp_path / "back.json")
    assert (found.rows, found.recorded) == (6, 3)
    assert [problem for _, problem in found.problems] == ["no `data`", "query_key: not text", "annotations: not a list of annotations"]
    assert decided(store) == {"pizza price": (CORRECT, intent("price"), "cleo")}
    assert set(review.decision_history(store, "query_intent")["who"].to_pylist()) == {"ben", "cleo", "dora"}


# --- the desk and its server


@pytest.fixture
def desk(config: review.Config, store: Storage) -> Desk:
    task = load_task("query_intent")
    return Desk(store, task, load_queue(store, config.suspects, task), "anna")


def test_the_desk_walks_and_counts(desk: Desk, store: Storage) -> None:
    first = desk.row(-1, 1, "open")
    assert (first["rank"], first["query"], first["seen"]) == (1, "pizza price", 0)
    assert [a["text"] for a in first["alternatives"]] == [intent("price"), intent("how_to")]  # not the answer itself
    assert [near["rank"] for near in first["near"]] == [1, 2, 3, 4, 5]
    made = desk.decide(1, first["query_key"], CORRECT, intent("price"), "anna", "", 0)
    assert made["progress"] == {"rows": 5, "decided": 1, "gain": 30 / 65, "verdicts": {"correct": 1}, "people": {"anna": 1}}
    assert decided(store)["pizza price"] == (CORRECT, intent("price"), "anna")
    assert desk.row(0, 1, "open")["rank"] == 2
    assert desk.row(1, -1, "open")["rank"] is None
    assert desk.row(1, -1, "all")["rank"] == 1
    assert desk.row(-1, 1, "decided")["decision"]["answer"] == intent("price")
    assert desk.undo("anna")["rank"] == 1
    assert desk.progress()["decided"] == 0
    assert desk.row(0, 0, "all")["history"][0]["withdrawn"] is True
    with pytest.raises(DeskRefusal, match="nothing to take back"):
        desk.undo("anna")
    with pytest.raises(DeskRefusal, match="show: one of"):
        desk.row(0, 0, "some")


def test_two_desks_see_each_other(desk: Desk, config: review.Config, store: Storage) -> None:
    other = Desk(open_storage(config.root), desk.task, desk.queue, "ben")
    key = desk.queue.item(0).query_key
    seen = other.row(0, 0, "open")["seen"]
    desk.decide(1, key, DROP, "", "anna", "", 0)
    made = other.decide(1, key, ACCEPT, "", "ben", "", seen)
    assert [said["who"] for said in made["others"]] == ["anna"]
    assert decided(store)["pizza price"][2] == "ben"
    assert [said["who"] for said in desk.row(0, 0, "all")["history"]] == ["anna", "ben"]
    assert desk.row(-1, 1, "open")["rank"] == 2


def test_a_clock_that_goes_slow_does_not_lose_a_decision(desk: Desk, store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    key = desk.queue.item(0).query_key
    desk.decide(1, key, DROP, "", "anna", "", 0)
    monkeypatch.setattr("headtail.review.desk.current_moment", lambda: "2001-01-01T00:00:00.000+00:00")
    desk.decide(1, key, ACCEPT, "", "ben", "", 1)
    assert decided(store)["pizza price"][2] == "ben"


@pytest.mark.parametrize(
    "change, wanted",
    [
        ({"answer": '{"intent":"dance"}'}, "schema"),
        ({"who": " "}, "who: empty"),
        ({"query_key": "00" * 16}, "reload"),
        ({"rank": 0}, "reload"),
        ({"rank": 6}, "reload"),
        ({"verdict": "undo"}, "verdict"),
    ],
)
def test_what_the_desk_refuses_is_not_recorded(desk: Desk, store: Storage, change: dict[str, Any], wanted: str) -> None:
    asked = {
        "rank": 1,
        "query_key": desk.queue.item(0).query_key,
        "verdict": CORRECT,
        "answer": intent("price"),
        "who": "anna",
        "why": "",
        "seen": 0,
    }
    with pytest.raises(DeskRefusal, match=wanted):
        desk.decide(**{**asked, **change})
    assert append_log.last_number(store, "reviews/query_intent") == 0


@pytest.fixture
def served(desk: Desk) -> Iterator[ReviewServer]:
    with ReviewServer(desk) as server:
        yield server


def asked(server: ReviewServer, path: str, body: object = None, **headers: str) -> httpx.Response:
    if body is None:
        return loopback.get(server.url + path, headers=headers)
    return loopback.post(server.url + path, content=json.dumps(body), headers={"content-type": "application/json", **headers})


def test_the_server_serves_its_page_and_nothing_else(served: ReviewServer) -> None:
    page = asked(served, "")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["referrer-policy"] == "no-referrer"  # the address holds the token
    assert not [name for name in page.headers if name.startswith("access-control")]
    assert "http://" not in page.text.replace("http://www.w3.org/2000/svg", "")
    assert asked(served, "about").json()["labels"][0] == "find_business"
    bare = served.url.removesuffix(f"{served.token}/")
    for path in ("", served.token, f"{served.token[:-1]}x/about", f"x{served.token}/", "about", "row?start=0&step=1", "%2e%2e/"):
        assert loopback.get(bare + path).status_code == 404, path
    assert loopback.post(f"{bare}undo", json={"who": "anna"}).status_code == 404
    assert asked(served, "nothing").status_code == 404
    assert asked(served, "row?start=x&step=1").status_code == 400
    assert loopback.request("OPTIONS", served.url + "decide").status_code == 405  # no preflight is answered: no CORS


HOSTILE = (
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "\"'`><svg/onload=alert(1)>",
    "][b",
    "[/b][link=javascript:alert(1)]x[/link]",
    "\x1b]0;title\x07\x1b[31mred",
    "\u202egnp.exe\u2028\u2029",
    "{{7*7}}${7*7}<!--",
)


def test_text_of_others_is_data_and_no_part_of_the_page(store: Storage, root: str) -> None:
    """Query, answer, reason, note and name come to the page in JSON, as they are; the page's only way to show text is as text."""
    rows = [suspect(text, spans((normalise(text), "topic")), reasons=[text]) for text in HOSTILE]
    keep(store, "curate", MARK, {"suspects": suspects(*rows)}, task="query_segmentation")
    task = load_task("query_segmentation")
    with ReviewServer(Desk(store, task, load_queue(store, REF, task), "anna")) as server:
        page = asked(server, "")
        shown = {}
        for place, text in enumerate(HOSTILE):
            note = text if text.isprintable() else "note"
            assert asked(server, "decide", body_of(server, place) | {"who": f"<b>{place}", "why": note}).status_code == 200
            reply = asked(server, f"row?start={place}&step=0&show=all")
            assert reply.headers["content-type"].split(";")[0] == "application/json"
            assert reply.headers["x-content-type-options"] == "nosniff"
            row = reply.json()
            history = [(one["who"], one["why"]) for one in row["history"]]
            shown[row["query"]] = (json.loads(row["answer"]["text"]), row["reasons"], history, place, note)
        for query, (answer, reasons, history, place, note) in shown.items():
            (one,) = (row for row in rows if row["query"] == query)
            assert (answer, reasons, history) == (json.loads(one["answer"]), one["reasons"], [(f"<b>{place}", note)])
        assert len(shown) == len(HOSTILE)
        assert asked(server, "").text == page.text == (Path(review.__file__).parent / "page.html").read_text(encoding="utf-8")
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "srcdoc", "DOMParser", "setHTML"):
        assert sink not in page.text


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"host": "evil.example"}, 403),  # a name that points here: DNS rebinding
        ({"host": "evil.example:80"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403),  # another server on this machine
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"content-type": "text/plain"}, 415),  # what a form can send
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_other_sites_cannot_decide(served: ReviewServer, store: Storage, headers: dict[str, str], status: int) -> None:
    assert asked(served, "decide", body_of(served), **headers).status_code == status
    assert append_log.last_number(store, "reviews/query_intent") == 0
    same = {"origin": served.url.removesuffix(f"/{served.token}/"), "sec-fetch-site": "same-origin"}
    assert asked(served, "decide", body_of(served), **same).status_code == 200


def body_of(server: ReviewServer, place: int = 0, verdict: str = ACCEPT) -> dict[str, Any]:
    row = asked(server, f"row?start={place}&step=0&show=all").json()
    return {"rank": row["rank"], "query_key": row["query_key"], "verdict": verdict, "answer": "", "who": "anna", "why": "", "seen": 0}


def test_what_is_wrong_with_a_request_is_said(served: ReviewServer, store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    body = body_of(served)
    wrong: list[object] = [{**body, "rank": True}, {**body, "who": None}, {"verdict": "accept"}, [], 3]
    for bad in wrong:
        assert asked(served, "decide", bad).status_code == 400
    assert loopback.post(served.url + "decide", content=b"{", headers={"content-type": "application/json"}).status_code == 400
    assert asked(served, "check", {"answer": "x" * 2**20}).status_code == 413
    chunked = {"content-type": "application/json"}
    assert loopback.post(served.url + "check", content=iter([b"{}"]), headers=chunked).status_code == 411
    refused = asked(served, "decide", {**body, "verdict": "correct", "answer": '{"intent": "\\ud800"}'})
    assert refused.status_code == 422
    assert asked(served, "check", {"answer": '{"intent": "price"}'}).json() == {"problem": ""}

    def full(*_: object) -> bool:
        raise StorageError("cannot write: No space left on device")

    monkeypatch.setattr(type(store), "create", full)
    failed = asked(served, "decide", body)
    assert failed.status_code == 500
    assert "No space left" in failed.json()["problem"]  # never "recorded" when it is not
    monkeypatch.undo()
    assert asked(served, "decide", body).json()["number"] == 1


def test_many_people_decide_at_once(served: ReviewServer, store: Storage) -> None:
    bodies = [{**body_of(served, place), "who": who} for place in (0, 1, 2) for who in ("anna", "ben", "cleo", "dora")]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda body: asked(served, "decide", body), bodies))
    assert {reply.status_code for reply in replies} == {200}
    assert sorted(reply.json()["number"] for reply in replies) == list(range(1, 13))
    assert len(review.decision_history(store, "query_intent")) == 12
    assert asked(served, "about").json()["rows"] == 5
    assert asked(served, "row?start=-1&step=1&show=open").json()["rank"] == 4


START = """
import sys
from headtail import review
review.serve_page(review.Config(root=sys.argv[1], task="query_intent"), lambda url: print(url, flush=True))
"""


@contextlib.contextmanager
def process(root: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    made = subprocess.Popen([sys.executable, "-c", START, root], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert made.stdout is not None
        yield made, made.stdout.readline().strip()
    finally:
        made.kill()
        made.communicate()


def test_a_kill_loses_nothing(config: review.Config, store: Storage) -> None:
    with process(config.root) as (running, url):
        row = loopback.get(url + "row?start=0&step=0&show=all").json()
        body = {"rank": 1, "query_key": row["query_key"], "verdict": "drop", "answer": "", "who": "anna", "why": "", "seen": 0}
        assert loopback.post(url + "decide", json=body).json()["number"] == 1
        os.kill(running.pid, signal.SIGKILL)
        running.wait(limit(10))
    assert decided(store) == {"pizza price": (DROP, None, "anna")}
    with process(config.root) as (running, url):
        assert loopback.get(url + "row?start=-1&step=1&show=open").json()["rank"] == 2
        running.send_signal(signal.SIGTERM)
        assert running.wait(limit(10)) == 0


def test_a_port_that_is_taken_is_named(desk: Desk, served: ReviewServer) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        ReviewServer(desk, int(served.url.split(":")[2].split("/")[0]))


# --- the page of documentation


def test_the_samples_in_the_docs_can_be_imported(config: review.Config, store: Storage, tmp_path: Path) -> None:
    """docs/review.md shows one file of each format; their keys are made of the words shown, so they are checked as they stand."""
    text = (Path(__file__).parent.parent / "docs" / "review.md").read_text(encoding="utf-8")
    blocks = {kind: part.split("```")[0] for kind in ("csv", "jsonl", "json") for part in text.split(f"```{kind}\n")[1:2]}
    assert set(blocks) == {"csv", "jsonl", "json"}
    row = suspect("pizza price", intent("browse"), 30.0, answer_key=bytes.fromhex("5d41402abc4b2a76b9719d911017c592"))
    keep(store, "curate", "1c9f2b7a40d35e68", {"suspects": suspects(row)}, task="query_intent")
    for kind, block in blocks.items():
        (tmp_path / f"sample.{kind}").write_text(block, encoding="utf-8")
        made = review.import_reviews(config.model_copy(update={"who": kind}), tmp_path / f"sample.{kind}")
        assert (made.rows, made.recorded, made.problems) == (1, 1, ()), kind
