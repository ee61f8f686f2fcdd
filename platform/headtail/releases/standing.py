"""How releases stand: which is current, whether a canary runs, what is proven about it. For the command line and the admin calls.

In: a store. Out: one record. Knows nothing of servers.
"""

from __future__ import annotations

from pydantic import Field

from headtail.adapters.storage import Storage
from headtail.core.config import Config
from headtail.releases.canary import CanaryRecord, CanaryVerdict, canary_verdict, is_running, read_canary
from headtail.releases.release import current_release


class ReleaseStanding(Config):
    """The current release and the last canary."""

    current: str = Field(description="id of the current release")
    canary: CanaryRecord | None = Field(description="the canary that ran last; null: none was ever begun")
    running: bool = Field(description="whether it answers queries")
    verdict: CanaryVerdict | None = Field(description="what is proven about it")


def read_standing(store: Storage) -> ReleaseStanding:
    """InputError when nothing was promoted yet."""
    record = read_canary(store)
    verdict = canary_verdict(record) if record is not None else None
    return ReleaseStanding(current=current_release(store).id, canary=record, running=is_running(store, record), verdict=verdict)
