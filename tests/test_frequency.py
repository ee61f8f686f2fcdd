"""Events and strata by key, against a plain dictionary: keys may be there twice, in the log or not, in the head or not."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from conftest import keep
from headtail.adapters.storage import Storage
from headtail.adapters.storage.frequency import head_mask, log_counts, query_strata
from headtail.core.keys import query_key
from headtail.core.rows import KEY, STRATA


@pytest.mark.parametrize("seed", range(5))
def test_events_and_strata_of_keys(store: Storage, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = {query_key(f"query {n}"): int(count) for n, count in enumerate(rng.integers(1, 9, int(rng.integers(1, 400))))}
    head = {key for key in counts if rng.random() < 0.2}
    log_table = pa.table({"query_key": pa.array(list(counts), KEY), "count": pa.array(list(counts.values()), pa.int64())})
    log = keep(store, "ingest", "cd", {"queries": log_table})
    plan = keep(store, "plan", "ab", {"head": pa.table({"query_key": pa.array(sorted(head), KEY)})}, inputs={"log": "ingest/cd"})
    known = [*counts, *(query_key(f"other {n}") for n in range(50))]
    asked = [known[place] for place in rng.integers(0, len(known), 300)]
    keys = pa.array(asked, KEY)
    found, total = log_counts(store, log, keys)
    assert found.tolist() == [counts.get(key, 0) for key in asked]
    assert total == sum(counts.values())
    assert head_mask(store, plan, keys).tolist() == [key in head for key in asked]

    def stratum(key: bytes) -> str:
        return "head" if key in head else "unseen" if key not in counts else "torso" if counts[key] >= 5 else "tail"

    assert [STRATA[place] for place in query_strata(store, plan, log, keys, 5)] == [stratum(key) for key in asked]
