"""Suspects and reviews, end to end: planted errors come first in the queue, what people decide holds, personal data stays out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bench.suspects import OFF, example_answers, one
from conftest import answered_by, keep
from headtail import review
from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import output_table
from headtail.core.keys import normalise, query_key
from headtail.core.rows import ANSWER, HUMAN_LABELS, SUSPECT, TRAINING_SET, with_side_inputs
from headtail.core.task import Task, load_task
from headtail.review.decision import Decision, current_moment
from headtail.review.log import FOLDER, LABELLING, DecisionLog
from headtail.review.queue import load_queue
from headtail.stages import curate
from headtail.stages.curate.suspects import AT_RANDOM

pytestmark = pytest.mark.usefixtures("not_drawn")

ROWS = 1500


@pytest.mark.parametrize("name", ["query_segmentation", "query_intent"])
def test_the_queue_finds_planted_errors_five_times_better_than_looking_at_random(name: str) -> None:
    """With nothing but the answers to go by: no confidence, no samples. 5 % of 1,500 rows are planted wrong."""
    task = load_task(name)
    found = one(task, name, example_answers(task, ROWS, seed=11), share=0.05, seed=3)
    assert found["rows"] == ROWS
    assert 50 <= found["wrong"] <= 105
    assert found["score"]["times_random"] >= 5
    assert found["gain"]["times_random"] >= 5
    assert found["gain"]["events_times_random"] >= 5
    assert found["gain"]["share_of_wrong_events"] > found["traffic_only"]["share_of_wrong_events"]


@pytest.fixture
def config(store: Storage, segmentation: Task) -> curate.Config:
    """1,000 right answers of the example data, ten of them wrong or without an answer, and two labelled queries."""
    answers = example_answers(segmentation, 1000)
    rows = answers.slice(0, 10).to_pylist()
    for place, row in enumerate(rows):
        row["answer"] = segmentation.dump({"segments": [{"text": "lighthouse", "label": "time"}]})
        if place == 0:
            row |= {"state": "truncated", "answer": None}
    spoilt = pa.concat_tables([pa.Table.from_pylist(rows, schema=answers.schema), answers.slice(10)])
    labels = [{"query_key": query_key(q), "query": q, "answer": "{}", "count": 1, "stratum": "tail"} for q in ("anna's first query", "b")]
    keep(store, "precompute", "t" * 16, {"answers/shard-00000": spoilt}, task_fingerprint=segmentation.fingerprint, result=answered_by())
    keep(store, "plan", "p" * 16, {"human_labels": pa.Table.from_pylist(labels, schema=HUMAN_LABELS)})
    return curate.Config(root=store.root, tracking=OFF)


def test_suspects_are_a_queue(store: Storage, segmentation: Task, config: curate.Config) -> None:
    receipt = curate.run(config)
    suspects = output_table(store, receipt, "suspects")
    assert suspects.schema == with_side_inputs(SUSPECT, ["businesses"])
    assert suspects.num_rows == receipt.rows["suspects"] == 1000
    at_random = suspects["drawn_from"].is_valid().to_numpy()
    assert (np.diff(suspects["gain"].to_numpy()[~at_random]) <= 1e-9).all()
    assert np.flatnonzero(at_random).tolist() == list(range(9, 1000, 10))[: at_random.sum()], "every tenth row"
    assert set(suspects["drawn_from"].drop_null().to_pylist()) == {999}, "from all that have an answer"
    assert all(reasons[0] == AT_RANDOM for reasons in suspects.filter(suspects["drawn_from"].is_valid())["reasons"].to_pylist())
    queue = load_queue(store, "curate:suspects", segmentation)
    assert [queue.item(place).query for place in range(40)] == suspects["query"].to_pylist()[:40], "people see it in this order"
    first = [queue.item(place) for place in range(12) if not at_random[place]]
    assert sum(item.answer is None or "lighthouse" in item.answer for item in first) >= 9, [item.query for item in first]
    unanswered = next(item for item in first if item.answer is None)
    assert unanswered.score == 1
    assert unanswered.reasons == ("truncated: there is no answer",)
    named = next(item for item in first if item.answer is not None)
    assert "not in the query: lighthouse" in named.reasons
    assert named.alternatives
    assert not segmentation.parse(named.alternatives[0])[1]
    assert "dropped.suspect" not in receipt.rows, "they are for people to look at"
    assert receipt.rows["dropped.truncated"] == 1
    assert set(receipt.result.signals) >= {"students", "neighbours", "not in query", "left out", "fallback"}


def test_suspects_are_dropped_only_where_that_is_asked_for(config: curate.Config) -> None:
    asked = config.model_copy(update={"suspicion": curate.Suspicion(drop_above=0.5)})
    kept, cut = curate.run(config).rows, curate.run(asked).rows
    assert cut["dropped.suspect"] >= 8
    assert cut["training_set"] == kept["training_set"] - cut["dropped.suspect"]


def decide(store: Storage, task: Task, row: dict[str, Any], verdict: str, answer: str | None, log: str = FOLDER) -> None:
    made = Decision(row["query_key"], row["query"], verdict, answer, row["answer"], row["answer_key"], "anna", current_moment(), "")
    DecisionLog(store, task.name, log).record([made], "page")


def test_what_people_decide_holds(store: Storage, segmentation: Task, config: curate.Config) -> None:
    before = curate.run(config)
    rows = output_table(store, before, "suspects").to_pylist()
    wrong = [row for row in rows if row["answer"] and "lighthouse" in row["answer"]]
    unanswered = next(row for row in rows if row["answer"] is None)
    right = rows[-1]
    mended = segmentation.dump({"segments": [{"text": wrong[0]["query"], "label": "topic"}]})
    decide(store, segmentation, wrong[0], "correct", mended)
    decide(store, segmentation, wrong[1], "accept", wrong[1]["answer"])
    decide(store, segmentation, right, "drop", None)
    decide(store, segmentation, unanswered, "correct", mended)
    after = curate.run(config)
    assert after.fingerprint != before.fingerprint, "decisions are part of what decides the result"
    training_set = {row["query_key"]: row for row in output_table(store, after, "training_set").to_pylist()}
    dropped = {row["query_key"]: row["reason"] for row in output_table(store, after, "dropped").to_pylist()}
    assert training_set[wrong[0]["query_key"]]["answer"] == mended
    assert training_set[unanswered["query_key"]]["answer"] == mended, "a person's answer rescues a row without one"
    assert training_set[wrong[0]["query_key"]]["answer_key"] is None
    assert training_set[wrong[1]["query_key"]]["answer"] == wrong[1]["answer"], "accepted: no longer dropped as a suspect"
    assert training_set[wrong[1]["query_key"]]["answer_key"] == wrong[1]["answer_key"]
    assert dropped[right["query_key"]] == "reviewed"
    people = [row for row in training_set.values() if row["origin"] == "human"]
    assert len(people) == after.rows["training_set.human"] == 3
    mine = training_set[wrong[0]["query_key"]]["weight"] / np.log1p(wrong[0]["count"])
    others = [
        row["weight"] / np.log1p(next(r["count"] for r in rows if r["query_key"] == key))
        for key, row in list(training_set.items())[:50]
        if row["origin"] == "teacher"
    ]
    assert others == pytest.approx([mine / 4] * len(others), rel=1e-4)
    left = {row["query_key"] for row in output_table(store, after, "suspects").to_pylist()}
    assert not left & {wrong[0]["query_key"], wrong[1]["query_key"], unanswered["query_key"]}
    raw = curate.run(config.model_copy(update={"reviews": False}))
    assert raw.fingerprint == before.fingerprint
    DecisionLog(store, segmentation.name).undo("anna")
    assert curate.run(config).fingerprint not in (before.fingerprint, after.fingerprint)


def test_answers_to_drawn_queries_are_not_learnt(store: Storage, segmentation: Task, config: curate.Config) -> None:
    """What people label is kept beside the reviews, not among them: the training set is the same as before."""
    before = curate.run(config)
    row = next(row for row in output_table(store, before, "suspects").to_pylist() if row["answer"])
    answer = segmentation.dump({"segments": [{"text": row["query"], "label": "topic"}]})
    decide(store, segmentation, row, "correct", answer, LABELLING)
    decide(store, segmentation, output_table(store, before, "training_set").to_pylist()[0], "drop", None, LABELLING)
    assert curate.run(config).fingerprint == before.fingerprint
    decide(store, segmentation, row, "correct", answer)  # as a review it is learnt
    assert curate.run(config).fingerprint != before.fingerprint


def test_near_duplicates_of_labelled_queries_are_set_aside(store: Storage, segmentation: Task, config: curate.Config) -> None:
    queries = output_table(store, curate.run(config), "training_set")["query"].to_pylist()
    typed = next(query for query in queries if len(query) > 24 and " " in query)
    labels = [{"query_key": query_key(t), "query": t, "answer": "{}", "count": 1, "stratum": "tail"} for t in (f"{typed}s",)]
    keep(store, "plan", "q" * 16, {"human_labels": pa.Table.from_pylist(labels, schema=HUMAN_LABELS)})
    receipt = curate.run(
        config.model_copy(update={"other_labels": (f"plan/{'q' * 16}:human_labels",), "labels": f"plan/{'p' * 16}:human_labels"})
    )
    dropped = {row["query"]: row["reason"] for row in output_table(store, receipt, "dropped").to_pylist()}
    assert dropped[typed] == "near_labels"
    assert receipt.rows["dropped.near_labels"] >= 1
    assert typed not in output_table(store, receipt, "training_set")["query"].to_pylist()


PRIVATE = ("anna.berg@example.org", "+49 171 2345678", "4111 1111 1111 1111")


def test_personal_data_is_out_of_all_that_is_trained_on_or_shown(store: Storage, segmentation: Task) -> None:
    """Queries that did not come through ingest, a teacher that repeats them, side inputs: planted in each."""
    answers = example_answers(segmentation, 60).to_pylist()
    for row, secret in zip(answers, PRIVATE, strict=False):
        text = normalise(f"call {secret}")
        segments = [{"text": "call", "label": "none"}, {"text": secret, "label": "name"}]
        row |= {"query": text, "query_key": query_key(text), "answer": segmentation.dump({"segments": segments})}
        row |= {"businesses": [f"berg ltd {secret}"]}
    table = pa.Table.from_pylist(answers, schema=with_side_inputs(ANSWER, ["businesses"]))
    keep(store, "precompute", "t" * 16, {"answers/shard-00000": table}, task_fingerprint=segmentation.fingerprint, result=answered_by())
    keep(store, "plan", "p" * 16, {"human_labels": HUMAN_LABELS.empty_table()})
    receipt = curate.run(curate.Config(root=store.root, tracking=OFF, max_rows=58))
    training_set = output_table(store, receipt, "training_set")
    for name in ("training_set", "dropped", "suspects"):
        written = json.dumps(output_table(store, receipt, name).to_pylist(), default=str)
        assert not [secret for secret in PRIVATE if secret in written], name
    assert training_set.schema == with_side_inputs(TRAINING_SET, ["businesses"])
    kept = [row for row in training_set.to_pylist() if row["query"].startswith("call <")]
    assert {row["query"] for row in kept} <= {"call <email>", "call <phone>", "call <card>"}
    assert kept
    for row in kept:
        assert row["query_key"] == query_key(row["query"])
        assert row["query"].removeprefix("call ") in row["answer"]
        assert row["businesses"] == [f"berg ltd {row['query'].removeprefix('call ')}"]


def test_the_queue_can_be_exported(store: Storage, config: curate.Config, tmp_path: Path) -> None:
    curate.run(config)
    made = review.export_reviews(review.Config(root=store.root, tracking=OFF), tmp_path / "review.csv", rows=20)
    assert made.rows == 20
