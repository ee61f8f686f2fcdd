"""One shard on its way from input rows to published answers, such that a kill at any moment loses little and repeats little.

In: a shard's input rows and, row by row, their Outcomes. Out: segments (Parquet) and a journal that names them, renewed
at each flush; at the end one answers file and a ShardReceipt, checked and published by one atomic step.
Knows nothing of engines: it says which rows are still to be asked and takes what became of them.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from headtail.config import Config, build
from headtail.engines import Completion
from headtail.errors import EngineError, LedgerError, StorageError
from headtail.generate.job import Job, ShardReceipt
from headtail.generate.prepare import Manifest, read_shard
from headtail.keys import answer_key
from headtail.outcome import Outcome
from headtail.rows import State
from headtail.storage import FileRef, Storage, put, read_json, read_table

# Rows asked at a time, by how often this shard was begun without a flush since: all of them twice (a machine may simply
# have been taken away), then fewer and fewer, so that a row that kills its engine is soon alone.
WINDOWS = (0, 0, 64, 8, 1)  # 0: no limit
PASSED_ENOUGH = 4096  # rows gone through in a narrow window after which the shard is trusted again
MOST_CULPRITS = 10  # rows of one shard that may kill an engine before the job gives up
_LISTED = 5  # reasons and sample rows named in receipts and errors


class Journal(Config):
    """What is finished of a shard that is not. Replaced whole at each flush."""

    segments: tuple[FileRef, ...] = Field((), description="files of finished rows")
    runs: tuple[str, ...] = Field((), description="which run of the job wrote each segment")
    strikes: int = Field(0, ge=0, description="how often the shard was begun since rows were last flushed")
    passed: int = Field(0, ge=0, description="rows flushed in a narrow window")
    culprits: int = Field(0, ge=0, description="rows that were found to kill the engine")
    seconds: float = Field(0.0, ge=0, description="engine time so far")


class Shard:
    """An open shard. `todo` holds the rows (by position) that have no outcome yet, in order of input."""

    def __init__(self, job: Job, store: Storage, manifest: Manifest, number: int, edition: int, run: str) -> None:
        self.job, self.store, self.number, self.edition, self.run = job, store, number, edition, run
        self._read_input(read_shard(store, manifest, number))
        self.journal = self._read_journal()
        self._seconds = self.journal.seconds
        self.damaged = 0
        self._buffer: list[tuple[int, Outcome, Completion]] = []
        self._flushed = time.monotonic()
        self._tables: list[pa.Table] = []
        self.published = False
        self.tries: Counter[int] = Counter()  # transient errors of each row in this worker
        done = self._read_finished()
        self.todo = [row for row in range(len(self.keys)) if row not in done]

    # --- what is in it

    def _read_input(self, table: pa.Table) -> None:
        """Rows, their messages and keys, and how many are duplicates of an earlier one."""
        rows: dict[tuple[bytes, bytes], dict[str, Any]] = {}
        self.messages: list[list[dict[str, str]]] = []
        self.unrendered: dict[int, str] = {}
        self.duplicates = 0
        for row in table.to_pylist():
            try:
                messages, problem = self.job.task.messages(row["query"], row), ""
            except Exception as error:  # templates are the user's, and can raise anything: this row's fault alone
                messages, problem = [{"role": "unrendered", "content": row["query"]}], f"prompt template: {type(error).__name__}: {error}"
            first = rows.setdefault((row["query_key"], answer_key(messages, self.job.settings)), row)
            if first is row:
                if problem:
                    self.unrendered[len(self.messages)] = problem
                self.messages.append(messages)
            else:
                self.duplicates += 1
                first["withheld"] = first["withheld"] or row["withheld"]  # gold anywhere is gold everywhere
        self.keys = list(rows)
        self.rows = list(rows.values())

    # --- what is finished

    def _read_journal(self) -> Journal:
        path = self.job.journal_path(self.number)
        if not self.store.exists(path):
            return Journal()
        return build(Journal, read_json(self.store, path), where=self.store.uri(path))

    def _read_finished(self) -> set[int]:
        """Positions of rows with an outcome: those of the journal, or of the edition before without its failed rows."""
        refs, runs = list(self.journal.segments), list(self.journal.runs)
        if self.edition and not refs:
            before = read_receipt(self.job, self.store, self.number, self.edition - 1)
            refs, runs = [before.answers], ["before"]
        place = {key: row for row, key in enumerate(self.keys)}
        done: set[int] = set()
        self.computed = 0
        for ref, run in zip(refs, runs, strict=True):
            try:
                table = read_table(self.store, ref.path).select(self.job.schema.names).cast(self.job.schema)
            except (StorageError, OSError, KeyError, pa.ArrowInvalid):
                self.damaged += ref.rows or 0  # its rows are asked again, and the receipt says how many
                continue
            if run != self.run:  # rows that failed in an earlier run get another chance
                table = table.filter(pc.not_equal(table["state"], State.FAILED))
            pairs = zip(table["query_key"].to_pylist(), table["answer_key"].to_pylist(), strict=True)
            found = [place.get(pair, -1) for pair in pairs]
            fresh = [i for i, row in enumerate(found) if row >= 0 and row not in done]
            self._tables.append(table.take(pa.array(fresh, pa.int64())))
            done |= {found[i] for i in fresh}
            self.computed += len(fresh) if run == self.run else 0
        self.resumed = len(done) - self.computed
        return done

    # --- rows that break the engine

    @property
    def suspicious(self) -> bool:
        """Whether the next start of this shard should be alone and narrow."""
        return self.journal.strikes >= WINDOWS.index(64)

    @property
    def window(self) -> int:
        """Rows to ask at a time; 0: no limit. Holds from `begin` on."""
        return WINDOWS[min(self.journal.strikes, len(WINDOWS)) - 1]

    def begin(self) -> None:
        """Write down, before any row is asked, that the shard is begun once more."""
        self.journal = self.journal.model_copy(update={"strikes": self.journal.strikes + 1})
        if self.journal.strikes > len(WINDOWS) and self.todo:
            self._accuse()
        self._write_journal()
        for row in [row for row in self.todo if row in self.unrendered]:
            self.settle(row, Outcome(State.FAILED, None, None, self.unrendered[row], None), Completion(row, finish_reason="error"))
        self.flush()

    def _accuse(self) -> None:
        row, culprits = self.todo[0], self.journal.culprits + 1
        if culprits > MOST_CULPRITS:
            fix = "the engine dies whatever it is asked: see its logs (HEADTAIL_WORKER_LOGS=1) and memory; finished rows are kept"
            said = f"more than {MOST_CULPRITS} rows of shard {self.number} killed the engine"
            raise EngineError(said, where=self.job.path, value=self.rows[row]["query"], fix=fix)
        reason = "the engine died on this row each time, last when it was asked alone"
        self.settle(row, Outcome(State.FAILED, None, None, reason, None), Completion(row, finish_reason="error"))
        self.journal = self.journal.model_copy(update={"culprits": culprits, "strikes": 1, "passed": 0})
        self.flush()

    # --- taking outcomes

    def settle(self, row: int, outcome: Outcome, completion: Completion) -> None:
        """Take the outcome of one row; it is safe after the next flush."""
        self._buffer.append((row, outcome, completion))

    def due(self) -> bool:
        """Whether enough rows or time have gathered for a flush."""
        held = len(self._buffer)
        return held >= self.job.flush_rows or (held > 0 and time.monotonic() - self._flushed >= self.job.flush_seconds)

    def flush(self, broken: bool = False) -> int:
        """Make the rows taken so far safe; returns how many. `broken`: the engine just died, so nothing is forgiven."""
        count = len(self._buffer)
        if count:
            table = self._table()
            ref = self._put(table, self.job.segment_path(self.number, f"{self.run}-{uuid.uuid4().hex[:8]}"))
            self._tables.append(table)
            settled = {row for row, _, _ in self._buffer}
            self.todo = [row for row in self.todo if row not in settled]
            self._buffer = []
            self.computed += count
            was = self.journal
            update: dict[str, Any] = {"segments": (*was.segments, ref), "runs": (*was.runs, self.run), "seconds": self._seconds}
            if self.window:
                update["passed"] = was.passed + count
            if not broken and (not self.window or was.passed + count >= PASSED_ENOUGH):
                update |= {"strikes": min(1, was.strikes), "passed": 0}
            self.journal = was.model_copy(update=update)
            self._write_journal()
        self._flushed = time.monotonic()
        return count

    def spent(self, seconds: float) -> None:
        """Add engine time; it is written with the next flush."""
        self._seconds += seconds

    def _write_journal(self) -> None:
        self.store.replace(self.job.journal_path(self.number), self.journal.model_dump_json().encode())

    def _table(self) -> pa.Table:
        lines = []
        for row, outcome, completion in self._buffer:
            query_key, key = self.keys[row]
            lines.append(
                {
                    **self.rows[row],
                    "query_key": query_key,
                    "answer_key": key,
                    **outcome._asdict(),
                    "state": str(outcome.state),
                    "finish_reason": completion.finish_reason,
                    "tokens_in": completion.tokens_in,
                    "tokens_out": completion.tokens_out,
                    "source": self.job.source,
                    "model": self.job.name,
                }
            )
        return pa.Table.from_pylist(lines, schema=self.job.schema)

    def _put(self, table: pa.Table, path: str) -> FileRef:
        with tempfile.TemporaryDirectory(prefix="headtail-segment-") as folder:
            local = Path(folder) / "rows.parquet"
            pq.write_table(table, local, compression="zstd")
            return put(self.store, local, path, table.num_rows)

    # --- the end

    @property
    def finished(self) -> bool:
        return len(self.todo) == len(self._buffer)

    def publish(self) -> ShardReceipt:
        """Check every row, write the answers, publish. When another writer was first, what it published counts."""
        self.flush()
        table = pa.concat_tables(self._tables).combine_chunks() if self._tables else self.job.schema.empty_table()
        check_rows(table, self.keys, f"{self.job.path}, shard {self.number}")
        table = table.take(pc.sort_indices(table, sort_keys=[("query_key", "ascending"), ("answer_key", "ascending")]))
        failed = table.filter(pc.equal(table["state"], State.FAILED))
        made = ShardReceipt(
            shard=self.number,
            edition=self.edition,
            answers=self._put(table, self.job.answers_path(self.number, uuid.uuid4().hex[:8])),
            rows=table.num_rows,
            duplicates=self.duplicates,
            states=dict(sorted(Counter(table["state"].to_pylist()).items())),
            reasons=dict(Counter(failed["reason"].to_pylist()).most_common(_LISTED)),
            tokens_in=pc.sum(table["tokens_in"]).as_py() or 0,
            tokens_out=pc.sum(table["tokens_out"]).as_py() or 0,
            seconds=round(self._seconds, 3),
            computed=self.computed,
            damaged=self.damaged,
        )
        path = self.job.receipt_path(self.number, self.edition)
        won = self.store.create(path, made.model_dump_json(indent=1).encode())
        self.published = True
        self.rows, self.keys, self.messages, self._tables = [], [], [], []  # the worker keeps the shard, not its rows
        return made if won else read_receipt(self.job, self.store, self.number, self.edition)


def read_receipt(job: Job, store: Storage, shard: int, edition: int) -> ShardReceipt:
    """A published ShardReceipt."""
    path = job.receipt_path(shard, edition)
    return build(ShardReceipt, read_json(store, path), where=store.uri(path))


def check_rows(table: pa.Table, wanted: Sequence[tuple[bytes, bytes]], where: str) -> None:
    """LedgerError unless `table` holds each wanted (query_key, answer_key) exactly once, each in a known state."""
    given = Counter(zip(table["query_key"].to_pylist(), table["answer_key"].to_pylist(), strict=True))
    queries = dict(zip(table["query_key"].to_pylist(), table["query"].to_pylist(), strict=True))
    asked = set(wanted)
    problems = {
        "missing": [pair for pair in wanted if pair not in given],
        "not asked for": [pair for pair in given if pair not in asked],
        "twice": [pair for pair, count in given.items() if count > 1],
    }
    states = set(table["state"].to_pylist()) - {str(state) for state in State}
    said = [
        f"{len(pairs)} {name} ({', '.join(_named(pair, queries) for pair in pairs[:_LISTED])})" for name, pairs in problems.items() if pairs
    ]
    said += [f"unknown state {state}" for state in states]
    if said:
        fix = "nothing of this shard was published; run again, and report this if it stays"
        value = f"{len(wanted)} rows in, {table.num_rows} out"
        raise LedgerError(f"rows do not add up: {'; '.join(said)}", where=where, value=value, fix=fix)


def _named(pair: tuple[bytes, bytes], queries: dict[bytes, str]) -> str:
    return f"{queries.get(pair[0], 'query')!r} {pair[0].hex()[:12]}"
