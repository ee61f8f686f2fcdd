"""MLflow through our door: where it is, prompts and models registered once, and no champion without evidence."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow
import pytest

from headtail.config import TrackingConfig
from headtail.errors import GateRefused
from headtail.evidence import read_evidence
from headtail.task import Task
from headtail.tracking import Tracker, tracking_uri
from test_evidence import evidence


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
    tracker.challenge("m", "2")
    client = mlflow.MlflowClient(tracker.uri)
    assert holder(tracker, "challenger") == "2"
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == parent


def holder(tracker: Tracker, alias: str, name: str = "m") -> str:
    """The version an alias points to; empty when there is none. Asked of MLflow itself."""
    aliases = mlflow.MlflowClient(tracker.uri).get_registered_model(name).aliases
    return str(aliases.get(alias, ""))


def register(tracker: Tracker, mark: str = "d") -> str:
    """A student of the store as a version of model m."""
    return tracker.model_version("m", f"file:///{mark}", "", {"fingerprint": mark, "path": f"distill/{mark * 16}"}, mark)


def test_champion_moves_on_evidence_that_is_kept_with_the_version(tracker: Tracker) -> None:
    first, second = register(tracker), register(tracker, "f")
    assert tracker.promote("m", first, evidence())
    assert holder(tracker, "champion") == first == "1"
    tags = mlflow.MlflowClient(tracker.uri).get_model_version("m", first).tags
    assert tags["gate.passed"] == "true"
    assert tags["gate.quality.tail"].startswith("holds; tail: 0.933 on 300 labels")
    assert json.loads(tags["gate.evidence"])["data"]["rows"] == "0" * 64
    kept = tracker.evidence("m")
    assert kept == read_evidence(evidence())
    assert tracker.promote("m", second, evidence(candidate="distill/" + "f" * 16))
    assert holder(tracker, "champion") == second


def test_champion_does_not_move_without_evidence(tracker: Tracker) -> None:
    """Nothing, half of it, a refusal, a forged verdict, another student's: the alias stays where it was, and it is said why."""
    assert tracker.promote("m", register(tracker), evidence())
    version = register(tracker, "f")
    own = {"candidate": "distill/" + "f" * 16}
    refused = evidence(("head", 290, 300, 0.9), ("tail", 210, 240, 0.85), **own)
    forged = {**refused, "passed": True, "claims": [{**claim, "passed": True} for claim in refused["claims"]]}
    for given, why in (
        ({}, "not complete: field passed is required"),
        ({key: value for key, value in evidence(**own).items() if key != "claims"}, "field claims is required"),
        (evidence(**own, data={}), "champion does not move; missing: no digest of the rows; no digest of the gold"),
        (refused, r"missing: tail: 993 more labels, or 1\.6 points"),
        (forged, "tail: said to hold, but its own figures do not show it"),
        (evidence(), "evidence of this version: what was given is of distill/dddd"),
    ):
        with pytest.raises(GateRefused, match=why):
            tracker.promote("m", version, given)
        assert holder(tracker, "champion") == "1"
    tags = mlflow.MlflowClient(tracker.uri).get_model_version("m", version).tags
    assert tags["gate.passed"] == "false"  # of what was given last for this version: the forgery, seen through
    assert "do not show it" in tags["gate.lacking"]
    assert not tracker.broken


def test_a_refusal_is_kept_with_the_version_too(tracker: Tracker) -> None:
    version = register(tracker)
    with pytest.raises(GateRefused):
        tracker.promote("m", version, evidence(("tail", 210, 240, 0.85)))
    tracker.challenge("m", version)
    kept = tracker.evidence("m", "challenger")
    assert kept is not None
    assert not kept.passed
    assert (holder(tracker, "champion"), tracker.evidence("m")) == ("", None)
    assert tracker.promote("m", version, evidence(("unseen", 300, 300, 0.85)))
    tags = mlflow.MlflowClient(tracker.uri).get_model_version("m", version).tags
    assert "gate.quality.unseen" in tags
    assert "gate.quality.tail" not in tags  # of the earlier gate


def test_a_version_of_unknown_origin_is_not_promoted(tracker: Tracker) -> None:
    version = tracker.model_version("m", "file:///x", "", {"fingerprint": "x"}, "by hand")
    with pytest.raises(GateRefused, match="of unknown origin"):
        tracker.promote("m", version, evidence())
    assert holder(tracker, "champion") == ""


def test_without_mlflow_a_refusal_is_still_one(tmp_path: Path) -> None:
    off = Tracker(TrackingConfig(enabled=False), str(tmp_path))
    assert not off.promote("m", "", evidence())
    with pytest.raises(GateRefused):
        off.promote("m", "", evidence(("tail", 210, 240, 0.85)))
    away = Tracker(TrackingConfig(), str(tmp_path))
    away._client = object()  # a server that answers nothing we know
    assert not away.promote("m", "1", evidence())
    with pytest.raises(GateRefused):
        away.promote("m", "1", evidence(("tail", 210, 240, 0.85)))
    assert away.broken


def test_disabled_tracker_is_silent(tmp_path: Path) -> None:
    off = Tracker(TrackingConfig(enabled=False), str(tmp_path))
    assert off.start("x") == ""
    off.log("", {"a": 1}, {"b": 2.0})
    assert not (tmp_path / "mlflow.db").exists()
