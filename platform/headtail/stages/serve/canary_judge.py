"""What a shadow model says of both releases' answers, into the sequential test of the canary that runs.

In: rows of rows.SHADOW as they are written. Out: outcomes `judged` (1 minus the score) in the canary's record, where its policy asks for
them. Knows nothing of models or requests.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from headtail.adapters.storage import Storage
from headtail.core.keys import query_key
from headtail.releases.canary import ArmCounts, CanaryRecord, CanaryWatcher, SeenQueries, is_running, read_canary
from headtail.stages.serve.shadow import ShadowConfig


class CanaryJudge:
    """Each query counts once in a canary. Hits and misses are thinned to the same share: else the release with more hits would differ
    by its mixture alone. With a share of 0 nothing is taken, and the canary's verdict says that there is no data. `seen`: by a canary's
    salt, the queries that were counted, also before a restart."""

    def __init__(
        self,
        store: Storage,
        config: ShadowConfig,
        watcher: CanaryWatcher | None = None,
        seed: int | None = None,
        seen: Callable[[str], SeenQueries] = lambda salt: SeenQueries(),
    ) -> None:
        self._store, self._watcher, self._rng = store, watcher or CanaryWatcher(store), np.random.default_rng(seed)
        lowest = min(config.share_hits, config.share_misses)
        self._kept = {True: lowest / (config.share_hits or 1.0), False: lowest / (config.share_misses or 1.0)}  # by `cached`
        self._record: CanaryRecord | None = None
        self._salt, self._open_seen, self._seen, self._added = "", seen, SeenQueries(), False

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take in rows of one time. StorageError when the store is away: they are lost to the test."""
        self._record = record = read_canary(self._store, self._record)
        if record is None or not record.policy.judged or not is_running(self._store, record):
            return
        if record.salt != self._salt:
            self._salt, self._seen, self._added = record.salt, self._open_seen(record.salt), False
        began = datetime.datetime.fromisoformat(record.started).timestamp() * 1e6
        harm: dict[str, list[float]] = {record.champion: [], record.canary: []}
        for row in rows:
            counts = row["score"] is not None and row["release"] in harm and row["time"] >= began
            if counts and self._rng.random() < self._kept[row["cached"]] and self._seen.add(query_key(row["query"])):
                harm[row["release"]].append(1.0 - row["score"])
        champion, canary = (ArmCounts(judged=tuple(harm[release])) for release in (record.champion, record.canary))
        if champion.judged and canary.judged:
            self._record, self._added = self._watcher.add(record, champion, canary), True

    def close(self) -> None:
        """Write what was added."""
        if self._added and is_running(self._store, read_canary(self._store, self._record)):
            self._watcher.save()
