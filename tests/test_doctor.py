"""The doctor names what would go wrong before it costs anything."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections import namedtuple
from pathlib import Path

import pytest
from fastapi import FastAPI, Response

from headtail import pipeline
from headtail.adapters.storage import local
from headtail.cli import doctor, doctor_servers, main
from headtail.cli.finding import Finding
from headtail.core.config import load_config
from headtail.engines import ModelConfig
from local_server import Running
from ports import free_port

TEACHER = "precompute_teacher.model"  # the pipeline's teacher


def found(sets: list[str]) -> dict[str, Finding]:
    return {result.check: result for result in doctor.examine(load_config(pipeline.Config, None, sets))}


def test_this_machine_passes(root: str) -> None:
    results = found([f"root={root}", f"serve.port={free_port()}", f"serve.admin_port={free_port()}"])
    assert [r for r in results.values() if r.status == "bad"] == []
    assert results["store"].status == "ok"
    assert results["vllm"].found == doctor.VLLM[0]


def test_wrong_version_is_named(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TESTED", {"ray": "1.0.0", "no-such-package": "1"})
    results = found([f"root={root}"])
    assert (results["ray"].status, results["no-such-package"].status) == ("warn", "bad")
    assert "tested with 1.0.0" in results["ray"].fix


def test_breaking_package_is_named(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}.get(name) or real(name))
    assert found([f"root={root}"])["torchvision"].status == "bad"


def test_missing_model_busy_port_bad_store(root: str) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        results = found(
            [
                f"root={root}",
                f"{TEACHER}.model=/no/such/model",
                f"serve.port={busy.getsockname()[1]}",
                "distill_batch.base.model=example:none",
            ]
        )
    assert results["teacher"].status == "bad"
    assert "/no/such/model" in results["teacher"].found
    assert results["port"].status == "bad"
    assert "example:student-base" in results["student base"].fix or "example:" in results["student base"].fix
    assert found(["root=/proc/nowhere"])["store"].status == "bad"


def test_endpoint_out_of_reach_and_no_secret_shown(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    results = found(
        [
            f"root={root}",
            f"{TEACHER}.model=m",
            f"{TEACHER}.engine=openai",
            f"{TEACHER}.base_url=http://127.0.0.1:9/v1",
        ]
    )
    assert results["teacher"].status == "bad"
    assert "sk-very-secret" not in repr(results)


def endpoint(models: Response, chat: int = 405, one: int = 404) -> FastAPI:
    """An endpoint that answers GET /v1/models, /v1/models/NAME and /v1/chat/completions so."""
    app = FastAPI()
    app.get("/v1/models")(lambda: models)
    app.get("/v1/models/{name:path}")(lambda: Response("{}", one))
    app.get("/v1/chat/completions")(lambda: Response("{}", chat))
    return app


def listed(*names: str) -> Response:
    return Response(json.dumps({"data": [{"id": name} for name in names]}), media_type="application/json")


@pytest.mark.parametrize(
    "app, status, said, cure",
    [
        (endpoint(listed("other", "org/model")), "ok", "org/model", ""),
        (endpoint(listed("other"), one=200), "ok", "org/model", ""),
        (endpoint(listed("other", "org/model-2")), "bad", "does not list org/model", "org/model-2"),
        (endpoint(listed()), "bad", "does not list org/model", "load the model"),
        (endpoint(Response("<html>")), "bad", "without a list", "model.base_url"),
        (endpoint(Response("[]")), "bad", "without a list", "model.base_url"),
        (endpoint(Response(status_code=401)), "bad", "401", "check OPENAI_API_KEY"),
        (endpoint(Response(status_code=403)), "warn", "403", "may use this one"),
        (endpoint(Response(status_code=404), chat=404), "bad", "404", "model.base_url"),
        (endpoint(Response(status_code=404)), "warn", "lists no models", "check by yourself"),
        (endpoint(Response(status_code=402)), "bad", "402", "money"),
        (endpoint(Response(status_code=429)), "warn", "429", "quota"),
        (endpoint(Response(status_code=500)), "bad", "500", "its log"),
        (endpoint(Response(status_code=400)), "bad", "400", "model.base_url"),
        (
            endpoint(Response(status_code=302, headers={"location": "https://new.example/v1"})),
            "bad",
            "https://new.example/v1",
            "final address",
        ),
    ],
)
def test_an_endpoints_status_and_models_decide_the_advice(
    app: FastAPI, status: str, said: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with Running(app) as server:
        model = ModelConfig(engine="openai", model="org/model", base_url=f"{server.url}/v1")
        result = doctor_servers.endpoint(model, "teacher")
    assert (result.status, said in result.found, cure in result.fix) == (status, True, True), result
    said_status = result.found.removeprefix(server.url)  # a port may hold the digits of a status
    assert ("OPENAI_API_KEY" in result.fix) == (("401" in said_status) or ("403" in said_status))


def test_an_endpoint_that_asks_for_a_key_where_none_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Running(endpoint(Response(status_code=401))) as server:
        model = ModelConfig(engine="openai", model="m", base_url=f"{server.url}/v1")
        assert "export OPENAI_API_KEY" in doctor_servers.endpoint(model, "teacher").fix


@pytest.mark.parametrize("url", ["127.0.0.1:8901/v1", "ftp://x/v1", "host/v1"])
def test_a_base_url_without_its_scheme_is_named_as_such(root: str, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    result = found(
        [
            f"root={root}",
            f"{TEACHER}.model=m",
            f"{TEACHER}.engine=openai",
            f"{TEACHER}.base_url={url}",
        ]
    )["teacher"]
    assert (result.status, "with http:// or https://" in result.found) == ("bad", True)


def test_a_tracking_server_that_does_not_answer_is_a_warning(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    result = found([f"root={root}"])["tracking"]
    assert (result.status, "MLFLOW_TRACKING_URI" in result.fix) == ("warn", True)


def test_the_tracking_servers_faults_are_named(root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def mlflow(healthy: int, experiment: int, kind: str) -> FastAPI:
        app = FastAPI()
        app.get("/health")(lambda: Response("OK", healthy))
        app.get("/api/2.0/mlflow/experiments/get")(lambda: Response("{}", experiment, media_type=kind))
        return app

    for app, status, said in (
        (mlflow(200, 200, "application/json"), "ok", ""),
        (mlflow(200, 401, "text/html"), "warn", "MLFLOW_TRACKING_USERNAME"),
        (mlflow(200, 404, "text/html"), "warn", "another server"),
        (mlflow(503, 200, "application/json"), "warn", "/health answers 503"),
    ):
        with Running(app) as server:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
            result = found([f"root={root}"])["tracking"]
            assert (result.status, said in result.found, bool(result.fix)) == (status, True, status != "ok")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    Path(root).mkdir(exist_ok=True)
    Path(root, "mlflow.db").write_bytes(b"no database" * 100)
    broken = found([f"root={root}"])["tracking"]
    assert (broken.status, "not a database" in broken.found, "tracking.uri" in broken.fix) == ("warn", True, True)
    assert "off" in found([f"root={root}", "tracking.enabled=false"])["tracking"].found


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "code, status, said", [(200, "ok", ""), (401, "bad", "HF_TOKEN"), (404, "bad", "model and revision"), (500, "warn", "again later")]
)
def test_a_hub_model_is_looked_for_on_the_hub(root: str, monkeypatch: pytest.MonkeyPatch, code: int, status: str, said: str) -> None:
    app = FastAPI()
    app.get("/api/models/org/name/revision/{commit}")(lambda commit: Response(commit, code))
    sets = [f"root={root}", f"{TEACHER}.model=org/name", f"{TEACHER}.revision={COMMIT}"]
    assert "HF_HUB_OFFLINE" in found(sets)["teacher on the hub"].fix  # as these tests run
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with Running(app) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        result = found(sets)["teacher on the hub"]
    assert (result.status, said in result.fix) == (status, True)
    gone = found(sets)["teacher on the hub"]
    assert (gone.status, "cannot be reached" in gone.found, "HF_ENDPOINT" in gone.fix) == ("bad", True, True)


def test_a_hub_model_in_the_cache_needs_no_hub(root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    kept = tmp_path / "models--org--name" / "snapshots" / COMMIT
    kept.mkdir(parents=True)
    (kept / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    result = found([f"root={root}", f"{TEACHER}.model=org/name", f"{TEACHER}.revision={COMMIT}"])["teacher on the hub"]
    assert (result.status, "hub cache" in result.found) == ("ok", True)


def test_the_log_and_the_labels_are_read(root: str, tmp_path: Path) -> None:
    log, labels = tmp_path / "log.csv", tmp_path / "labels.csv"
    log.write_text("query,n\npizza,3\n")
    labels.write_text("query,answr\npizza,{}\n")
    results = found([f"root={root}", f"log={log}", f"labels={labels}"])
    assert (results["log"].status, "businesses" in results["log"].fix) == ("warn", True)  # the shipped task's side inputs
    bad = results["labels"]
    assert (bad.status, "no column 'answer'" in bad.found, "answr" in bad.fix) == ("bad", True, True)
    log.write_text("quer,businesses\npizza,x\n")
    bad = found([f"root={root}", f"log={log}"])["log"]
    assert (bad.status, "did you mean 'quer'" in bad.fix) == ("bad", True)
    missing = found([f"root={root}", f"log={tmp_path}/none.csv"])["log"]
    assert (missing.status, "not found" in missing.found) == ("bad", True)
    assert found([f"root={root}"])["log"].status == "ok"
    assert found([f"root={root}", "task=nosuch"])["task"].status == "bad"


def test_a_teacher_that_nobody_named_is_said_before_a_run(root: str, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(
        "name: own\nanswer: {type: object, properties: {a: {enum: [x, y]}}, required: [a]}\n"
        "score: {kind: label, field: a}\nfallback: {a: x}\n"
    )
    (tmp_path / "prompt.j2").write_text("{% block user %}{{ query }}{% endblock %}")
    (tmp_path / "log.csv").write_text("query\npizza\n")
    (tmp_path / "labels.csv").write_text("query,answer\npizza,x\n")
    own = [f"root={root}", f"task={tmp_path}", f"log={tmp_path}/log.csv"]
    missing, trained = found(own)["teacher"], found([*own, f"labels={tmp_path}/labels.csv"])["teacher"]
    assert (missing.status, "no human labels" in missing.found, "precompute_teacher.model.model" in missing.fix) == ("bad", True, True)
    assert (trained.status, "trained on the human labels" in trained.found) == ("warn", True)
    shipped = found([f"root={root}", f"log={tmp_path}/log.csv"])["teacher"]
    assert (shipped.status, "example data" in shipped.found) == ("warn", True)


def test_the_command_prints_cures_to_stdout_and_fails_on_a_bad_one(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["doctor", "--root", root, "--set", "log=/no/such.csv", "--set", f"serve.port={free_port()}"])
    assert done.value.code == 1
    assert "log" in capsys.readouterr().out
    main(["doctor", "--root", root, "--set", f"serve.port={free_port()}", "--set", f"serve.admin_port={free_port()}", "--json"])
    assert {"log", "task", "tracking"} <= {one["check"] for one in json.loads(capsys.readouterr().out)}


def test_cluster_without_token_is_named(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert found([f"root={root}"])["cluster"].status == "warn"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 32)
    assert found([f"root={root}"])["cluster"].status == "ok"


def test_table_puts_the_worst_first() -> None:
    table = doctor.findings_table([Finding(check="a", status="ok", found=""), Finding(check="b", status="bad", found="")])
    assert list(table.columns[1].cells) == ["b", "a"]


def failing(*_: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def test_the_store_is_tried_and_left_as_it_was(root: str, s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = found([f"root={root}"])
    assert (results["store"].status, results["store"].found) == ("ok", f"{root}; names by hard link")
    assert list(Path(root).iterdir()) == []
    assert "conditional puts hold" in found([f"root={s3_root}"])["store"].found
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", failing)
        assert found([f"root={root}"])["store"].found == f"{root}; names by rename without overwriting"
        patch.setattr(local, "_rename_new", lambda source, target: errno.EINVAL)
        none = found([f"root={root}"])["store"]
        assert (none.status, "neither hard links" in none.found, "--root" in none.fix) == ("bad", True, True)
        assert list(Path(root).iterdir()) == []


def test_a_store_without_a_bucket_or_keys_is_named(s3_root: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = found(["root=s3://nobody-made-this/x"])["store"]
    assert (bad.status, "NoSuchBucket" in bad.found, "create the bucket" in bad.fix) == ("bad", True, True)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    bad = found([f"root={s3_root}"])["store"]
    assert (bad.status, "AWS_ACCESS_KEY_ID" in bad.fix) == ("bad", True)


def test_a_disk_that_is_nearly_full_and_a_mounted_bucket_are_named(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 1 << 40, 300 << 20))
    assert found([f"root={root}"])["disk"].status == "warn"
    assert "300 MiB are free" in local.low_space(root)
    monkeypatch.setattr(doctor, "file_system", lambda path, mounts: "fuse.s3fs")
    assert "s3://bucket/prefix" in found([f"root={root}"])["file system"].fix


def test_the_file_system_is_that_of_the_deepest_mount() -> None:
    mounts = "overlay / overlay rw 0 0\ns3fs /mnt/my\\040bucket fuse.s3fs rw 0 0\n/dev/sdb /mnt ext4 rw 0 0\n"
    kinds = [doctor.file_system(path, mounts) for path in ("/home", "/mnt/my bucket/store", "/mnt/my bucket", "/mnt/mybucket", "relative")]
    assert kinds == ["overlay", "fuse.s3fs", "fuse.s3fs", "ext4", ""]
