"""Write rows of a server to the store, but for those of queries that were deleted.

In: rows with their queries. Out: one Parquet file without the rows of deleted queries, also of a deletion that comes while it is written.
Knows nothing of what the rows are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import pyarrow as pa

from headtail.adapters.storage import Storage, write_table
from headtail.core.keys import query_key
from headtail.releases.overrides import Overrides, load_overrides

Row = TypeVar("Row")


class UndeletedRows:
    """Writes to one store; it remembers the deletions that it read."""

    def __init__(self, store: Storage) -> None:
        self._store, self._deletions = store, Overrides()

    def write(self, path: str, rows: Sequence[Row], query: Callable[[Row], str], table: Callable[[Sequence[Row]], pa.Table]) -> None:
        """Write the rows of queries that nobody deleted; no file when there is none. StorageError when the store cannot be written."""
        written, left = 0, self._left(rows, query)
        while len(left) != written:  # a deletion that came meanwhile may not have seen the file: look again after each write
            write_table(self._store, path, table(left))
            written, left = len(left), self._left(left, query)

    def _left(self, rows: Sequence[Row], query: Callable[[Row], str]) -> Sequence[Row]:
        self._deletions = load_overrides(self._store, "", self._deletions)
        gone = self._deletions.deleted
        return [row for row in rows if query_key(query(row)) not in gone] if gone else rows
