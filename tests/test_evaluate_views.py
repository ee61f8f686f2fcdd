"""Evaluate's views: what is taken for what, valid answers by themselves, and queries that are worse than what users get today."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from conftest import answered_by, keep
from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import output_table
from headtail.core.config import TrackingConfig
from headtail.core.errors import InputError
from headtail.core.keys import canonical, query_key
from headtail.core.receipt import Receipt
from headtail.core.rows import ANSWER, HUMAN_LABELS
from headtail.core.task import Task
from headtail.stages import evaluate
from headtail.stages.evaluate.confusion import EXTRA, MISSED, pair_spans
from headtail.stages.evaluate.watch_list import group_rows

OFF = TrackingConfig(enabled=False)


def put(store: Storage, wanted: dict[str, Any], given: dict[str, Any], counts: dict[str, int] | None = None) -> None:
    """A plan with these labels and a teacher with these answers; None: invalid."""
    labels = [
        {"query_key": query_key(q), "query": q, "answer": canonical(answer), "count": (counts or {}).get(q, 1), "stratum": "tail"}
        for q, answer in wanted.items()
    ]
    keep(store, "plan", "p" * 16, {"human_labels": pa.Table.from_pylist(labels, schema=HUMAN_LABELS)})
    lines: list[dict[str, Any]] = [
        {"query_key": query_key(q), "query": q, "answer_key": query_key(q), "state": "answered" if answer else "truncated"}
        | {"answer": canonical(answer) if answer else None, "source": "teacher"}
        for q, answer in given.items()
    ]
    table = pa.Table.from_pylist(sorted(lines, key=lambda line: bytes(line["query_key"])), schema=ANSWER)
    keep(store, "precompute", "t" * 16, {"answers/shard-00000": table}, result=answered_by())


def run(store: Storage, task: str, **fields: Any) -> Receipt[evaluate.Result]:
    answers = {"teacher": "latest"}
    return evaluate.run(evaluate.Config(root=store.root, tracking=OFF, task=task, answers=answers, resamples=200, **fields))


def spans(*pairs: str) -> dict[str, Any]:
    return {"segments": [{"label": pair.partition(":")[0], "text": pair.partition(":")[2]} for pair in pairs]}


def cells(store: Storage, receipt: Receipt[Any], source: str = "teacher") -> dict[tuple[str, str], dict[str, Any]]:
    rows = output_table(store, receipt, "confusion").to_pylist()
    return {(row["wanted"], row["given"]): row for row in rows if row["source"] == source}


def test_spans_are_paired_by_text_then_by_words_and_the_rest_is_missed_or_extra(store: Storage) -> None:
    wanted = {"thai food boston": spans("topic:thai food", "location:boston"), "open now": spans("time:open now")}
    given = {"thai food boston": spans("topic:thai", "name:boston", "time:food", "none:in"), "open now": None}
    put(store, wanted, given, {"thai food boston": 9})
    receipt = run(store, "query_segmentation")
    found = cells(store, receipt)
    assert {cell: (row["n"], row["moved"]) for cell, row in found.items()} == {
        ("topic", "topic"): (1, 1),
        ("location", "name"): (1, 0),
        (EXTRA, "time"): (1, 0),  # `none` is no unit
        ("time", MISSED): (1, 0),
    }
    assert found["location", "name"]["examples"] == ["thai food boston: boston > boston"]
    assert store.read(receipt.output("confusion.svg").path).startswith(b"<?xml")


def test_a_span_is_paired_once_and_best_with_best() -> None:
    pairs = list(pair_spans([("topic", "a b c"), ("name", "a")], [("topic", "a"), ("name", "b c")]))
    assert pairs == [(("name", "a"), ("topic", "a")), (("topic", "a b c"), ("name", "b c"))]
    twice = [("topic", "x"), ("topic", "x")]
    assert list(pair_spans(twice, twice[:1])) == [(twice[0], twice[0]), (twice[1], None)]


def test_labels_are_counted_as_a_confusion_matrix_counts_them(store: Storage) -> None:
    from sklearn.metrics import confusion_matrix

    rng, names = np.random.default_rng(0), ["browse", "how_to", "price"]
    want, got = rng.choice(names, 300), rng.choice(names, 300)
    wanted, given = ({f"q{i}": {"intent": str(x)} for i, x in enumerate(side)} for side in (want, got))
    put(store, wanted, given, {f"q{i}": i for i in range(300)})
    found = cells(store, run(store, "query_intent"))
    expected = confusion_matrix(want, got, labels=names)
    assert [[found[a, b]["n"] for b in names] for a in names] == expected.tolist()
    both = [i for i in range(300) if (want[i], got[i]) == ("price", "how_to")]
    assert found["price", "how_to"]["examples"] == [f"q{i}" for i in both[::-1][:3]], "the most frequent queries"


def test_a_silent_source_and_a_wrong_one_are_told_apart(store: Storage) -> None:
    wanted = {f"q{i}": {"intent": "price"} for i in range(100)}
    given: dict[str, Any] = {q: None if i < 30 else {"intent": "price" if i < 93 else "how_to"} for i, q in enumerate(wanted)}
    put(store, wanted, given)
    receipt = run(store, "query_intent")
    (line,) = [row for row in output_table(store, receipt, "validity").to_pylist() if row["stratum"] == "all"]
    assert (line["n"], line["valid"], line["states"]) == (100, 0.7, "30 truncated")
    assert line["quality"] == pytest.approx(0.9)
    assert line["low"] < 0.7 < line["high"]
    assert receipt.metrics["valid/teacher/all"] == 0.7
    assert receipt.metrics["quality/teacher/all"] == pytest.approx(2 * 63 / (2 * 63 + 7 + 37))


def shop(store: Storage, path: Path, worse: int, better: int) -> Path:
    """80 queries; on `worse` of them the new answer is wrong and today's is right, on `better` the other way."""
    names = [f"q{i}" for i in range(80)]
    right, wrong = {"intent": "price"}, {"intent": "how_to"}
    put(
        store,
        dict.fromkeys(names, right),
        {q: wrong if i < worse else right for i, q in enumerate(names)},
        {q: i for i, q in enumerate(names)},
    )
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["query", "old"])
        out.writerows([q.upper(), json.dumps(wrong if worse <= i < worse + better else right)] for i, q in enumerate(names[:-1]))
        out.writerow([names[-1], "not JSON"])
    return path


def test_the_watch_list_has_queries_by_cost_and_groups_that_are_clearly_worse(store: Storage, tmp_path: Path, intent: Task) -> None:
    file = shop(store, tmp_path / "today.csv", 12, 1)
    receipt = run(store, "query_intent", status_quo=str(file), status_quo_column="old")
    queries = output_table(store, receipt, "watch_list").to_pylist()
    assert [row["query"] for row in queries] == [f"q{i}" for i in range(11, 0, -1)], "by events; q0 has none"
    assert (queries[0]["score"], queries[0]["score_status_quo"], queries[0]["cost"]) == (0.0, 1.0, 11.0)
    groups = {(row["kind"], row["group"]): row for row in output_table(store, receipt, "watch_groups").to_pylist()}
    assert set(groups) == {("all", "all"), ("stratum", "tail"), ("label", "price")}
    line = groups["label", "price"]
    assert (line["n"], line["worse"], line["better"], line["events"]) == (80, 12, 2, 66)
    from scipy import stats

    assert line["p"] == pytest.approx(stats.binomtest(12, 14, 0.5, alternative="greater").pvalue)
    assert line["clear"]
    assert receipt.rows["status_quo_invalid"] == 1
    (note,) = [note for note in receipt.notes if note.startswith("watch list")]
    assert "worse than the status quo on 12 of 80" in note
    assert "'q11'" in note
    again = run(store, "query_intent", status_quo=str(file), status_quo_column="old")
    assert again.reused
    file.write_text(file.read_text().replace("how_to", "price"))
    assert not run(store, "query_intent", status_quo=str(file), status_quo_column="old").reused, "the file's content is in the fingerprint"


def test_chance_alone_is_seldom_clear() -> None:
    rng, found = np.random.default_rng(0), 0
    for _ in range(400):
        rows = [
            {"source": "s", "stratum": str(stratum), "labels": [str(label)], "count": 1, "score": float(a), "score_status_quo": float(b)}
            for stratum, label, a, b in zip(rng.integers(0, 4, 60), rng.integers(0, 6, 60), *(rng.random((2, 60)) < 0.8), strict=True)
        ]
        found += any(line["clear"] for line in group_rows(rows, "s", 0.95))
    assert found <= 28  # 20 expected at most


def test_todays_answers_come_from_a_table_too_or_are_refused(store: Storage, tmp_path: Path) -> None:
    file = shop(store, tmp_path / "today.csv", 3, 0)
    receipt = run(store, "query_intent", status_quo="precompute")
    assert output_table(store, receipt, "watch_list").num_rows == 0, "nobody is worse than oneself"
    rows = [{"query_key": query_key("q5"), "old": canonical({"intent": "price"})}]
    keep(store, "ingest", "i" * 16, {"old": pa.Table.from_pylist(rows, schema=pa.schema([HUMAN_LABELS.field(0), ("old", pa.string())]))})
    assert run(store, "query_intent", status_quo="ingest:old", status_quo_column="old").rows["status_quo"] == 1
    with pytest.raises(InputError, match="lacks answer"):
        run(store, "query_intent", status_quo=str(file))
    with pytest.raises(InputError, match="file is not there"):
        run(store, "query_intent", status_quo=str(tmp_path / "other.csv"))
    file.write_text('query,old\nq1,"{""intent"": ""price""}"\nQ1,"{""intent"":""price""}"\n')
    assert run(store, "query_intent", status_quo=str(file), status_quo_column="old").rows["status_quo"] == 1, "the same answer twice"
    file.write_text('query,old\nq1,"{""intent"": ""price""}"\nQ1,"{""intent"": ""how_to""}"\n')
    with pytest.raises(InputError, match="two different answers to one query") as refused:
        run(store, "query_intent", status_quo=str(file), status_quo_column="old")
    assert "how_to" in str(refused.value)
    file.write_text("query,old\nq1,nonsense\n")
    with pytest.raises(InputError, match="no valid answer"):
        run(store, "query_intent", status_quo=str(file), status_quo_column="old")
