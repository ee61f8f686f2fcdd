"""Curation: nothing is lost, nothing leaks, and the draw depends on rows and seed alone."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import answered_by, keep
from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import output_table
from headtail.core.config import TrackingConfig, build_config
from headtail.core.errors import ConfigError, InputError, LeakError, LedgerError, StorageError
from headtail.core.keys import canonical, query_key
from headtail.core.leaks import LabelledQueries
from headtail.core.rows import ANSWER, DROPPED, HUMAN_LABELS, TOP, TRAINING_SET, State, with_side_inputs, with_top
from headtail.core.task import Task
from headtail.review.decision import Decision, current_moment
from headtail.review.log import DecisionLog
from headtail.stages import curate
from headtail.stages.curate import columns
from headtail.stages.curate.verdicts import Verdicts, traffic_weights
from headtail.stages.curate.verdicts import give_verdicts as verdicts
from timescale import limit

OFF = TrackingConfig(enabled=False)
ANSWERS = with_side_inputs(ANSWER, ["businesses"])


def one(
    query: str, *, state: str = "answered", confidence: float | None = 0.9, stratum: str = "head", count: int = 3, **more: Any
) -> dict[str, Any]:
    """An ANSWER row as a dict."""
    answer = canonical({"segments": [{"label": "topic", "text": query}]})
    row = {"query_key": query_key(query), "query": query, "answer_key": query_key("a" + query), "state": state, "eval_only": False}
    row |= {"answer": answer if state == "answered" else None, "confidence": confidence, "stratum": stratum, "count": count}
    return {**row, "businesses": [f"{query} ltd"], "source": "teacher", **more}


def table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([dict(row) for row in rows], schema=ANSWERS)


def labels_table(*queries: str) -> pa.Table:
    lines = [{"query_key": query_key(q), "query": q, "answer": '{"segments":[]}', "count": 1, "stratum": "head"} for q in queries]
    return pa.Table.from_pylist(lines, schema=HUMAN_LABELS)


def put(
    store: Storage,
    task: Task,
    rows: Sequence[Mapping[str, Any]],
    *training_set: str,
    shards: int = 3,
    states: Mapping[str, int] | None = None,
) -> curate.Config:
    """A store with these answers and labelled queries, and the config that curates them."""
    whole = table(rows)
    parts = {f"answers/shard-{i:05d}": whole.take(pa.array(range(i, len(rows), shards), pa.int64())) for i in range(shards)}
    keep(store, "precompute", "t" * 16, parts, task_fingerprint=task.fingerprint, result=answered_by(), rows=dict(states or {}))
    keep(store, "plan", "p" * 16, {"human_labels": labels_table(*training_set)})
    return curate.Config(root=store.root, tracking=OFF)


def judge(tables: Sequence[pa.Table], labelled_queries: Sequence[str], config: curate.Config) -> Verdicts:
    """Verdicts without a look at the text."""
    return verdicts(columns.read_columns(tables, LabelledQueries(labelled_queries, config.near_labels), config.seed), config.rules)


def why(judged: Verdicts, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {row["query"]: reason for row, reason in zip(rows, judged.reason.tolist(), strict=True)}


def test_answers_that_lack_a_column_are_refused(store: Storage, segmentation: Task) -> None:
    config = put(store, segmentation, [one("plumber"), one("pizza"), one("cut short", state="truncated")])
    whole = table([one("plumber"), one("pizza"), one("cut short", state="truncated")])
    keep(
        store,
        "precompute",
        "1" * 16,
        {"answers/shard-00000": whole.drop_columns(["state"])},
        task_fingerprint=segmentation.fingerprint,
        result=answered_by(),
    )
    with pytest.raises(StorageError, match="state"):
        curate.run(config)


def test_likeliest_tokens_stay_with_the_teachers_own_words(store: Storage, segmentation: Task) -> None:
    rows = [one("plumber"), one("pizza"), one("ann@example.com mail"), one("cut short", state="truncated")]
    told = [{**row, "token_ids": [5, 6], "top_ids": [5, 1, 6, 2], "top_logprobs": [np.float16(-i) for i in range(4)]} for row in rows]
    config = put(store, segmentation, rows)
    table_with = pa.Table.from_pylist(told, schema=with_side_inputs(with_top(ANSWER, 2), ["businesses"]))
    settings_with = {"task_fingerprint": segmentation.fingerprint, "result": answered_by(top_logprobs=2)}
    keep(store, "precompute", "2" * 16, {"answers/shard-00000": table_with}, **settings_with)
    before = rows[1]
    made = Decision(
        query_key("pizza"), "pizza", "correct", '{"segments":[]}', before["answer"], before["answer_key"], "anna", current_moment(), ""
    )
    DecisionLog(store, segmentation.name).record([made], "page")
    training_set = {row["query"]: row for row in output_table(store, curate.run(config), "training_set").to_pylist()}
    assert training_set["plumber"]["top_ids"] == [5, 1, 6, 2]
    assert training_set["plumber"]["top_logprobs"] == [0, -1, -2, -3]
    assert training_set["plumber"]["businesses"] == ["plumber ltd"]
    assert [training_set["pizza"][name] for name in TOP.names] == [None] * 3, "a person wrote this one"
    assert [training_set["<email> mail"][name] for name in TOP.names] == [None] * 3, "personal data went out of the answer"


def test_run(store: Storage, segmentation: Task) -> None:
    rows = [
        one("plumber", count=900),
        one("pizza", stratum="torso", count=2),
        one("cut short", state="truncated"),
        one("no json", state="invalid"),
        one("unsure", confidence=0.2),
        one("asked of people", eval_only=True),
        one("asked of people, badly", eval_only=True, state="failed"),
    ]
    config = put(store, segmentation, rows, "asked of people", "asked of people, badly", "never seen")
    receipt = curate.run(config)
    training_set, dropped = output_table(store, receipt, "training_set"), output_table(store, receipt, "dropped")
    assert training_set.schema == with_side_inputs(TRAINING_SET, ["businesses"])
    assert dropped.schema == DROPPED
    assert sorted(training_set["query"].to_pylist()) == ["pizza", "plumber"]
    assert {d["query"]: d["reason"] for d in dropped.to_pylist()} == {
        "cut short": "truncated",
        "no json": "invalid",
        "unsure": "unconfident",
        "asked of people": "eval_only",
        "asked of people, badly": "eval_only",
    }
    assert receipt.rows == {
        "in": 7,
        "training_set": 2,
        "dropped": 5,
        "dropped.invalid": 1,
        "dropped.truncated": 1,
        "dropped.unconfident": 1,
        "dropped.eval_only": 2,
        "training_set.head": 1,
        "training_set.torso": 1,
        "suspects": 5,
    }
    plumber = next(row for row in training_set.to_pylist() if row["query"] == "plumber")
    assert plumber["businesses"] == ["plumber ltd"]
    assert plumber["answer"] == segmentation.dump(json.loads(plumber["answer"]))
    assert (plumber["origin"], plumber["answer_key"]) == ("teacher", query_key("aplumber"))
    assert plumber["weight"] == pytest.approx(2 * np.log(901) / (np.log(901) + np.log(3)))
    assert np.mean(training_set["weight"].to_numpy()) == pytest.approx(1.0)
    assert curate.run(config).reused


ROW = st.builds(
    lambda name, state, confidence, stratum, count, held: one(
        f"q{name}", state=state, confidence=confidence, stratum=stratum, count=count, eval_only=held or name < 3
    ),
    st.integers(0, 25),
    st.sampled_from([*map(str, State), "answered", "answered"]),
    st.none() | st.floats(0, 1, width=32),
    st.sampled_from(["head", "torso", "tail"]),
    st.integers(0, 1000),
    st.booleans(),
)


@given(st.lists(ROW, min_size=1, max_size=60), st.integers(1, 30), st.integers(0, 5), st.randoms())
@settings(max_examples=150)
def test_every_row_has_one_verdict_whatever_the_order(rows: list[dict[str, Any]], size: int, seed: int, rng: Any) -> None:
    for i, row in enumerate(rows):
        row["answer_key"] = query_key(f"{i}")
    keys, config = ["q0", "q1", "q2"], curate.Config(max_rows=size, seed=seed)
    judged = judge([table(rows)], keys, config)
    kept = [row for row, reason in zip(rows, judged.reason, strict=True) if not reason]
    assert len(judged.reason) == len(rows)
    assert len(kept) <= size
    assert len({row["query_key"] for row in kept}) == len(kept)
    assert not {row["query"] for row in kept} & {"q0", "q1", "q2"}
    assert all(row["state"] == "answered" and not row["eval_only"] for row in kept)
    assert all(row["confidence"] is None or row["confidence"] >= 0.5 for row in kept)
    fit = {
        row["query"]
        for row in rows
        if row["state"] == "answered" and not row["eval_only"] and (row["confidence"] is None or row["confidence"] >= 0.5)
    }
    assert len(kept) == min(size, len(fit))
    assert judged.weight[judged.reason == ""].sum() == pytest.approx(len(kept))
    mixed = list(enumerate(rows))
    rng.shuffle(mixed)
    half = len(mixed) // 2
    again = judge([table([r for _, r in mixed[:half]]), table([r for _, r in mixed[half:]])], keys, config)
    verdicts = {place: (reason, weight) for (place, _), reason, weight in zip(mixed, again.reason, again.weight, strict=True)}
    for place, (reason, weight) in enumerate(zip(judged.reason, judged.weight, strict=True)):
        assert verdicts[place] == (reason, pytest.approx(weight))


def test_a_labelled_query_that_is_not_marked_is_a_leak(store: Storage, segmentation: Task) -> None:
    config = put(store, segmentation, [one("plumber"), one("pizza")], "pizza")
    with pytest.raises(LeakError, match="not marked eval_only") as caught:
        curate.run(config)
    assert "'pizza'" in str(caught.value)
    assert not store.exists("curate/LATEST")


@pytest.mark.parametrize("state", ["truncated", "failed"])
def test_a_leak_is_a_leak_even_if_the_row_would_be_dropped(state: str) -> None:
    with pytest.raises(LeakError):
        judge([table([one("pizza", state=state)])], ["pizza"], curate.Config())


def test_a_leak_behind_a_wrong_key_or_another_spelling_is_found() -> None:
    with pytest.raises(LeakError):
        judge([table([one("pizza", query_key=query_key("something else"))])], ["pizza"], curate.Config())
    with pytest.raises(LeakError):
        judge([table([one("pizza")])], ["  PIZZA\u200b"], curate.Config())


def test_best_of_several_answers_stays() -> None:
    rows = [one("pizza", confidence=c, answer_key=query_key(str(c))) for c in (0.6, 0.9, 0.8)] + [one("pizza", confidence=None)]
    judged = judge([table(rows)], [], curate.Config())
    assert judged.reason.tolist() == ["duplicate", "", "duplicate", "duplicate"]


def test_shares_hold_when_more_qualify_than_fit() -> None:
    rows = (
        [one(f"head {i}") for i in range(900)]
        + [one(f"torso {i}", stratum="torso") for i in range(60)]
        + [one(f"tail {i}", stratum="tail") for i in range(30)]
    )
    config = curate.Config(max_rows=200, strata_shares={"torso": 0.25, "tail": 0.2})
    judged = judge([table(rows)], [], config)
    kept = Counter(judged.stratum[judged.reason == ""].tolist())
    assert kept.total() == 200
    assert kept["torso"] >= 50
    assert kept["tail"] == 30
    assert judged.notes == ["tail: 30 rows qualify, fewer than its share of 40; all are taken"]
    assert Counter(judged.reason.tolist())["over_quota"] == 790
    other = judge([table(rows)], [], config.model_copy(update={"seed": 1}))
    assert (other.reason != judged.reason).any()


def test_the_draw_is_even() -> None:
    """Within a stratum every query has the same chance, whatever its key: over 300 seeds, 50 of 200 drawn each time."""
    rows = [one(f"q{i}") for i in range(200)]
    drawn = np.zeros(200)
    for seed in range(300):
        judged = judge([table(rows)], [], curate.Config(max_rows=50, strata_shares={}, seed=seed))
        drawn += judged.reason == ""
    spread = (drawn - 75) / np.sqrt(300 * 0.25 * 0.75)
    assert abs(spread).max() < 4.5
    assert 0.8 < spread.std() < 1.2


def test_unknown_confidence_is_kept_and_said() -> None:
    judged = judge([table([one("a", confidence=None), one("b")])], [], curate.Config())
    assert judged.reason.tolist() == ["", ""]
    assert judged.notes[-1].startswith("1 training rows have no confidence")


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=50))
def test_weights_have_mean_one_and_follow_traffic(counts: list[int]) -> None:
    weights = traffic_weights(np.asarray(counts, dtype=float))
    assert weights.mean() == pytest.approx(1.0)
    assert (weights > 0).all()
    order = np.argsort(counts, kind="stable")
    assert (np.diff(weights[order]) >= -1e-12).all()


def test_refusals(store: Storage, segmentation: Task, intent: Task) -> None:
    config = put(store, segmentation, [one("unsure", confidence=0.1), one("cut", state="truncated")], "pizza")
    with pytest.raises(InputError, match="no answer can be trained on") as caught:
        curate.run(config)
    assert "1 unconfident, 1 truncated" in str(caught.value) or "1 truncated, 1 unconfident" in str(caught.value)
    with pytest.raises(InputError, match="made under another task, prompt or schema"):
        curate.run(config.model_copy(update={"task": "query_intent"}))
    config = put(store, segmentation, [one("a", answer='{"segments":"none"}')], "pizza")
    with pytest.raises(InputError, match="not valid under task query_segmentation") as caught:
        curate.run(config)
    config = put(store, segmentation, [one("a")], states={**{str(s): 0 for s in State}, "answered": 2})
    with pytest.raises(LedgerError, match="do not add up"):
        curate.run(config)
    config = put(store, segmentation, [one("pizza", eval_only=True)], "pizza")
    with pytest.raises(InputError, match="no answer can be trained on"):
        curate.run(config)
    config = put(store, segmentation, [])
    with pytest.raises(InputError, match="no answers to curate"):
        curate.run(config)
    with pytest.raises(ConfigError, match="unknown stratum hed"):
        build_config(curate.Config, {"strata_shares": {"hed": 0.5}}, "test")
    with pytest.raises(ConfigError, match="add up to at most 1"):
        build_config(curate.Config, {"strata_shares": {"head": 0.6, "tail": 0.6}}, "test")


def test_many_rows_in_bounded_time() -> None:
    """200 thousand answers are judged in seconds; the pass is linear in rows."""
    n = 200_000
    keys = [query_key(f"q{i}") for i in range(n)]
    column = {"query_key": pa.array(keys, ANSWER.field("query_key").type), "query": pa.array([f"q{i}" for i in range(n)])}
    column |= {
        "answer_key": column["query_key"],
        "state": pa.array(["answered"] * n),
        "confidence": pa.array(np.full(n, 0.9, dtype=np.float32)),
    }
    column |= {"count": pa.array(np.arange(n)), "stratum": pa.array(["head"] * n), "eval_only": pa.array([False] * n)}
    start = time.process_time()
    judged = judge([pa.table(column)], ["human_labels"], curate.Config())
    assert time.process_time() - start < limit(10)
    assert (judged.reason == "").sum() == 20_000


def test_s3(s3_root: str, segmentation: Task) -> None:
    from headtail.adapters.storage import open_storage

    store = open_storage(s3_root)
    receipt = curate.run(put(store, segmentation, [one("plumber"), one("pizza", eval_only=True)], "pizza"))
    assert receipt.rows["training_set"] == 1
