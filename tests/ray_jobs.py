"""A Ray head of its own with a token, as `ray start` makes it, and jobs submitted to it: what test_jobs and test_pipeline share."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from ports import free_port
from timescale import limit

REPO = Path(__file__).parent.parent
OFF = "tracking.enabled=false"
PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
    "ray-client-server-port",
)


class Cluster(NamedTuple):
    """A running head: its dashboard's address, and an environment that holds its token."""

    address: str
    env: dict[str, str]


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    """`ray start --head` with a token, on ports of its own; ended by its own process id."""
    folder = Path(tempfile.mkdtemp(prefix="ht-", dir="/tmp"))  # short: sockets have 107 characters for their path
    token = folder / "token"
    token.write_text("a" * 32, encoding="utf-8")
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_DISABLE_IMPORT_WARNING": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    env.pop("PYTHONPATH", None)  # the code must come with the job
    ports = {name: free_port() for name in PORTS}
    flags = [f"--{name}={port}" for name, port in ports.items()]
    command = ["ray", "start", "--head", "--block", "--num-cpus=4", "--object-store-memory=200000000", "--include-dashboard=true", *flags]
    log = (folder / "ray.log").open("wb")
    process = subprocess.Popen([*command, f"--temp-dir={folder}/ray"], env=env, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    cluster = Cluster(f"http://127.0.0.1:{ports['dashboard-port']}", env)
    try:
        _wait_until_up(cluster, process, folder / "ray.log")
        yield cluster
    finally:
        _end(process)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_up(cluster: Cluster, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + limit(90)
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"ray start ended with {process.returncode}:\n{log.read_text(encoding='utf-8')[-3000:]}")
        with contextlib.suppress(httpx.TransportError):
            if ask(cluster, "/api/jobs/").status_code == 200:
                return
        time.sleep(0.5)
    pytest.fail(f"the dashboard did not come up in 90 s:\n{log.read_text(encoding='utf-8')[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """`ray start --block` takes more than 20 s to end on SIGTERM. It and its children are one process group: all end at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=limit(10))


def ask(cluster: Cluster, path: str) -> httpx.Response:
    """The dashboard's answer to a GET with the token; `ray job` takes 1.6 s of a core for each."""
    token = Path(cluster.env["RAY_AUTH_TOKEN_PATH"]).read_text(encoding="utf-8")
    return httpx.get(cluster.address + path, headers={"authorization": f"Bearer {token}"}, timeout=limit(30), trust_env=False)


def ray(cluster: Cluster, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "ray"), *arguments]
    return subprocess.run(command, env={**cluster.env, **env}, cwd=REPO, capture_output=True, text=True, timeout=limit(550))


def entry(job: str, *flags: str) -> list[str]:
    """The command of a job's header, with the laptop's config."""
    return ["python", f"jobs/{job}.py", "--config", f"jobs/configs/{job}.laptop.yaml", *flags]


def submit(cluster: Cluster, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return ray(cluster, "job", "submit", "--address", cluster.address, "--runtime-env", "jobs/runtime_env.yaml", "--", *command, **env)


def submit_all(cluster: Cluster, root: str, jobs: dict[str, tuple[str, ...]], common: tuple[str, ...] = (OFF,)) -> list[dict[str, Any]]:
    """Some jobs one after another in one submission, each with its fields; the receipts that they print."""
    lines = []
    for job, sets in jobs.items():
        flags = [flag for field in (*sets, *common) for flag in ("--set", field)]
        lines.append(shlex.join(entry(job, "--root", root, "--json", *flags)))
    done = submit(cluster, "bash", "-c", " && ".join(lines))
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-2000:]}"
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == len(jobs)
    return found
