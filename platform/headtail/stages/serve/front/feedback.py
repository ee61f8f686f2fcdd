"""POST /v1/feedback: what a caller reports about an answer: rating, corrected answer, used or not used.

In: the request id of an answer and its query. Out: a row of rows.FEEDBACK in the request log's pipe, which the collector writes to
the store, without personal data. A correction is taken when it is valid under the task's schema and passes the guardrails. Whether
there was such a request is checked later, by the stage `feedback`: a front keeps nothing of the requests that it answered.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from headtail.cache import StoredAnswer
from headtail.core.query import redact_texts
from headtail.core.typed_answer import parse_typed_answer
from headtail.stages.serve.answerer import Answerer, OpenRelease
from headtail.stages.serve.api import FeedbackRequest
from headtail.stages.serve.errors import RequestError, validation_error
from headtail.stages.serve.front.app import FrontRequest, FrontResponse, Route, json_response
from headtail.stages.serve.front.counters import Counters
from headtail.stages.serve.front.log_pipe import TAG, RequestLog
from headtail.stages.serve.line_pipe import LINE_BYTES

_RETRY_S = 1.0  # the collector empties a full pipe in less


class FeedbackRoutes:
    """The route. `request_log`: its pipe is used. Without a request log no feedback is taken, since no request could be found for it."""

    def __init__(self, answerer: Answerer, counters: Counters, request_log: RequestLog) -> None:
        self._answerer, self._counters, self._log = answerer, counters, request_log

    @property
    def routes(self) -> Mapping[str, Route]:
        return {"/v1/feedback": Route(("POST",), self._take, "answer")}

    async def _take(self, request: FrontRequest) -> FrontResponse:
        if not self._log.is_on:
            raise RequestError("not_found", "this server takes no feedback: its request log is off", fix="start it with request_log=true")
        row, kinds = self._row(request)
        if not self._log.send((TAG, *row), "feedback_lines", "feedback_dropped"):
            raise RequestError("overloaded", "the feedback could not be kept: the log is full", retry_after_s=_RETRY_S)
        for kind in kinds:
            self._counters.add(f"feedback/{kind}")
        return json_response({"request_id": request.request_id, "about": row[1]}, 202)

    def _row(self, request: FrontRequest) -> tuple[tuple[Any, ...], list[str]]:
        """The row, without its tag, and what it says. RequestError names the field that is wrong."""
        try:
            sent = FeedbackRequest.model_validate_json(request.body)
        except ValidationError as error:
            raise validation_error(error) from None
        kinds = _kinds(sent)
        if not kinds:
            raise RequestError("invalid", "the feedback says nothing", fix="give one or more of rating, used and answer")
        served = self._answerer.served
        clean = self._answerer.clean(sent.query, {}, served)
        if self._answerer.split is not None:
            served = self._answerer.split.choose(clean, served)
        answer = self._correction(served, clean, sent.answer) if "corrected" in kinds else None
        shown, answer_key = _subject(served, sent, served.find(clean))
        if answer is not None and answer == shown:
            raise RequestError("invalid", "the corrected answer is the one that was given", field="answer", fix='send "rating": "up"')
        release, comment = served.release.id, redact_texts(sent.comment.strip())
        about = sent.request_id.removeprefix("chatcmpl-")
        now = int(time.time() * 1_000_000)
        row = now, about, clean, release, sent.rating, sent.used, answer, shown, answer_key, comment, request.caller.name
        if len(json.dumps([TAG, *row], ensure_ascii=False).encode()) > LINE_BYTES - 64:
            what = f"the feedback has more than {LINE_BYTES - 64:,} bytes"
            raise RequestError("too_large", what, field="answer", fix="shorten the comment, or correct the answer in the review queue")
        return row, kinds

    @staticmethod
    def _correction(served: OpenRelease, clean: str, given: Any) -> str:
        """A corrected answer in canonical form, without personal data."""
        text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        answer, problem = parse_typed_answer(served.task, text)
        if not problem:
            answer, problem = served.task.parse(json.dumps(redact_texts(answer), ensure_ascii=False))
        if problem:
            raise RequestError("invalid", problem, field="answer", fix="send an answer that is valid under the schema of /v1/release")
        code = served.guard.reason(clean, answer) if served.guard is not None else ""
        if code:
            what = f"a guardrail of the task refuses this answer: {code}"
            raise RequestError("invalid", what, field="answer", fix="keep the answer's text to that of the query")
        return served.task.dump(answer)


def _kinds(sent: FeedbackRequest) -> list[str]:
    kinds: list[str] = [sent.rating] if sent.rating else []
    if sent.used is not None:
        kinds.append("used" if sent.used else "unused")
    return [*kinds, "corrected"] if "answer" in sent.model_fields_set else kinds


def _subject(served: OpenRelease, sent: FeedbackRequest, found: StoredAnswer | None) -> tuple[str | None, str | None]:
    """The answer that the feedback is about, and its key: the snapshot's if it has that key, else the one that the caller sends."""
    if found is not None and sent.answer_key == found.answer_key.hex():
        return served.task.dump(found.plain_answer()), sent.answer_key
    if not sent.request_id:
        what = "there is no request_id, and answer_key is not that of the answer which the snapshot has for this query"
        raise RequestError("invalid", what, field="request_id", fix="send the request_id of the answer")
    if "shown" not in sent.model_fields_set:
        return None, sent.answer_key
    text = json.dumps(redact_texts(sent.shown), ensure_ascii=False)
    answer, problem = served.task.parse(text)
    if problem:
        raise RequestError("invalid", problem, field="shown", fix="send `answer` of the response as it was, or leave the field out")
    return served.task.dump(answer), sent.answer_key
