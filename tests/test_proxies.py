"""Loopback is reached directly by every client of this package, whatever the proxy variables say."""

from __future__ import annotations

import ast
import os
import urllib.request
from pathlib import Path

import httpx
import pytest

from headtail.adapters.proxies import LOOPBACK, may_proxy, spare_loopback
from headtail.core.task import Task
from headtail.engines import ModelConfig, open_engine
from test_engines_openai import GOOD, SAMPLING, Server, requests, server
from timescale import limit

__all__ = ["server"]
PACKAGE = Path(__file__).parent.parent / "platform" / "headtail"
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment with a proxy at which nobody listens, as headtail finds it when it is imported."""
    for name in PROXIES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "intranet.example")
    spare_loopback(os.environ)


@pytest.mark.parametrize(
    "before, after",
    [
        ({}, "localhost,127.0.0.1,::1"),
        ({"no_proxy": "a, b"}, "a,b,localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "localhost"}, "localhost,127.0.0.1,::1"),
        ({"no_proxy": "a", "NO_PROXY": "b"}, "a,localhost,127.0.0.1,::1"),  # the first is what clients would read
        ({"NO_PROXY": "*"}, "*"),
    ],
)
def test_what_is_excepted_already_stays(before: dict[str, str], after: str) -> None:
    spare_loopback(before)
    assert before == {"no_proxy": after, "NO_PROXY": after}


def test_importing_the_package_spares_loopback() -> None:
    assert set(LOOPBACK) <= set(os.environ["NO_PROXY"].split(",")) | set(os.environ["no_proxy"].split(","))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "LOCALHOST.", "a.localhost", "[::1]"])
def test_our_own_clients_take_no_proxy_to_loopback(host: str) -> None:
    assert not may_proxy(f"http://{host}:8000/v1")
    assert may_proxy("https://host.example/v1")
    assert may_proxy("http://128.0.0.1/")


def test_a_client_that_reads_proxies_for_itself_spares_loopback(proxied: None) -> None:
    """Python's own rule is botocore's; requests is MLflow's; httpx is ours."""
    from requests.utils import get_environ_proxies

    for host in ("127.0.0.1", "localhost"):
        assert urllib.request.proxy_bypass(host)
        assert get_environ_proxies(f"http://{host}:5000") == {}
    assert get_environ_proxies("http://host.example")


def test_the_engine_reaches_an_endpoint_on_this_machine(proxied: None, server: Server, segmentation: Task) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get("http://host.example", timeout=limit(30))  # the proxy is in force
    config = ModelConfig.model_validate({"engine": "openai", "model": "m", "base_url": server.url.replace("127.0.0.1", "localhost")})
    engine = open_engine(config, "m", segmentation.schema, SAMPLING)
    assert [made.text for made in engine.generate(requests("a"))] == [GOOD]
    engine.close()


def test_every_client_of_the_package_says_whether_it_reads_proxies() -> None:
    seen = 0
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)):
                continue
            if (node.func.value.id, node.func.attr in ("get", "post", "Client", "AsyncClient")) == ("httpx", True):
                assert "trust_env" in {keyword.arg for keyword in node.keywords}, f"{file}:{node.lineno}"
                seen += 1
    assert seen >= 5
