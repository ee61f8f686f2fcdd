"""What changed between two snapshots: queries added, dropped, with a changed answer, with the same answer.

In: a store and two snapshot ids. Out: a SnapshotDiff: rows, events and share of the traffic of each kind, by source, with the most
frequent queries as examples. The two sorted Parquet files are read side by side, in bounded memory; nothing is opened in
LMDB. Knows nothing of releases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field
from rich.console import Group
from rich.table import Table
from rich.text import Text

from headtail.adapters.storage import Storage, stream_table
from headtail.cache.manifest import SnapshotManifest, read_manifest
from headtail.cache.merge import SortedBatch, merge_order, merge_rounds, sorted_batches
from headtail.core.config import Config
from headtail.core.rows import CACHED, key_words

KINDS = ("added", "dropped", "changed", "same")
_COLUMNS = ["query_key", "query", "answer", "source", "count"]
_READ = pa.schema([CACHED.field(name) for name in _COLUMNS])
_SHOWN = pa.schema(
    [("count", pa.int64()), ("query", pa.string()), ("before", pa.string()), ("after", pa.string()), ("source", pa.string())]
)


class QueryChange(Config):
    """One query, as an instance of its kind."""

    query: str = Field(description="normalised")
    count: int = Field(description="events")
    before: str | None = Field(description="answer in the first snapshot, canonical JSON; null when it had none")
    after: str | None = Field(description="answer in the second; null when it has none")
    source: str = Field(description="who gave the answer; `teacher -> batch_student` when that changed")


class DiffPart(Config):
    """The queries of one kind."""

    rows: int = Field(ge=0, description="queries")
    events: int = Field(ge=0, description="how often they were asked: by the second snapshot's counts, of dropped ones by the first's")
    share: float | None = Field(description="events over the traffic of the SnapshotDiff; null without traffic")
    by_source: dict[str, int] = Field(description="queries by who answers; `teacher -> batch_student` where that changed")
    examples: tuple[QueryChange, ...] = Field((), description="the most frequent")


class SnapshotDiff(Config):
    """Two snapshots, compared."""

    before: str = Field(description="id of the first snapshot")
    after: str = Field(description="id of the second snapshot")
    rows_before: int = Field(ge=0, description="answers in the first")
    rows_after: int = Field(ge=0, description="answers in the second")
    traffic: int = Field(ge=0, description="events that shares are taken of")
    of_log: bool = Field(description="true: traffic is the second snapshot's whole log; false: its queries and the dropped ones")
    added: DiffPart = Field(description="answered only in the second")
    dropped: DiffPart = Field(description="answered only in the first")
    changed: DiffPart = Field(description="answered otherwise")
    same: DiffPart = Field(description="answered the same, by whomever")


def diff_snapshots(store: Storage, before: str, after: str, examples: int = 10) -> SnapshotDiff:
    """Compare snapshot `after` with snapshot `before`; `examples` of each kind but `same`. StorageError when one is gone."""
    old, new = read_manifest(store, before), read_manifest(store, after)
    tallies = {kind: _Tally(examples if kind != "same" else 0) for kind in KINDS}
    for parts in diff_rounds(store, old, new):
        for kind, table in parts.items():
            tallies[kind].add(table)
    events = {kind: tally.events for kind, tally in tallies.items()}
    held = sum(events.values()) - events["dropped"]
    traffic = round(held / new.coverage) if new.coverage else held + events["dropped"]
    return SnapshotDiff(
        before=before,
        after=after,
        rows_before=old.rows,
        rows_after=new.rows,
        traffic=traffic,
        of_log=bool(new.coverage),
        **{kind: tally.part(traffic) for kind, tally in tallies.items()},
    )


def diff_rounds(store: Storage, old: SnapshotManifest, new: SnapshotManifest) -> Iterator[dict[str, pa.Table]]:
    """The queries of two snapshots by kind, a range of keys at a time, as `split_by_change` gives them."""
    for cut in merge_rounds([_rows(store, old), _rows(store, new)]):
        yield split_by_change(*(table if table.num_rows else _READ.empty_table() for table in cut))


def _rows(store: Storage, manifest: SnapshotManifest) -> Iterator[SortedBatch]:
    answers = manifest.files["answers"]
    return sorted_batches(stream_table(store, answers, _COLUMNS), store.uri(answers.path))


def split_by_change(old: pa.Table, new: pa.Table) -> dict[str, pa.Table]:
    """The rows of two tables of one range of keys, by kind, in the columns of _SHOWN. Each key is once in each at most."""
    both = pa.concat_tables([old, new])
    order, first = merge_order(*key_words(both.column("query_key")))
    starts = np.flatnonzero(first)
    pair = np.diff(np.append(starts, len(order))) == 2  # stable order: the old row is before the new
    alone = order[starts[~pair]]
    kept, now = order[starts[pair]], order[starts[pair] + 1] - old.num_rows
    was, then = old.take(pa.array(kept)), new.take(pa.array(now))
    alike = pc.equal(was.column("answer"), then.column("answer"))
    matched = _example_rows(then, was.column("answer"), then.column("answer"), _sources(was.column("source"), then.column("source")))
    gone, come = old.take(pa.array(alone[alone < old.num_rows])), new.take(pa.array(alone[alone >= old.num_rows] - old.num_rows))
    return {
        "added": _example_rows(come, pa.nulls(come.num_rows, pa.string()), come.column("answer"), come.column("source")),
        "dropped": _example_rows(gone, gone.column("answer"), pa.nulls(gone.num_rows, pa.string()), gone.column("source")),
        "changed": matched.filter(pc.invert(alike)),
        "same": matched.filter(alike),
    }


def _sources(was: pa.ChunkedArray, now: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(pc.equal(was, now), now, pc.binary_join_element_wise(was, now, " -> "))


def _example_rows(rows: pa.Table, before: pa.Array, after: pa.Array, source: pa.Array) -> pa.Table:
    counts = pc.fill_null(rows.column("count"), 0)
    return pa.table([counts, rows.column("query"), before, after, source], schema=_SHOWN)


class _Tally:
    """Counts of one kind and its most frequent rows."""

    def __init__(self, examples: int) -> None:
        self.rows = self.events = 0
        self._examples = examples
        self._sources: Counter[str] = Counter()
        self._top = _SHOWN.empty_table()

    def add(self, table: pa.Table) -> None:
        if not table.num_rows:
            return
        self.rows += table.num_rows
        self.events += pc.sum(table.column("count")).as_py()
        self._sources.update({item["values"]: item["counts"] for item in pc.value_counts(table.column("source")).to_pylist()})
        if self._examples:
            all_of = pa.concat_tables([self._top, table])
            keys = [("count", "descending"), ("query", "ascending")]
            self._top = all_of.take(pc.select_k_unstable(all_of, k=self._examples, sort_keys=keys)).combine_chunks()

    def part(self, traffic: int) -> DiffPart:
        return DiffPart(
            rows=self.rows,
            events=self.events,
            share=self.events / traffic if traffic else None,
            by_source=dict(sorted(self._sources.items())),
            examples=tuple(QueryChange.model_validate(row) for row in self._top.to_pylist()),
        )


def diff_table(diff: SnapshotDiff) -> Group:
    """A SnapshotDiff for people."""
    title = f"snapshot {diff.before} ({diff.rows_before:,} answers) -> {diff.after} ({diff.rows_after:,})"
    parts: Mapping[str, DiffPart] = {kind: getattr(diff, kind) for kind in KINDS}
    of = "the log" if diff.of_log else "queries in either"
    counts = Table("queries", "rows", f"share of {of}", "by source", title=title, title_justify="left")
    for kind, part in parts.items():
        share = "unknown" if part.share is None else f"{part.share:.2%}"
        counts.add_row(kind, f"{part.rows:,}", share, ", ".join(f"{name} {rows:,}" for name, rows in part.by_source.items()))
    shown = Table("", "events", "query", "before", "after", "source", title="the most frequent", title_justify="left")
    for kind, part in parts.items():
        for one in part.examples:
            shown.add_row(kind, f"{one.count:,}", *map(Text, (one.query, one.before or "", one.after or "", one.source)))  # no markup
    return Group(counts, shown) if shown.row_count else Group(counts)
