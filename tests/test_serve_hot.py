"""The hot path: what it reads, and that its bytes are the same answer as the slow way's."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fronts import Front
from headtail.adapters.storage import Storage
from headtail.core.keys import normalise
from headtail.core.task import Task
from headtail.stages import serve
from headtail.stages.serve.answerer import Miss, Reply
from headtail.stages.serve.errors import RequestError
from headtail.stages.serve.front.hot import Hit, HotPath, RequestIds, read_get, read_post, reply_bytes
from test_serve import published
from timescale import limit

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
HEAD = ["pizza near me", 'say "cheese" \\ now', "crème brûlée 東京", "100% cotton"]


@pytest.fixture
def front(store: Storage, tmp_path: Path, segmentation: Task) -> Front:
    published(store, tmp_path, segmentation, HEAD)
    return Front(store, serve.Config(), tmp_path)


@given(text=TEXTS)
def test_a_query_is_read_as_browsers_and_curl_write_it(text: str) -> None:
    assert read_get(f"query={quote_plus(text)}".encode()) == text
    assert read_get(f"a=b&query={quote(text, safe='')}&query=second".encode()) == text
    assert read_post(json.dumps({"query": text}).encode()) == (text, {})
    assert read_post(json.dumps({"query": text}, ensure_ascii=False).encode()) == (text, {})


@pytest.mark.parametrize("sent", [b"", b"q=pizza", b"query", b"xquery=a", b"query=%ff%fe"])
def test_a_query_string_without_a_query_is_refused(sent: bytes) -> None:
    with pytest.raises(RequestError) as told:
        read_get(sent)
    assert (told.value.status, told.value.field) == (422, "query")


@pytest.mark.parametrize("query", HEAD)
def test_a_hit_from_bytes_is_what_the_answerer_says(front: Front, query: str) -> None:
    found = HotPath(front.answerer).look_up(f"  {query.upper()} ", {}, "id1")
    assert isinstance(found, Hit)
    slow = front.answerer.look_up(f"  {query.upper()} ", {}, "id1")
    assert isinstance(slow, Reply)
    fast, plain = json.loads(found.body), json.loads(reply_bytes(slow))
    assert 0 <= fast.pop("latency_ms") < limit(1000)
    plain.pop("latency_ms")
    assert fast == plain
    assert list(fast) == list(plain)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_any_query_becomes_a_hit_a_miss_or_a_refusal(front: Front, text: str) -> None:
    hot = HotPath(front.answerer)
    if not normalise(text):
        with pytest.raises(RequestError, match="the query is empty"):
            hot.look_up(text, {}, "id")
        return
    found = hot.look_up(text, {}, "id")
    if isinstance(found, Miss):
        assert found.clean not in HEAD
    else:
        assert json.loads(found.body)["query"] == text


def test_side_inputs_have_bounds(front: Front) -> None:
    good = {"query": "a", "side_inputs": {"businesses": ["b" * 500] * 50}}
    assert read_post(json.dumps(good).encode())[1] == good["side_inputs"]
    many: list[Any] = [{"businesses": ["b" * 501]}, {"businesses": ["b"] * 51}, {str(i): ["b"] for i in range(17)}, {"businesses": "b"}]
    for side_inputs in many:
        with pytest.raises(RequestError) as told:
            read_post(json.dumps({"query": "a", "side_inputs": side_inputs}).encode())
        assert (told.value.code, told.value.field.split(".")[0]) == ("invalid", "side_inputs")


def test_request_ids_never_repeat() -> None:
    one, two = RequestIds(), RequestIds()
    made = {ids.next() for ids in (one, two) for _ in range(1000)}
    assert len(made) == 2000
    assert {len(name) for name in made} == {20}


def test_a_shape_belongs_to_its_release(front: Front, store: Storage, tmp_path: Path, segmentation: Task) -> None:
    hot = HotPath(front.answerer)
    old = hot.look_up(HEAD[0], {}, "a")
    published(store, tmp_path, segmentation, [HEAD[0], "more"])
    assert asyncio.run(front.watch.refresh())
    new = hot.look_up(HEAD[0], {}, "a")
    assert isinstance(old, Hit)
    assert isinstance(new, Hit)
    assert json.loads(old.body)["release"] != json.loads(new.body)["release"] == front.answerer.served.release.id


@pytest.fixture
def cost(front: Front) -> Callable[[], int]:
    """Python calls on the way of a hit."""

    def count() -> int:
        import sys

        calls = 0

        def watch(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event == "call"

        hot = HotPath(front.answerer)
        hot.get(b"query=pizza+near+me", "id")
        sys.setprofile(watch)
        try:
            hot.get(b"query=pizza+near+me", "id")
        finally:
            sys.setprofile(None)
        return calls

    return count


def test_a_hit_takes_few_calls(cost: Callable[[], int]) -> None:
    """A guard that no load can upset: a dozen Python functions, where a web framework runs two hundred."""
    assert cost() <= 20
