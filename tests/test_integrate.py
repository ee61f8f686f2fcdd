"""docs/integrate.md: its programs and commands run as they are written; only addresses and folders are the test's."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from headtail.adapters.storage import open_storage
from headtail.client import Client, ClientConfig, ClientError
from headtail.core.task import load_task
from headtail.stages import serve
from headtail.stages.serve.errors import CODES
from test_serve import config, published
from timescale import limit

PAGE = (Path(__file__).parent.parent / "docs" / "integrate.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_table_of_errors_is_the_servers() -> None:
    rows = re.findall(r"^\| (\d{3}) \| ((?:`\w+`(?:, )?)+) \|", PAGE, re.MULTILINE)
    documented = {(int(status), code) for status, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    assert documented == {(kind.status, code) for code, kind in CODES.items()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[serve.Server]:
    """A server without a student."""
    store = open_storage(str(tmp_path_factory.mktemp("store")))
    published(store, tmp_path_factory.mktemp("scratch"), load_task("query_segmentation"))
    with serve.start_server(config(store.root, realtime_student=False, request_log=False)) as running:
        yield running


def run(command: list[str], **env: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit(120), env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout


def here(text: str, server: serve.Server) -> str:
    return text.replace("http://127.0.0.1:8000", server.url).replace("build/quickstart", server.config.root)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_a_program_of_the_page_runs(program: str, server: serve.Server) -> None:
    shown = run([sys.executable, "-W", "error", "-c", here(program, server)], NO_PROXY="127.0.0.1")
    assert "segments" in shown or "timeout_ms" in shown


@pytest.mark.slow
def test_the_curl_commands_of_the_page_run(server: serve.Server) -> None:
    commands = re.findall(r"^    (curl .*)$", PAGE, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        assert json.loads(run(["curl", "-sS", "--noproxy", "*", *shlex.split(here(command, server))[1:]]))["release"] == server.release


@pytest.mark.slow
def test_keys_of_a_running_server(tmp_path: Path, server: serve.Server) -> None:
    """The commands of the page, while the server's two front processes run."""
    keys = tmp_path / "keys.json"
    commands = [line.strip() for line in re.findall(r"^    (headtail keys .*)$", PAGE, re.MULTILINE)]
    headtail = {words[2]: [sys.executable, "-m", "headtail.cli", *words[1:]] for words in map(shlex.split, commands)}
    headtail = {name: [str(keys) if word == "keys.json" else word for word in words] for name, words in headtail.items()}
    assert list(headtail) == ["add", "list", "rotate", "revoke"]
    first = run(headtail["add"]).strip()
    with serve.start_server(config(server.config.root, realtime_student=False, request_log=False, api_keys=str(keys))) as locked:
        settings = {"url": locked.url, "retries": 0, "timeout_ms": int(limit(20) * 1000)}

        def code(key: str) -> str:
            with Client(ClientConfig(api_key=key, **settings)) as client:
                try:
                    return client.answer("pizza near me").source
                except ClientError as error:
                    return error.code

        def becomes(key: str, wanted: str) -> None:
            """Both front processes follow the file."""
            end = time.monotonic() + limit(30)
            while {code(key) for _ in range(8)} != {wanted}:
                assert time.monotonic() < end
                time.sleep(0.2)

        assert {code(first) for _ in range(4)} == {"teacher"}
        assert {code(key) for key in ("", "htk_wrong")} == {"unauthorized"}
        assert httpx.get(f"{locked.url}/readyz", trust_env=False, timeout=limit(20)).status_code == 200
        second = run(headtail["rotate"]).strip()
        becomes(second, "teacher")
        assert code(first) == "teacher", "both are valid for a while"
        assert first not in run(headtail["list"])
        run(headtail["revoke"])
        becomes(second, "unauthorized")
        becomes(first, "unauthorized")
        slow = run([*headtail["add"][:5], "slow", "--file", str(keys), "--rate", "1/h", "--burst", "20"]).strip()
        becomes(slow, "rate_limited")  # 20 answers over both processes, then none
