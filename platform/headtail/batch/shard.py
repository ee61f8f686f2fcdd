"""One shard from input rows to published answers. A kill at any moment loses little and repeats little.

In: a shard's input rows and, row by row, their ParsedAnswers. Out: segments (Parquet) and a journal that names them, renewed
at each flush; at the end one answers file and a ShardReceipt, checked and published by one atomic step.
Knows nothing of engines: it says which rows are still open and takes their results. One thread may take
results while another flushes.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from headtail.adapters.storage import Storage, read_table, write_once, write_table
from headtail.batch.catalog import EarlierJob, adapt_rows, complete_rows
from headtail.batch.job import Job, ShardReceipt, read_journal, read_receipt
from headtail.batch.parsed_answer import ParsedAnswer
from headtail.batch.prepare import InputManifest, read_shard
from headtail.batch.shard_requests import ShardRequests, check_rows, shard_requests, sort_answers
from headtail.core import record
from headtail.core.errors import EngineError, StorageError
from headtail.core.rows import TOP, State
from headtail.engines import Completion

# Rows asked at a time, by how often this shard was begun without a flush since: all of them twice (a machine may simply
# have been taken away), then fewer and fewer, so that a row that kills its engine is soon alone.
WINDOWS = (0, 0, 64, 8, 1)  # 0: no limit
CRASHES_ALONE = 2  # with the same row being asked alone, before it is blamed: one may be a machine that was taken away
PASSED_ENOUGH = 4096  # rows gone through in a narrow window after which the shard is trusted again
MAX_POISON_ROWS = 10  # rows of one shard that may kill an engine before the job gives up
_LISTED = 5  # reasons and sample rows named in receipts and errors


class Shard:
    """An open shard. `todo` holds the rows (by position) that have no safe outcome yet, in order of input."""

    def __init__(
        self, job: Job, store: Storage, manifest: InputManifest, number: int, edition: int, run: str, before: Sequence[EarlierJob] = ()
    ) -> None:
        self.job, self.store, self.number, self.edition, self.run = job, store, number, edition, run
        self.requests = shard_requests(read_shard(store, manifest, number), job.task, job.settings, job.io_format)
        self.journal = read_journal(self.job, self.store, self.number)
        self._seconds = self.journal.seconds
        self.damaged = self.computed = 0
        self._buffer: list[tuple[int, ParsedAnswer, Completion, float]] = []
        self._leaving = 0  # rows of a flush that is going on
        self._taking = threading.Lock()  # of _buffer and _unsettled
        self._writing = threading.RLock()  # of all that a flush changes
        self._begun, self._since = time.monotonic(), 0  # when rows were first asked, and how many were flushed since
        self._tables: list[pa.Table] = []
        self.published = False
        self.tries: Counter[int] = Counter()  # transient errors of each row in this worker
        self._before: dict[int, tuple[str, int]] = {}  # state of rows that are asked again, and in how many runs they ended in it
        done = self._read_finished()
        self.resumed = len(done) - self.computed
        self.reused = pa.Table.from_batches([], schema=job.schema)
        done |= self._take_over(done, before, manifest.shards)
        self.todo = [row for row in range(len(self.requests)) if row not in done]
        self._unsettled = len(self.todo)

    @property
    def askable(self) -> bool:
        """Whether any open row has a prompt that an engine can be asked."""
        return any(row not in self.requests.unrendered for row in self.todo)

    @property
    def done(self) -> int:
        """Rows that are safe, or taken over."""
        return len(self.requests) - len(self.todo)

    @property
    def finished_counts(self) -> dict[str, float]:
        """Rows that are safe or taken over, as `Limits.problem` counts them."""
        states = Counter(state for table in self._tables for state in table["state"].to_pylist())
        return count_finished(states)

    @property
    def representative(self) -> bool:
        """Whether the open rows are a sample of all rows: none was answered before, none is asked again."""
        answered = any(pc.any(pc.equal(table["state"], State.ANSWERED)).as_py() for table in self._tables)
        return not (self.edition or self._before or answered)

    def failed_before(self, row: int) -> bool:
        """Whether an earlier run asked the row and it is asked again."""
        return row in self._before

    @property
    def messages(self) -> list[list[dict[str, str]]]:
        """The messages of each row."""
        return self.requests.messages

    # --- what is finished

    def _read_finished(self) -> set[int]:
        """Positions of rows with an outcome: those of the journal, or of the edition before without its failed rows."""
        refs, runs = list(self.journal.segments), list(self.journal.runs)
        if self.edition and not refs:
            before = read_receipt(self.job, self.store, self.number, self.edition - 1)
            refs, runs, self._seconds = [before.answers], ["before"], before.seconds
        done: set[int] = set()
        for ref, run in zip(refs, runs, strict=True):
            try:
                table = read_table(self.store, ref).select(self.job.schema.names).cast(self.job.schema)
            except (StorageError, OSError, KeyError, pa.ArrowInvalid):
                self.damaged += ref.rows or 0  # its rows are asked again, and the receipt says how many
                continue
            if run != self.run:  # rows that failed in an earlier run get another chance
                table = self._without_retries(table)
            fresh = [(i, row) for i, row in enumerate(self._places(table)) if row >= 0 and row not in done]
            self._tables.append(table.take(pa.array([i for i, _ in fresh], pa.int64())))
            done |= {row for _, row in fresh}
            self.computed += len(fresh) if run == self.run else 0
        return done

    def _without_retries(self, table: pa.Table) -> pa.Table:
        """`table` without the failed rows that are asked again; in how many runs they failed is remembered."""
        again = pc.and_(pc.equal(table["state"], State.FAILED), pc.invert(self._exhausted_rows(table)))
        if not pc.any(again).as_py():
            return table
        failed = table.filter(again)
        self._before |= dict(
            zip(self._places(failed), zip(failed["state"].to_pylist(), failed["runs"].to_pylist(), strict=True), strict=True)
        )
        return table.filter(pc.invert(again))

    def _exhausted_rows(self, table: pa.Table) -> pa.Array:
        """Which rows were asked in as many runs as a row may be."""
        limit = self.job.max_runs_per_row
        return pa.array([bool(limit) and runs >= limit for runs in table["runs"].to_pylist()], pa.bool_())

    def _places(self, table: pa.Table) -> list[int]:
        """The position of each row of `table` in this shard; -1 for a stranger."""
        pairs = zip(table["query_key"].to_pylist(), table["answer_key"].to_pylist(), strict=True)
        return [self.requests.place.get(pair, -1) for pair in pairs]

    def _take_over(self, done: set[int], before: Sequence[EarlierJob], shards: int) -> set[int]:
        """Answers of earlier jobs to rows of this one. An answered row is taken first, then the newest of those not to be retried."""
        chosen: dict[int, tuple[bool, pa.Table, int]] = {}
        for source in before:
            if len(done) + sum(answered for answered, _, _ in chosen.values()) == len(self.requests):
                break
            for table in source.answers(self.number, shards):
                states, whole = table["state"].to_pylist(), complete_rows(table, self.job.top_logprobs)
                given_up, runs = self._exhausted_rows(table).to_pylist(), table["runs"].to_pylist()
                for i, row in enumerate(self._places(table)):
                    if row < 0 or row in done or not whole[i]:
                        continue
                    if states[i] in self.job.retry and not given_up[i]:
                        self._before.setdefault(row, (states[i], runs[i]))
                        continue
                    answered = states[i] == State.ANSWERED
                    if row not in chosen or (answered and not chosen[row][0]):
                        chosen[row] = (answered, table, i)
        by_table: dict[int, tuple[pa.Table, list[int], list[int]]] = {}
        for row, (_, table, i) in chosen.items():
            _, there, here = by_table.setdefault(id(table), (table, [], []))
            there.append(i)
            here.append(row)
        taken = [
            adapt_rows(table.take(pa.array(there, pa.int64())), self.requests.table.take(pa.array(here, pa.int64())), self.job)
            for table, there, here in by_table.values()
        ]
        if taken:
            self.reused = pa.concat_tables(taken)
            self._tables.append(self.reused)
        return set(chosen)

    # --- rows that break the engine

    @property
    def suspicious(self) -> bool:
        """Whether the next start of this shard should be alone and narrow."""
        return self.journal.crashes >= WINDOWS.index(64)

    @property
    def window(self) -> int:
        """Rows to ask at a time; 0: no limit. Holds from `begin` on."""
        return WINDOWS[min(self.journal.crashes, len(WINDOWS)) - 1]

    def begin(self) -> None:
        """Write down, before any row is asked, that the shard is begun once more."""
        with self._writing:
            was = self.journal
            update: dict[str, Any] = {"crashes": was.crashes + 1}
            if was.crashes >= len(WINDOWS) and self.todo:  # rows were asked one by one: the first open one was with the engine
                first = self.requests.pairs[self.todo[0]][1].hex()
                update |= {"suspect": first, "crashes_alone": was.crashes_alone + 1 if was.suspect == first else 1}
            self.journal = was.model_copy(update=update)
            if self.journal.crashes_alone >= CRASHES_ALONE:
                self._fail_poison_row()
            self._write_journal()
            for row in [row for row in self.todo if row in self.requests.unrendered]:
                parsed = ParsedAnswer(State.FAILED, None, None, self.requests.unrendered[row], None)
                self.take(row, parsed, Completion(row, finish_reason="error"))
            self.flush()
            self._begun, self._since = time.monotonic(), 0

    def _fail_poison_row(self) -> None:
        row, poison_rows = self.todo[0], self.journal.poison_rows + 1
        if poison_rows > MAX_POISON_ROWS:
            fix = "the engine dies on every row: see its logs (HEADTAIL_WORKER_LOGS=1) and memory; finished rows are kept"
            what = f"more than {MAX_POISON_ROWS} rows of shard {self.number} killed the engine"
            raise EngineError(what, where=self.job.path, value=self.requests.table["query"][row].as_py(), fix=fix)
        reason = "the engine died or hung on this row each time, also when the row was asked alone"
        self.take(row, ParsedAnswer(State.FAILED, None, None, reason, None), Completion(row, finish_reason="error"))
        self.journal = self.journal.model_copy(
            update={"poison_rows": poison_rows, "crashes": 1, "passed": 0, "suspect": "", "crashes_alone": 0}
        )
        self.flush()

    # --- taking answers

    def take(self, row: int, parsed: ParsedAnswer, completion: Completion, seconds: float = 0.0) -> None:
        """Take the parsed answer of one row and the engine time it took; it is safe after the next flush."""
        with self._taking:
            self._buffer.append((row, parsed, completion, seconds))
            self._unsettled -= 1

    @property
    def unsaved(self) -> int:
        """Rows that were taken and are not safe."""
        return len(self._buffer) + self._leaving

    def flush(self, broken: bool = False) -> int:
        """Make the rows taken so far safe; returns how many. `broken`: the engine just died, so nothing is forgiven."""
        with self._writing:
            with self._taking:
                rows, self._buffer = self._buffer, []
                self._leaving = len(rows)
            if not rows:
                return 0
            try:
                table = self._table(rows)
                ref = write_table(self.store, self.job.segment_path(self.number, f"{self.run}-{uuid.uuid4().hex[:8]}"), table)
            except BaseException:
                with self._taking:
                    self._buffer, self._leaving = rows + self._buffer, 0
                raise
            self._tables.append(table)
            settled = {row for row, _, _, _ in rows}
            self.todo = [row for row in self.todo if row not in settled]
            self.computed += len(rows)
            self._since += len(rows)
            was = self.journal
            update: dict[str, Any] = {"segments": (*was.segments, ref), "runs": (*was.runs, self.run), "seconds": self._seconds}
            if self.window:
                update["passed"] = was.passed + len(rows)
            if not broken and self._is_trusted(was.passed + len(rows)):
                update |= {"crashes": min(1, was.crashes), "passed": 0, "suspect": "", "crashes_alone": 0}
            self.journal = was.model_copy(update=update)
            self._write_journal()
            self._leaving = 0
            return len(rows)

    def _is_trusted(self, passed: int) -> bool:
        """Whether the engine went on for so long since the shard was begun that its earlier crashes are forgiven."""
        if self.window:
            return passed >= PASSED_ENOUGH
        return not self.todo or self._since >= self.job.flush_rows or time.monotonic() - self._begun >= self.job.flush_seconds

    def add_seconds(self, seconds: float) -> None:
        """Add engine time; it is written with the next flush."""
        self._seconds += seconds

    def _write_journal(self) -> None:
        self.store.replace(self.job.journal_path(self.number), self.journal.model_dump_json().encode())

    def _table(self, taken: Sequence[tuple[int, ParsedAnswer, Completion, float]]) -> pa.Table:
        """Rows as ANSWER rows, column by column: a dict per row costs more than all else here."""
        rows, answers, completions, seconds = zip(*taken, strict=True)
        count, requests = len(rows), self.requests
        keep = self.job.keep_logprobs
        answered: dict[str, Any] = {
            "answer_key": [requests.pairs[row][1] for row in rows],
            **dict(zip(ParsedAnswer._fields, zip(*answers, strict=True), strict=True)),
            "finish_reason": [completion.finish_reason for completion in completions],
            "tokens_in": [completion.tokens_in for completion in completions],
            "tokens_out": [tokens_out(completion) for completion in completions],
            "source": pa.repeat(pa.scalar(self.job.source), count),
            "model": pa.repeat(pa.scalar(self.job.name), count),
            "seconds": seconds,
            "runs": [0 if o.answer is not None else self._run(row, o, c) for row, o, c in zip(rows, answers, completions, strict=True)],
            "logprobs": [(c.token_logprobs if keep and _first(o) else None) or None for o, c in zip(answers, completions, strict=True)],
            **(_tops(answers, completions) if self.job.top_logprobs else {}),
        }
        inputs = requests.table.take(pa.array(rows, pa.int64()))
        columns = [
            pa.array(answered[field.name], field.type) if field.name in answered else inputs[field.name] for field in self.job.schema
        ]
        return pa.Table.from_arrays(
            [_cast(column, field.type) for column, field in zip(columns, self.job.schema, strict=True)], schema=self.job.schema
        )

    def _run(self, row: int, parsed: ParsedAnswer, completion: Completion) -> int:
        """In how many runs the row ended in this state, this one counted unless its reason may pass."""
        state, runs = self._before.get(row, ("", 0))
        return (runs if state == parsed.state else 0) + (not (completion.transient or completion.passing))

    # --- the end

    @property
    def finished(self) -> bool:
        return not self._unsettled

    def publish(self) -> ShardReceipt:
        """Check every row, write the answers, publish. When another writer was first, what it published counts."""
        self.flush()
        table = sort_answers(pa.concat_tables(self._tables).combine_chunks() if self._tables else self.job.schema.empty_table())
        check_rows(table, self.requests, f"{self.job.path}, shard {self.number}")
        failed = table.filter(pc.equal(table["state"], State.FAILED))
        others = table.filter(pc.is_in(table["state"], value_set=pa.array(set(self.job.retry) - {State.FAILED}, table["state"].type)))
        others = others.filter(self._exhausted_rows(others))
        made = ShardReceipt(
            shard=self.number,
            edition=self.edition,
            answers=write_table(self.store, self.job.answers_path(self.number, uuid.uuid4().hex[:8]), table),
            rows=table.num_rows,
            duplicates=self.requests.duplicates,
            states=dict(sorted(Counter(table["state"].to_pylist()).items())),
            failed_runs=dict(sorted(Counter(failed["runs"].to_pylist()).items())),
            reasons=dict(Counter(failed["reason"].to_pylist()).most_common(_LISTED)),
            tokens_in=_sum(table["tokens_in"]),
            tokens_out=_sum(table["tokens_out"]),
            seconds=round(self._seconds, 3),
            reused=self.reused.num_rows,
            reused_seconds=round(float(_sum(self.reused["seconds"])), 3),
            reused_tokens_in=_sum(self.reused["tokens_in"]),
            reused_tokens_out=_sum(self.reused["tokens_out"]),
            given_up=others.num_rows,
            computed=self.computed,
            damaged=self.damaged,
        )
        path = self.job.receipt_path(self.number, self.edition)
        held = write_once(self.store, path, made.model_dump_json(indent=1).encode())
        self.published = True
        self.requests, self._tables = _NOTHING, []  # the worker keeps the shard, not its rows
        self.reused = self.reused.slice(0, 0)
        return record.parse_record(ShardReceipt, held, self.store.uri(path))


def count_finished(states: Mapping[str, int]) -> dict[str, float]:
    """Finished rows of which so many are in each state, as `Limits.problem` counts them."""
    kept = sum(states.values())
    return {"kept": kept, "kept_failed": states.get(State.FAILED, 0), "kept_unanswered": kept - states.get(State.ANSWERED, 0)}


_NOTHING = ShardRequests(pa.table({}), [], [])


def tokens_out(completion: Completion) -> int:
    """Answer tokens of all samples of a row."""
    return completion.tokens_out + sum(sample.tokens_out for sample in completion.samples)


def _first(parsed: ParsedAnswer) -> bool:
    """Whether a row ended as the first of its samples did, whose tokens its completion has."""
    return not parsed.samples or parsed.samples[0]["answer"] == parsed.answer


def _tops(answers: Sequence[ParsedAnswer], completions: Sequence[Completion]) -> dict[str, list[Any]]:
    """The columns of TOP: of answered rows, where they are the answer's own tokens."""
    tops = [c.top if o.answer is not None and _first(o) else None for o, c in zip(answers, completions, strict=True)]
    return {name: [None if top is None else top[at].ravel() for top in tops] for at, name in enumerate(TOP.names)}


def _sum(column: pa.ChunkedArray) -> Any:
    return pc.sum(column).as_py() or 0


def _cast(column: Any, kind: pa.DataType) -> Any:
    return column if column.type == kind else column.cast(kind)
