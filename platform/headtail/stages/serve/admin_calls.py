"""Calls that change what is served: releases, the canary, overrides, deletions, for keys of scope `admin`, on the pages' port.

In: the body of a call, the name of its key. Out: what the command of the same name does in the store, which all servers follow, as JSON;
an entry in `audit/`. Who calls is the key's name, never what a body says. Closed unless the config opens them. Knows nothing of HTTP,
fronts or students.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headtail.adapters.storage import Storage
from headtail.core.errors import ConfigError, GateRejected, HeadtailError, InputError
from headtail.core.keys import query_key
from headtail.core.secrets import hide
from headtail.releases import canary, overrides
from headtail.releases import release as releases
from headtail.releases.audit import list_calls, record_call
from headtail.releases.deletion import delete_query
from headtail.releases.promotion import promote_release
from headtail.releases.standing import read_standing
from headtail.stages.serve.errors import RequestError, validation_error

log = logging.getLogger("headtail.audit")
SHOWN_CALLS = 1000
_ID = re.compile(r"[0-9a-f]{1,64}")


class AdminBody(BaseModel):
    """What a call is told. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")


class NoFields(AdminBody):
    """Nothing; the body may be empty."""


class CanaryCall(AdminBody):
    """A canary begins, its share changes, or it ends."""

    share: float = Field(ge=0, lt=1, description="share of the queries (0..1); 0 ends the canary")
    release: str = Field("", description="id of the release; empty: the canary that runs")
    policy: canary.CanaryPolicy | None = Field(None, description="when it ends; null: as before, or the default")
    why: str = Field("", description="why, in words")


class PromoteCall(AdminBody):
    """A release becomes the current one."""

    release: str = Field("", description="id of a release; empty: the canary that runs, when it is proven fine")
    accept_undecided: bool = Field(False, description="promote the canary although it is not proven that it does no harm")


class OverrideCall(AdminBody):
    """A person's answer to a query."""

    query: str = Field(description="as people type it")
    answer: Any = Field(description="valid under the task's schema; of a task with labels the bare label")
    why: str = Field(description="why, in words")
    until: str = Field("", description="last day that it holds, or the time; empty: no end")
    despite_guardrails: bool = Field(False, description="take it although a guardrail of the task refuses it")


class QueryCall(AdminBody):
    """A query, and why."""

    query: str = Field(description="as people type it")
    why: str = Field("", description="why, in words; do not repeat the query")


class AdminCall(NamedTuple):
    """What a path does. `do`: (store, body, who) to what is shown; `ref`: what the audit says that it was about."""

    method: Literal["GET", "POST"]
    body: type[AdminBody]
    do: Callable[[Storage, Any, str], Any]
    ref: Callable[[Any], str]
    summary: str


def _subject(body: Any) -> str:
    """The release or the key of the query that a body names."""
    if isinstance(body, CanaryCall | PromoteCall):
        return body.release if _ID.fullmatch(body.release) else ""
    try:
        return query_key(overrides.plain_query(body.query)).hex()
    except ConfigError:
        return ""


def _no_subject(body: Any) -> str:
    return ""


def _canary(store: Storage, body: CanaryCall, who: str) -> Any:
    if body.share == 0:
        return canary.stop_canary(store, who=who, why=body.why)
    record = canary.read_canary(store)
    running = record.canary if record is not None and canary.is_running(store, record) else ""
    if not (release := body.release or running):
        raise ConfigError("no canary runs, and no release is named", where="release", fix="send the id of a release")
    return canary.start_canary(store, release, body.share, who=who, why=body.why, policy=body.policy)


def _promote(store: Storage, body: PromoteCall, who: str) -> Any:
    if body.release:
        promote_release(store, body.release)
    else:
        canary.promote_canary(store, who=who, accept_undecided=body.accept_undecided)
    return read_standing(store)


def _rollback(store: Storage, body: NoFields, who: str) -> Any:
    releases.rollback(store)
    return read_standing(store)


def _override(store: Storage, body: OverrideCall, who: str) -> Any:
    text = body.answer if isinstance(body.answer, str) else json.dumps(body.answer, ensure_ascii=False)
    return overrides.set_override(
        store, body.query, text, who=who, why=body.why, until=body.until, despite_guardrails=body.despite_guardrails
    )


CALLS: Mapping[str, AdminCall] = {
    "release": AdminCall("GET", NoFields, lambda store, body, who: read_standing(store), _no_subject, "The current release and the canary"),
    "release/rollback": AdminCall("POST", NoFields, _rollback, _no_subject, "Make the previous release current"),
    "release/canary": AdminCall("POST", CanaryCall, _canary, _subject, "Begin a canary, change its share, end it with share 0"),
    "release/promote": AdminCall("POST", PromoteCall, _promote, _subject, "Make the canary, or a release, current"),
    "overrides": AdminCall(
        "GET",
        NoFields,
        lambda store, body, who: overrides.standing_overrides(store, releases.current_release(store).task),
        _no_subject,
        "People's answers that hold",
    ),
    "overrides/add": AdminCall("POST", OverrideCall, _override, _subject, "Give a person's answer to a query"),
    "overrides/remove": AdminCall(
        "POST",
        QueryCall,
        lambda store, body, who: overrides.remove_override(store, body.query, who=who, why=body.why),
        _subject,
        "Take a person's answer back",
    ),
    "deletions/add": AdminCall(
        "POST",
        QueryCall,
        lambda store, body, who: delete_query(store, body.query, who=who, why=body.why),
        _subject,
        "Delete a query and all that was made from it; may take minutes, and may be repeated",
    ),
    "audit": AdminCall(
        "GET", NoFields, lambda store, body, who: list_calls(store)[-SHOWN_CALLS:], _no_subject, "Who made which of these calls"
    ),
}


class AdminCalls:
    """The calls over one store. `count`: a call of this name in the counters."""

    def __init__(self, store: Storage, count: Callable[[str], None]) -> None:
        self._store, self._count = store, count
        self._busy = threading.Lock()  # one change at a time by this server

    def run(self, name: str, data: bytes, who: str, host: str) -> bytes:
        """Do the call `name` of CALLS for the key `who`, which was checked. `data`: the body; `host`: where it came from. RequestError."""
        call = CALLS[name]
        try:
            body = call.body.model_validate_json(data or b"{}")
        except ValidationError as error:
            raise validation_error(error) from None
        if call.method == "GET":
            return _as_json(_do(call, self._store, body, who))
        if not self._busy.acquire(blocking=False):
            raise RequestError("overloaded", "another admin call changes the store", retry_after_s=5)
        reason = "internal"
        try:
            made = _as_json(_do(call, self._store, body, who))
            reason = ""
            return made
        except RequestError as error:
            reason = error.code
            raise
        finally:
            self._busy.release()
            self._audit({"who": who, "action": name, "ref": call.ref(body), "reason": reason, "host": host})

    def _audit(self, fields: dict[str, str]) -> None:
        self._count("admin_calls")
        log.warning("admin call %s", json.dumps(fields))
        try:
            record_call(self._store, fields)
        except HeadtailError as error:  # the change is made, and the line above says so
            log.error("the audit could not be written: %s", hide(str(error))[:300])


def _do(call: AdminCall, store: Storage, body: AdminBody, who: str) -> Any:
    """RequestError says what the command would say; of the store's own faults nothing goes out."""
    try:
        return call.do(store, body, who)
    except (ConfigError, InputError, GateRejected) as error:
        field = error.where.lower() if error.where.lower() in type(body).model_fields else ""
        raise RequestError("invalid", error.what, field=field, fix=error.fix) from None
    except Exception as error:
        log.error("an admin call failed: %s", hide(str(error))[:500])
        raise RequestError("internal", "the store could not be read or changed", fix="see the server's log") from None


def _as_json(made: Any) -> bytes:
    plain = [one.model_dump(mode="json") for one in made] if isinstance(made, list) else made.model_dump(mode="json")
    return json.dumps(plain, ensure_ascii=False).encode()
