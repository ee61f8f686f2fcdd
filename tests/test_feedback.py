"""Feedback from a caller's call to the review queue and labels: nothing is taken that the task would refuse, nothing is lost unseen."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest

from fronts import Front
from headtail.adapters.storage import Storage, read_table, write_table
from headtail.adapters.storage.receipts import output_table
from headtail.client import AsyncClient, Client, ClientConfig, ClientError
from headtail.core.config import TrackingConfig
from headtail.core.errors import InputError
from headtail.core.keys import query_key
from headtail.core.rows import FEEDBACK, FEEDBACK_LABELS, REQUEST_LOG
from headtail.core.task import Task
from headtail.releases.deletion import delete_query
from headtail.releases.overrides import tombstone_query
from headtail.review.queue import load_queue
from headtail.stages import feedback, serve
from headtail.stages.evaluate.stage import check_design
from headtail.stages.serve.collector import Collector
from headtail.stages.serve.front.counters import Counters, read_counters
from headtail.stages.serve.metrics import prometheus_text
from local_server import Running
from test_serve import published, says, segments

OFF = TrackingConfig(enabled=False)
PIZZA = "pizza near me"


class Logged(Front):
    """A front with a log: `collect` writes what came through the pipe into the store, as the collector's process does."""

    def __init__(self, store: Storage, folder: Path, task: Task, **options: Any) -> None:
        self.store = store
        self.read, self.write = os.pipe()
        os.set_blocking(self.read, False)
        super().__init__(store, serve.Config(), folder, says(task, segments("rare")), pipe=self.write, **options)

    def collect(self) -> None:
        made = Collector(self.store, 1000, 60.0, Counters(self.path, 0))
        try:
            while data := os.read(self.read, 1 << 20):
                made.feed(data)
        except BlockingIOError:
            pass
        made.close()

    def call(self, **body: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            async with self.client() as http:
                return await http.post("/v1/feedback", json=body)

        return asyncio.run(go())

    def request(self, query: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask(query).json()
        return found

    def close(self) -> None:
        os.close(self.read)
        os.close(self.write)


@pytest.fixture
def front(store: Storage, tmp_path: Path, segmentation: Task) -> Iterator[Logged]:
    published(store, tmp_path, segmentation)
    made = Logged(store, tmp_path, segmentation)
    yield made
    made.close()


def rows_of(store: Storage, folder: str) -> list[dict[str, Any]]:
    files = [file.path for file in store.files(folder) if file.path.startswith(f"{folder}/20")]
    rows: list[dict[str, Any]] = pa.concat_tables([read_table(store, path) for path in files]).to_pylist() if files else []
    return rows


def run(store: Storage) -> Any:
    return feedback.run(feedback.Config(root=store.root, tracking=OFF))


def test_feedback_becomes_a_review_queue_and_labels_of_its_own_design(front: Logged, store: Storage, segmentation: Task) -> None:
    hits = [front.request(PIZZA) for _ in range(3)]
    miss = front.request("pizza rare")
    right = {"segments": [{"label": "topic", "text": "pizza"}, {"label": "location", "text": "near me"}]}
    bodies: list[dict[str, Any]] = [{"answer": right}, {"answer": right, "comment": "mail a@example.org"}, {"rating": "up"}]
    for hit, body in zip(hits, bodies, strict=True):
        said = front.call(request_id=hit["request_id"], query=PIZZA, answer_key=hit["answer_key"], used=False, **body)
        assert (said.status_code, said.json()["about"]) == (202, hit["request_id"])
    assert front.call(request_id=miss["request_id"], query="Pizza  RARE", rating="up", used=True, shown=miss["answer"]).status_code == 202
    front.collect()

    rows = rows_of(store, "feedback")
    assert len(rows) == 4
    assert read_table(store, store.files("feedback")[0].path).schema.equals(FEEDBACK)
    assert {row["shown"] for row in rows[:3]} == {segmentation.dump(segments(PIZZA))}, "the snapshot's answer, not sent by the caller"
    assert rows[1]["comment"] == "mail <email>"
    assert rows[3]["query"] == "pizza rare"

    receipt = run(store)
    assert receipt.rows == {"in": 4, "used": 4, "no_request": 0, "other_query": 0, "repeated": 0, "schema": 0}
    assert (receipt.result.queries, receipt.result.suspects, receipt.result.labels) == (2, 1, 2)
    labels = output_table(store, receipt, "labels")
    assert labels.schema.equals(FEEDBACK_LABELS)
    assert set(labels["design"].to_pylist()) == {"feedback"}
    with pytest.raises(InputError, match="no random sample"):
        check_design(labels, "feedback:labels")
    by_query = {row["query"]: row for row in labels.to_pylist()}
    assert by_query[PIZZA]["answer"] == segmentation.dump(right)
    assert [by_query[PIZZA][name] for name in ("up", "down", "corrected", "used", "unused")] == [1, 0, 2, 0, 3]
    assert by_query["pizza rare"]["answer"] == segmentation.dump(miss["answer"])

    queue = load_queue(store, f"{receipt.path}:suspects", segmentation)
    item = queue.item(0)
    assert (item.query, item.answer, item.count) == (PIZZA, segmentation.dump(segments(PIZZA)), 3)
    assert item.alternatives == (segmentation.dump(right),)
    assert item.reasons == ("corrected by callers",)
    assert item.answer_key == hits[0]["answer_key"]
    assert run(store).reused, "the same logs are read once"

    delete_query(store, "pizza rare", who="ada", why="asked for")
    assert {row["query"] for row in rows_of(store, "feedback")} == {PIZZA}


def test_feedback_keeps_no_personal_data(front: Logged, store: Storage) -> None:
    data = {"request_id": "0" * 20, "query": "Mail ada@example.com", "comment": "Call ADA@example.com\n+49 171 1234567"}
    said = front.call(**data, answer=segments("mail ada@example.com", "location"), shown=segments("mail ada@example.com"))
    assert said.status_code == 202, said.text
    front.collect()
    (row,) = rows_of(store, "feedback")
    assert (row["query"], row["comment"]) == ("mail <email>", "call <email> <phone>")
    assert (json.loads(row["answer"]), json.loads(row["shown"])) == (segments("mail <email>", "location"), segments("mail <email>"))


def test_rows_of_a_deleted_query_that_the_log_still_held_are_not_written(
    front: Logged, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for query in (PIZZA, "pizza rare"):
        hit = front.request(query)
        assert front.call(request_id=hit["request_id"], query=query, rating="up", shown=hit["answer"]).status_code == 202
    delete_query(store, "Pizza  rare", who="ada", why="asked for")
    front.collect()
    assert [row["query"] for folder in ("requests", "feedback") for row in rows_of(store, folder)] == [PIZZA, PIZZA]

    for file in list(store.files("requests")):
        store.remove(file.path)
    late = iter([PIZZA])

    def deleted_meanwhile(*args: Any) -> None:
        """The deletion has listed the store's files before this one is there."""
        for query in late:
            tombstone_query(store, query_key(query), who="ada", why="asked for")
        write_table(*args)

    monkeypatch.setattr("headtail.stages.serve.deleted_rows.write_table", deleted_meanwhile)
    front.request(PIZZA)
    front.request("sushi")
    front.collect()
    assert [row["query"] for row in rows_of(store, "requests")] == ["sushi"]
    assert front.count("log_dropped") == 0


def test_feedback_on_requests_that_never_were_is_set_aside(front: Logged, store: Storage) -> None:
    hit = front.request(PIZZA)
    known = {"request_id": hit["request_id"], "answer_key": hit["answer_key"]}
    assert front.call(**known, query=PIZZA, rating="up").status_code == 202
    assert front.call(**known, query=PIZZA, rating="up", used=True).status_code == 202
    assert front.call(**known, query=PIZZA, rating="down").status_code == 202
    assert front.call(**known, query="something else", rating="up").status_code == 202
    assert front.call(request_id="0" * 20, query=PIZZA, rating="up").status_code == 202
    front.collect()
    receipt = run(store)
    assert receipt.rows == {"in": 5, "used": 2, "no_request": 1, "other_query": 1, "repeated": 1, "schema": 0}
    assert receipt.result.labels == 0, "the caller's last word is a thumb down"
    assert (receipt.metrics["up"], receipt.metrics["down"], receipt.metrics["used"]) == (0, 1, 1)
    aside = output_table(store, receipt, "set_aside").to_pylist()
    assert sorted(row["reason"] for row in aside) == ["no_request", "other_query", "repeated"]


@pytest.mark.parametrize(
    "body, field",
    [
        ({"rating": "sideways"}, "rating"),
        ({}, ""),
        ({"answer": {"segments": "none"}}, "answer"),
        ({"answer": None}, "answer"),
        ({"answer": {"segments": [{"label": "topic", "text": "denver"}]}}, "answer"),  # not in the query
        ({"answer": segments(PIZZA)}, "answer"),  # what was given
        ({"rating": "up", "shown": {"x": 1}, "answer_key": None}, "shown"),
        ({"rating": "up", "request_id": ""}, None),
        ({"rating": "up", "request_id": "", "answer_key": "0" * 32}, "request_id"),
        ({"rating": "up", "request_id": "../../x"}, "request_id"),
        ({"rating": "up", "comment": "x" * 501}, "comment"),
        ({"rating": "up", "query": ""}, "query"),
    ],
)
def test_what_cannot_be_taken_names_the_field(front: Logged, body: dict[str, Any], field: str | None) -> None:
    hit = front.request(PIZZA)
    found = front.call(**{"request_id": hit["request_id"], "query": PIZZA, "answer_key": hit["answer_key"], **body})
    if field is None:  # a client that answered from its own snapshot has no request id
        assert found.status_code == 202
        return
    assert found.status_code == 422
    assert found.json()["error"]["field"] == field
    assert front.count("feedback_lines") == 0


def test_feedback_that_finds_the_pipe_full_is_refused_and_counted(front: Logged, store: Storage) -> None:
    hit = front.request(PIZZA)
    try:
        while True:
            os.write(front.write, b"x" * 4095 + b"\n")
    except BlockingIOError:
        pass
    found = front.call(request_id=hit["request_id"], query=PIZZA, rating="up")
    assert (found.status_code, found.headers["retry-after"]) == (503, "1")
    assert (front.count("feedback_dropped"), front.count("feedback/up")) == (1, 0)
    text = prometheus_text({"query_segmentation": read_counters(front.path)}).decode()
    assert 'headtail_feedback_dropped_total{task="query_segmentation"} 1.0' in text
    assert 'headtail_feedback_total{kind="up",task="query_segmentation"} 0.0' in text


def test_both_tables_share_the_pipe_and_what_is_no_row_is_counted(front: Logged, store: Storage) -> None:
    hit = front.request(PIZZA)
    os.write(front.write, b'["feedback",1,2]\n{"a": 1}\n')
    front.call(request_id=hit["request_id"], query=PIZZA, rating="up")
    front.collect()
    assert len(rows_of(store, "requests")) == len(rows_of(store, "feedback")) == 1
    assert read_table(store, store.files("requests")[0].path).schema.equals(REQUEST_LOG)
    assert (front.count("feedback_dropped"), front.count("log_dropped")) == (1, 1)


def test_a_server_without_a_request_log_takes_no_feedback(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    published(store, tmp_path, segmentation)
    front = Front(store, serve.Config(), tmp_path)

    async def go() -> httpx.Response:
        async with front.client() as http:
            return await http.post("/v1/feedback", json={"query": PIZZA, "request_id": "0" * 20, "rating": "up"})

    found = asyncio.run(go())
    assert found.status_code == 404
    assert "request log" in found.json()["error"]["message"]
    with pytest.raises(InputError, match="no feedback"):
        run(store)


def test_clients_give_feedback_on_misses_and_on_hits_of_their_own(front: Logged, store: Storage) -> None:
    with Running(front.app) as server:
        config = ClientConfig(url=server.url, root=store.root)
        with Client(config) as client:
            local, miss = client.answer(PIZZA), client.answer("something rare")
            assert (local.local, local.request_id) == (True, "")
            client.feedback(local, "down", comment="two spans")
            client.feedback(miss, used=True, corrected=segments("something rare", "location"))
            with pytest.raises(ClientError) as refused:
                client.feedback(miss, corrected=segments("elsewhere"))
            assert refused.value.field == "answer"

        async def go() -> None:
            async with AsyncClient(config) as later:
                await later.feedback(await later.answer(PIZZA), "up")

        asyncio.run(go())
    front.collect()
    rows = rows_of(store, "feedback")
    assert [(row["query"], row["rating"], row["used"]) for row in rows] == [
        (PIZZA, "down", None),
        ("something rare", None, True),
        (PIZZA, "up", None),
    ]
    assert json.loads(rows[1]["shown"]) == segments("rare")
    receipt = run(store)
    assert receipt.rows["used"] == 3, "two callers without a request id do not replace one another"
    assert {row["query_key"] for row in output_table(store, receipt, "labels").to_pylist()} == {query_key("something rare")}
