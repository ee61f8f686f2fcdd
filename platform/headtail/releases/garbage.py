"""Which snapshots a release may still need, and the removal of all others.

In: a store, how many releases to keep, an age. Out: a CollectionReport. How a snapshot is removed is `cache.collect`.
"""

from __future__ import annotations

import datetime

from headtail.adapters.storage import Storage
from headtail.cache.collect import CollectionReport, collect_snapshots
from headtail.core.errors import ConfigError
from headtail.releases.canary import is_running, read_canary
from headtail.releases.release import current_id, load_release, move_history, standing_promotions


def collect_garbage(store: Storage, keep: int = 5, days: float = 14, dry_run: bool = False) -> CollectionReport:
    """Take away snapshots that are older than `days` and of none of: the current release, the canary, the last `keep` promoted
    ones, those that `keep` rollbacks reach. Also what killed publishes and writes left behind."""
    if keep < 1 or days < 0:
        raise ConfigError("keep must be 1 or more, days 0 or more", where="headtail gc", value=f"keep {keep}, days {days}")
    named = {load_release(store, move.release).snapshot for move in move_history(store)}
    age = datetime.timedelta(days=days)
    return collect_snapshots(store, lambda: needed_snapshots(store, keep), older_than=age, also=named, dry_run=dry_run)


def needed_snapshots(store: Storage, keep: int) -> dict[str, str]:
    """Snapshots that must not be collected, and why."""
    moves, stack, current = move_history(store), standing_promotions(store), current_id(store)
    found = {release: f"of release {release}, which {keep} rollbacks reach" for release in stack[-1 - keep :]}
    latest = list(dict.fromkeys(move.release for move in reversed(moves)))[:keep]
    found |= {release: f"of release {release}, one of the last {keep}" for release in latest}
    found |= {current: f"of release {current}, which is current"} if current else {}
    if (canary := read_canary(store)) is not None and is_running(store, canary):
        found[canary.canary] = f"of release {canary.canary}, the canary"
    return {load_release(store, release).snapshot: reason for release, reason in found.items()}
