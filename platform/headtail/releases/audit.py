"""Who changed by way of a server what is served, and when: one numbered entry in `audit/` for each call.

In: what an admin call did. Out: entries, oldest first. An entry names a query by its key and never by its text, so that a deletion has
nothing to take out. Changes by the command line have their own records (moves, canary, overrides, deletions). Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from headtail.adapters import append_log
from headtail.adapters.storage import Storage
from headtail.core.config import Config
from headtail.core.record import Moment
from headtail.review.decision import current_moment

FOLDER = "audit"


class AuditEntry(Config):
    """One admin call."""

    number: int = Field(ge=1, description="1 for the first")
    who: str = Field(description="name of the API key")
    action: str = Field(description="the call, such as release/rollback")
    ref: str = Field("", description="what it was about: id of a release, or query_key in hex; empty: nothing of its own")
    reason: str = Field("", description="code of the error that it ended in; empty: it was done")
    host: str = Field("", description="address that it came from")
    at: Moment = Field(description="UTC, ISO 8601: when it ended")


def record_call(store: Storage, fields: Mapping[str, str]) -> AuditEntry:
    """Add an entry. `fields`: who, action, ref, reason, host."""
    entry = AuditEntry.model_validate({**fields, "number": 1, "at": current_moment()})

    def numbered(number: int) -> bytes:
        return (entry.model_copy(update={"number": number}).model_dump_json(indent=2) + "\n").encode()

    return entry.model_copy(update={"number": append_log.append_entry(store, FOLDER, numbered)})


def list_calls(store: Storage) -> list[AuditEntry]:
    """All entries, oldest first."""
    return list(append_log.read_entry_records(store, AuditEntry, FOLDER))
