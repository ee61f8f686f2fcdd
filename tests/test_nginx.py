"""TLS in front of the server: clusters/nginx.conf under Debian's nginx, before an app that answers, is away, or refuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from headtail.adapters.storage import Storage, open_storage
from headtail.client import Answer, Client, ClientConfig, ClientError
from headtail.core.task import Task
from headtail.stages import serve
from headtail.stages.serve.errors import ErrorResponse
from local_server import Running
from ports import free_port
from test_client import GOOD, Scripted, error
from test_serve import config as server_config
from test_serve import published
from timescale import limit

CONF = Path(__file__).parent.parent / "clusters" / "nginx.conf"
missing = [name for name in ("nginx", "openssl") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs the Debian packages {', '.join(missing)}")

MAIN = """
{user}
daemon off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/headtail.conf;
}}
"""


class Nginx:
    """nginx with the shipped file: only ports and paths of files are changed. `backend`: the port behind it."""

    def __init__(self, folder: Path, backend: int) -> None:
        self.folder, self.port = folder, free_port()
        self.url, self.cert = f"https://127.0.0.1:{self.port}", folder / "cert.pem"
        make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
        names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
        subprocess.run([*make, *names, "-keyout", folder / "key.pem", "-out", self.cert], check=True, capture_output=True)
        text = CONF.read_text()
        for old, new in {
            "127.0.0.1:8000": f"127.0.0.1:{backend}",
            "listen 443 ssl": f"listen 127.0.0.1:{self.port} ssl",
            "/etc/ssl/headtail/fullchain.pem": str(self.cert),
            "/etc/ssl/headtail/privkey.pem": str(folder / "key.pem"),
            "/var/log/nginx/headtail.log": str(folder / "access.log"),
        }.items():
            assert text.count(old) >= 1, old
            text = text.replace(old, new)
        (folder / "headtail.conf").write_text(text)
        user = "user root;" if os.geteuid() == 0 else ""  # the test's folder is the user's own
        (folder / "main.conf").write_text(MAIN.format(folder=folder, user=user))

    def __enter__(self) -> Nginx:
        self.process = subprocess.Popen(["nginx", "-p", str(self.folder), "-c", str(self.folder / "main.conf")], stderr=subprocess.DEVNULL)
        end = time.monotonic() + limit(20)
        while True:
            try:
                self.get("/nothing")
                return self
            except httpx.TransportError:
                assert self.process.poll() is None, (self.folder / "error.log").read_text()
                assert time.monotonic() < end
                time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(limit(20))

    def http(self) -> httpx.Client:
        trusted = ssl.create_default_context(cafile=str(self.cert))
        return httpx.Client(base_url=self.url, verify=trusted, trust_env=False, timeout=limit(20))

    def get(self, path: str) -> httpx.Response:
        with self.http() as client:
            return client.get(path)


@pytest.fixture
def app() -> Scripted:
    return Scripted(GOOD)


@pytest.fixture
def backend(app: Scripted) -> Iterator[Running]:
    with Running(app) as running:
        yield running


@pytest.fixture
def nginx(backend: Running, tmp_path: Path) -> Iterator[Nginx]:
    with Nginx(tmp_path, backend.port) as running:
        yield running


def config(nginx: Nginx, **changes: Any) -> ClientConfig:
    fields = {
        "url": nginx.url,
        "ca_file": str(nginx.cert),
        "timeout_ms": int(limit(20) * 1000),
        "connect_timeout_ms": int(limit(10) * 1000),
    }
    return ClientConfig(**{**fields, **changes})


def shaped(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    found = ErrorResponse.model_validate_json(response.content).error
    assert found.code == code
    assert re.fullmatch("[0-9a-f]{32}", found.request_id)


def test_the_client_asks_through_tls_and_its_key_arrives(nginx: Nginx, app: Scripted) -> None:
    with Client(config(nginx, api_key="htk_x")) as client:
        assert [client.answer("pizza").request_id for _ in range(3)] == ["id1"] * 3
    paths = {(path, headers["authorization"], headers["host"]) for path, headers, _ in app.seen}
    assert paths == {("/v1/answer", "Bearer htk_x", "127.0.0.1")}
    with Client(config(nginx, ca_file="", retries=0)) as client, pytest.raises(ClientError) as unknown:
        client.answer("pizza")
    assert unknown.value.code == "unreachable", "a certificate of an unknown issuer is not accepted"


@pytest.mark.slow
def test_a_whole_server_behind_it(store: Storage, tmp_path: Path, segmentation: Task) -> None:
    published(store, tmp_path, segmentation)
    other = published(open_storage(str(tmp_path / "other")), tmp_path, segmentation, ["of the other task"]).id
    off = {"realtime_student": False, "request_log": False}
    options = {**off, "tasks": {"other-one": {"root": str(tmp_path / "other"), **off}}}
    (tmp_path / "nginx").mkdir()
    with serve.start_server(server_config(store.root, **options)) as server, Nginx(tmp_path / "nginx", server.config.port) as nginx:
        with Client(config(nginx)) as client:
            found = client.answers(["pizza near me", "rare"])
            assert [one.source for one in found if isinstance(one, Answer)] == ["teacher", "fallback"]
        with Client(config(nginx, url=f"{nginx.url}/tasks/other-one")) as client:
            assert (client.answer("of the other task").cached, client.answer("rare").release) == (True, other)
        with nginx.http() as http:
            assert http.get("/readyz").json()["release"] == server.release
            shaped(http.get("/healthz"), 404, "not_found")


def test_errors_of_the_server_pass_through(nginx: Nginx, app: Scripted) -> None:
    app.replies = [error("rate_limited", retry_after_s=7.0)]
    with nginx.http() as client:
        refused = client.post("/v1/answer", json={"query": "x"})
    assert (refused.status_code, refused.headers["retry-after"], refused.json()["error"]["request_id"]) == (429, "7", "id2")


def test_what_is_not_for_outside_stays_inside(nginx: Nginx, app: Scripted) -> None:
    pages = ("", "metrics", "docs", "admin/release", "v1/../admin/release")  # of a further task
    for path in ("/", "/metrics", "/docs", "/admin/release", "//v1/answer/../../metrics", *(f"/tasks/intent/{page}" for page in pages)):
        shaped(nginx.get(path), 404, "not_found")
    assert app.seen == []


def test_a_large_body_is_refused_before_it_is_passed_on(nginx: Nginx, app: Scripted) -> None:
    with nginx.http() as client:
        shaped(client.post("/v1/answer", content=b"x" * (1 << 20) + b"x"), 413, "too_large")
    assert app.seen == []


def test_a_server_that_is_away_is_503_in_our_shape(nginx: Nginx, backend: Running) -> None:
    backend.__exit__()
    with nginx.http() as client:
        found = client.post("/v1/answer", json={"query": "x"})
    shaped(found, 503, "not_ready")
    assert found.headers["retry-after"] == "1"


def test_old_tls_is_refused(nginx: Nginx) -> None:
    command = ["openssl", "s_client", "-connect", nginx.url.removeprefix("https://"), "-cipher", "DEFAULT@SECLEVEL=0"]
    for version, code in (("-tls1_1", 1), ("-tls1_2", 0)):
        done = subprocess.run([*command, version], input="", capture_output=True, text=True, timeout=limit(20))
        assert done.returncode == code
        assert ("alert protocol version" in done.stderr) == (code == 1), "the server refuses, not openssl itself"


def test_the_log_holds_no_query(nginx: Nginx) -> None:
    with nginx.http() as client:
        assert client.get("/v1/nothing?query=secretword").status_code
        client.post("/v1/answer", json={"query": "secretword"})
    end = time.monotonic() + limit(10)
    log = nginx.folder / "access.log"
    while log.read_text().count("/v1/answer") < 1:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert "/v1/nothing" in log.read_text()
    assert "secretword" not in log.read_text() + (nginx.folder / "error.log").read_text()


def test_the_shipped_errors_are_those_of_the_server() -> None:
    bodies = [json.loads(text)["error"] for text in re.findall(r"return \d+ '(.*)';", CONF.read_text())]
    assert sorted(body["code"] for body in bodies) == ["not_found", "not_ready", "too_large"]
    assert all(ErrorResponse.model_validate({"error": body}) for body in bodies)
