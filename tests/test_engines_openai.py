"""The OpenAI-compatible engine against a server that misbehaves on purpose."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from headtail.core.config import build_config
from headtail.core.errors import ConfigError, EngineError, HeadtailError
from headtail.core.task import Task
from headtail.engines import Completion, Engine, ModelConfig, Request, open_engine
from headtail.engines.chat import completion_of_chat
from headtail.engines.openai import FORBIDDEN, SILENT_ROWS, OpenAIEngine, retry_after
from timescale import limit

SAMPLING = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 120, "seed": None}


def requests(*texts: str) -> list[Request]:
    return [Request(i, [{"role": "user", "content": text}]) for i, text in enumerate(texts)]


GOOD = '{"segments": [{"text": "x", "label": "topic"}]}'


def chat(text: str | None, reason: str = "stop", **message: Any) -> dict[str, Any]:
    tokens = [{"token": char, "logprob": -0.5} for char in text or ""]
    return {
        "choices": [
            {"message": {"role": "assistant", "content": text, **message}, "finish_reason": reason, "logprobs": {"content": tokens}}
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
    }


class _Listener(ThreadingHTTPServer):
    """Says nothing of a client that has gone away: its job may have ended while an answer was under way."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Server:
    """An endpoint that answers as `reply(text, nth)` says: (status, body, headers). It remembers what it was asked."""

    def __init__(self) -> None:
        self.reply: Callable[[str, int], tuple[int, Any, dict[str, str]]] = lambda text, nth: (200, chat(GOOD), {})
        self.asked: list[tuple[float, dict[str, Any], dict[str, str]]] = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                length = int(self.headers["content-length"])
                sent = self.rfile.read(length)
                if len(sent) < length:  # the client went away in the middle of its request
                    self.close_connection = True
                    return
                body = json.loads(sent)
                text = body["messages"][-1]["content"]
                with outer._lock:
                    outer.at_once += 1
                    outer.most_at_once = max(outer.most_at_once, outer.at_once)
                    nth = sum(asked["messages"][-1]["content"] == text for _, asked, _ in outer.asked)
                    outer.asked.append((time.monotonic(), body, dict(self.headers)))
                status, said, headers = outer.reply(text, nth)
                data = said if isinstance(said, bytes) else json.dumps(said).encode()
                with outer._lock:
                    outer.at_once -= 1
                self.send_response(status)
                for name, value in {"content-length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # a client that gave up waiting
                    self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                return None

        self.http = _Listener(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture
def ask(server: Server, segmentation: Task, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[int, Completion]]]:
    """Ask texts of the server; completions by row."""
    monkeypatch.setattr("headtail.engines.openai.BACKOFF_S", 0.01)
    engines: list[Engine] = []

    def asked(*texts: str, **fields: Any) -> dict[int, Completion]:
        plain = {"engine": "openai", "model": "m", "base_url": server.url, "request_timeout_s": limit(5), "concurrency": 4}
        config = ModelConfig.model_validate({**plain, **fields})
        engines.append(open_engine(config, "m", segmentation.schema, SAMPLING))
        found = list(engines[-1].generate(requests(*texts)))
        assert len(found) == len(texts) == len({completion.id for completion in found})
        return {completion.id: completion for completion in found}

    yield asked
    for engine in engines:
        engine.close()


Ask = Callable[..., dict[int, Completion]]


def test_openai_answers_with_counts_and_logprobs(server: Server, ask: Ask, segmentation: Task) -> None:
    found = ask("a", "b", "c", "d", "e", "f")
    assert all(completion.text == GOOD and completion.finish_reason == "stop" for completion in found.values())
    assert (found[0].tokens_in, found[0].tokens_out) == (7, 3)
    assert found[0].samples == ()
    assert "".join(found[0].token_texts) == GOOD
    body = server.asked[0][1]
    assert body["model"] == "m"
    assert body["response_format"]["json_schema"]["schema"] == segmentation.schema
    assert (body["temperature"], body["max_tokens"], body["logprobs"], "seed" in body) == (0.0, 120, True, False)


def test_openai_keeps_its_requests_in_bounds(server: Server, ask: Ask) -> None:
    def slow(text: str, nth: int) -> tuple[int, Any, dict[str, str]]:
        time.sleep(0.02)
        return 200, chat(GOOD), {}

    server.reply = slow
    ask(*(f"row {i}" for i in range(40)), concurrency=3)
    assert 2 <= server.most_at_once <= 3


@pytest.mark.parametrize("status", [429, 500, 502, 503, 408])
def test_openai_tries_again_what_passes(server: Server, ask: Ask, status: int) -> None:
    server.reply = lambda text, nth: (status, {"error": {"message": "later"}}, {}) if nth < 2 else (200, chat(GOOD), {})
    assert ask("a")[0].text == GOOD
    assert len(server.asked) == 3


def test_openai_waits_as_long_as_it_is_told_with_all_requests(server: Server, ask: Ask) -> None:
    server.reply = lambda text, nth: (429, {}, {"retry-after": "0.4"}) if text == "a" and nth == 0 else (200, chat(GOOD), {})
    ask("a", *(f"b{i}" for i in range(30)), concurrency=1)
    first, second = server.asked[0][0], server.asked[1][0]
    assert second - first >= 0.39


@pytest.mark.parametrize("status", [429, 503])
def test_openai_one_row_that_is_to_wait_an_hour_holds_no_other(
    server: Server, ask: Ask, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """It ends as failed, with that reason, and a later run may ask it again."""
    monkeypatch.setattr("headtail.engines.rate_limit.SHARED_S", 0.05)
    refused = (status, {"error": {"message": "later"}}, {"retry-after": "3600"})
    server.reply = lambda text, nth: refused if text == "slow" else (200, chat(GOOD), {})
    found = ask("slow", *(f"row {i}" for i in range(100)))
    assert [row for row, completion in found.items() if completion.error] == [0]
    assert f"HTTP {status}" in found[0].error
    assert "asks to wait 3,600 s, the limit is 60 s" in found[0].error
    assert (found[0].transient, found[0].passing) == (False, True)
    assert sum(asked["messages"][-1]["content"] == "slow" for _, asked, _ in server.asked) == 1


def test_openai_a_row_waits_as_long_as_it_is_asked(server: Server, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headtail.engines.rate_limit.SHARED_S", 0.01)
    server.reply = lambda text, nth: (429, {}, {"retry-after": "0.5"}) if text == "slow" and nth == 0 else (200, chat(GOOD), {})
    ask("slow", *(f"row {i}" for i in range(20)))
    first, second = (moment for moment, asked, _ in server.asked if asked["messages"][-1]["content"] == "slow")
    assert second - first >= 0.49
    assert any(first < moment < second for moment, _, _ in server.asked)


@pytest.mark.parametrize(
    "body, status",
    [
        ({"error": {"message": "overloaded", "code": 500}}, 500),
        ({"error": {"message": "overloaded"}}, 200),
        ({"choices": []}, 200),
        (b"<html>bad gateway</html>", 200),
        (b"", 200),
        ({"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}, 200),
        ([], 200),
    ],
)
def test_openai_error_bodies_are_never_answers(server: Server, ask: Ask, body: Any, status: int) -> None:
    """DESIGN 5."""
    server.reply = lambda text, nth: (status, body, {})
    completion = ask("a")[0]
    assert completion.error
    assert completion.transient
    assert (completion.text, completion.finish_reason) == ("", "error")


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_openai_other_refusals_are_final_for_the_row_alone(server: Server, ask: Ask, status: int) -> None:
    server.reply = lambda text, nth: (status, {"error": {"message": "too long"}}, {}) if text == "bad" else (200, chat(GOOD), {})
    found = ask("good", "bad", "better")
    assert (found[0].error, found[2].error) == ("", "")
    assert "too long" in found[1].error
    assert not found[1].transient
    assert sum(asked["messages"][-1]["content"] == "bad" for _, asked, _ in server.asked) == 1


@pytest.mark.parametrize("status", [401, 404])
def test_openai_a_wrong_key_or_model_ends_the_job_and_the_key_is_told_to_nobody(
    server: Server, ask: Ask, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    server.reply = lambda text, nth: (status, {"error": {"message": "Incorrect API key provided: sk-very-secret"}}, {})
    with pytest.raises(ConfigError, match=str(status)) as error:
        ask(*(f"row {i}" for i in range(100)))
    assert "secret" not in str(error.value)
    assert error.value.fix
    assert error.value.exit_code == 2
    assert server.asked[0][2]["Authorization"] == "Bearer sk-very-secret"
    assert len(server.asked) <= 8


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_openai_a_redirect_ends_the_job_and_says_where_it_leads(server: Server, ask: Ask, status: int) -> None:
    server.reply = lambda text, nth: (status, {}, {"Location": "https://elsewhere/v1"})
    with pytest.raises(ConfigError, match=f"{status}.*redirects to https://elsewhere/v1") as error:
        ask("row")
    assert "model.base_url" in error.value.fix


def test_openai_a_model_has_a_name() -> None:
    with pytest.raises(ConfigError, match="field model: "):
        build_config(ModelConfig, {"engine": "openai", "base_url": "https://host/v1", "model": ""}, "model")


def test_openai_facts_and_repr_hold_no_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    engine = OpenAIEngine(ModelConfig(engine="openai", model="m", base_url=server.url), "m", None, SAMPLING)
    assert "secret" not in json.dumps(engine.facts()) + repr(engine)
    engine.close()


def test_openai_a_stalled_endpoint_is_a_failed_row_not_a_hang(server: Server, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headtail.engines.openai.TRIES", 2)

    def stall(text: str, nth: int) -> tuple[int, Any, dict[str, str]]:
        time.sleep(limit(1.5) if text == "slow" else 0)
        return 200, chat(GOOD), {}

    server.reply = stall
    started = time.monotonic()
    found = ask("slow", "fast", request_timeout_s=0.3)
    assert time.monotonic() - started < limit(1.4)
    assert "no answer within 0.3 s" in found[0].error
    assert found[0].transient
    assert found[1].error == ""


def test_openai_nobody_listens(ask: Ask, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headtail.engines.openai.TRIES", 2)
    completion = ask("a", base_url="http://127.0.0.1:9/v1")[0]
    assert "no connection to 127.0.0.1:9: " in completion.error
    assert completion.transient


def test_openai_a_reply_that_cannot_be_unpacked(ask: Ask, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headtail.engines.openai.TRIES", 2)
    server.reply = lambda text, nth: (200, b"no gzip", {"Content-Encoding": "gzip"})
    completion = ask("a")[0]
    assert "cannot be unpacked" in completion.error
    assert completion.transient


def black_hole(server: Server, answers: int) -> None:
    """The endpoint answers so many requests, and then none any more."""

    def reply(text: str, nth: int) -> tuple[int, Any, dict[str, str]]:
        if len(server.asked) > answers:
            time.sleep(limit(20))  # longer than the test
        return 200, chat(GOOD), {}

    server.reply = reply


@pytest.mark.parametrize("answers", [0, 20])
def test_openai_an_endpoint_that_is_a_black_hole_ends_the_job(
    server: Server, ask: Ask, monkeypatch: pytest.MonkeyPatch, answers: int
) -> None:
    """Each row's tries would otherwise wait behind those of all others: hours at 120 s a try."""
    monkeypatch.setattr("headtail.engines.openai.SILENT_S", 0.9)
    monkeypatch.setattr("headtail.engines.openai.SILENT_FIRST_S", 0.4)
    black_hole(server, answers)
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"answered no row for .* no answer within 0\.3 s") as error:
        ask(*(f"row {i}" for i in range(100)), request_timeout_s=0.3, concurrency=32)
    assert time.monotonic() - started < limit(10)  # all 5 tries of a row: 40 s
    assert error.value.where == f"{server.url}/chat/completions"
    assert "model.request_timeout_s" in error.value.fix


def test_openai_a_few_slow_rows_are_no_black_hole(server: Server, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headtail.engines.openai.SILENT_S", 0.1)
    monkeypatch.setattr("headtail.engines.openai.SILENT_FIRST_S", 0.1)
    monkeypatch.setattr("headtail.engines.openai.TRIES", 2)
    black_hole(server, 0)
    found = ask(*(f"row {i}" for i in range(SILENT_ROWS - 1)), request_timeout_s=0.2)
    assert all("no answer within" in completion.error for completion in found.values())


@pytest.mark.parametrize("status, body", [(403, {"error": {"message": "flagged"}}), (400, {"error": {"message": "unknown model"}})])
def test_openai_rows_that_failed_before_say_nothing_about_the_config(
    server: Server, segmentation: Task, monkeypatch: pytest.MonkeyPatch, status: int, body: Any
) -> None:
    """A second run over rows that a filter refuses ends, and does not blame key or model each time."""
    server.reply = lambda text, nth: (status, body, {})
    engine = OpenAIEngine(ModelConfig(engine="openai", model="m", base_url=server.url), "m", segmentation.schema, SAMPLING)
    asked = [Request(one.id, one.messages, again=True) for one in requests(*(f"row {i}" for i in range(20)))]
    found = list(engine.generate(asked))
    engine.close()
    assert all(f"HTTP {status}" in completion.error and not completion.transient for completion in found)
    assert len(found) == 20


def test_openai_refusals_and_limits(server: Server, ask: Ask) -> None:
    said = {"filtered": chat(None, "content_filter"), "refused": chat(None, refusal="I cannot"), "long": chat('{"seg', "length")}
    server.reply = lambda text, nth: (200, said[text], {})
    found = ask("filtered", "refused", "long")
    assert [found[i].finish_reason for i in range(3)] == ["content_filter", "content_filter", "length"]
    assert found[1].text == "I cannot"


def test_openai_without_logprobs() -> None:
    body = chat(GOOD)
    body["choices"][0]["logprobs"] = None
    del body["usage"]
    assert completion_of_chat(3, body) == Completion(3, GOOD, "stop")


@pytest.mark.parametrize(
    "header, seconds", [("3", 3.0), ("0.5", 0.5), ("-4", 0.0), ("", 0.0), ("soon", 0.0), ("Thu, 01 Jan 1970 00:02:00 GMT", 20.0)]
)
def test_retry_after(header: str, seconds: float) -> None:
    assert retry_after(header, now=100.0) == seconds


def several(*texts: str) -> dict[str, Any]:
    body = chat(texts[0])
    body["choices"] = [{**chat(text)["choices"][0], "index": i} for i, text in enumerate(texts)][::-1]
    body["usage"] = {"prompt_tokens": 7, "completion_tokens": 3 * len(texts), "prompt_tokens_details": {"cached_tokens": 5}}
    return body


def test_openai_samples_come_in_order_and_every_token_is_counted_once(server: Server, segmentation: Task) -> None:
    server.reply = lambda text, nth: (200, several("a", "bb", "c"), {})
    engine = OpenAIEngine(ModelConfig(engine="openai", model="m", base_url=server.url), "m", segmentation.schema, {**SAMPLING, "n": 3})
    (made,) = engine.generate(requests("x"))
    engine.close()
    assert [made.text, *(sample.text for sample in made.samples)] == ["a", "bb", "c"]
    assert [sample.tokens_out for sample in made.samples] == [2, 1]  # as listed
    assert made.tokens_out + sum(sample.tokens_out for sample in made.samples) == 9  # as the usage says
    assert (made.tokens_in, made.tokens_cached) == (7, 5)
    assert server.asked[0][1]["n"] == 3


def test_openai_an_endpoint_that_knows_no_samples_is_an_error_not_a_poorer_answer() -> None:
    made = completion_of_chat(1, chat("a"), samples=3)
    assert "1 samples, not the 3" in made.error
    assert not made.transient


def gemini(quota: str) -> list[dict[str, Any]]:
    """A 429 as Gemini's OpenAI-compatible endpoint words it; `quota` is all that tells a day's limit from a minute's."""
    failure = {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [{"quotaId": quota, "quotaValue": "250"}]}
    retry = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "12s"}
    what = "You exceeded your current quota, please check your plan and billing details. " + "More about this error is on that page. " * 60
    return [{"error": {"code": 429, "message": what, "status": "RESOURCE_EXHAUSTED", "details": [failure, retry]}}]


GEMINI_DAY = gemini("GenerateRequestsPerDayPerProjectPerModel-FreeTier")


def test_openai_a_quota_per_minute_is_waited_for(server: Server, ask: Ask) -> None:
    minute = gemini("GenerateRequestsPerMinutePerProjectPerModel-FreeTier")
    server.reply = lambda text, nth: (429, minute, {}) if nth == 0 else (200, chat(text), {})
    assert not any(made.error for made in ask("row 1", "row 2").values())
    assert len(server.asked) == 4


@pytest.mark.parametrize(
    "status, body, words",
    [
        (403, {"error": {"message": "your key may not use this model"}}, "valid key"),
        (405, b"<html>405 Not Allowed</html>", "model.base_url"),
        (410, {"error": {"message": "retired"}}, "model.model"),
        (402, {"error": {"message": "no credit"}}, "no money"),
        (429, {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}, "no money"),
        (429, GEMINI_DAY, "quota for a day"),
        (429, {"error": {"message": "Rate limit reached for m on requests per day (RPD): Limit 200, Used 200"}}, "quota for a day"),
    ],
)
def test_openai_what_no_row_can_pass_ends_the_job(server: Server, ask: Ask, status: int, body: Any, words: str) -> None:
    server.reply = lambda text, nth: (status, body, {})
    with pytest.raises(HeadtailError, match=str(status)) as error:
        ask(*(f"row {i}" for i in range(100)))
    assert words in error.value.fix
    assert isinstance(error.value, EngineError if status in (402, 429) else ConfigError)
    assert len(server.asked) <= FORBIDDEN + 4


@pytest.mark.slow
def test_openai_asks_less_at_once_while_the_endpoint_pushes_back(
    server: Server, segmentation: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that bears three requests at once: all rows are answered, and few were pushed back for it."""
    monkeypatch.setattr("headtail.engines.openai.BACKOFF_S", 0.01)
    busy = threading.Semaphore(3)

    def narrow(text: str, nth: int) -> tuple[int, Any, dict[str, str]]:
        if not busy.acquire(blocking=False):
            return 429, {"error": {"message": "slow down"}}, {}
        time.sleep(0.03)
        busy.release()
        return 200, chat(GOOD), {}

    server.reply = narrow
    config = ModelConfig(engine="openai", model="m", base_url=server.url, concurrency=32)
    engine = OpenAIEngine(config, "m", segmentation.schema, SAMPLING)
    found = list(engine.generate(requests(*(f"row {i}" for i in range(200)))))
    facts = engine.facts()
    engine.close()
    assert all(completion.error == "" for completion in found)
    assert len(found) == 200
    assert 1 <= facts["concurrency_now"] <= 10
    assert facts["requests_pushed_back"] < 0.5 * len(found)
    assert facts["requests_sent"] == len(server.asked) == 200 + facts["requests_pushed_back"]


def test_openai_holds_its_limit_per_minute(server: Server, ask: Ask) -> None:
    ask(*(f"row {i}" for i in range(48)), requests_per_minute=1200)  # 50 ms apart, two at once: 2.3 s
    times = [moment for moment, _, _ in server.asked]
    assert times[-1] - times[0] >= 40 * 0.05  # the first may come late on a slow machine
