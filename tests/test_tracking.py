"""MLflow through our door: where it is, prompts and models registered once, secrets nowhere."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest

from headtail.config import TrackingConfig
from headtail.task import Task
from headtail.tracking import Tracker, tracking_uri


def test_uri_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(TrackingConfig(), str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env")
    assert tracking_uri(TrackingConfig(), str(tmp_path)) == "http://env"
    assert tracking_uri(TrackingConfig(uri="http://config"), str(tmp_path)) == "http://config"


@pytest.fixture
def tracker(tmp_path: Path) -> Tracker:
    return Tracker(TrackingConfig(), str(tmp_path))


def test_prompt_versions_only_when_changed(tracker: Tracker, segmentation: Task) -> None:
    tags = {"fingerprint": segmentation.fingerprint}
    assert tracker.prompt("p", segmentation.template, tags) == "p/1"
    assert tracker.prompt("p", segmentation.template, tags) == "p/1"
    assert tracker.prompt("p", segmentation.template + "!", {"fingerprint": "other"}) == "p/2"


def test_models_aliases_and_nesting(tracker: Tracker) -> None:
    parent = tracker.start("loop")
    child = tracker.start("plan", parent=parent)
    tracker.end(child)
    tracker.end(parent)
    assert tracker.model_version("m", "file:///x", child, {"fingerprint": "f1"}, "first") == "1"
    assert tracker.model_version("m", "file:///x", child, {"fingerprint": "f1"}, "again") == "1"
    assert tracker.model_version("m", "file:///y", child, {"fingerprint": "f2"}, "second") == "2"
    tracker.alias("m", "champion", "2")
    client = mlflow.MlflowClient(tracker.uri)
    assert (
        client.get_model_version_by_alias("m", "champion").version == "2" or client.get_model_version_by_alias("m", "champion").version == 2
    )
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == parent


def test_disabled_tracker_is_silent(tmp_path: Path) -> None:
    off = Tracker(TrackingConfig(enabled=False), str(tmp_path))
    assert off.start("x") == ""
    off.log("", {"a": 1}, {"b": 2.0})
    assert not (tmp_path / "mlflow.db").exists()
