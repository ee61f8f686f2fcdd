"""Keys and limits together: who is let in, and how a refused caller is told to wait."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from headtail.adapters.redis_link import RedisLink
from headtail.stages.serve.admission import ClusterAdmission, KeyAdmission
from headtail.stages.serve.api_keys import add_key
from headtail.stages.serve.errors import RequestError
from headtail.stages.serve.rate_limit import RedisLimiter
from redis_server import RedisServer, needs_redis
from timescale import limit


def bearer(key: str) -> bytes:
    return f"Bearer {key}".encode()


def test_fronts_of_a_node_share_a_limit(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    slow, free = add_key(keys, "slow", ["answer"], 0.01, 4), add_key(keys, "free", ["answer"])
    one, two = (KeyAdmission(keys, tmp_path / "limits") for _ in range(2))
    assert [admit(bearer(slow))[0] for admit in (one, two)] == ["slow", "slow"]
    assert two(bearer(slow), cost=2)[0] == "slow"
    for admit in (one, two):
        with pytest.raises(RequestError) as refused:
            admit(bearer(slow))
        assert refused.value.status == 429
        assert 90 <= int(dict(refused.value.headers)["retry-after"]) <= 100
    with pytest.raises(RequestError, match="may send 4 queries at once"):
        one(bearer(slow), cost=5)
    assert {one(bearer(free), cost=1000)[0] for _ in range(100)} == {"free"}
    for header, scope, status in ((None, "answer", 401), (b"Bearer x", "answer", 401), (bearer(free), "admin", 403)):
        with pytest.raises(RequestError) as refused:
            one(header, scope)
        assert refused.value.status == status
    assert one.reload_failures == 0
    one.close()
    two.close()


def test_who_is_refused_does_not_use_up_a_limit(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    key = add_key(keys, "a", ["answer"], 0.01, 1)
    admit = KeyAdmission(keys, tmp_path / "limits")
    for _ in range(5):
        with pytest.raises(RequestError, match="may not make this call"):
            admit(bearer(key), "admin")
    assert admit(bearer(key))[0] == "a"
    admit.close()


@needs_redis
def test_nodes_share_a_limit_over_redis_and_none_without_it(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    key, free = add_key(keys, "a", ["answer"], 0.01, 2), add_key(keys, "free", ["answer"])

    async def use() -> None:
        with RedisServer(tmp_path) as server:
            links = [RedisLink(server.url, timeout_s=limit(5)) for _ in range(2)]
            one, two = (ClusterAdmission(keys, RedisLimiter(link)) for link in links)
            assert [(await admit(bearer(key)))[0] for admit in (one, two)] == ["a", "a"]
            with pytest.raises(RequestError) as refused:
                await two(bearer(key))
            assert refused.value.status == 429
            server.kill()
            assert [(await two(bearer(key)))[0] for _ in range(5)] == ["a"] * 5
            assert two.limiter.open_admissions == 5
            assert (await two(bearer(free)))[0] == "free"
            with pytest.raises(RequestError, match="valid API key"):
                await two(None)
            assert (two.limiter.open_admissions, two.reload_failures) == (5, 0)
            for link in links:
                await link.close()

    asyncio.run(use())
