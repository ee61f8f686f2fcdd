"""What the manifest for Kubernetes starts, as two processes here: fronts by its command, students by `serve run` of its Serve config."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from headtail.adapters.storage import Storage
from headtail.core.task import load_task
from ports import free_port
from test_serve import published
from timescale import limit, read_banner

pytestmark = pytest.mark.slow
MANIFEST = Path(__file__).parent.parent / "clusters" / "kuberay" / "rayservice.yaml"


def spec() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))["spec"]
    return found


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


@pytest.fixture
def fronts(store: Storage, root: str, tmp_path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The container `fronts` of the manifest, with addresses of this machine; its URL, and what the students have to be told."""
    published(store, tmp_path, load_task("query_segmentation"))
    (tmp_path / "token").write_text("a secret of both\n")
    port, ours = free_port(), {"realtime_timeout_ms": int(limit(5000)), "fronts": 1, "link_port": free_port()}
    containers = spec()["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    container = next(one for one in containers if one["name"] == "fronts")
    assert container["command"] == ["headtail", "serve"]
    changed = {**ours, "port": port, "admin_port": free_port(), "host": "127.0.0.1", "link_host": "127.0.0.1"}
    changed["link_token_file"] = str(tmp_path / "token")
    options = [one for one in container["args"] if not one.startswith(("--root", *(f"--set={name}=" for name in changed)))]
    options += [f"--root={root}", *(f"--set={name}={value}" for name, value in changed.items())]
    command = [sys.executable, "-m", "headtail.cli", "serve", *options]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        read_banner(process)
        yield f"http://127.0.0.1:{port}", {**ours, "root": root, "link_token_file": changed["link_token_file"]}
    finally:
        process.terminate()
        process.communicate(timeout=limit(60))
    assert process.returncode == 0


def test_students_of_the_manifest_answer_misses_of_its_fronts(cluster: None, fronts: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    import ray
    from ray import serve

    url, told = fronts
    config = yaml.safe_load(spec()["serveConfigV2"])
    [application] = config["applications"]
    model = {"engine": "transformers", "model": "example:teacher", "cpus": 0.1}  # of this machine: no GPU, none of the roles
    application["args"] |= {**told, "model": model, "realtime_replicas": 1}
    assert application["args"]["link_address"] == "$FQ_RAY_IP"  # KubeRay tells each worker
    application["runtime_env"] = {"env_vars": {"FQ_RAY_IP": "127.0.0.1"}}
    config |= {"proxy_location": "Disabled", "http_options": {"host": "127.0.0.1", "port": free_port()}}  # KubeRay alone asks the proxy
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    assert httpx.get(f"{url}/v1/answer", params={"query": "sushi"}, timeout=limit(20)).json()["reason"] == "unavailable"
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "--non-blocking", f"--address={address}", str(tmp_path / "serve.yaml")]
    try:
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=limit(180))
        assert done.returncode == 0, done.stderr
        end = time.monotonic() + limit(120)
        while (found := httpx.get(f"{url}/v1/answer", params={"query": "sushi"}, timeout=limit(20)).json())["reason"] == "unavailable":
            assert time.monotonic() < end, serve.status()
            time.sleep(0.2)
        assert found["source"] == "realtime_student" or found["reason"] in ("withheld", "invalid", "truncated"), found  # a small model
        assert httpx.get(f"{url}/v1/answer", params={"query": "pizza near me"}, timeout=limit(20)).json()["cached"]
    finally:
        serve.delete(application["name"])
