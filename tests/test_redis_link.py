"""Redis that may be away: what a call costs then, and that it is used again when it is back."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from headtail.adapters.redis_link import RedisLink
from headtail.core.errors import ConfigError
from redis_server import RedisServer, needs_redis
from timescale import limit


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as running:
        yield running


async def ping(link: RedisLink) -> bool:
    return bool(await link.call(lambda redis: redis.ping()))


@needs_redis
def test_a_call_gives_what_the_server_says(server: RedisServer) -> None:
    async def use() -> None:
        link = RedisLink(server.url, timeout_s=limit(5))
        assert await ping(link)
        await link.call(lambda redis: redis.set("a", b"1"))
        assert await link.call(lambda redis: redis.get("a")) == b"1"
        assert (link.failures, link.skipped) == (0, 0)
        await link.close()

    asyncio.run(use())


@needs_redis
def test_an_outage_is_none_and_counted_and_ends_by_itself(server: RedisServer) -> None:
    async def use() -> None:
        now = 0.0
        link = RedisLink(server.url, timeout_s=limit(5), clock=lambda: now)
        assert await ping(link)
        server.kill()
        assert [await ping(link) for _ in range(10)] == [False] * 10
        assert (link.failures, link.skipped) == (3, 7)
        server.start()
        assert not await ping(link)  # still in the pause
        now = 1.0
        assert await ping(link)
        await link.close()

    asyncio.run(use())


@needs_redis
def test_more_calls_than_connections_wait_their_turn(server: RedisServer) -> None:
    async def use() -> None:
        link = RedisLink(server.url, timeout_s=limit(10), connections=2)
        assert all(await asyncio.gather(*(ping(link) for _ in range(50))))
        await link.close()

    asyncio.run(use())


def test_a_server_that_accepts_and_says_nothing_costs_the_time_limit_and_then_nothing() -> None:
    async def use() -> None:
        link = RedisLink(f"redis://127.0.0.1:{port}", timeout_s=0.05)
        started = time.monotonic()
        assert [await ping(link) for _ in range(200)] == [False] * 200
        assert time.monotonic() - started < limit(5)  # 200 time limits are 10 s
        assert link.failures < 20
        await link.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        held: list[socket.socket] = []
        thread = threading.Thread(target=_accept, args=(listener, held), daemon=True)
        thread.start()
        asyncio.run(use())
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(limit(10))
    for connection in held:
        connection.close()


def _accept(listener: socket.socket, held: list[socket.socket]) -> None:
    while True:
        try:
            held.append(listener.accept()[0])
        except OSError:
            return


def test_a_wrong_url_is_an_error_at_the_start() -> None:
    with pytest.raises(ConfigError, match="not the URL of a Redis server"):
        RedisLink("http://localhost")
