"""The chat-completions format: OpenAI's own client against it, over HTTP; and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fronts import Front
from headtail.adapters.storage import LocalStorage
from headtail.core.task import Task
from headtail.stages import serve
from headtail.stages.serve.admission import KeyAdmission
from headtail.stages.serve.answerer import Reply
from headtail.stages.serve.api_keys import add_key
from headtail.stages.serve.chat_api import ChatCall, chat_error, chat_response, chat_stream, parse_chat
from headtail.stages.serve.errors import CODES, RequestError
from local_server import Running
from test_serve import published, says, segments
from timescale import limit

TASKS = {"query_segmentation": 1_700_000_000}
REPLY = Reply("Pizza", "pizza", {"a": "ü"}, "teacher", True, False, 0.5, "ab" * 16, "r1", "s1", 0.1, "", "q1")


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory, segmentation: Task) -> Iterator[tuple[str, str]]:
    """A front behind HTTP: its URL, and a key for it."""
    folder = tmp_path_factory.mktemp("chat")
    store = LocalStorage(str(folder / "store"))
    published(store, folder, segmentation)
    key = add_key(folder / "keys", "chat", ["answer"])
    config = serve.Config(realtime_timeout_ms=int(limit(5) * 1000))
    made = Front(store, config, folder, says(segmentation), admit=KeyAdmission(folder / "keys", folder / "limits"))
    with Running(made.app) as server:
        yield f"{server.url}/v1", key


@pytest.fixture
def client(front: tuple[str, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=front[0], api_key=front[1], max_retries=0, timeout=limit(20)) as made:
        yield made


def ask(client: openai.OpenAI, query: Any, **options: Any) -> Any:
    messages: Any = [{"role": "system", "content": "You are ignored."}, {"role": "user", "content": query}]
    return client.chat.completions.create(model="query_segmentation", messages=messages, **options)


def test_the_client_gets_an_answer(client: openai.OpenAI) -> None:
    found = ask(client, "Pizza NEAR me", temperature=0.3, seed=1, response_format={"type": "json_object"}, extra_body={"unheard_of": [1]})
    message = found.choices[0].message
    assert json.loads(message.content) == segments("pizza near me")
    assert (message.role, found.choices[0].finish_reason, found.object) == ("assistant", "stop", "chat.completion")
    assert found.choices[0].logprobs is None
    assert found.usage.total_tokens == 0
    own = found.model_extra["headtail"]
    assert (own["source"], own["cached"], own["degraded"]) == ("teacher", True, False)
    assert found.id == f"chatcmpl-{own['request_id']}"
    assert found.system_fingerprint == own["release"]


def test_a_miss_is_answered_by_the_student(client: openai.OpenAI) -> None:
    found = ask(client, "something rare", extra_body={"side_inputs": {}})
    assert json.loads(found.choices[0].message.content) == segments("from the student")
    assert found.model_extra["headtail"]["source"] == "realtime_student"


def test_the_confidence_is_a_logprob_when_asked_for(client: openai.OpenAI) -> None:
    found = ask(client, "something rare", logprobs=True, top_logprobs=5)
    (token,) = found.choices[0].logprobs.content
    assert token.token == found.choices[0].message.content
    assert bytes(token.bytes).decode() == token.token
    assert math.exp(token.logprob) == pytest.approx(0.8)


@pytest.mark.parametrize("usage", [False, True])
def test_a_stream_has_the_answer_in_one_chunk(client: openai.OpenAI, usage: bool) -> None:
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(ask(client, "pizza near me", stream=True, **options))
    assert len(chunks) == 1 + usage
    choice = chunks[0].choices[0]
    assert json.loads(choice.delta.content) == segments("pizza near me")
    assert (choice.delta.role, choice.finish_reason) == ("assistant", "stop")
    assert not usage or chunks[1].usage.total_tokens == 0


def test_the_accumulating_stream_gives_the_same(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "pizza near me"}]
    with client.chat.completions.stream(model="query_segmentation", messages=messages) as stream:
        final = stream.get_final_completion()
    assert json.loads(final.choices[0].message.content or "") == segments("pizza near me")


@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "Segments"}}, "required"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_demanded_function_gets_the_answer_as_its_arguments(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    tools = [{"type": "function", "function": {"name": "Segments", "parameters": {"type": "object"}}}]
    if stream:
        (chunk,) = ask(client, "pizza near me", tools=tools, tool_choice=choice, stream=True)
        call = chunk.choices[0].delta.tool_calls[0]
    else:
        call = ask(client, "pizza near me", tools=tools, tool_choice=choice).choices[0].message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("Segments", segments("pizza near me"))
    free = ask(client, "pizza near me", tools=tools, tool_choice="auto").choices[0].message
    assert (free.tool_calls, json.loads(free.content)) == (None, segments("pizza near me"))


def test_the_query_is_the_last_message_of_a_user(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "user", "content": "something rare"},
        {"role": "assistant", "content": "{}"},
        {"role": "user", "content": [{"type": "text", "text": "pizza "}, {"type": "text", "text": "near me"}]},
        {"role": "tool", "content": "no", "tool_call_id": "1"},
    ]
    found = client.chat.completions.create(model="query_segmentation", messages=messages)
    assert json.loads(found.choices[0].message.content or "") == segments("pizza near me")


def test_models_are_the_tasks(client: openai.OpenAI) -> None:
    assert [(model.id, model.owned_by) for model in client.models.list()] == [("query_segmentation", "headtail")]
    assert client.models.retrieve("query_segmentation").created > 1_700_000_000
    for name in ("gpt-4", "openai/gpt-4"):
        with pytest.raises(openai.NotFoundError) as unknown:
            client.models.retrieve(name)
        assert (unknown.value.type, unknown.value.param, unknown.value.code) == ("not_found_error", "model", "not_found")


def test_the_client_raises_its_own_errors_and_they_have_our_fields(client: openai.OpenAI, front: tuple[str, str]) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}])
    body: Any = unknown.value.body
    assert (unknown.value.code, unknown.value.param, unknown.value.type) == ("not_found", "model", "not_found_error")
    assert body["do"] == "set model to one of: query_segmentation"
    assert len(body["request_id"]) == 20
    with pytest.raises(openai.UnprocessableEntityError) as empty:
        ask(client, "   ")
    assert (empty.value.code, empty.value.param) == ("invalid", "query")
    with openai.OpenAI(base_url=front[0], api_key="wrong", max_retries=0) as other, pytest.raises(openai.AuthenticationError) as shut:
        ask(other, "pizza near me")
    assert shut.value.type == "authentication_error"


@pytest.mark.parametrize("code", CODES)
def test_every_error_has_a_type(code: str) -> None:
    body = json.loads(chat_error(RequestError(code, field="f"), "r"))["error"]
    assert (body["code"], body["param"], body["request_id"]) == (code, "f", "r")
    assert body["type"].endswith("_error")
    assert (body["type"] == "server_error") == (CODES[code].status >= 500)


def refused(**changes: Any) -> RequestError:
    body = {"model": "query_segmentation", "messages": [{"role": "user", "content": "x"}], **changes}
    with pytest.raises(RequestError) as caught:
        parse_chat(json.dumps(body).encode(), TASKS)
    return caught.value


def test_what_cannot_be_answered_is_refused_with_its_field() -> None:
    image = {"type": "image_url", "image_url": {"url": "http://x"}}
    assert refused(messages=[]).field == "messages"
    assert refused(messages=[{"role": "system", "content": "x"}]).field == "messages"
    assert refused(messages=[{"role": "user", "content": None}]).field == "messages"
    assert refused(messages=[{"role": "user", "content": [image]}]).field == "messages.0.content"
    assert refused(messages="x").field == "messages"
    assert refused(n=2).field == "n"
    assert refused(model=3).field == "model"
    for tools in (None, [], [{"type": "function", "function": {"name": "b"}}]):
        error = refused(tools=tools, tool_choice={"type": "function", "function": {"name": "a"}})
        assert (error.status, error.field) == (400, "tool_choice")
    assert refused(side_inputs={"a": "b"}).field.startswith("side_inputs")
    for body in (b"", b"{", b"\xff", b"[]", b"{}"):
        with pytest.raises(RequestError) as caught:
            parse_chat(body, TASKS)
        assert caught.value.status in (400, 422)


@given(choice=st.recursive(st.none() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5))
def test_odd_tools_are_ignored(choice: Any) -> None:
    body = {"model": "query_segmentation", "messages": [{"role": "user", "content": "x"}], "tool_choice": choice, "tools": [choice]}
    assert isinstance(parse_chat(json.dumps(body).encode(), TASKS), ChatCall)


@pytest.mark.parametrize("confidence, logprob", [(0.0, -9999.0), (1.0, 0.0), (0.5, math.log(0.5))])
def test_any_confidence_is_a_number(confidence: float, logprob: float) -> None:
    call = ChatCall("t", "q", {}, False, False, True, "")
    token = json.loads(chat_response(call, REPLY._replace(confidence=confidence), 0))["choices"][0]["logprobs"]["content"][0]
    assert token["logprob"] == logprob
    assert json.loads(chat_response(call, REPLY._replace(confidence=None), 0))["choices"][0]["logprobs"] is None


def test_any_text_goes_through() -> None:
    call = ChatCall("t", "q", {}, False, False, True, "")
    for text in ('ü \u2028 \x00 "\\ data: [DONE]\n\n', "\ud800"):
        reply = REPLY._replace(answer={"a": text})
        content = json.loads(chat_response(call, reply, 0))["choices"][0]["message"]["content"]
        assert json.loads(content) == {"a": text}
        first, last, rest = chat_stream(call, reply, 0).split(b"\n\n")
        assert (last, rest) == (b"data: [DONE]", b"")
        assert json.loads(json.loads(first.removeprefix(b"data: "))["choices"][0]["delta"]["content"]) == {"a": text}
