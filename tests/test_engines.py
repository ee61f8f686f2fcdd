"""Engines: null, OpenAI-compatible HTTP against a server that misbehaves on purpose, grammars, and real vLLM on the CPU."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headtail.engines import Completion, Engine, ModelConfig, Request, grammar, open_engine
from headtail.engines.null import NullEngine
from headtail.engines.openai import OpenAIEngine, completion_of, retry_after
from headtail.errors import ConfigError, EngineError
from headtail.task import Task, load_task

SAMPLING = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 120, "seed": None}


def requests(*texts: str) -> list[Request]:
    return [Request(i, [{"role": "user", "content": text}]) for i, text in enumerate(texts)]


# --- null


@pytest.mark.parametrize("name", ["query_segmentation", "query_intent"])
def test_null_answers_are_valid_and_echo_their_own_row(name: str) -> None:
    task = load_task(name)
    queries = ["thai food", 'a "quoted" \\ thing', "x" * 300, ""]
    asked = [Request(i, task.messages(query)) for i, query in enumerate(queries)]
    for completion in NullEngine(task.schema).generate(asked):
        answer, problem = task.parse(completion.text)
        assert problem == ""
        if name == "query_segmentation":
            text = answer["segments"][0]["text"]
            assert task.messages(queries[completion.id])[-1]["content"].endswith(text)


def test_null_takes_no_unknown_option() -> None:
    with pytest.raises(ConfigError, match="unknown option"):
        NullEngine(None, "null:speed=9")


def test_null_faults_only_when_asked() -> None:
    assert [c.error for c in NullEngine(None, "null").generate(requests("!fail"))] == [""]
    assert [c.error for c in NullEngine(None, "null:faults").generate(requests("!fail"))] == ["told to fail"]


# --- the grammar and the text that students are taught to write


def _accepts(schema: dict[str, Any], text: str) -> bool:
    """Whether xgrammar, told what vLLM is told, lets this text pass, byte by byte, to the end."""
    import xgrammar

    vocabulary = [bytes([i]) for i in range(256)] + [b"</s>"]
    info = xgrammar.TokenizerInfo(vocabulary, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[256])
    compiled = xgrammar.GrammarCompiler(info).compile_json_schema(json.dumps(schema), any_whitespace=False)
    matcher = xgrammar.GrammarMatcher(compiled)
    return all(matcher.accept_token(byte) for byte in text.encode()) and bool(matcher.accept_token(256))


_TEXT = st.text(max_size=40)
_SEGMENT = st.fixed_dictionaries({"text": _TEXT, "label": st.sampled_from(["topic", "name", "location", "time", "question", "none"])})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(_SEGMENT, max_size=8))
def test_whatever_is_taught_the_grammar_lets_pass(segments: list[dict[str, str]]) -> None:
    task = load_task("query_segmentation")
    schema = grammar.for_engine(task.schema, task.file.sampling.max_tokens)
    assert _accepts(schema, task.target({"segments": segments}))


def test_the_grammar_forces_one_spacing_and_the_schemas_order(segmentation: Task) -> None:
    schema = grammar.for_engine(segmentation.schema, 120)
    assert _accepts(schema, '{"segments": [{"text": "x", "label": "name"}, {"text": "y", "label": "none"}]}')
    for other in (
        '{"segments":[{"text":"x","label":"name"}]}',
        '{"segments": [{"label": "name", "text": "x"}]}',
        '{ "segments": []}',
        '{"segments": [] }',
        '{"segments": [{"text": "x", "label": "dish"}]}',
        '{"segments": [{"text": "a\tb", "label": "name"}]}',
        '{"segments": []}\n',
    ):
        assert not _accepts(schema, other)


def test_intents_pass(intent: Task) -> None:
    for label in intent.schema["properties"]["intent"]["enum"]:
        assert _accepts(grammar.for_engine(intent.schema, 24), intent.target({"intent": label}))


def test_a_bound_that_the_token_limit_implies_goes_and_a_tighter_one_stays() -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {
            "wide": {"type": "string", "maxLength": 200, "minLength": 1},
            "tight": {"type": "string", "maxLength": 5},
            "kind": {"enum": [{"type": "string", "maxLength": 500}]},
        },
    }
    made = grammar.for_engine(schema, 120)
    assert made["properties"]["wide"] == {"type": "string"}
    assert made["properties"]["tight"] == schema["properties"]["tight"]
    assert made["properties"]["kind"] == schema["properties"]["kind"]
    assert schema["properties"]["wide"]["maxLength"] == 200  # the task's own schema, by which answers are judged, is untouched


def test_a_schema_that_is_no_grammar_says_so() -> None:
    with pytest.raises(ConfigError, match="cannot be turned into a grammar"):
        grammar.check({"type": "string", "pattern": "["}, "task.yaml answer")


# --- OpenAI-compatible HTTP

GOOD = '{"segments": [{"text": "x", "label": "topic"}]}'


def chat(text: str | None, reason: str = "stop", **message: Any) -> dict[str, Any]:
    tokens = [{"token": char, "logprob": -0.5} for char in text or ""]
    return {
        "choices": [
            {"message": {"role": "assistant", "content": text, **message}, "finish_reason": reason, "logprobs": {"content": tokens}}
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
    }


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
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
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

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


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
        plain = {"engine": "openai", "model": "m", "base_url": server.url, "request_timeout_s": 5, "concurrency": 4}
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
    with pytest.raises(EngineError, match=str(status)) as error:
        ask(*(f"row {i}" for i in range(100)))
    assert "secret" not in str(error.value)
    assert server.asked[0][2]["Authorization"] == "Bearer sk-very-secret"
    assert len(server.asked) <= 8


def test_openai_facts_and_repr_hold_no_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    engine = OpenAIEngine(ModelConfig(engine="openai", model="m", base_url=server.url), "m", None, SAMPLING)
    assert "secret" not in json.dumps(engine.facts()) + repr(engine)
    engine.close()


def test_openai_a_stalled_endpoint_is_a_failed_row_not_a_hang(server: Server, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headtail.engines.openai.TRIES", 2)

    def stall(text: str, nth: int) -> tuple[int, Any, dict[str, str]]:
        time.sleep(1.5 if text == "slow" else 0)
        return 200, chat(GOOD), {}

    server.reply = stall
    started = time.monotonic()
    found = ask("slow", "fast", request_timeout_s=0.3)
    assert time.monotonic() - started < 1.4
    assert "no answer within 0.3 s" in found[0].error
    assert found[0].transient
    assert found[1].error == ""


def test_openai_nobody_listens(ask: Ask, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headtail.engines.openai.TRIES", 2)
    completion = ask("a", base_url="http://127.0.0.1:9/v1")[0]
    assert "no connection" in completion.error
    assert completion.transient


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
    assert completion_of(3, body) == Completion(3, GOOD, "stop")


@pytest.mark.parametrize(
    "header, seconds", [("3", 3.0), ("0.5", 0.5), ("-4", 0.0), ("", 0.0), ("soon", 0.0), ("Thu, 01 Jan 1970 00:02:00 GMT", 20.0)]
)
def test_retry_after(header: str, seconds: float) -> None:
    assert retry_after(header, now=100.0) == seconds


# --- vLLM, really


@pytest.fixture(scope="module")
def vllm_engine(teacher_path: Path, segmentation: Task) -> Iterator[Engine]:
    config = ModelConfig(max_model_len=256, max_num_seqs=64, kv_cache_gib=0.25, cpus=2)
    engine = open_engine(config, str(teacher_path), segmentation.schema, {**SAMPLING, "max_tokens": 48})
    yield engine
    engine.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*max_rollback_tokens:DeprecationWarning")  # xgrammar to vLLM, in its threads
def test_vllm_runs_as_asked_and_says_so(vllm_engine: Engine) -> None:
    facts = vllm_engine.facts()
    assert (facts["max_num_seqs"], facts["max_num_batched_tokens"], facts["max_model_len"]) == (64, 8192, 256)
    assert (facts["device"], facts["dtype"], facts["prefix_caching"], facts["threads"]) == ("cpu", "bfloat16", True, 2)
    assert facts["structured_outputs"] == "xgrammar, no free whitespace"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*max_rollback_tokens:DeprecationWarning")  # xgrammar to vLLM, in its threads
def test_vllm_each_row_once_with_what_it_says(vllm_engine: Engine, segmentation: Task) -> None:
    """More rows than fit at once; texts that repeat; a row that is too long; a row whose template raises."""
    queries = [f"pizza near {'boston' if i % 2 else 'me'}" for i in range(150)]
    asked = [Request(i, segmentation.messages(query)) for i, query in enumerate(queries)]
    asked[7] = Request(7, [{"role": "user", "content": "very long " * 500}])
    asked[9] = Request(9, [{"nonsense": "x"}])
    found = {completion.id: completion for completion in vllm_engine.generate(iter(asked))}
    assert sorted(found) == list(range(150))
    assert "256" in found[7].error
    assert found[9].error
    for row, completion in found.items():
        if row in (7, 9):
            assert not completion.transient
            continue
        assert completion.error == ""
        assert completion.finish_reason in ("stop", "length")
        assert "".join(completion.token_texts) == completion.text
        assert len(completion.token_logprobs) == len(completion.token_texts) == completion.tokens_out
        assert all(logprob <= 1e-6 for logprob in completion.token_logprobs)
        assert completion.tokens_in > 10
        if completion.finish_reason == "stop":
            answer, problem = segmentation.parse(completion.text)
            assert problem == ""
            assert completion.text == segmentation.target(answer)  # the very spelling that students are taught


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*max_rollback_tokens:DeprecationWarning")  # xgrammar to vLLM, in its threads
def test_vllm_abandoned_rows_leave_nothing_behind(vllm_engine: Engine, segmentation: Task) -> None:
    stream = vllm_engine.generate(Request(i, segmentation.messages(f"query {i}")) for i in range(100))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    again = list(vllm_engine.generate(Request(i, segmentation.messages(f"other {i}")) for i in range(5)))
    assert sorted(completion.id for completion in again) == [0, 1, 2, 3, 4]
