"""Admin calls: closed without a key of scope admin, the same as the commands with one, audited; failed logins are limited by address."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from headtail.adapters.storage import Storage
from headtail.core.errors import ConfigError
from headtail.core.keys import query_key
from headtail.core.task import Task
from headtail.releases import canary, release
from headtail.releases.audit import list_calls
from headtail.releases.overrides import load_overrides
from headtail.stages import serve
from headtail.stages.serve.admin import MOST_BYTES, make_app
from headtail.stages.serve.admin_calls import CALLS, AdminCalls
from headtail.stages.serve.admission import KeyAdmission
from headtail.stages.serve.api_keys import add_key
from headtail.stages.serve.errors import ErrorResponse
from headtail.stages.serve.front.counters import Counters, create_counters, read_counters
from headtail.stages.serve.login import BURST, INTERVAL_S, MOST_ADDRESSES, FailedLogins, Login
from headtail.stages.serve.metrics import prometheus_text
from test_serve import config as server_config
from test_serve import published, segments
from timescale import limit


class Pages:
    """The pages of a server over a store, without its processes. `now`: of the limit on failed logins."""

    def __init__(self, store: Storage, folder: Path, opened: bool = True) -> None:
        self.counters, keys, self.now = folder / "counters", folder / "keys", 1000.0
        create_counters(self.counters, 1)
        self.admin, self.other = add_key(keys, "ada", ["admin"]), add_key(keys, "other", ["answer", "metrics"])
        count = Counters(self.counters, 0).add
        login = Login(KeyAdmission(keys, folder / "limits"), FailedLogins(lambda: self.now), count)
        calls = AdminCalls(store, count) if opened else None
        self._app = make_app(
            {"query_segmentation": self.counters},
            httpx.AsyncClient(base_url="http://nobody", timeout=limit(30)),
            login,
            calls,
            open_metrics=False,
        )

    def call(self, path: str, body: Any = None, key: str | None = None, address: str = "10.0.0.1", method: str = "") -> httpx.Response:
        async def go() -> httpx.Response:
            transport = httpx.ASGITransport(self._app, client=(address, 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://pages") as http:
                headers = {"authorization": f"Bearer {self.admin if key is None else key}"}
                sent = {"content": body} if isinstance(body, bytes) else {"json": body} if body is not None else {}
                return await http.request(method or ("POST" if body is not None else "GET"), path, headers=headers, **sent)

        return asyncio.run(go())

    def count(self, name: str) -> float:
        return read_counters(self.counters).sums[name]


@pytest.fixture
def two(store: Storage, tmp_path: Path, segmentation: Task) -> tuple[str, str]:
    """The first release and the current one."""
    return published(store, tmp_path, segmentation).id, published(store, tmp_path, segmentation, ["pizza near me", "new"]).id


@pytest.fixture
def pages(store: Storage, tmp_path: Path, two: tuple[str, str]) -> Pages:
    return Pages(store, tmp_path)


@pytest.mark.parametrize("name", CALLS)
def test_no_call_is_taken_without_a_key_of_scope_admin(name: str, pages: Pages, store: Storage, two: tuple[str, str]) -> None:
    body = b"this is no JSON" if CALLS[name].method == "POST" else None  # who may not call learns nothing of what the body should be
    found = [pages.call(f"/admin/{name}", body, key) for key in ("", "htk_wrong", pages.other)]
    assert [(one.status_code, one.json()["error"]["code"]) for one in found] == [
        (401, "unauthorized"),
        (401, "unauthorized"),
        (403, "forbidden"),
    ]
    assert release.current_id(store) == two[1]
    assert list_calls(store) == []


def test_where_they_are_not_switched_on_there_is_nothing(store: Storage, tmp_path: Path, two: tuple[str, str]) -> None:
    closed = Pages(store, tmp_path, opened=False)
    assert {closed.call(f"/admin/{name}", {} if call.method == "POST" else None).status_code for name, call in CALLS.items()} == {404}
    assert "admin_calls" in serve.Config.model_fields
    assert serve.Config().admin_calls is False
    with pytest.raises(ConfigError, match="admin calls need API keys"):
        serve.start_server(server_config(store.root, admin_calls=True))


def test_releases_move_as_by_the_commands(pages: Pages, store: Storage, two: tuple[str, str]) -> None:
    old, new = two
    assert pages.call("/admin/release").json() == {"current": new, "canary": None, "running": False, "verdict": None}
    begun = pages.call("/admin/release/canary", {"share": 0.1, "release": old, "why": "once more", "policy": {"min_queries": 7}}).json()
    assert (begun["canary"], begun["share"], begun["who"], begun["policy"]["min_queries"]) == (old, 0.1, "ada", 7)
    assert pages.call("/admin/release/canary", {"share": 0.5}).json()["policy"]["min_queries"] == 7
    shown = pages.call("/admin/release").json()
    assert (shown["running"], shown["verdict"]["word"]) == (True, "undecided")
    refused = pages.call("/admin/release/promote", {})
    assert refused.status_code == 422
    assert "this canary is undecided: 0 of at least 7 queries" in refused.json()["error"]["message"]
    assert pages.call("/admin/release/canary", {"share": 0}).json()["state"] == "stopped"
    assert pages.call("/admin/release/rollback", {}).json()["current"] == old
    assert pages.call("/admin/release/promote", {"release": new}).json()["current"] == new
    assert release.current_id(store) == new
    record = canary.read_canary(store)
    assert record is not None
    assert (record.who, record.state) == ("ada", "stopped")
    assert [(entry.who, entry.action, entry.ref, entry.reason, entry.host) for entry in list_calls(store)] == [
        ("ada", "release/canary", old, "", "10.0.0.1"),
        ("ada", "release/canary", "", "", "10.0.0.1"),
        ("ada", "release/promote", "", "invalid", "10.0.0.1"),
        ("ada", "release/canary", "", "", "10.0.0.1"),
        ("ada", "release/rollback", "", "", "10.0.0.1"),
        ("ada", "release/promote", new, "", "10.0.0.1"),
    ]
    assert [entry["action"] for entry in pages.call("/admin/audit").json()][-1] == "release/promote"
    assert pages.count("admin_calls") == 6


def test_overrides_and_deletions(pages: Pages, store: Storage, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "headtail.audit"):
        given = {"query": " Rare  HAM", "answer": segments("rare ham", "name"), "why": "it is a name"}
        assert pages.call("/admin/overrides/add", given).json()["who"] == "ada"
        assert [entry["query"] for entry in pages.call("/admin/overrides").json()] == ["rare ham"]
        wrong = pages.call("/admin/overrides/add", {**given, "answer": {"segments": [{"label": "nothing", "text": "rare"}]}})
        assert wrong.status_code == 422
        assert "this answer cannot be served" in wrong.json()["error"]["message"]
        assert pages.call("/admin/overrides/remove", {"query": "rare ham", "why": "no"}).status_code == 200
        assert pages.call("/admin/overrides").json() == []
        assert pages.call("/admin/overrides/remove", {"query": "rare ham"}).status_code == 422
        removed = pages.call("/admin/deletions/add", {"query": "rare ham", "why": "asked for"})
        assert removed.status_code == 200, removed.text
    gone = removed.json()
    key = query_key("rare ham")
    assert (gone["query_key"], gone["who"]) == (key.hex(), "ada")
    assert key in load_overrides(store).deleted
    entries = list_calls(store)
    assert {entry.ref for entry in entries} == {key.hex()}
    assert len(entries) == 5
    for file in Path(store.root, "audit").iterdir():
        assert "ham" not in file.read_text(), "a deletion has nothing to take out of the audit"
    lines = [line for record in caplog.records if (line := record.getMessage()).startswith("admin call ")]
    assert [json.loads(line.removeprefix("admin call "))["action"] for line in lines] == [entry.action for entry in entries]


BAD: list[tuple[str, Any, int, str]] = [
    ("release/canary", {"share": 2}, 422, "share"),
    ("release/canary", {"share": 0.1}, 422, "release"),
    ("release/canary", {"share": 0.1, "release": "../../x"}, 422, ""),
    ("release/rollback", {"who": "eve"}, 422, "who"),  # who calls is the key's name
    ("overrides/add", {"query": "", "answer": {}, "why": "x"}, 422, "query"),
    ("overrides/add", b"no JSON", 400, "body"),
    ("deletions/add", b'{"query": "' + b"x" * MOST_BYTES + b'"}', 413, "body"),
]


@pytest.mark.parametrize("name, body, status, field", BAD)
def test_a_wrong_body_changes_nothing(name: str, body: Any, status: int, field: str, pages: Pages, store: Storage, two: Any) -> None:
    refused = pages.call(f"/admin/{name}", body)
    assert (refused.status_code, refused.json()["error"]["field"]) == (status, field), refused.text
    assert release.current_id(store) == two[1]


def test_refusals_have_the_one_shape_and_an_id_that_the_log_has(pages: Pages, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        wrong = pages.call("/admin/release/canary", {"share": 2})
        found = [wrong, pages.call("/nowhere"), pages.call("/v1/answer", method="DELETE"), pages.call("/admin/audit", {})]
    errors = [ErrorResponse.model_validate(one.json()).error for one in found]
    assert [error.code for error in errors] == ["invalid", "not_found", "method_not_allowed", "method_not_allowed"]
    assert [one.headers.get("allow") for one in found] == [None, None, "GET, POST", "GET"]
    assert len({error.request_id for error in errors} - {""}) == len(errors)
    assert any(errors[0].request_id in record.getMessage() for record in caplog.records)
    assert not any(errors[1].request_id in record.getMessage() for record in caplog.records)  # anyone could fill the log


@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/metrics", "/v1/release", "/admin/audit", "/nowhere"])
def test_pages_of_this_machine_answer_to_its_names_alone(path: str, tmp_path: Path) -> None:
    """A site whose name is made to lead to 127.0.0.1 is refused on every path; `public` is never asked then."""
    app = make_app({"none": tmp_path / "none"}, httpx.AsyncClient(timeout=limit(30)), here_alone=True)

    def code(host: str) -> str:
        async def call() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://x") as client:
                return await client.get(path, headers={"host": host})

        found = asyncio.run(call())
        return found.json()["error"]["code"] if found.status_code == 403 else ""

    foreign = [
        "evil.example",
        "evil.example:8001",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "[2001:db8::1]:8001",
        "",
        "[",
        "0.0.0.0",
    ]
    assert [code(host) for host in foreign] == ["forbidden"] * len(foreign)
    assert [code(host) for host in ("127.0.0.1:8001", "localhost", "[::1]:8001")] == [""] * 3


def test_a_body_is_bounded_before_anyone_has_logged_in(tmp_path: Path) -> None:
    """`public` fails the test when it is asked: nothing is passed on."""
    app = make_app({"none": tmp_path}, httpx.AsyncClient(timeout=limit(30)), config=serve.Config(max_body_bytes=1024, body_timeout_s=0.05))
    waits = 0

    async def go(headers: dict[str, str], *parts: bytes, then: str = "") -> tuple[int, str]:
        nonlocal waits
        left, sent = list(parts), []

        async def receive() -> Any:
            nonlocal waits
            if left:
                return {"type": "http.request", "body": left.pop(0), "more_body": True}
            if then:
                return {"type": then}
            waits += 1
            return await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/answers", "query_string": b"", "root_path": ""}
        await app({**scope, "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}, receive, send)
        return sent[0]["status"], json.loads(sent[1]["body"])["error"]["code"]

    announced = {"content-length": "1025"}
    assert asyncio.run(go(announced)) == asyncio.run(go({"content-length": "9" * 5000})) == (413, "too_large")
    assert waits == 0, "it was not read"
    assert asyncio.run(go({}, *[b"x" * 70_000] * 400)) == (413, "too_large")
    assert asyncio.run(go({}, b"x" * 2000)) == (413, "too_large")
    assert asyncio.run(go({}, b"x")) == (408, "request_timeout")
    assert asyncio.run(go({}, b"x", then="http.disconnect")) == (400, "bad_request")


def test_a_store_that_is_away_tells_nothing_of_itself(pages: Pages, monkeypatch: pytest.MonkeyPatch, store: Storage) -> None:
    def broken(*args: object) -> None:
        raise OSError(f"no space left in {store.root}")

    monkeypatch.setattr(release, "rollback", broken)
    refused = pages.call("/admin/release/rollback", {})
    assert (refused.status_code, refused.json()["error"]["code"]) == (500, "internal")
    assert store.root not in refused.text
    assert list_calls(store)[-1].reason == "internal"


def test_failed_logins_are_limited_by_address_and_counted(pages: Pages) -> None:
    assert [pages.call("/admin/release", key=f"htk_{n}").status_code for n in range(BURST)] == [401] * BURST
    limited = pages.call("/admin/release")  # the right key, from the same address
    assert limited.status_code == 429
    assert 1 <= int(limited.headers["retry-after"]) <= INTERVAL_S
    assert pages.call("/metrics", key=pages.other).status_code == 429
    assert pages.call("/admin/release", address="10.0.0.2").status_code == 200
    pages.now += INTERVAL_S
    assert pages.call("/admin/release").status_code == 200
    assert [pages.call("/admin/release", key="").status_code for _ in range(BURST)] == [401] * BURST  # that login forgot the failures
    for n in range(BURST):  # one caller may have all addresses of a network
        pages.call("/admin/release", key="", address=f"2001:db8:0:1::{n}")
    assert pages.call("/admin/release", address="2001:db8:0:1::ffff").status_code == 429
    assert pages.call("/admin/release", address="2001:db8:0:2::1").status_code == 200
    assert (pages.count("failed_logins"), pages.count("limited_logins")) == (3 * BURST, 3)
    text = prometheus_text({"query_segmentation": read_counters(pages.counters)}).decode()
    assert f"headtail_failed_logins_total {3 * BURST}.0" in text


def test_the_limit_remembers_so_many_addresses() -> None:
    failed = FailedLogins(lambda: 0.0)
    for n in range(MOST_ADDRESSES + 10):
        failed.add(str(n))
    assert len(failed._arrivals) == MOST_ADDRESSES


@pytest.mark.slow
def test_a_running_server_takes_them_on_the_pages_port_alone(store: Storage, tmp_path: Path, two: tuple[str, str]) -> None:
    keys = tmp_path / "keys"
    key = add_key(keys, "ada", ["admin"])
    options = {"admin_calls": True, "api_keys": str(keys), "realtime_student": False, "request_log": False, "fronts": 1}
    with serve.start_server(server_config(store.root, **options)) as server, httpx.Client(trust_env=False, timeout=limit(20)) as http:
        url, headers = f"{server.admin_url}/admin/release", {"authorization": f"Bearer {key}"}
        assert http.get(url).status_code == 401  # on loopback too
        spoofed = [http.get(url, headers={"authorization": "Bearer x", "x-forwarded-for": f"10.0.0.{n}"}).status_code for n in range(6)]
        assert spoofed == [401] * (BURST - 1) + [429] * 2, "a header does not say who calls"
        assert http.get(f"{server.url}/admin/release", headers=headers).status_code == 404  # never on the public port
        assert "headtail_failed_logins_total 5.0" in http.get(f"{server.admin_url}/metrics").text
