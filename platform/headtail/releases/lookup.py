"""What a release answers to one query without a model, and the links to where that came from.

In: a store, a query. Out: plain values for people and programs. Knows nothing of servers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headtail.adapters.storage import Storage
from headtail.cache import open_snapshot
from headtail.core.keys import query_key
from headtail.core.query import clean_text
from headtail.releases.overrides import load_overrides
from headtail.releases.release import load_release, open_task


def look_up(store: Storage, query: str, release: str = "current", into: Path | None = None) -> dict[str, Any]:
    """What a release's snapshot answers to `query`, with people's overrides laid over it, and where that came from.

    `cached` is false on a miss.
    """
    record = load_release(store, release)
    cache = open_snapshot(store, record.snapshot, into)
    text = clean_text(query)
    shared = open_task(record).file.redacted == "cached"
    answer = load_overrides(store, record.task).resolve(query_key(text), cache.find_stored(text), shared)
    return {
        "query": query,
        "normalised": text,  # as the server looks it up
        "answer": None if answer is None else answer.plain_answer(),
        "source": None if answer is None else answer.source,
        "cached": answer is not None,
        "confidence": None if answer is None or answer.confidence is None else round(answer.confidence, 4),
        "answer_key": None if answer is None else answer.answer_key.hex(),
        "release": record.id,
        "snapshot": record.snapshot,
        "lineage": list(cache.manifest.lineage),
        "evidence": record.evidence.evaluate,
    }
