"""Published caches of answers: made, moved into a store, opened and looked up."""

from headtail.cache.manifest import Manifest, read_manifest, snapshot_path
from headtail.cache.snapshot import Built, Cache, CachedAnswer, coverage, open_snapshot, publish_snapshot

__all__ = [
    "Built",
    "Cache",
    "CachedAnswer",
    "Manifest",
    "coverage",
    "open_snapshot",
    "publish_snapshot",
    "read_manifest",
    "snapshot_path",
]
