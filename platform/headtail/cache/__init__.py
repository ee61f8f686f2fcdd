"""Published caches of answers: made, moved into a store, opened and looked up."""

from headtail.cache.manifest import SnapshotManifest, read_manifest, snapshot_path
from headtail.cache.snapshot import Cache, CachedAnswer, LocalSnapshot, StoredAnswer, open_snapshot, publish_snapshot, snapshot_coverage

__all__ = [
    "Cache",
    "CachedAnswer",
    "LocalSnapshot",
    "SnapshotManifest",
    "StoredAnswer",
    "open_snapshot",
    "publish_snapshot",
    "read_manifest",
    "snapshot_coverage",
    "snapshot_path",
]
