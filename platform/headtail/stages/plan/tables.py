"""The tables of a plan: every query's place as PLANNED rows, read and written as a stream.

In: the queries of a log, and masks over them. Out: record batches of head, teacher_sample, student_rows; labels with strata.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.adapters.storage import Storage, stream_table
from headtail.core.receipt import FileRef
from headtail.core.rows import PLANNED, SIDE_INPUT, Stratum, with_side_inputs
from headtail.stages.plan.selection import Mask

STRATA = (Stratum.HEAD, Stratum.TORSO, Stratum.TAIL)


class Plan(NamedTuple):
    """Every query's place, by rank, over the table at `queries`."""

    queries: FileRef
    stratum: npt.NDArray[np.int8]
    eval_only: Mask
    side_inputs: tuple[str, ...]

    @property
    def schema(self) -> pa.Schema:
        return with_side_inputs(PLANNED, self.side_inputs)

    def rows(self, store: Storage, mask: Mask, advance: Callable[[int], None]) -> Iterator[pa.RecordBatch]:
        """The wanted queries as PLANNED rows, read as a stream and no further than the last one."""
        names = pa.array([str(name) for name in STRATA])
        at, end = 0, int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0
        for batch in stream_table(store, self.queries):
            if at >= end:
                break
            place = slice(at, at + batch.num_rows)
            columns = {
                **{name: batch.column(name) for name in batch.schema.names},
                "rank": pa.array(np.arange(at + 1, at + 1 + batch.num_rows)),
                "stratum": names.take(pa.array(self.stratum[place])),
                "eval_only": pa.array(self.eval_only[place]),
            }
            made = pa.RecordBatch.from_arrays([columns[name] for name in self.schema.names], schema=self.schema)
            at += batch.num_rows
            advance(batch.num_rows)
            yield made.filter(pa.array(mask[place]))
        advance(len(self.stratum) - at)

    def labels(self, store: Storage, labels: pa.Table, keys: pa.ChunkedArray) -> pa.Table:
        """Human labels with their strata, and the side inputs of the queries that were seen."""
        places = pc.index_in(labels["query_key"], keys.take(pa.array(np.flatnonzero(self.eval_only))))
        ranks = pa.array(np.flatnonzero(self.eval_only)).take(places)
        names = pa.array([str(name) for name in STRATA]).take(pa.array(self.stratum).take(ranks))
        labels = labels.set_column(labels.schema.get_field_index("stratum"), "stratum", pc.fill_null(names, str(Stratum.UNSEEN)))
        seen = pa.Table.from_batches(self.rows(store, self.eval_only, lambda _: None), self.schema)
        for name in self.side_inputs:
            labels = labels.append_column(pa.field(name, SIDE_INPUT), seen[name].combine_chunks().take(places))
        return labels
