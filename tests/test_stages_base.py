"""A stage runs once: found when done, never half there, never mixed, and told to MLflow."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from mlflow import MlflowClient
from pydantic import Field

from headtail.adapters.storage import open_storage
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.core.config import StageConfig, TrackingConfig, execution
from headtail.core.errors import InputError
from headtail.core.receipt import StageResult
from headtail.stages.base import Stage, run_once, versions

OFF = TrackingConfig(enabled=False)


class Config(StageConfig):
    rows: int = Field(3, description="rows")
    workers: int = execution(1, "workers")


def work(stage: Stage) -> StageResult:
    stage.table("numbers", pa.table({"x": [1, 2, 3]}))
    stage.rows["made"] = 3
    stage.metrics["share"] = 0.5
    stage.note("a note")
    return StageResult()


def test_second_run_does_nothing(root: str) -> None:
    calls = []

    def counted(stage: Stage) -> StageResult:
        calls.append(stage.path)
        return work(stage)

    first = run_once("demo", StageResult, Config(root=root, tracking=OFF), counted)
    second = run_once("demo", StageResult, Config(root=root, tracking=OFF, workers=9), counted)
    assert len(calls) == 1
    assert second.reused
    assert second.model_copy(update={"reused": False}) == first
    assert output_table(open_storage(root), first, "numbers")["x"].to_pylist() == [1, 2, 3]


def test_any_change_that_matters_makes_another_folder(root: str, segmentation: object) -> None:
    base = {"root": root, "tracking": OFF}
    paths = [
        run_once("demo", StageResult, Config(**base), work).path,
        run_once("demo", StageResult, Config(**base, rows=4), work).path,
        run_once("demo", StageResult, Config(**base), work, version=2).path,
        run_once("demo", StageResult, Config(**base), work, inputs={"a": "digest"}).path,
        run_once("demo", StageResult, Config(**base), work, replaces={"rows": "resolved"}).path,
    ]
    assert len(set(paths)) == 5
    assert load_receipt(open_storage(root), "demo").path == paths[-1]


def test_an_input_of_another_normal_form_is_refused(root: str) -> None:
    made = run_once("demo", StageResult, Config(root=root, tracking=OFF), work)
    old = made.model_copy(update={"normalisation": 1})
    with pytest.raises(InputError, match="another version of the normal form") as error:
        run_once("next", StageResult, Config(root=root, tracking=OFF), work, inputs={"log": old})
    assert "run ingest" in error.value.fix
    assert run_once("next", StageResult, Config(root=root, tracking=OFF), work, inputs={"log": made}).rows == {"made": 3}


def test_a_stage_that_fails_leaves_no_receipt(root: str) -> None:
    def fails(stage: Stage) -> StageResult:
        work(stage)
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        run_once("demo", StageResult, Config(root=root, tracking=OFF), fails)
    store = open_storage(root)
    assert not store.exists("demo/LATEST")
    assert run_once("demo", StageResult, Config(root=root, tracking=OFF), work).rows == {"made": 3}


def test_mlflow_has_params_metrics_dataset_and_receipt(root: str) -> None:
    receipt = run_once("demo", StageResult, Config(root=root), work)
    client = MlflowClient(f"sqlite:///{Path(root)}/mlflow.db")
    run = client.get_run(receipt.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["rows"] == "3"
    assert run.data.metrics["share"] == 0.5
    assert run.data.metrics["rows/made"] == 3
    assert run.inputs.dataset_inputs[0].dataset.name == "demo.numbers"
    assert [a.path for a in client.list_artifacts(receipt.run_id)] == ["receipt.json"]


@pytest.mark.slow
def test_tracking_outage_does_not_stop_a_job(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config(root=root, tracking=TrackingConfig(uri="http://127.0.0.1:9"))
    receipt = run_once("demo", StageResult, config, work)
    assert receipt.rows == {"made": 3}
    assert receipt.run_id == ""
    assert capsys.readouterr().err.count("out of reach") == 1


def test_failed_run_is_marked_in_mlflow(root: str) -> None:
    def fails(stage: Stage) -> StageResult:
        raise RuntimeError(stage.run_id)

    with pytest.raises(RuntimeError) as error:
        run_once("demo", StageResult, Config(root=root), fails)
    client = MlflowClient(f"sqlite:///{Path(root)}/mlflow.db")
    assert client.get_run(str(error.value)).info.status == "FAILED"


def test_versions_name_the_packages_that_matter() -> None:
    assert {"headtail", "ray", "torch", "pyarrow"} <= versions().keys()
