"""Training rows: what a weight is made of, which rows judge, and that none of those is trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from conftest import answered_by, keep
from headtail.adapters.storage import Storage
from headtail.adapters.storage.receipts import load_receipt, load_ref, output_table
from headtail.core.config import TrackingConfig
from headtail.core.errors import ConfigError, LeakError
from headtail.core.keys import query_key
from headtail.core.receipt import Receipt
from headtail.core.rows import TRAINING_SET, with_side_inputs
from headtail.core.task import Task
from headtail.releases.claim import AnswererResult, training_keys
from headtail.releases.seal import seal_labels, sealed_keys
from headtail.stages.distill import stage as distill
from headtail.stages.distill.base import BaseModelConfig, Shape
from headtail.stages.distill.result import Result as DistillResult
from headtail.stages.distill.rows import Weights, read_rows, weigh


def training_set(queries: list[str], origins: list[str], weights: list[float]) -> pa.Table:
    n = len(queries)
    schema = with_side_inputs(TRAINING_SET, ["businesses"])
    keys = [query_key(q) for q in queries]
    rows = [keys, queries, ['{"segments":[]}'] * n, weights, ["head"] * n, origins, keys, [[]] * n]
    return pa.table([pa.array(column, field.type) for column, field in zip(rows, schema, strict=True)], schema=schema)


ROWS = training_set(["a", "b", "c"], ["teacher", "teacher", "human"], [0.5, 1.5, 1.0])


def test_weights_keep_their_proportions_and_have_mean_one() -> None:
    assert weigh(Weights(), ROWS, None).tolist() == pytest.approx([0.5, 1.5, 1.0])
    assert weigh(Weights(traffic=0), ROWS, None).tolist() == pytest.approx([1, 1, 1])
    humans = weigh(Weights(human=4), ROWS, None)
    assert humans[2] / humans[1] == pytest.approx(4 / 1.5)
    assert humans.mean() == pytest.approx(1)


def test_confidence_counts_for_teachers_alone() -> None:
    found = weigh(Weights(traffic=0, confidence=2), ROWS, np.array([0.5, np.nan, 0.1]))
    assert found[0] / found[1] == pytest.approx(0.25)
    assert found[1] == found[2]


def test_confidence_is_found_through_the_answer_key(store: Storage, segmentation: Task) -> None:
    answers = pa.table({"answer_key": pa.array(reversed(ROWS["answer_key"].to_pylist()), pa.binary(16)), "confidence": [0.9, 0.8, 0.25]})
    taught = keep(store, "precompute", "t", {"answers/0": answers}, result=answered_by())
    made = keep(store, "curate", "g", {"training_set": ROWS}, inputs={"answers": taught.path})
    chosen = distill.TrainingSet(training_set=f"{made.path}:training_set")
    refs = {"training_set.0": load_ref(store, chosen.training_set)}
    found = read_rows(store, Weights(traffic=0, confidence=1), chosen, segmentation, refs, 0).training_set["weight"].to_numpy()
    assert found[0] / found[1] == pytest.approx(0.25 / 0.8)
    loose = keep(store, "example-data", "x", {"training_set": ROWS})
    with pytest.raises(ConfigError, match="no teacher's confidence"):
        read_rows(store, Weights(confidence=1), chosen, segmentation, {"training_set.0": (loose, "training_set")}, 0)


def judged(store: Storage, held: list[str]) -> distill.Config:
    made = keep(store, "curate", "g", {"training_set": ROWS})
    people: Receipt = keep(store, "ingest", "p", {"human_labels_train": training_set(held, ["human"] * len(held), [1.0] * len(held))})
    chosen = distill.TrainingSet(training_set=f"{made.path}:training_set", held_out=f"{people.path}:human_labels_train")
    shape = Shape(vocabulary=300, hidden=32, layers=1, heads=2, feed_forward=32, positions=256)
    return distill.Config(
        root=str(store.root),
        tracking=TrackingConfig(enabled=False),
        sets=(chosen,),
        labels=(),
        base=BaseModelConfig(shape=shape),
        lora=None,
    )


def test_held_out_rows_that_are_trained_on_are_refused(store: Storage) -> None:
    with pytest.raises(LeakError, match="1 held-out rows are also trained on"):
        distill.run(judged(store, ["z", "b"]))


def test_only_held_out_rows_judge(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a table of its own, no training row is taken away for eval_loss."""
    seen: list[pa.Table] = []

    def stop(config: object, stage: object, learner: object, base: object, examples: pa.Table, *rest: object) -> None:
        seen.append(examples)
        raise KeyboardInterrupt

    monkeypatch.setattr("headtail.stages.distill.launch.train_student", stop)
    with pytest.raises(KeyboardInterrupt):
        distill.run(judged(store, ["y", "z"]))
    assert seen[0]["held_out"].to_pylist() == [False] * 3 + [True] * 2


def test_rows_that_stop_training_count_as_learnt_those_that_are_sealed_do_not(store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate leaves out what early stopping read, and tests on what it never read."""
    config = judged(store, [f"people {i} say" for i in range(60)])
    labels = config.sets[0].held_out
    table = output_table(store, *load_ref(store, labels))
    sealed, _ = seal_labels(store, labels, table, 0.5)
    assert 0 < sealed < 60
    launch, finish = "headtail.stages.distill.launch", "headtail.stages.distill.finish"
    monkeypatch.setattr(f"{launch}.train_student", lambda *some: None)
    monkeypatch.setattr(f"{finish}.finish_student", lambda *some: "D")
    monkeypatch.setattr(f"{finish}.record_figures", lambda *some: DistillResult(digest="D"))
    student = distill.run(config)
    answers = keep(store, "precompute", "s", {}, result=answered_by(student.path, "D", "batch_student"))
    learnt = training_keys(store, load_receipt(store, "precompute", answers.path, AnswererResult))
    assert learnt == set(ROWS["query_key"].to_pylist()) | (set(table["query_key"].to_pylist()) - sealed_keys(store))


def test_identity_is_the_receipts(store: Storage, tmp_path: Path) -> None:
    config = judged(store, ["y"])
    assert distill.student_fingerprint(config) == distill.student_fingerprint(config.model_copy(update={"log_steps": 7}))
    assert distill.student_fingerprint(config) != distill.student_fingerprint(config.model_copy(update={"seed": 7}))


def test_early_stopping_without_held_out_rows_is_refused(store: Storage) -> None:
    config = judged(store, ["y"])
    alone = config.model_copy(
        update={"sets": (config.sets[0].model_copy(update={"held_out": ""}),), "held_out_share": 0, "early_stopping": distill.Stopping()}
    )
    with pytest.raises(ConfigError, match="needs held-out rows"):
        distill.run(alone)
