"""The whole way, once round, on real engines in small: every station leaves its receipt and the thread holds."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from mlflow import MlflowClient

from conftest import SMALL_LOOP, keep
from headtail import pipeline
from headtail.adapters.storage import Storage, open_storage, read_json
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.adapters.tracking import Tracker
from headtail.cache import open_generation
from headtail.core.config import TrackingConfig, load
from headtail.core.errors import ConfigError
from headtail.core.rows import State
from headtail.core.task import EXAMPLES, Task, load_task
from headtail.engines import ModelConfig
from headtail.examples import world
from headtail.releases import registry, release
from headtail.stages import ingest, plan, precompute, publish, report
from headtail.stages.report.summary import REALTIME
from test_evidence import evidence
from timescale import limit

STATIONS = set(report.STATIONS) - {"world", "train_teacher"} - set(REALTIME)  # the small loop has one student


def test_own_task_without_gold_or_teacher_is_refused(root: str, tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("query\npizza\n")
    task = str(Path(pipeline.__file__).parent / "examples" / "pretraining" / "query_correction")
    with pytest.raises(ConfigError, match="no teacher is named and there is no gold"):
        pipeline.run(pipeline.Config(root=root, log=str(log), task=task, tracking=TrackingConfig(enabled=False)))


def test_a_student_nobody_judged_is_not_promoted() -> None:
    assert not pipeline._unproven(pipeline.Config())
    assert pipeline._unproven(pipeline.Config(promote_unproven=True))


def test_an_encoder_is_a_live_student_only_of_tasks_that_labels_can_hold(
    tmp_path: Path, segmentation: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = pipeline.Config.model_validate({"realtime": {"student": "encoder", "base": {"shape": {}}, "lora": None}}).realtime
    assert encoder is not None
    assert pipeline._fits(encoder, segmentation)
    free = load_task(Path(pipeline.__file__).parent / "examples" / "pretraining" / "query_correction")
    assert not pipeline._fits(encoder, free)
    assert "the batch student answers live too" in capsys.readouterr().err
    assert pipeline._fits(pipeline.Config().distill, free)  # a decoder writes whatever it is asked
    planned = keep(open_storage(str(tmp_path)), "plan", "p" * 16, {})
    assert pipeline._all_read(encoder, planned).encoder.queries == tuple(f"{planned.path}:{name}" for name in ("head", "teach", "rest"))
    own = encoder.model_copy(update={"encoder": encoder.encoder.model_copy(update={"queries": ("plan:rest",)})})
    assert pipeline._all_read(own, planned) is own


def test_a_students_base_and_code_are_what_the_loop_has(segmentation: Task, capsys: pytest.CaptureFixture[str]) -> None:
    """`teacher` as a base is the loop's own; answers that no code can hold are written in JSON, and that is said."""
    made = pipeline.Config.model_validate(
        {"distill": {"base": {"model": "teacher", "layers": 3}, "form": {"prompt": "bare", "answer": "code"}}}
    )
    base = pipeline._of_teacher(made.distill, ModelConfig(model="big/model", revision="ab12")).base
    assert (base.model, base.revision, base.layers) == ("big/model", "ab12", 3)
    named = pipeline.Config().distill
    assert pipeline._of_teacher(named, ModelConfig()) is named
    assert pipeline._coded(made.distill, segmentation) is made.distill
    uncoded = replace(segmentation, schema={"type": "array", "prefixItems": [{"enum": ["a", "b"]}], "items": False})
    plainer = pipeline._coded(made.distill, uncoded).form
    assert (plainer.prompt, plainer.answer) == ("bare", "json")
    assert "answers in JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"task": "own"}, "a PLACEHOLDER is trained on 70% of people's answers (gold_train_share)"),
        ({"log": "log.csv"}, "the shipped PLACEHOLDER example:teacher, trained on example data, answers your log"),
        ({}, ""),
        ({"log": "log.csv", "teacher": {"model": "big/model", "revision": "ab12"}}, ""),
    ],
)
def test_a_placeholder_is_announced_before_anything_runs(
    fields: dict[str, Any], words: str, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if fields.get("task"):
        folder = shutil.copytree(EXAMPLES / "query_intent", tmp_path / "own")
        fields = {**fields, "task": str(folder), "log": "log.csv"}

    class Ran(Exception):
        pass

    def first(*_: object, **__: object) -> None:
        raise Ran

    monkeypatch.setattr(pipeline._Loop, "station", first)
    with pytest.raises(Ran):
        pipeline.run(pipeline.Config.model_validate({"root": root, "tracking": {"enabled": False}, **fields}))
    said = " ".join(capsys.readouterr().err.split())
    assert (words in said) if words else ("PLACEHOLDER" not in said)
    assert not words or "TEACHER=" in said


@pytest.mark.parametrize("one", [False, True])
def test_one_student_alone_is_the_realtime_one_where_it_fits(store: Storage, one: bool) -> None:
    made = pipeline.Config.model_validate({"one_student": one, "realtime": {"student": "encoder", "base": {"shape": {}}, "lora": None}})
    planned = keep(store, "plan", "p" * 16, {})
    ran: dict[str, tuple[Any, dict[str, Any]]] = {}

    def station(name: str, _: Any, config: Any, **changes: Any) -> Any:
        ran[name] = (config, changes)
        return planned

    def students(config: pipeline.Config) -> dict[str, Any]:
        ran.clear()
        return pipeline._students(
            cast(pipeline._Loop, SimpleNamespace(config=config, task=load_task(config.task), station=station)), (), planned, ModelConfig()
        )

    assert list(students(made)) == (["student"] if one else ["student", "realtime"])
    assert ran["distill"][0].student == ("encoder" if one else "decoder")
    assert bool(ran["distill"][0].encoder.queries) is one
    assert ran["precompute_student"][1]["inputs"] == (f"{planned.path}:rest", f"{planned.path}:gold")
    free = str(Path(pipeline.__file__).parent / "examples" / "pretraining" / "query_correction")
    assert list(students(made.model_copy(update={"task": free}))) == ["student"]
    assert ran["distill"][0].student == "decoder"  # labels cannot hold this task's answers


def test_champion_is_a_student_whose_gate_was_passed(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused, unjudged, passed: the registry says which, and why."""
    store = open_storage(root)
    config = pipeline.Config(root=root, task="query_intent")
    tracker = Tracker(config.tracking, root)
    published = keep(store, "publish", "p" * 16, {}, facts={"release": "r"})
    students = {mark: keep(store, "distill", mark * 16, {}, facts={"base": "b"}) for mark in "xyz"}
    refused = keep(store, "gate", "0" * 16, {}, facts={"evidence": evidence(("tail", 210, 240, 0.85), candidate=students["x"].path)})
    passed = keep(store, "gate", "1" * 16, {}, facts={"evidence": evidence(candidate=students["z"].path)})
    client = tracker.client
    for mark, gated, aliases in (
        ("x", refused, {"challenger": 1}),
        ("y", None, {"challenger": 2}),
        ("z", passed, {"challenger": 2, "champion": 3}),
    ):
        registry.register(tracker, root, task=config.task, tier="student", student=students[mark], gated=gated, published=published)
        held = client.get_registered_model("headtail-query_intent-student").aliases
        assert {name: int(version) for name, version in held.items()} == aliases
    said = capsys.readouterr().err
    assert "champion does not move; missing: tail: 993 more labels" in said
    assert "the evidence is not complete" in said


def test_a_task_the_world_does_not_know_is_refused(root: str) -> None:
    task = Path(pipeline.__file__).parent / "examples" / "pretraining" / "query_correction"
    with pytest.raises(ConfigError, match="no answers for this task"):
        pipeline.run(
            load(
                pipeline.Config,
                None,
                [
                    f"root={root}",
                    f"task={task}",
                    "world.events=100",
                    "world.gold=5",
                    "tracking.enabled=false",
                    "teacher.model=example:teacher",
                ],
            )
        )


@pytest.mark.slow
def test_stations_work_on_s3(s3_root: str, cluster: None, tmp_path: Path) -> None:
    """World to published generation on S3 (moto's server stands in for it), with the null engine; then the same again."""
    off = {"root": s3_root, "tracking": TrackingConfig(enabled=False)}
    made = world.run(world.Config(**off, events=2000, days=2, universe=500, gold=40))
    store = open_storage(s3_root)
    gold = store.uri(made.output("gold_query_segmentation").path)
    ingest.run(ingest.Config(**off, log=store.uri(f"{made.path}/log"), gold=gold))
    plan.run(plan.Config(**off, teach_rows=20))
    answered = precompute.run(precompute.Config(**off, model=ModelConfig(engine="null", model="null")))
    assert answered.rows["in"] == sum(answered.rows[state] for state in State)
    published = publish.run(publish.Config(**off))
    query = output_table(store, published, "answers", ["query"])["query"][0].as_py()
    assert release.lookup(store, query, into=tmp_path / "cache")["cached"]
    assert publish.run(publish.Config(**off)).reused


@pytest.mark.slow
def test_every_station_is_there_and_rows_add_up(finished_loop: str) -> None:
    summary = read_json(open_storage(finished_loop), "summary.json")
    assert set(summary["paths"]["receipts"]) >= STATIONS
    store = open_storage(finished_loop)
    for name in ("precompute_teacher", "precompute_student"):
        rows = load_receipt(store, "precompute", summary["paths"]["receipts"][name]).rows
        assert rows["in"] == sum(rows[state] for state in State)
        assert rows["answered"] > 0.9 * rows["in"]


@pytest.mark.slow
def test_second_run_reuses_everything_and_is_quick(finished_loop: str, cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    before = release.current(open_storage(finished_loop))
    started = time.monotonic()
    first = read_json(open_storage(finished_loop), "summary.json")
    pipeline.run(load(pipeline.Config, None, [*SMALL_LOOP, f"root={finished_loop}"]))
    assert re.search(r"(\d+) stations, \1 of them found done", capsys.readouterr().err)
    assert time.monotonic() - started < limit(60)
    assert release.current(open_storage(finished_loop)) == before
    assert read_json(open_storage(finished_loop), "summary.json") == first


@pytest.mark.slow
def test_a_served_answer_can_be_walked_back_to_the_log(finished_loop: str) -> None:
    store = open_storage(finished_loop)
    summary = read_json(store, "summary.json")
    now = release.current(store)
    published = load_receipt(store, "publish", summary["paths"]["receipts"]["publish"])
    query = output_table(store, published, "answers", ["query"])["query"][0].as_py()
    assert open_generation(store, now.generation).lookup(query) is not None
    teacher = load_receipt(store, "precompute", next(path for path in published.inputs.values() if path.startswith("precompute/")))
    assert teacher.facts["model"]["digest"]
    planned = load_receipt(store, "plan", next(path for path in teacher.inputs.values() if path.startswith("plan/")).split(":")[0])
    ingested = load_receipt(store, "ingest", next(path for path in planned.inputs.values() if path.startswith("ingest/")).split(":")[0])
    assert query in output_table(store, ingested, "queries", ["query"])["query"].to_pylist()


@pytest.mark.slow
def test_mlflow_shows_the_release_within_a_minute(finished_loop: str) -> None:
    client = MlflowClient(f"sqlite:///{finished_loop}/mlflow.db")
    experiment = client.get_experiment_by_name("headtail")
    runs = client.search_runs([experiment.experiment_id])
    parent = next(run for run in runs if run.data.tags["headtail.stage"] == "loop" and run.info.status == "FINISHED")
    children = {run.data.tags["headtail.stage"] for run in runs if run.data.tags.get("mlflow.parentRunId")}
    assert children >= {"ingest", "plan", "precompute", "publish", "evaluate", "curate", "distill", "report"}
    note = parent.data.tags["mlflow.note.content"]
    assert all(part in note for part in ("release", "prompt", "teacher", "golden set", "student", "evidence", "report"))
    assert {run.info.run_name for run in runs} >= {"precompute_teacher", "precompute_student", "publish_head", "publish"}
    assert "report.html" in {a.path for a in client.list_artifacts(parent.info.run_id)}
    assert [prompt.name for prompt in client.search_prompts()] == ["headtail-query_segmentation"]
    models = client.search_registered_models()
    assert [model.name for model in models] == ["headtail-query_segmentation-student"]
    version = client.get_model_version(models[0].name, next(iter(models[0].aliases.values())))
    assert ("champion" in models[0].aliases) == (version.tags["gate.passed"] == "true")
    assert json.loads(version.tags["gate.evidence"])["candidate"] == version.tags["path"]


@pytest.mark.slow
def test_summary_is_plain_json(finished_loop: str) -> None:
    text = Path(finished_loop, "summary.json").read_bytes()
    assert Path(finished_loop, json.loads(text)["paths"]["report"]).is_file()
    reported = Path(finished_loop, "report", "LATEST")
    assert Path(finished_loop, reported.read_text(), "summary.json").read_bytes() == text
