"""jobs/: every shipped config is valid, every job says how it is submitted, and one really is: to a real cluster, with a token."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from headtail import cli
from headtail.adapters.storage import open_storage, read_table
from headtail.adapters.storage.receipts import load_receipt
from headtail.core.config import TrackingConfig
from headtail.examples import example_data
from ports import free_port
from ray_jobs import OFF, REPO, Cluster, ask, entry, ray, submit, submit_all
from timescale import limit

JOBS = sorted((REPO / "jobs").glob("*.py"))
CONFIGS = sorted((REPO / "jobs" / "configs").glob("*.yaml"))


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def stage_of(job: Path) -> str:
    found = re.search(r'job\("(\w+)"\)', job.read_text(encoding="utf-8"))
    assert found, f"{job.name} does not call job()"
    return found[1]


@pytest.mark.parametrize("path", CONFIGS, ids=names(CONFIGS))
def test_shipped_config_is_valid(path: Path) -> None:
    stage = stage_of(REPO / "jobs" / f"{path.stem.split('.')[0]}.py")
    config = cli.read_config(stage, path, None, None)
    assert config.root == ("build/quickstart" if ".laptop" in path.name else "s3://your-bucket/headtail")


@pytest.mark.parametrize("path", CONFIGS, ids=names(CONFIGS))
def test_every_field_of_a_shipped_config_is_explained(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "headtail fields" in text
    bare = [line for line in text.splitlines() if re.match(r"\s*-? ?[\w.]+: *[^\s#{]", line) and "#" not in line and "{" not in line]
    assert not bare
    assert len(yaml.safe_load(text)) > 1


@pytest.mark.parametrize("path", JOBS, ids=names(JOBS))
def test_every_job_says_how_it_is_submitted(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.fullmatch(r"[a-z]+(_[a-z]+)+", path.stem), "a job is verb_noun.py"
    for size in ("laptop", "cluster"):
        assert f"jobs/configs/{path.stem}.{size}.yaml" in text
        assert (REPO / "jobs" / "configs" / f"{path.stem}.{size}.yaml").is_file()
    assert "ray job submit --runtime-env jobs/runtime_env.yaml" in text
    assert f"python jobs/{path.stem}.py" in text
    assert stage_of(path) in {*cli.STAGES, "serve"}


@pytest.mark.parametrize("path", JOBS, ids=names(JOBS))
def test_a_job_refuses_an_unknown_field_and_says_which(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([stage_of(path), "--set", "wrokers=2"])
    assert left.value.code == 2
    assert "wrokers" in capsys.readouterr().err


# One submission, in the data's order; the server is a job beside the replay.
STAGES: dict[str, tuple[str, ...]] = {
    "ingest_log": ("columns.time=time",),
    "plan_head": ("head.rows=30", "teacher_sample_rows=40", "max_student_rows=20"),
    "precompute_answers": ("model.engine=transformers",),  # vLLM under a submission: run_pipeline's teacher
    "evaluate_answers": (),
    "curate_training_set": ("min_confidence=0",),
    "publish_snapshot": ("evaluation=evaluate",),
}
# Not submitted. train_student: run_pipeline, which the fixture of test_pipeline submits, trains two students, serves one and replays.
# train_teacher, sweep_students, ablate_curation, train_reference: trainings as train_student's. gate_student and calibrate_student want
# a student's answers to labelled queries, one more precompute; run_pipeline goes through the same stages. measure_gap: precompute and
# evaluate twice over. judge_answers: a precompute by a model that can judge, which no shipped one can. collect_feedback, compare_shadow,
# analyse_experiment: want callers, and only read tables. simulate_designs: reads tables alone.
LEFT = {
    *("train_student", "train_teacher", "sweep_students", "ablate_curation", "train_reference"),
    *("gate_student", "calibrate_student", "measure_gap", "judge_answers", "collect_feedback", "compare_shadow", "analyse_experiment"),
    "simulate_designs",
}


def test_every_job_is_submitted_or_left_out_for_a_reason() -> None:
    assert {*STAGES, *LEFT, "serve_release", "replay_log", "run_pipeline"} == {path.stem for path in JOBS}


@pytest.mark.slow
def test_jobs_run_under_ray_job_submit(head: Cluster, tmp_path: Path) -> None:
    """Each job once on real engines, in small, in the data's order, with a token; the server as a job beside the replay."""
    root = str(tmp_path / "store")
    made = example_data.run(
        example_data.Config(root=root, tracking=TrackingConfig(enabled=False), events=3000, days=2, universe=800, labels=60)
    )
    store, port = open_storage(root), free_port()
    labels = store.uri(made.output("human_labels_query_segmentation").path)
    log = ("log=" + store.uri(f"{made.path}/log"), f"labels={labels}")
    found = dict(zip(STAGES, submit_all(head, root, {**STAGES, "ingest_log": STAGES["ingest_log"] + log}), strict=True))
    planned = load_receipt(store, "plan")  # the code travels with the job, what it makes lands in the store
    assert found["plan_head"]["fingerprint"] == planned.fingerprint
    assert read_table(store, planned.output("head").path).num_rows == planned.rows["head"] > 0
    rows = found["publish_snapshot"]["rows"]
    assert rows["published"] + rows["left_out"] == found["precompute_answers"]["rows"]["answered"] > 0  # guardrails withhold some
    assert rows["published"] > 0.8 * found["precompute_answers"]["rows"]["answered"]
    with served(head, root, port):  # without a student
        (replayed,) = submit_all(head, root, {"replay_log": (f"url=http://127.0.0.1:{port}", "requests=40")})
    assert replayed["rows"]["requests"] == 40
    assert replayed["metrics"]["errors"] == 0


@contextmanager
def served(cluster: Cluster, root: str, port: int) -> Iterator[None]:
    """serve_release as a job that is not waited for; stopped with `ray job stop`."""
    flags = ["--root", root, "--set", f"port={port}"]
    name = ["--address", cluster.address, "--submission-id", "serving", "--no-wait", "--runtime-env", "jobs/runtime_env.yaml"]
    begun = ray(cluster, "job", "submit", *name, "--", *entry("serve_release", *flags))
    assert begun.returncode == 0, begun.stdout + begun.stderr
    try:
        end = time.monotonic() + limit(180)
        while "serving release" not in (said := ask(cluster, "/api/jobs/serving/logs").text):
            assert time.monotonic() < end, said
            time.sleep(0.5)
        yield
    finally:
        ray(cluster, "job", "stop", "--address", cluster.address, "serving")


@pytest.mark.slow
def test_a_failed_job_fails_its_submission(head: Cluster, tmp_path: Path) -> None:
    done = submit(head, *entry("plan_head", "--root", str(tmp_path / "empty"), "--set", OFF))
    assert done.returncode == 1
    assert "ingest has not been run in this store" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("token", ["b" * 32, ""], ids=["wrong", "none"])
def test_without_the_token_nothing_runs(head: Cluster, tmp_path: Path, token: str) -> None:
    root = tmp_path / "store"
    mode = "token" if token else "disabled"
    done = submit(head, *entry("plan_head", "--root", str(root)), RAY_AUTH_TOKEN=token, RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN_PATH="")
    assert done.returncode != 0
    assert re.search(r"authenticat|unauthori[sz]ed|40[13]", done.stdout + done.stderr, re.IGNORECASE)
    assert not root.exists()
