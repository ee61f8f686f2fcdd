"""A sweep: every combination once, the best by what was measured, nothing trained twice, all under one parent run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headtail.core.config import TrackingConfig
from headtail.core.errors import ConfigError, InputError, TrainingError
from headtail.core.receipt import Receipt, StageResult
from headtail.stages import distill
from headtail.stages.base import Stage, run_once
from headtail.stages.distill import sweep


def fake(losses: dict[float, float | None], calls: list[float]) -> Any:
    """distill.run with the training left out: a student's loss by its learning rate; None diverges."""

    def run(config: distill.Config) -> Receipt:
        def work(stage: Stage) -> StageResult:
            calls.append(config.learning_rate)
            loss = losses[config.learning_rate]
            if loss is None:
                raise TrainingError("the loss is no longer a number", where="step 3")
            stage.metrics |= {"eval_loss": loss, "steps": 10.0}
            return StageResult()

        return run_once("distill", StageResult, config, work, version=2)

    return run


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "student_fingerprint", lambda config: f"{config.learning_rate}/{config.seed}")


def config(root: str, rates: tuple[float, ...], **more: Any) -> sweep.Config:
    return sweep.Config(root=root, grid={"learning_rate": rates}, **more)


def test_every_combination_once_and_checked_before_any_training(root: str) -> None:
    tried = sweep.trials(sweep.Config(root=root, grid={"lora.rank": (4, 8), "seed": (0, 1, 2)}))
    assert [(t.config.lora.rank, t.config.seed) for t in tried if t.config.lora] == [(r, s) for r in (4, 8) for s in (0, 1, 2)]
    assert all(t.config.lora and t.config.lora.alpha == 32 for t in tried), "other fields of a group stay"
    assert tried[1].label == "lora.rank=4, seed=1"
    with pytest.raises(ConfigError, match="did you mean learning_rate"):
        sweep.trials(sweep.Config(root=root, grid={"learning_rat": (1,)}))
    with pytest.raises(ConfigError, match="1 to 256 trials"):
        sweep.trials(sweep.Config(root=root, grid={"seed": ()}))


def test_the_best_is_named_and_a_failure_told(root: str, plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    monkeypatch.setattr(distill, "run", fake({0.1: 0.9, 0.2: 0.4, 0.4: None}, calls))
    made = sweep.run(config(root, (0.1, 0.2, 0.4), tracking=TrackingConfig(enabled=False)))
    assert made.result.best_values == {"learning_rate": 0.2}
    assert made.metrics["best/eval_loss"] == 0.4
    assert made.rows == {"trials": 3, "failed": 1, "reused": 0}
    trials = json.loads((Path(root) / made.output("trials").path).read_text())
    assert "no longer a number" in trials[2]["reason"]
    assert trials[1]["path"] == made.result.best


def test_all_failed_is_an_error(root: str, plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "run", fake({0.4: None}, []))
    with pytest.raises(TrainingError, match="every trial failed"):
        sweep.run(config(root, (0.4,), tracking=TrackingConfig(enabled=False)))


def test_a_broken_sweep_goes_on_under_one_parent(root: str, plain: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Killed at its third trial, run again: two are not trained again, and MLflow shows all three under the new parent."""
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    calls: list[float] = []
    run = fake({0.1: 0.9, 0.2: 0.4, 0.4: 0.5}, calls)

    def killed(trial: distill.Config) -> Receipt:
        if trial.learning_rate == 0.4:
            raise KeyboardInterrupt
        found: Receipt = run(trial)
        return found

    monkeypatch.setattr(distill, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(config(root, (0.1, 0.2, 0.4), tracking=tracking))
    monkeypatch.setattr(distill, "run", run)
    made = sweep.run(config(root, (0.1, 0.2, 0.4), tracking=tracking))
    assert calls == [0.1, 0.2, 0.4]
    assert made.rows["reused"] == 2
    import mlflow

    client = mlflow.MlflowClient(tracking.uri, tracking.uri)
    experiment = client.get_experiment_by_name("headtail")
    runs = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{made.run_id}'")
    assert sorted(run.info.run_name for run in runs) == [
        "learning_rate=0.1 (done before)",
        "learning_rate=0.2 (done before)",
        "learning_rate=0.4",
    ]
    assert {run.data.metrics["eval_loss"] for run in runs} == {0.9, 0.4, 0.5}
    assert sweep.run(config(root, (0.1, 0.2, 0.4), tracking=tracking)).reused


def test_a_missing_training_set_is_told_before_any_training(root: str) -> None:
    with pytest.raises(InputError, match="has not been run"):
        sweep.run(config(root, (0.1,), tracking=TrackingConfig(enabled=False)))
