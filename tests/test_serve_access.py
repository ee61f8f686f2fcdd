"""Keys and limits at the front: every path that needs a key has it checked, and refusals are counted and say nothing more."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from fronts import Front
from headtail.adapters.redis_link import RedisLink
from headtail.adapters.storage import Storage
from headtail.core.errors import ConfigError
from headtail.core.task import Task
from headtail.stages import serve
from headtail.stages.serve.admission import ClusterAdmission, KeyAdmission, open_admission
from headtail.stages.serve.api_keys import add_key, revoke_key
from headtail.stages.serve.front.counters import Counters, create_counters, read_counters
from headtail.stages.serve.front.store_counts import follow_counts, follow_processor, store_counts
from headtail.stages.serve.metrics import prometheus_text
from headtail.stages.serve.principal import admit_all
from headtail.stages.serve.rate_limit import RedisLimiter
from headtail.stages.simulate.probe import FRONT_METRIC
from redis_server import RedisServer, needs_redis
from test_serve import config as server_config
from test_serve import published, says
from timescale import limit

CHAT = {"model": "query_segmentation", "messages": [{"role": "user", "content": "pizza near me"}]}
CALLS: list[tuple[str, str, Any]] = [
    ("GET", "/v1/answer?query=pizza", None),
    ("POST", "/v1/answer", {"query": "pizza near me"}),
    ("POST", "/v1/answers", {"queries": ["pizza near me", "rare"]}),
    ("POST", "/v1/chat/completions", CHAT),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/query_segmentation", None),
    ("GET", "/v1/release", None),
]


@pytest.fixture
def front(store: Storage, tmp_path: Path, segmentation: Task) -> Callable[..., Front]:
    published(store, tmp_path, segmentation)
    settings = serve.Config(realtime_timeout_ms=int(limit(5) * 1000))

    def make(**options: Any) -> Front:
        return Front(store, settings, tmp_path, says(segmentation), **options)

    return make


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def call(front: Front, method: str, path: str, body: Any = None, key: str = "") -> httpx.Response:
    async def go() -> httpx.Response:
        async with front.client() as http:
            return await http.request(method, path, json=body, headers={"authorization": f"Bearer {key}"} if key else {})

    return asyncio.run(go())


@pytest.mark.parametrize("method, path, body", CALLS)
def test_a_path_needs_a_key_with_its_scope(method: str, path: str, body: Any, front: Callable[..., Front], keys: Path) -> None:
    good, other = add_key(keys, "good", ["answer"]), add_key(keys, "other", ["metrics"])
    served = front(admit=KeyAdmission(keys, keys.with_name("limits")))
    assert call(served, method, path, body, good).status_code == 200
    for key, status in (("", 401), ("htk_wrong", 401), (other, 403)):
        refused = call(served, method, path, body, key)
        assert refused.status_code == status
        assert refused.json()["error"]["code"] == {401: "unauthorized", 403: "forbidden"}[status]
        assert ("www-authenticate" in refused.headers) == (status == 401)
    assert (served.count("refused/unauthorized"), served.count("refused/forbidden")) == (2, 1)


def test_health_needs_no_key_and_a_large_body_is_not_read_without_one(front: Callable[..., Front], keys: Path) -> None:
    add_key(keys, "a", ["answer"])
    served = front(admit=KeyAdmission(keys, keys.with_name("limits")))
    assert [call(served, "GET", path).status_code for path in ("/healthz", "/readyz", "/nowhere")] == [200, 200, 404]
    assert call(served, "POST", "/v1/answer", {"query": "x" * (2 << 20)}).status_code == 401


def test_a_key_that_is_too_fast_is_told_to_wait(front: Callable[..., Front], keys: Path) -> None:
    key = add_key(keys, "slow", ["answer"], 0.001, 5)
    served = front(admit=KeyAdmission(keys, keys.with_name("limits")))
    ask = ("POST", "/v1/answer", {"query": "pizza near me"}, key)
    assert [call(served, *ask).status_code for _ in range(2)] == [200, 200]
    assert call(served, "POST", "/v1/answers", {"queries": ["a", "b", "c", "d"]}, key).status_code == 429, "whole, or not at all"
    assert call(served, "POST", "/v1/answers", {"queries": ["a", "b", "c"]}, key).status_code == 200
    refused = [call(served, *ask), call(served, "POST", "/v1/chat/completions", CHAT, key)]
    assert [one.status_code for one in refused] == [429, 429]
    assert all(900 < int(one.headers["retry-after"]) <= 1000 for one in refused)
    assert refused[1].json()["error"]["type"] == "rate_limit_error"
    assert call(served, "POST", "/v1/answers", {"queries": ["q"] * 6}, key).status_code == 413
    assert served.count("refused/rate_limited") == 3


def test_a_revoked_key_is_refused_without_a_restart(front: Callable[..., Front], keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = add_key(keys, "a", ["answer"])
    admit = KeyAdmission(keys, keys.with_name("limits"))
    served = front(admit=admit)
    monkeypatch.setattr(admit._ring, "_every", 0.0)
    monkeypatch.setattr(admit._ring, "_next", 0.0)
    assert call(served, "GET", "/v1/answer?query=pizza", key=key).status_code == 200
    revoke_key(keys, "a")
    assert call(served, "GET", "/v1/answer?query=pizza", key=key).status_code == 401


def test_the_log_names_the_caller_and_never_the_key(front: Callable[..., Front], keys: Path) -> None:
    key = add_key(keys, "search-team", ["answer"])
    read, write = os.pipe()
    served = front(admit=KeyAdmission(keys, keys.with_name("limits")), pipe=write)
    for method, path, body in CALLS[:4]:
        call(served, method, path, body, key)
    lines = os.read(read, 1 << 16)
    os.close(read)
    os.close(write)
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [row[-1] for row in rows] == ["search-team"] * 5
    assert key.encode() not in lines


@needs_redis
def test_limits_over_redis_hold_at_every_path(front: Callable[..., Front], keys: Path, tmp_path: Path) -> None:
    key = add_key(keys, "slow", ["answer"], 0.001, 4)

    async def use(server: RedisServer) -> None:
        url = server.url
        admit = ClusterAdmission(keys, RedisLimiter(RedisLink(url, timeout_s=limit(5))))
        served, headers = front(admit=admit), {"authorization": f"Bearer {key}"}
        async with served.client() as http:
            first = await http.post("/v1/answer", json={"query": "pizza near me"}, headers=headers)
            second = await http.post("/v1/answers", json={"queries": ["a", "b"]}, headers=headers)
            third = await http.post("/v1/chat/completions", json=CHAT, headers=headers)
            last = await http.post("/v1/answer", json={"query": "pizza near me"}, headers=headers)
            assert [one.status_code for one in (first, second, third, last)] == [200, 200, 200, 429]
            assert (await http.get("/v1/answer?query=x")).status_code == 401
            server.kill()
            again = [(await http.post("/v1/answer", json={"query": "pizza near me"}, headers=headers)).status_code for _ in range(5)]
            assert again == [200] * 5
            counting = asyncio.create_task(follow_counts(served.counters, admit, None))
            await asyncio.sleep(0)
            counting.cancel()
            assert [served.count(name) for name in ("unlimited", "redis_failures", "redis_skipped")] == [5, 3, 2]
            text = prometheus_text({"query_segmentation": read_counters(served.path)}).decode()
            assert "headtail_unlimited_total 5.0" in text
        await admit.close()

    with RedisServer(tmp_path) as server:
        asyncio.run(use(server))


@pytest.mark.slow
def test_metrics_for_other_machines_need_a_key(store: Storage, tmp_path: Path, segmentation: Task, keys: Path) -> None:
    published(store, tmp_path, segmentation)
    key, other = add_key(keys, "prometheus", ["metrics"]), add_key(keys, "a", ["answer"])
    options = {"admin_host": "0.0.0.0", "api_keys": str(keys), "realtime_student": False, "request_log": False, "fronts": 1}
    with serve.start_server(server_config(store.root, **options)) as server, httpx.Client(trust_env=False, timeout=limit(20)) as http:
        got = [http.get(f"{server.admin_url}/metrics", headers={"authorization": f"Bearer {one}"}) for one in (key, other, "none")]
        assert [one.status_code for one in got] == [200, 403, 401]
        assert 'headtail_fronts{task="query_segmentation"} 1.0' in got[0].text
        assert http.get(server.admin_url).status_code == 200


def test_what_a_damaged_file_of_keys_did_is_counted(keys: Path) -> None:
    add_key(keys, "a", ["answer"])
    admit = KeyAdmission(keys, keys.with_name("limits"))
    assert set(store_counts(admit, None).values()) == {0}
    keys.write_text("{")
    admit._ring._next = 0.0
    admit._ring.find(b"")
    assert store_counts(admit, None)["key_file_failures"] == 1
    assert set(store_counts(admit_all, None).values()) == {0}


def test_the_processor_time_of_fronts_is_counted(tmp_path: Path) -> None:
    create_counters(tmp_path / "counters", 2)

    async def count() -> None:
        fronts = [Counters(tmp_path / "counters", row) for row in range(2)]
        tasks = [asyncio.create_task(follow_processor(front)) for front in fronts]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()

    before = time.process_time()
    asyncio.run(count())
    text = prometheus_text({"a": read_counters(tmp_path / "counters")}).decode()
    (found,) = [float(line.split()[1]) for line in text.splitlines() if line.startswith(FRONT_METRIC)]
    assert 2 * before <= found <= 2 * time.process_time()


def test_settings_choose_the_check(keys: Path, root: str) -> None:
    add_key(keys, "a", ["answer"])
    limits = keys.with_name("limits")
    assert open_admission("", limits, "") is admit_all
    assert isinstance(open_admission(str(keys), limits, ""), KeyAdmission)
    assert isinstance(open_admission(str(keys), limits, "redis://127.0.0.1:1"), ClusterAdmission)
    with pytest.raises(ConfigError, match="the file of API keys cannot be read"):
        serve.start_server(server_config(root, api_keys=str(keys.with_name("none"))))
