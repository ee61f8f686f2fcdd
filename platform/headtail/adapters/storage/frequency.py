"""How often queries came in a log, and so their strata: by key, the log streamed.

In: an ingest's receipt, a plan's, keys of queries. Out: events, and places in STRATA. Knows nothing of what the queries are for.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.adapters.storage.base import Storage
from headtail.adapters.storage.receipts import output_table
from headtail.adapters.storage.tables import stream_table
from headtail.core.receipt import Receipt
from headtail.core.strata import stratum_places


def log_counts(store: Storage, log: Receipt, keys: pa.Array) -> tuple[npt.NDArray[np.int64], int]:
    """Events of each of `keys` in the log before the cut (0: it never came), and of the whole log. A key may be there twice."""
    counts, total = np.zeros(len(keys), np.int64), 0
    for batch in stream_table(store, log.output("queries"), ["query_key", "count"]):
        size = batch.column("count").to_numpy()
        places = pc.index_in(keys, value_set=batch.column("query_key"))
        counts[np.asarray(places.is_valid())] = size[np.asarray(places.drop_null())]
        total += int(size.sum())
    return counts, total


def head_mask(store: Storage, plan: Receipt, keys: pa.Array) -> npt.NDArray[np.bool_]:
    """Whether each of `keys` is in a plan's head."""
    head = output_table(store, plan, "head", ["query_key"])["query_key"].combine_chunks()
    return np.asarray(pc.is_in(keys, value_set=head.cast(keys.type)))


def query_strata(store: Storage, plan: Receipt, log: Receipt, keys: pa.Array, torso_min_count: int) -> npt.NDArray[np.int8]:
    """The place in STRATA of each of `keys`, by a plan and the log that it was made of."""
    return stratum_places(log_counts(store, log, keys)[0], head_mask(store, plan, keys), torso_min_count)
