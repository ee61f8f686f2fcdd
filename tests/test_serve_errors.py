"""Errors of the HTTP interface: the shape, the codes, what OpenAPI says of them."""

from __future__ import annotations

import json

import jsonschema
import pytest
from fastapi import FastAPI, Response
from pydantic import BaseModel, Field, ValidationError

import loopback
from headtail.stages.serve.errors import CODES, ErrorResponse, RequestError, method_error, openapi_errors, validation_error
from local_server import Running


class Sent(BaseModel):
    query: str = Field(max_length=5)
    many: list[int] = []


@pytest.mark.parametrize("code", CODES)
def test_each_code_has_the_one_shape(code: str) -> None:
    error = RequestError(code)
    body = ErrorResponse.model_validate_json(error.body("r1"))
    assert (body.error.code, body.error.request_id, body.error.field) == (code, "r1", "")
    assert body.error.message == CODES[code].message == str(error)
    assert body.error.do == CODES[code].fix
    assert error.status == CODES[code].status


def test_statuses_are_those_that_were_promised() -> None:
    assert {kind.status for kind in CODES.values()} == {400, 401, 403, 404, 405, 408, 413, 422, 429, 500, 503}


def test_an_unknown_code_is_refused() -> None:
    with pytest.raises(KeyError, match="teapot"):
        RequestError("teapot")


@pytest.mark.parametrize("seconds, header", [(None, "1"), (0.0, "1"), (0.2, "1"), (1.0, "1"), (1.2, "2"), (60.0, "60")])
@pytest.mark.parametrize("code", ["rate_limited", "overloaded", "not_ready"])
def test_retry_after_is_whole_seconds_and_never_early(code: str, seconds: float | None, header: str) -> None:
    assert RequestError(code, retry_after_s=seconds).headers == [("retry-after", header)]


def test_headers_that_http_asks_for() -> None:
    assert RequestError("unauthorized").headers == [("www-authenticate", "Bearer")]
    assert method_error("GET", "HEAD").headers == [("allow", "GET, HEAD")]
    assert RequestError("invalid").headers == []


def test_texts_of_the_caller_are_cut_and_cannot_break_the_body() -> None:
    error = RequestError("invalid", "\ud800" + "m" * 10_000, field="\udfff" + "f" * 10_000)
    found = json.loads(error.body("r"))["error"]
    assert len(found["message"]) == 300
    assert len(found["field"]) == 80


def refused(data: bytes) -> RequestError:
    with pytest.raises(ValidationError) as caught:
        Sent.model_validate_json(data)
    return validation_error(caught.value)


def test_what_is_no_json_is_400_and_what_does_not_fit_422() -> None:
    for data in (b"", b"{", b"\xff", b"{'query': 1}"):
        error = refused(data)
        assert (error.code, error.status, error.field) == ("bad_request", 400, "body"), data
    assert (refused(b"{}").code, refused(b"{}").field) == ("invalid", "query")
    assert refused(b"[]").field == "body"
    assert refused(b'{"query": "a", "many": [1, "x"]}').field == "many.1"
    with pytest.raises(ValidationError) as caught:
        Sent.model_validate_json(b"{}")
    assert validation_error(caught.value, ["queries", 3]).field == "queries.3.query"


def test_a_wrong_value_is_not_sent_back() -> None:
    assert b"secret" not in refused(b'{"query": "secret words"}').body("r")


def test_openapi_says_what_is_sent() -> None:
    app = FastAPI()

    @app.get("/x", responses=openapi_errors("invalid", "rate_limited", "overloaded", "not_ready"))
    async def x() -> Response:
        error = RequestError("overloaded", retry_after_s=3)
        return Response(error.body("r"), error.status, dict(error.headers), "application/json")

    described = app.openapi()
    documented = described["paths"]["/x"]["get"]["responses"]
    assert {"200", "422", "429", "503"} == set(documented)
    assert "overloaded" in documented["503"]["description"]
    assert "not_ready" in documented["503"]["description"]
    assert documented["503"]["headers"]["Retry-After"]["schema"] == {"type": "integer", "minimum": 1}
    schema = documented["503"]["content"]["application/json"]["schema"] | {"components": described["components"]}
    with Running(app) as server:
        got = loopback.get(f"{server.url}/x")
    assert (got.status_code, got.headers["retry-after"]) == (503, "3")
    jsonschema.validate(got.json(), schema)
