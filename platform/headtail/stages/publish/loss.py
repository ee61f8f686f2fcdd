"""How much of the current release's traffic would lose its answer: what a promotion is refused for.

In: a release that was built, the current one. Out: nothing, or GateRejected with figures and examples.
"""

from __future__ import annotations

from headtail.adapters.progress import say
from headtail.adapters.storage import Storage
from headtail.cache import snapshot_path
from headtail.cache.diff import SnapshotDiff, diff_snapshots
from headtail.core.errors import GateRejected
from headtail.core.receipt import Receipt
from headtail.releases import release as releases
from headtail.stages.publish.result import Result


def refuse_loss(store: Storage, published: Receipt[Result], most: float, accepted: bool) -> None:
    """GateRejected when the current release answers much that this one does not. Without a current release there is nothing to lose."""
    current = releases.current_id(store)
    before = releases.load_release(store, current) if current else None
    if before is None or before.snapshot == published.result.snapshot:
        return
    if not store.exists(f"{snapshot_path(before.snapshot)}/manifest.json"):
        say(f"{'publish':<12} the snapshot of the current release {current} is gone: how many answers this release loses is not known")
        return
    diff = diff_snapshots(store, before.snapshot, published.result.snapshot, examples=5)
    share, of = lost_share(diff)
    if share <= most:
        return
    names = ", ".join(repr(example.query) for example in diff.dropped.examples)
    text = (
        f"{share:.1%} of {of} would lose their answer: {diff.dropped.rows:,} queries with {diff.dropped.events:,} events, such as {names}"
    )
    if accepted:
        say(f"{'publish':<12} {text}; accepted")
        return
    raise GateRejected(
        f"release {published.result.release} is not made current: {text}",
        where=f"max_lost_share={most:g}, current release {current} of task {before.task}",
        fix=f"add the answers that are missing (answers=...), or accept it: --set accept_loss=true. It is built: {published.path}",
    )


def lost_share(diff: SnapshotDiff) -> tuple[float, str]:
    """The share of the first snapshot's traffic that has no answer in the second, and of what it is a share: events where known."""
    kinds = (diff.dropped, diff.changed, diff.same)
    events, rows = sum(kind.events for kind in kinds), sum(kind.rows for kind in kinds)
    if events:
        return diff.dropped.events / events, "the current release's events"
    return diff.dropped.rows / rows if rows else 0.0, "the current release's queries (their events are not known)"
