"""MLflow's evaluation runs: real MLflow on SQLite, in the process of its own that makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from headtail.adapters.evaluation_runs import EvaluatedSource, log_evaluations
from headtail.adapters.tracking import Tracker
from headtail.core.config import TrackingConfig

RIGHT, WRONG = {"intent": "price"}, {"intent": "how_to"}


@pytest.mark.slow
def test_two_answer_sources_lie_side_by_side_in_mlflow(tmp_path: Path) -> None:
    tracker = Tracker(TrackingConfig(uri=f"sqlite:///{tmp_path}/m.db"), str(tmp_path))
    run, queries = tracker.start("judge"), [f"q{i}" for i in range(6)]
    wanted: dict[str, Any] = dict.fromkeys(queries, RIGHT)
    sources = [
        EvaluatedSource("batch_student", "m1", dict.fromkeys(queries, RIGHT), {"judge": dict.fromkeys(queries, 1.0)}),
        EvaluatedSource("teacher", "m2", dict.fromkeys(queries, WRONG), {"judge": dict.fromkeys(queries, 0.25)}),
    ]
    assert log_evaluations(tracker, run, "headtail.query_intent.ab12", wanted, sources)
    assert log_evaluations(tracker, run, "headtail.query_intent.ab12", wanted, sources[:1])
    client = MlflowClient(tracker.uri)
    experiment = client.get_experiment_by_name("headtail")
    runs = client.search_runs([experiment.experiment_id], "tags.`mlflow.runType` = 'genai_evaluate'")
    assert sorted(found.info.run_name for found in runs) == ["batch_student", "batch_student", "teacher"]
    assert {found.data.metrics["judge/mean"] for found in runs} == {1.0, 0.25}
    assert {found.data.tags["mlflow.parentRunId"] for found in runs} == {run}
    assert {found.inputs.dataset_inputs[0].dataset.name for found in runs} == {"headtail.query_intent.ab12"}
    assert len({found.inputs.dataset_inputs[0].dataset.digest for found in runs}) == 1, "one data set, so that runs are compared"
    assert not log_evaluations(tracker, run, "x", wanted, sources, limit_s=0.01), "a server that is too slow stops nothing"
