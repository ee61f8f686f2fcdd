"""The bodies of the HTTP interface, for reading what is wrong with a request and for OpenAPI.

In: JSON that a caller sent. Out: typed values, or pydantic's error. The front reads well-formed bodies faster (`front.hot`) and comes
here with what it cannot read, so both take the same. Knows nothing of routes.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from headtail.stages.serve.answerer import REASONS
from headtail.stages.serve.errors import RequestError, has_half_character, validation_error

MOST_SIDE_INPUTS, MOST_ITEMS, ITEM_CHARS, MOST_QUERIES = 16, 50, 500, 1000
SideInputs = dict[str, Annotated[list[Annotated[str, Field(max_length=ITEM_CHARS)]], Field(max_length=MOST_ITEMS)]]


class AnswerRequest(BaseModel):
    """One query."""

    model_config = ConfigDict(extra="forbid")
    query: str = Field(description="what a person typed", examples=["pizza near me"])
    side_inputs: SideInputs = Field(
        {}, description="columns of the task joined to the query; used by the realtime student only", max_length=MOST_SIDE_INPUTS
    )


class AnswersRequest(BaseModel):
    """Many queries. Whether each is a text is looked at where it is answered: one that is not has its error in its place."""

    model_config = ConfigDict(extra="forbid")
    queries: list[Annotated[Any, WithJsonSchema({"type": "string"})]] = Field(
        description="what people typed", min_length=1, max_length=MOST_QUERIES, examples=[["pizza near me"]]
    )
    timeout_ms: int | None = Field(
        None,
        ge=1,
        description="milliseconds that the call may take; null, or more than the server's answers_timeout_ms: that",
        examples=[2000],
    )


def parse_query_list(body: bytes) -> AnswersRequest:
    """The body of /v1/answers, its queries as they were sent. RequestError when the body itself is wrong."""
    try:
        return AnswersRequest.model_validate_json(body)
    except ValidationError as error:
        if not has_half_character(error):
            raise validation_error(error) from None
    try:
        return AnswersRequest.model_validate(json.loads(body))  # takes such an escape, so that the other queries are answered
    except ValidationError as error:
        raise validation_error(error) from None
    except (ValueError, RecursionError):
        raise RequestError("bad_request", "the body is no JSON", field="body") from None


class AnswerResponse(BaseModel):
    """One answer and where it comes from."""

    query: str = Field(description="as it was sent")
    normalised: str = Field(description="the form that was looked up, without personal data")
    answer: Any = Field(description="JSON valid under the task's schema")
    source: str = Field(description="human_override, teacher, batch_student, realtime_student, dynamic, escalated or fallback")
    cached: bool = Field(description="whether it came from the published snapshot")
    degraded: bool = Field(description="whether this is the fallback, given because nothing better could be had")
    confidence: float | None = Field(description="0..1; null when unknown")
    answer_key: str | None = Field(description="provenance: the key under which the answer was made; null for a fallback")
    release: str = Field(description="id of the release that answered")
    snapshot: str = Field(description="id of its cache snapshot")
    latency_ms: float = Field(description="time spent in this process and on the student")
    reason: str = Field(description="empty, or one of: " + "; ".join(f"{name}: {text}" for name, text in REASONS.items()))
    request_id: str = Field(description="of this request, for logs and feedback")


class AnswersResponse(BaseModel):
    """The answers to many queries, in their order. A query that cannot be taken has an error in its place."""

    answers: list[AnswerResponse | dict[str, Any]] = Field(description='one per query, or `{"error": ...}`')


class FeedbackRequest(BaseModel):
    """What is said of one answer: at least one of rating, used and answer."""

    model_config = ConfigDict(extra="forbid")
    request_id: str = Field(
        "",
        description="of the answer. Empty only for one that a client took from its own copy of the snapshot: then `answer_key` is checked",
        pattern=r"^(?:(?:chatcmpl-)?[0-9a-f]{20}(?:-[0-9]{1,4})?)?$",
        examples=["8041d11ee1e800000001"],
    )
    query: str = Field(description="the query that was answered", examples=["pizza near me"])
    rating: Literal["up", "down"] | None = Field(None, description="thumbs")
    used: bool | None = Field(None, description="whether the answer was used: clicked, applied, acted upon")
    answer: Any = Field(
        None, description="the right answer, valid under the task's schema and guardrails; a bare label for a task of labels"
    )
    shown: Any = Field(None, description="the answer that was given, where the snapshot has none: it is not kept by the server")
    answer_key: str | None = Field(None, description="of the answer that was given", pattern="^[0-9a-f]{32}$")
    comment: str = Field("", description="why, in words; personal data is removed", max_length=500)


class FeedbackResponse(BaseModel):
    """The feedback was taken, and is written within a minute or so."""

    request_id: str = Field(description="of this call")
    about: str = Field(description="request_id of the answer that it is about")
