"""Published caches of answers: made, moved into a store, opened and looked up."""

from headtail.cache.manifest import Manifest, generation_path, read_manifest
from headtail.cache.snapshot import Built, Cache, CachedAnswer, coverage, open_generation, publish_generation

__all__ = [
    "Built",
    "Cache",
    "CachedAnswer",
    "Manifest",
    "coverage",
    "generation_path",
    "open_generation",
    "publish_generation",
    "read_manifest",
]
