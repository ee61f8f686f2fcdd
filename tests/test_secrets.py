"""Keys and logins stay in the environment: every variable, every way to write one, every way out."""

from __future__ import annotations

import base64
import io
import json
import traceback
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headtail.adapters.storage import Storage, open_storage, read_json, write_json
from headtail.adapters.tracking import Tracker
from headtail.batch.parsed_answer import classify
from headtail.cli import status
from headtail.cli.doctor_servers import endpoint
from headtail.cli.finding import Finding
from headtail.core import secrets
from headtail.core.config import TrackingConfig
from headtail.core.errors import ConfigError, HeadtailError
from headtail.core.receipt import Receipt, StageResult
from headtail.core.secrets import HIDDEN, hide, hide_in, hide_in_stream
from headtail.core.task import Task
from headtail.engines import Completion, ModelConfig, Request
from headtail.engines.chat import completion_of_chat
from headtail.engines.openai import OpenAIEngine, key_for
from local_server import Running

KEYS = (
    "OPENAI_API_KEY", "MY_PROVIDER_API_KEY", "ANTHROPIC_APIKEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RAY_AUTH_TOKEN",
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN",
    "REDIS_PASSWORD", "PGPASSWORD", "GITHUB_PAT", "ORACLE_PWD", "SENTRY_DSN", "AZURE_STORAGE_CONNECTION_STRING", "SLACK_WEBHOOK",
    "TEAMS_WEBHOOK_URL", "DB_CONN_STR",
)  # fmt: skip
URLS = ("MLFLOW_TRACKING_URI", "HTTP_PROXY", "https_proxy", "ALL_PROXY", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_REGISTRY_URI")
SECRET = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\0"), min_size=8, max_size=40).filter(
    lambda text: len("".join(text.split())) >= 8 and len(set(text)) > 4
)
LOGIN = st.text(st.characters(categories=("L", "N"), include_characters="!$*-_.~@/:%+"), min_size=8, max_size=30)


def written(secret: str) -> dict[str, str]:
    """Texts as they are met: errors, headers, URLs, JSON, logs."""
    basic = base64.b64encode(f"user:{secret}".encode()).decode()
    return {
        "plain": f"the key {secret} is wrong",
        "newline": f"Illegal header value b'Bearer {secret}\\n'",
        "stripped": f"Bearer {secret.strip()}.",
        "repr": repr(secret),
        "bytes": repr(secret.encode()),
        "json": json.dumps({"key": secret}),
        "url": f"https://host/?x={quote(secret, safe='')}",
        "form": f"x={quote_plus(secret)}&y=1",
        "twice": quote(quote(secret, safe=""), safe=""),
        "basic": f"Authorization: Basic {basic}",
        "alone": base64.b64encode(secret.encode()).decode(),
        "urlsafe": base64.urlsafe_b64encode(f"ab:{secret}".encode()).decode(),
        "hex": secret.encode().hex(),
    }


@settings(max_examples=150)
@given(name=st.sampled_from(KEYS), secret=SECRET)
def test_a_key_is_hidden_however_it_is_written(name: str, secret: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, secret)
        for kind, text in written(secret).items():
            clean = hide(text)
            assert HIDDEN in clean, kind
            assert secret.strip() not in clean, kind
        assert secret.strip() not in json.dumps(hide_in({"a": [secret, {"b": (secret,)}], secret: 1}), ensure_ascii=False)


@settings(max_examples=150)
@given(name=st.sampled_from(URLS), secret=LOGIN)
def test_the_login_of_a_url_is_hidden_in_the_url_and_alone(name: str, secret: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, f"https://someone:{secret}@host.example:8443/path")
        for text in (f"cannot reach https://someone:{secret}@host.example:8443/path", f"password {secret} refused", quote(secret, safe="")):
            assert secret not in hide(text)
        assert "host.example:8443/path" in hide(f"https://someone:{secret}@host.example:8443/path")


@pytest.mark.parametrize(
    "text, clean",
    [
        ("postgresql://me:pw@db/mlflow", "postgresql://***@db/mlflow"),
        ("https://token@host/x", "https://***@host/x"),
        ("https://h/x?a=1&token=abcdef&b=2", "https://h/x?a=1&token=***&b=2"),
        ("https://b.s3.amazonaws.com/k?X-Amz-Signature=0a1b&X-Amz-Date=1", "https://b.s3.amazonaws.com/k?X-Amz-Signature=***&X-Amz-Date=1"),
        ("s3://bucket/prefix/a@b", "s3://bucket/prefix/a@b"),
        ("curl 'http://127.0.0.1:8000/v1/answer?query=a@b&query_key=1'", "curl 'http://127.0.0.1:8000/v1/answer?query=a@b&query_key=1'"),
    ],
    ids=map(str, range(6)),  # pytest puts the ids into the environment
)
def test_urls(text: str, clean: str) -> None:
    assert hide(text) == clean


def test_the_parts_of_connection_strings_and_webhooks_are_hidden_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", "DefaultEndpointsProtocol=https;AccountName=shop;AccountKey=c2VjcmV0a2V5MTIz==")
    monkeypatch.setenv("SQL_CONN_STR", "Server=db;User Id=me;Password=open-sesame")
    monkeypatch.setenv("SLACK_WEBHOOK_URL", "https://hooks.example/services/T000/B000/abcdefgh")
    clean = hide("key c2VjcmV0a2V5MTIz== or open-sesame, POST /services/T000/B000/abcdefgh; AccountName=shop Server=db")
    assert clean == "key *** or ***, POST /***; AccountName=shop Server=db"


def test_an_answer_that_repeats_the_key_does_not_hold_it(planted: str) -> None:
    body = {"choices": [{"message": {"content": f'{{"intent": "Bearer {planted}"}}'}, "finish_reason": "stop"}]}
    assert planted not in completion_of_chat(0, body).text


def test_a_bucket_takes_no_login() -> None:
    with pytest.raises(HeadtailError, match="no login") as told:
        open_storage("s3://user:open-sesame@bucket/prefix")
    assert "open-sesame" not in str(told.value)
    assert open_storage("s3://bucket/prefix/a@b").root == "s3://bucket/prefix/a@b"


@pytest.mark.parametrize(
    "name",
    ["RAY_AUTH_TOKEN_PATH", "TOKENIZERS_PARALLELISM", "PWD", "OLDPWD", "PATH", "PYTHONPATH", "DSNAME", "RAY_AUTH_MODE", "AWS_PROFILE"],
)
def test_other_variables_are_shown(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "/home/someone/place")
    assert not secrets.is_secret_name(name)
    assert hide("see /home/someone/place") == "see /home/someone/place"


def test_short_values_do_not_tear_words_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    assert hide("EMPTY answer") == "EMPTY answer"


PLANTED = "sk-planted/secret+0123"


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OPENAI_API_KEY", PLANTED + "\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:{PLANTED}@127.0.0.1:9/")
    return PLANTED


def test_no_error_holds_a_secret(planted: str) -> None:
    error = HeadtailError(f"a {planted}", where=f"b {planted}", value={"c": planted}, fix=f"d {planted}")
    assert planted not in f"{error} {error.args} {error.__reduce__()}"  # the last is how it travels between processes


class Kept(StageResult):
    """A result with a text in it."""

    url: str


def test_no_row_receipt_or_document_holds_a_secret(planted: str, store: Storage, intent: Task) -> None:
    assert planted not in classify(intent, Completion(1, error=f"{'x' * 490}{planted}")).reason  # also where it would have been cut
    assert "sk-plan" not in classify(intent, Completion(1, error=f"{'x' * 490}{planted}")).reason
    text = {"stage": "plan", "fingerprint": "a", "path": "plan/a", "started": "", "seconds": 0}
    receipt = Receipt.model_validate({**text, "result": Kept(url=planted), "notes": [planted], "settings": {planted: planted}})
    assert planted not in receipt.model_dump_json()
    write_json(store, "summary.json", {"paths": {"tracking": f"http://someone:{planted}@127.0.0.1:9/"}})
    assert read_json(store, "summary.json") == {"paths": {"tracking": "http://***@127.0.0.1:9/"}}
    assert planted not in json.dumps(status.status(store.root))
    assert planted not in json.dumps(vars(Finding(check="x", status="bad", found=planted, fix=planted)))


class Recorder:
    """A tracking client that keeps what it is sent."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> list[Any]:
            self.sent.append(repr([getattr(one, "__dict__", one) for group in (*arguments, *named.values()) for one in _each(group)]))
            return []

        return call


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def test_no_parameter_or_tag_holds_a_secret(planted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(TrackingConfig(), str(tmp_path))
    tracker._client = recorder = Recorder()
    tracker.log("run", {"a": planted}, {"m": 1.0}, {"t": planted})
    tracker.guard(lambda client: client.create_run("e", tags={}))
    tracker.dataset("run", "d", "0", f"s3://{planted}", "plan")
    assert len(recorder.sent) == 3
    assert planted not in "".join(recorder.sent)

    def fails(_: Any) -> None:
        raise OSError(f"cannot reach {tracker.uri}")

    tracker.guard(fails)
    shown = capsys.readouterr().err
    assert "out of reach" in shown
    assert planted not in shown


def test_the_terminal_shows_no_secret_not_even_in_a_stack_trace(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from headtail import cli

    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)

    def breaks(*_: object, **__: object) -> None:
        print(f"told {planted}")
        raise RuntimeError(f"broke with {planted}")

    monkeypatch.setattr("headtail.cli.entry.app", breaks)
    try:
        cli.main([])
    except RuntimeError:
        traceback.print_exc()  # as the interpreter does
    assert "broke with ***" in err.getvalue()
    assert planted not in out.getvalue() + err.getvalue()
    stream = hide_in_stream(err)
    assert hide_in_stream(stream) is stream


@pytest.mark.parametrize(
    "url, hosts, allowed",
    [
        ("https://api.example.com/v1", (), True),
        ("http://127.0.0.1:8000/v1", (), True),
        ("http://[::1]:8000/v1", (), True),
        ("http://localhost:8000/v1", (), True),
        ("http://api.example.com/v1", (), False),
        ("http://vllm.internal/v1", ("vllm.internal",), True),
        ("http://vllm.internal.evil.com/v1", ("vllm.internal",), False),
        ("http://127.0.0.1.evil.com/v1", (), False),
        ("http://localhost.evil.com/v1", (), False),
        ("http://2130706433/v1", (), False),
    ],
)
def test_a_key_goes_only_where_the_config_allows(planted: str, url: str, hosts: tuple[str, ...], allowed: bool) -> None:
    config = ModelConfig(engine="openai", base_url=url, key_hosts=hosts)
    if allowed:
        assert key_for(config) == planted  # without the line break at its end
        return
    with pytest.raises(ConfigError, match="unencrypted") as caught:
        OpenAIEngine(config, "m", None, {"temperature": 0.0, "top_p": 1.0, "max_tokens": 5})
    assert planted not in str(caught.value)
    assert endpoint(config, "teacher").status == "bad"


def test_without_a_key_any_host_may_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert key_for(ModelConfig(engine="openai", base_url="http://vllm.internal/v1")) == ""


@pytest.mark.parametrize("bad", ["sk-one\nsk-two-secret", "sk-öffentlich", "sk a secret b", "sk-tab\tsecret"])
def test_a_key_that_no_header_can_hold_is_refused_without_being_shown(monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", bad)
    config = ModelConfig(engine="openai", base_url="https://host/v1")
    with pytest.raises(ConfigError, match="no HTTP header") as caught:
        key_for(config)
    found = endpoint(config, "teacher")
    assert found.status == "bad"
    for piece in (bad, *bad.split()):
        assert len(piece) < 6 or piece not in f"{caught.value} {found}"


def test_a_redirect_never_carries_the_key(planted: str) -> None:
    """Neither the engine nor doctor follows one, to whatever host it leads."""
    met: list[tuple[str, str]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        met.append((scope["path"], dict(scope["headers"]).get(b"authorization", b"").decode()))
        headers = [(b"location", b"http://localhost:" + str(scope["server"][1]).encode() + b"/elsewhere")]
        await send({"type": "http.response.start", "status": 307, "headers": headers})
        await send({"type": "http.response.body", "body": planted.encode()})

    with Running(app) as server:
        config = ModelConfig(engine="openai", base_url=f"{server.url}/v1")
        engine = OpenAIEngine(config, "m", None, {"temperature": 0.0, "top_p": 1.0, "max_tokens": 5})
        with pytest.raises(ConfigError, match="the endpoint answered 307") as told:
            list(engine.generate([Request(1, [{"role": "user", "content": "x"}])]))
        engine.close()
        found = endpoint(config, "teacher")
    assert met == [("/v1/chat/completions", f"Bearer {planted}"), ("/v1/models", f"Bearer {planted}")]
    assert "it redirects to http://localhost" in str(told.value)
    assert planted not in str(told.value) + json.dumps(vars(found))
