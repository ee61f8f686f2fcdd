"""Planted errors: as many as asked, really wrong, still valid, the same each time, and all of them in the truth table."""

from __future__ import annotations

import random
from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import planted
from bench.suspects import OFF, example_answers, put
from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import output_table
from headtail.core.task import Task, load_task


@pytest.mark.parametrize("name", ["query_segmentation", "query_intent"])
def test_run(store: Storage, name: str) -> None:
    task = load_task(name)
    answers = example_answers(task, 1500)
    halves = answers.slice(0, 700), answers.slice(700)
    source = put(store, "precompute", "answers/shard-00000", answers)
    config = planted.Config(root=store.root, tracking=OFF, task=name, answers=source, share=0.1)
    receipt = planted.run(config)
    spoilt, truth = output_table(store, receipt, "answers/shard-00000"), output_table(store, receipt, "planted")
    assert 110 <= truth.num_rows == receipt.rows["planted"] <= 190
    assert len(Counter(truth["kind"].to_pylist())) == (4 if name == "query_segmentation" else 1)
    before, after = answers["answer"].to_pylist(), spoilt["answer"].to_pylist()
    changed = {key: (a, b) for key, a, b in zip(answers["query_key"].to_pylist(), before, after, strict=True) if a != b}
    assert changed == {row["query_key"]: (row["answer"], row["planted"]) for row in truth.to_pylist()}
    for old, new in changed.values():
        parsed, problem = task.parse(new)
        assert not problem
        assert not task.score(task.parse(old)[0], parsed).right
    assert spoilt.drop(["answer"]).equals(answers.drop(["answer"])), "only answers are touched"
    labels = planted.span_labels(task, [answers])
    parts = [planted.plant(task, half, 0.1, 0, labels)[0] for half in halves]
    assert pa.concat_tables(parts)["answer"].to_pylist() == after, "shards change nothing"
    assert planted.plant(task, answers, 0.1, 1, labels)[1].num_rows != truth.num_rows


@given(st.integers(0, 10**6))
def test_an_error_is_always_found_for_a_segmentation(seed: int) -> None:
    task: Task = load_task("query_segmentation")
    rng = random.Random(seed)
    words = ["pizza", "in", "chicago", "open", "now"][: rng.randint(1, 5)]
    answer = {"segments": [{"text": word, "label": rng.choice(["topic", "none"])} for word in words]}
    wrong, kind = planted.spoil(task, answer, rng, ["topic", "none", "location"])
    assert kind in ("label", "boundary", "missing", "word")
    assert not task.score(answer, wrong).right
    assert not task.parse(task.dump(wrong))[1]


def test_what_is_not_answered_is_left_alone(segmentation: Task) -> None:
    answers = example_answers(segmentation, 300)
    failed = answers.set_column(3, "state", pa.array(["failed"] * answers.num_rows))
    spoilt, truth = planted.plant(segmentation, failed, 0.5, 0, ["topic", "name"])
    assert truth.num_rows == 0
    assert spoilt.equals(failed)
