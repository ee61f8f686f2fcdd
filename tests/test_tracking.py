"""MLflow through `Tracker`: where it is, prompts and models registered once, and no champion without evidence."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import pytest

from headtail.adapters import tracking
from headtail.adapters.storage import open_storage
from headtail.adapters.storage.receipts import load_receipt
from headtail.adapters.tracking import Tracker, tracking_uri
from headtail.core.config import StageConfig, TrackingConfig
from headtail.core.errors import GateRejected
from headtail.core.evidence import read_evidence
from headtail.core.receipt import StageResult
from headtail.core.task import Task
from headtail.stages.base import Stage, run_once
from test_evidence import evidence


def test_uri_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(TrackingConfig(), str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env")
    assert tracking_uri(TrackingConfig(), str(tmp_path)) == "http://env"
    assert tracking_uri(TrackingConfig(uri="http://config"), str(tmp_path)) == "http://config"


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracking database with nothing in it: MLflow takes seconds to make its tables."""
    folder = tmp_path_factory.mktemp("tables")
    assert Tracker(TrackingConfig(experiment="other"), str(folder)).client
    return folder / "mlflow.db"


@pytest.fixture
def tracker(tmp_path: Path, tables: Path) -> Tracker:
    shutil.copy(tables, tmp_path)
    return Tracker(TrackingConfig(), str(tmp_path))


def test_prompt_versions_only_when_changed(tracker: Tracker, segmentation: Task) -> None:
    tags = {"fingerprint": segmentation.fingerprint}
    assert tracker.prompt("p", segmentation.template, tags) == "p/1"
    assert tracker.prompt("p", segmentation.template, tags) == "p/1"
    assert tracker.prompt("p", segmentation.template + "!", {"fingerprint": "other"}) == "p/2"


def test_models_aliases_and_nesting(tracker: Tracker) -> None:
    parent = tracker.start("pipeline")
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
    assert tags["gate.quality.tail"].startswith("passed; tail: 0.933 on 300 labels")
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
    forged = {**refused, "passed": True, "criteria": [{**criterion, "passed": True} for criterion in refused["criteria"]]}
    for given, why in (
        ({}, "not complete: field passed is required"),
        ({key: value for key, value in evidence(**own).items() if key != "criteria"}, "field criteria is required"),
        (evidence(**own, data={}), "champion does not move; missing: no digest of the rows; no digest of the human labels"),
        (refused, r"missing: tail: 993 more labels, or 1\.6 points"),
        (forged, "tail: marked as passed, but its own figures do not show it"),
        (evidence(), "evidence of this version: the given evidence is of distill/dddd"),
    ):
        with pytest.raises(GateRejected, match=why):
            tracker.promote("m", version, given)
        assert holder(tracker, "champion") == "1"
    tags = mlflow.MlflowClient(tracker.uri).get_model_version("m", version).tags
    assert tags["gate.passed"] == "false"  # of what was given last for this version: the forgery, seen through
    assert "do not show it" in tags["gate.missing"]
    assert not tracker.broken


def test_a_rejection_is_kept_with_the_version_too(tracker: Tracker) -> None:
    version = register(tracker)
    with pytest.raises(GateRejected):
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
    with pytest.raises(GateRejected, match="of unknown origin"):
        tracker.promote("m", version, evidence())
    assert holder(tracker, "champion") == ""


def test_without_mlflow_a_rejection_is_still_one(tmp_path: Path) -> None:
    off = Tracker(TrackingConfig(enabled=False), str(tmp_path))
    assert not off.promote("m", "", evidence())
    with pytest.raises(GateRejected):
        off.promote("m", "", evidence(("tail", 210, 240, 0.85)))
    away = Tracker(TrackingConfig(), str(tmp_path))
    away._client = object()  # a server that answers nothing we know
    assert not away.promote("m", "1", evidence())
    with pytest.raises(GateRejected):
        away.promote("m", "1", evidence(("tail", 210, 240, 0.85)))
    assert away.broken


def test_disabled_tracker_is_silent(tmp_path: Path) -> None:
    off = Tracker(TrackingConfig(enabled=False), str(tmp_path))
    assert off.start("x") == ""
    off.log("", {"a": 1}, {"b": 2.0})
    assert not (tmp_path / "mlflow.db").exists()


@contextmanager
def server(answer: Callable[[str, str], tuple[int, str]]) -> Iterator[tuple[str, list[str]]]:
    """An HTTP server that answers (method, path) with a status and a text; its address, and the paths it was asked."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def _reply(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            seen.append(self.path.split("?")[0])
            status, text = answer(self.command, seen[-1])
            self.send_response(status)
            self.send_header("Content-Type", "application/json" if text.startswith("{") else "text/html")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_POST = do_PATCH = do_PUT = _reply  # noqa: N815 - the standard library's names

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_address[1]}", seen
    made.shutdown()
    made.server_close()


def _made_three(stage: Stage) -> StageResult:
    stage.rows["made"] = 3
    return StageResult()


def stages(root: str, uri: str, count: int) -> list[str]:
    """Run ids of a job of `count` stages, each with a receipt that is whole."""
    found = []
    for number in range(count):
        config = StageConfig(root=root, tracking=TrackingConfig(uri=uri))
        run_once("demo", StageResult, config, _made_three, version=number + 1)
        receipt = load_receipt(open_storage(root), "demo")
        assert receipt.rows == {"made": 3}
        found.append(receipt.run_id)
    return found


def test_a_black_hole_costs_a_job_a_bounded_time_in_all(
    root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It accepts and never answers: MLflow's own time-outs and retries would cost each stage half a minute."""
    monkeypatch.setattr(tracking, "LOST_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as hole:
        uri = f"http://127.0.0.1:{hole.getsockname()[1]}"
        assert stages(root, uri, 4) == ["", "", "", ""]
        assert tracking._losses(uri).seconds >= 0.5
        asked = len([thread for thread in threading.enumerate() if thread.name == "headtail-tracking"])
        assert asked == 1, "a stage asked again after all that may be lost was lost"
    said = capsys.readouterr().err
    assert said.count("warning: MLflow") == 1
    assert "no answer" in said
    assert "MLFLOW_TRACKING_URI" in said


def test_slow_answers_are_counted_over_all_stages(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "SLOW_S", 0.0)
    monkeypatch.setattr(tracking, "LOST_S", 0.3)

    def late(*_: str) -> tuple[int, str]:
        time.sleep(0.1)
        return 200, "{}"

    with server(late) as (uri, seen):
        stages(root, uri, 10)
        assert len(seen) <= 6


def test_a_page_instead_of_mlflow_is_said_in_one_line(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = "<html>" + "<p>Please \x1b[2J log in</p>\n" * 500
    for status in (200, 404):
        with server(lambda *_, status=status: (status, page)) as (uri, _):
            assert stages(f"{root}/{status}", uri, 2) == ["", ""]
        said = capsys.readouterr().err
        assert said.count("warning: MLflow") == 1
        warning = next(line for line in said.splitlines() if "warning: MLflow" in line)
        assert len(warning) < 700
        assert "going on without it" in warning
        assert "\x1b" not in warning, "no server writes to the terminal as it likes"
        assert warning.endswith(" [...]")
        assert warning.removesuffix(" [...]").split()[-1] in page.replace("\x1b", "\ufffd").split() or status == 404, "cut between words"


def test_an_older_server_gets_what_it_knows(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    """MLflow 1: no dataset inputs, no prompts. Runs, figures and tags are logged all the same."""
    run = '{"run": {"info": {"run_id": "r1", "run_uuid": "r1", "experiment_id": "7", "artifact_uri": "%s"}, "data": {}}}'
    known = {
        "experiments/get-by-name": '{"experiment": {"experiment_id": "7", "name": "headtail", "lifecycle_stage": "active"}}',
        "runs/create": run % root,
        "runs/get": run % root,
        "runs/log-batch": "{}",
        "runs/update": run % root,
    }

    def answer(method: str, path: str) -> tuple[int, str]:
        text = known.get("/".join(path.split("/")[-2:]))
        return (200, text) if text else (404, "<html>Not Found</html>")

    with server(answer) as (uri, seen):
        tracker = Tracker(TrackingConfig(uri=uri), root)
        assert tracker.start("x") == "r1"
        tracker.dataset("r1", "d", "digest", "file:///d", "training")
        tracker.dataset("r1", "d", "digest", "file:///d", "training")
        assert tracker.prompt("p", "text", {"fingerprint": "f"}) == ""
        tracker.log("r1", {"a": 1}, {"b": 2.0})
        tracker.end("r1")
    assert not tracker.broken
    assert {"runs/log-inputs", "runs/log-batch", "runs/update"} <= {path.split("mlflow/")[1] for path in seen}
    said = capsys.readouterr().err
    assert said.count("warning: MLflow") == 1
    assert "older than this MLflow client" in said


def _first_job(root: str, gate: Any) -> None:
    gate.wait()
    os._exit(0 if Tracker(TrackingConfig(), root).start("x") else 1)


def test_first_jobs_at_once_on_a_new_database(tmp_path: Path) -> None:
    """MLflow makes the tables of a new database without a lock."""
    forked = multiprocessing.get_context("fork")
    gate = forked.Barrier(3)
    jobs = [forked.Process(target=_first_job, args=(str(tmp_path), gate)) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select count(*), count(distinct experiment_id) from runs").fetchone() == (3, 1)
