"""What an endpoint's bodies come to: a line of the table in docs/engines.md each; and the setting that a refusal asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from headtail.batch.parsed_answer import classify
from headtail.core.errors import ConfigError
from headtail.core.io_format import merge_system_message
from headtail.core.rows import State
from headtail.core.task import Task
from headtail.engines import ModelConfig
from headtail.engines.chat import KEY, MODEL, SETTINGS, SYSTEM, completion_of_chat, refused_setting
from test_engines_openai import GOOD, SAMPLING, Ask, Server, ask, chat, requests, server

__all__ = ["ask", "server"]
FENCED = f"```json\n{GOOD}\n```"
CALL = [{"id": "1", "type": "function", "function": {"name": "answer", "arguments": GOOD}}]


def with_logprob(value: Any) -> dict[str, Any]:
    """An answer one of whose tokens has this log-prob."""
    body = chat(GOOD)
    body["choices"][0]["logprobs"]["content"][20]["logprob"] = value
    return body


# (body, state, tries, words of the reason)
BODIES: dict[str, tuple[Any, State, int, str]] = {
    "answer": (chat(GOOD), State.ANSWERED, 1, ""),
    "answer with reasoning": (chat(GOOD, reasoning_content="x looks like a topic"), State.ANSWERED, 1, ""),
    "reasoning alone": (
        chat(None, reasoning_content="hm"),
        State.INVALID,
        1,
        "not JSON: the message has no content; the model wrote into `reasoning_content` alone",
    ),
    "reasoning alone, to the limit": (chat(None, "length", reasoning_content="hm"), State.TRUNCATED, 1, "length limit"),
    "fenced": (chat(FENCED), State.INVALID, 1, "not JSON: the answer is inside a Markdown fence"),
    "words around it": (chat(f"Here you are: {GOOD}"), State.INVALID, 1, "not JSON: Expecting value"),
    "empty": (chat(""), State.INVALID, 1, "not JSON: the message has no content"),
    "refusal": (chat(None, refusal="I cannot help with that"), State.REFUSED, 1, "declined"),
    "content filter": (chat(None, "content_filter"), State.REFUSED, 1, "declined"),
    "tool call": (chat(None, "tool_calls", tool_calls=CALL), State.FAILED, 1, "tool_calls"),
    "cut": (chat(GOOD[:20], "length"), State.TRUNCATED, 1, "length limit"),
    "another reason": (chat(GOOD, "weird"), State.FAILED, 1, "weird"),
    "a list of parts": (chat([{"type": "text", "text": GOOD}]), State.FAILED, 1, "a list, not text"),  # type: ignore[arg-type]
    "no content": (chat(None), State.FAILED, 5, "no content"),
    "no choices": ({"choices": []}, State.FAILED, 5, "not a chat completion (no choices): "),
    "an error": ({"error": {"message": "overloaded"}}, State.FAILED, 5, "an error body"),
    "no JSON": (b"<html>bad gateway</html>", State.FAILED, 5, "not a chat completion"),
    "brackets without end": (b'{"choices":' + b"[" * 100_000, State.FAILED, 5, "not a chat completion (RecursionError"),
    "a count of tokens that cannot be": ({**chat(GOOD), "usage": {"prompt_tokens": -3}}, State.FAILED, 5, "usage.prompt_tokens is -3"),
    "half a character": (chat(GOOD.replace("x", "\ud800")), State.INVALID, 1, "not JSON: it holds half of a surrogate pair"),
    "odd log-probs": (with_logprob(None), State.ANSWERED, 1, ""),
}


@pytest.mark.parametrize("name", BODIES)
def test_what_a_body_of_status_200_comes_to(name: str, server: Server, ask: Ask, segmentation: Task) -> None:
    body, state, tries, words = BODIES[name]
    server.reply = lambda text, nth: (200, body, {})
    found = classify(segmentation, ask("a")[0])
    assert (found.state, len(server.asked)) == (state, tries)
    assert words in found.reason
    assert (found.answer is not None) == (state == State.ANSWERED)


@pytest.mark.parametrize("value", [-1, 0, 10**30, 2**31, "many", float("inf"), float("nan"), [], True])
@pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens"])
def test_a_count_is_one_that_a_table_can_hold_or_an_error(name: str, value: Any) -> None:
    body = {**chat(GOOD), "usage": {name: value}}
    if value in (0, True, []):
        assert completion_of_chat(0, body).text == GOOD
    else:
        with pytest.raises(ValueError, match=f"usage.{name} is "):
            completion_of_chat(0, body)


@pytest.mark.parametrize("value", [None, "a", 5000.0, float("nan"), float("inf"), float("-inf"), [], {}])
def test_an_answer_with_odd_logprobs_is_one_without_a_confidence(value: Any, segmentation: Task) -> None:
    made = completion_of_chat(0, with_logprob(value))
    assert (made.text, made.token_texts, made.token_logprobs) == (GOOD, (), ())
    assert classify(segmentation, made).confidence is None
    assert completion_of_chat(0, with_logprob(-9999.0)).token_logprobs[20] == -9999.0
    odd: list[Any] = ["abc", 7, {"content": "abc"}, {"content": [1]}, []]
    for said in odd:
        body = chat(GOOD)
        body["choices"][0]["logprobs"] = said
        assert completion_of_chat(0, body).token_logprobs == ()


def test_what_an_endpoint_calls_its_end_is_kept_short_and_storable(segmentation: Task) -> None:
    made = completion_of_chat(0, chat(GOOD, "\ud800" + "x" * 100_000))
    made.finish_reason.encode()
    assert len(made.finish_reason) == 50
    assert classify(segmentation, made).state == State.FAILED


def test_the_table_in_the_docs_has_a_line_for_each() -> None:
    page = (Path(__file__).parent.parent / "docs" / "engines.md").read_text(encoding="utf-8")
    assert [name for name in BODIES if f"| {name} |" not in page] == []


def openai(message: str, param: str | None = None, code: str | None = None) -> str:
    return json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}})


SYSTEM_REFUSALS = (
    json.dumps({"object": "error", "message": "System role not supported", "type": "BadRequestError", "code": 400}),
    json.dumps({"error": {"message": "System role not supported None", "code": 400}}),
    json.dumps({"detail": "Conversation roles must alternate user/assistant/user/assistant/..."}),
    openai("Unsupported value: 'messages[0].role' does not support 'system' with this model.", "messages[0].role", "unsupported_value"),
    "Only user, assistant and tool roles are supported, got system role",
)
MAX_TOKENS = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
REFUSALS = (
    ("max_tokens", openai(MAX_TOKENS, "max_tokens", "unsupported_parameter")),
    ("max_completion_tokens", openai("Unrecognized request argument supplied: max_completion_tokens")),
    ("temperature", openai("Unsupported value: 'temperature' does not support 0.0 with this model.", "temperature", "unsupported_value")),
    ("logprobs", openai("'logprobs' is not supported with this model")),
    ("seed", json.dumps({"message": "unknown field 'seed'"})),
    ("response_format", openai("Invalid parameter: 'response_format' of type 'json_schema' is not supported with this model.")),
)


MODEL_REFUSALS = (
    openai("Invalid model name passed in model=big. Call `/v1/models` to view available models"),
    json.dumps({"object": "error", "message": "Invalid model: big", "type": "invalid_model", "param": None, "code": "1500"}),
    json.dumps({"error": {"message": "big is not a valid model ID", "code": 400}}),
    openai("The model `big` has been decommissioned and is no longer supported.", code="model_decommissioned"),
    openai("The model 'big' does not exist or you do not have access to it.", code="model_not_found"),
)
KEY_REFUSALS = (
    json.dumps([{"error": {"code": 400, "message": "API key not valid. Please pass a valid API key.", "status": "INVALID_ARGUMENT"}}]),
    json.dumps({"error": "Missing API key"}),
)


def sent(**more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    return {"messages": messages, "temperature": 0, "logprobs": True, "seed": 1, "response_format": {}, **more}


def test_a_refusal_names_the_setting_to_change() -> None:
    for text in SYSTEM_REFUSALS:
        assert refused_setting(text, sent()) == SYSTEM, text
        assert refused_setting(text, {"messages": sent()["messages"][1:]}) is None, "no system message was sent"
    for name, text in REFUSALS:
        assert refused_setting(text, sent(**({name: 9} if name.startswith("max") else {}))) == SETTINGS[name], text
        assert refused_setting(text, {"messages": []}) is None, "it was not sent"
    assert [refused_setting(text, sent()) for text in MODEL_REFUSALS] == [MODEL] * len(MODEL_REFUSALS)
    assert [refused_setting(text, sent()) for text in KEY_REFUSALS] == [KEY] * len(KEY_REFUSALS)


@pytest.mark.parametrize(
    "text",
    [
        openai("This model's maximum context length is 4097 tokens. However, your messages resulted in 5000 tokens.", "messages"),
        openai("max_tokens is too large: 120000. This model supports at most 4096 completion tokens."),
        openai("The message was flagged by our content policy", code="content_policy_violation"),
        openai("Invalid model output: the grammar has no string of 120 tokens"),
        openai("The content is not available in the language of this model."),
        "bad request",
        "",
        "[]",
    ],
)
def test_a_refusal_of_one_row_names_none(text: str) -> None:
    assert refused_setting(text, sent(max_tokens=120)) is None


def test_the_endpoint_that_wants_another_name_ends_the_job_at_its_first_rows(server: Server, ask: Ask) -> None:
    def reasoning_model(text: str, nth: int) -> tuple[int, Any, dict[str, str]]:
        return (400, json.loads(REFUSALS[0][1]), {}) if "max_tokens" in server.asked[-1][1] else (200, chat(GOOD), {})

    server.reply = reasoning_model
    with pytest.raises(ConfigError, match="max_completion_tokens") as error:
        ask(*(f"row {i}" for i in range(100)))
    assert error.value.where == "model.max_tokens_field"
    assert "set model.max_tokens_field to max_completion_tokens" in error.value.fix
    assert len(server.asked) <= 8
    found = ask("a", max_tokens_field="max_completion_tokens", ask_logprobs=False)
    assert found[0].text == GOOD
    assert server.asked[-1][1]["max_completion_tokens"] == SAMPLING["max_tokens"]
    assert not {"max_tokens", "logprobs"} & server.asked[-1][1].keys()


def test_the_endpoint_that_knows_no_system_role(server: Server, segmentation: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    from headtail.engines import Request, open_engine

    def gemma(text: str, nth: int) -> tuple[int, Any, dict[str, str]]:
        refused = any(message["role"] == "system" for message in server.asked[-1][1]["messages"])
        return (400, json.loads(SYSTEM_REFUSALS[0]), {}) if refused else (200, chat(GOOD), {})

    server.reply = gemma
    chats = [Request(i, segmentation.messages(f"query {i}")) for i in range(20)]
    for role in ("keep", "merge"):
        config = ModelConfig.model_validate(
            {"engine": "openai", "model": "m", "base_url": server.url, "system_role": role, "concurrency": 4}
        )
        engine = open_engine(config, "m", segmentation.schema, SAMPLING)
        if role == "keep":
            with pytest.raises(ConfigError, match="System role not supported") as error:
                list(engine.generate(chats))
            assert (error.value.where, error.value.fix) == SYSTEM
        else:
            assert {made.text for made in engine.generate(chats)} == {GOOD}
            content = server.asked[-1][1]["messages"][0]["content"]
            assert all(message["content"] in content for message in chats[0].messages if message["role"] == "system")
        engine.close()


def test_words_in_one_row_end_no_job(server: Server, ask: Ask) -> None:
    """An endpoint that repeats a query in its refusal: the row fails with the advice, the others are answered."""
    hostile = json.loads(REFUSALS[2][1])
    server.reply = lambda text, nth: (400, hostile, {}) if text == "bad" else (200, chat(GOOD), {})
    found = ask("bad", "good", "better")
    assert [bool(found[row].error) for row in range(3)] == [True, False, False]
    assert "set it to 1" in found[0].error


@pytest.mark.parametrize("text, setting", [(MODEL_REFUSALS[0], MODEL), (KEY_REFUSALS[0], KEY)])
def test_a_400_that_blames_the_model_or_the_key_ends_the_job(text: str, setting: Any, server: Server, ask: Ask) -> None:
    server.reply = lambda _, nth: (400, json.loads(text), {})
    with pytest.raises(ConfigError, match="HTTP 400") as error:
        ask(*(f"row {i}" for i in range(100)))
    assert (error.value.where, error.value.fix, error.value.exit_code) == (*setting, 2)
    assert len(server.asked) <= 10


def test_merged_messages_hold_every_word_once() -> None:
    chat_ = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert merge_system_message(chat_) == [{"role": "user", "content": "s\n\na"}, *chat_[2:]]
    assert merge_system_message(chat_[1:]) == chat_[1:]
    assert merge_system_message(chat_[:1]) == [{"role": "user", "content": "s"}]
    assert [dict(message) for message in requests("x")[0].messages] == merge_system_message(requests("x")[0].messages)
