"""Finished rows are safe in time, whatever the engine does: the rule in simulated time, and the thread beside an engine that is silent."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headtail.adapters.storage import open_storage, read_json
from headtail.batch.flusher import LOOK, flush_due
from headtail.batch.job import Journal
from headtail.batch.shard import Shard
from headtail.core.errors import StorageError
from headtail.core.rows import State
from headtail.engines import Completion, Request
from headtail.engines.null import NullEngine
from null_jobs import MakeJob, planned, run_here
from timescale import limit


@settings(max_examples=200)
@given(
    rate=st.floats(2, 5000),
    seconds=st.floats(1, 30),
    write=st.floats(0.001, 0.01),
    killed=st.floats(2, 20),
)
def test_killed_after_two_intervals_nearly_all_rows_are_safe(rate: float, seconds: float, write: float, killed: float) -> None:
    """`rate` rows a second; a write takes a share of `seconds`; the kill is at so many times `seconds`."""
    now, last, safe, oldest = 0.0, 0.0, 0, 0.0
    while now < killed * seconds:
        now += LOOK * seconds
        finished = int(now * rate)
        if flush_due(finished - safe, finished, now - last, now, seconds):
            last = now
            now += write * seconds
            if now < killed * seconds:
                safe = finished
        oldest = max(oldest, now - (safe + 1) / rate)
    at_kill = int(killed * seconds * rate)
    assert at_kill - safe <= max(1, 0.05 * at_kill)
    assert oldest <= seconds


@pytest.mark.parametrize("hours, most", [(0.01, 200), (1, 850)])
def test_flushes_stay_few(hours: float, most: int) -> None:
    """10 rows a second, flush_seconds 10: the clock alone makes 480 an hour."""
    now, last, safe, flushes = 0.0, 0.0, 0, 0
    while now < hours * 3600:
        now += LOOK * 10
        if flush_due(int(now * 10) - safe, int(now * 10), now - last, now, 10.0):
            last, safe, flushes = now, int(now * 10), flushes + 1
    assert flushes <= most


def test_a_long_job_is_flushed_by_the_clock() -> None:
    assert not flush_due(0, 1000, 1e9, 1e9, 10.0)
    assert not flush_due(100, 1_000_000, 7.0, 1e9, 10.0)
    assert flush_due(1, 1_000_000, 7.5, 1e9, 10.0)


@pytest.mark.parametrize("rows", [30, 254])
def test_rows_are_safe_while_the_engine_is_silent(make_local_job: MakeJob, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """One row stalls: the others do not wait for it. The engine itself looks whether they are safe, and goes on only then."""
    job = make_local_job(planned([f"q{i}" for i in range(rows + 1)]), shards=1, flush_rows=10_000, flush_seconds=0.2)
    store, plain, seen = open_storage(job.root), NullEngine.generate, list[int]()

    def stalled(self: NullEngine, requests: Iterable[Request]) -> Iterator[Completion]:
        for number, completion in enumerate(plain(self, requests)):
            if number == rows:
                end = time.monotonic() + limit(20)
                while time.monotonic() < end and (not seen or seen[-1] < rows):
                    time.sleep(0.01)
                    journal = Journal.model_validate(read_json(store, job.journal_path(0)))
                    seen.append(sum(ref.rows or 0 for ref in journal.segments))
            yield completion

    monkeypatch.setattr(NullEngine, "generate", stalled)
    ledger, _ = run_here(job)
    assert seen[-1] == rows
    assert (ledger.rows, ledger.states[State.ANSWERED]) == (rows + 1, rows + 1)


@pytest.mark.parametrize("thread", [True, False])
def test_nearly_all_rows_are_safe_at_any_moment_however_busy_the_machine(
    make_local_job: MakeJob, monkeypatch: pytest.MonkeyPatch, thread: bool
) -> None:
    """Looked at row by row, as a kill would find it; also when the thread gets no turn at all."""
    seconds = 0.05
    job = make_local_job(planned([f"q{i}" for i in range(800)]), shards=1, flush_rows=10_000, flush_seconds=seconds)
    store, plain, least, begun = open_storage(job.root), NullEngine.generate, [1.0], time.monotonic()
    if not thread:
        monkeypatch.setattr("headtail.batch.flusher.LOOK", 1e6)

    def watched(self: NullEngine, requests: Iterable[Request]) -> Iterator[Completion]:
        for number, completion in enumerate(plain(self, requests)):
            if number % 5 == 0 and number > 300 and time.monotonic() - begun > 2 * seconds:
                journal = Journal.model_validate(read_json(store, job.journal_path(0)))
                least.append(sum(ref.rows or 0 for ref in journal.segments) / number)
            time.sleep(0.0005)
            yield completion

    monkeypatch.setattr(NullEngine, "generate", watched)
    assert run_here(job)[0].rows == 800
    assert len(least) > 50
    assert min(least[1:]) >= 0.95


def test_a_flush_that_fails_ends_the_job_and_loses_no_row(make_local_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_local_job(planned([f"q{i}" for i in range(200)]), shards=1, flush_rows=10_000, flush_seconds=0.05)
    plain, failed = Shard._table, list[int]()

    def full(self: Shard, taken: object) -> object:
        if not failed:
            failed.append(1)
            raise StorageError("cannot write: No space left on device")
        return plain(self, taken)  # type: ignore[arg-type]

    monkeypatch.setattr(Shard, "_table", full)
    monkeypatch.setattr(NullEngine, "_take", lambda *_: time.sleep(0.002))
    job = dataclasses.replace(job, model=job.model.model_copy(update={"model": "null:delay_us=1"}))
    with pytest.raises(StorageError, match="No space left"):
        run_here(job)
    journal = Journal.model_validate(read_json(open_storage(job.root), job.journal_path(0)))
    safe = sum(ref.rows or 0 for ref in journal.segments)
    assert 0 < safe < 200
    assert run_here(job, "run1")[0].computed == 200 - safe
