"""The worker: one engine that gets rows of shard after shard without a pause; each result goes back to its shard.

In: numbers of shards, as a Ray Data batch. Out: a ShardReceipt each. Rows go from the store to the engine to the store;
none passes through Ray. An engine that breaks is started again and shards that broke it go on alone, in small steps.
Knows nothing of how shards are kept or engines work.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import Field

from headtail.adapters.storage import open_storage, read_record, write_json
from headtail.adapters.worker_logs import last_fatal_signal, log_folder
from headtail.batch.catalog import EarlierJob, earlier_jobs
from headtail.batch.flusher import flush_late, flush_thread
from headtail.batch.job import Job, ShardReceipt, read_receipt
from headtail.batch.limits import FirstRows
from headtail.batch.parsed_answer import classify
from headtail.batch.prepare import InputManifest
from headtail.batch.shard import Shard, tokens_out
from headtail.batch.watch import watchdog
from headtail.core.config import Config
from headtail.core.errors import EngineError, HeadtailError
from headtail.core.rows import State
from headtail.core.secrets import hide
from headtail.engines import Completion, Engine, Request, open_engine
from headtail.engines.models import check_weights, find_model

_PASS_BACKOFF_S = 1.0  # before rows with transient errors are asked once more; doubles
_LONGEST_BACKOFF_S = 30.0
_TELL_S = 1.0  # the meter gets counts, and is asked whether to stop, at most this often
_FIRST_TELL_S = 0.1  # the same until a row has an answer: a job without any stops that much sooner
_REASONS = 100  # different ones that a worker keeps
_START_S = 1800.0  # beyond stall_seconds: loading the weights of a large model takes long
MOST_STARTS = 16  # of engines in a row that finish no row. Ray brings a dead actor back for ever; this is what ends it
MOST_ILLEGAL = 2  # the same when the last one ended by an illegal instruction: no row is to blame for that


class Starts(Config):
    """How often a run's engines were started since one of them last finished a row."""

    starts: int = Field(ge=0, description="engines")


@dataclass(frozen=True)
class Ask:
    """A shard to do, and which edition of it."""

    shard: int
    edition: int


class Worker:
    """A Ray Data actor. `run` names this run of the job; `meter` gets the progress (None: there is no meter)."""

    def __init__(self, job: Job, manifest: InputManifest, run: str, meter: Any = None) -> None:
        self.job, self.manifest, self.run, self.meter = job, manifest, run, meter
        self.store = open_storage(job.root)
        self.engine: Engine | None = None
        self.name = uuid.uuid4().hex[:8]
        self.start_s = self.begun = 0.0
        self.restarts = self.settled = 0
        self.stopped = ""  # why the job stops before its end; what is open is made safe and nothing new is begun
        self.reasons: Counter[str] = Counter()  # why rows have no answer
        self._first = FirstRows(job.limits.unanswered_share if job.workers == 1 else 1.0)  # one of several may be ill alone
        self._proven = True
        self._done: dict[int, int] = {}
        self._before: dict[int, dict[str, float]] = {}
        self._news: dict[str, float] = defaultdict(float)
        self._news_at, self._tell_s = 0.0, _FIRST_TELL_S
        self._reply: Any = None

    @cached_property
    def earlier(self) -> list[EarlierJob]:
        """Earlier jobs whose answers may be taken over. Not read when the actor starts: an error there would be hidden by Ray's retries."""
        return earlier_jobs(self.store, self.job)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        asks = [Ask(int(shard), int(edition)) for shard, edition in zip(batch["shard"], batch["edition"], strict=True)]
        receipts = self.work(asks)
        facts = self.engine.facts() if self.engine is not None else {}
        report = {"worker": self.name, "engine": facts, "start_s": self.start_s, "restarts": self.restarts}
        report |= {"receipts": [receipt.model_dump(mode="json") for receipt in receipts], "stopped": self.stopped, "reasons": self.reasons}
        return {"report": [json.dumps(report)]}

    def work(self, asks: Sequence[Ask]) -> list[ShardReceipt]:
        """Bring shards to their end: first those that never broke an engine, together; then the others, one by one.

        A shard that is missing in what comes back was left open because the job is to stop.
        """
        receipts: dict[int, ShardReceipt] = {}
        while (todo := self._unpublished(asks, receipts)) and not self.stopped:
            alone: list[Ask] = []
            self._run_feed(_ChainFeed(self, todo, alone), receipts)
            for ask in alone:
                self._run_feed(_WindowFeed(self, self.open(ask)), receipts)
        self.report_progress()
        return [receipts[ask.shard] for ask in asks if ask.shard in receipts]

    def _unpublished(self, asks: Sequence[Ask], receipts: dict[int, ShardReceipt]) -> list[Ask]:
        """What is not published yet. A task that Ray repeats, or an engine that broke, may leave published shards behind."""
        for ask in asks:
            if ask.shard not in receipts and self.store.exists(self.job.receipt_path(ask.shard, ask.edition)):
                receipts[ask.shard] = read_receipt(self.job, self.store, ask.shard, ask.edition)
        return [ask for ask in asks if ask.shard not in receipts]

    def open(self, ask: Ask) -> Shard:
        """The shard, with its finished rows, which are reported to the meter once."""
        shard = Shard(self.job, self.store, self.manifest, ask.shard, ask.edition, self.run, self.earlier)
        if not shard.representative:
            self._first.end()
        self._done[ask.shard] = shard.done
        self._before.setdefault(ask.shard, {"before": shard.journal.seconds, **shard.finished_counts})
        return shard

    def _run_feed(self, feed: _ChainFeed | _WindowFeed, receipts: dict[int, ShardReceipt]) -> None:
        """Run a feed to its end or until the engine breaks; what is finished is safe in either case."""
        try:
            for receipt in feed.run():
                receipts[receipt.shard] = receipt
        except HeadtailError:
            feed.save()
            raise  # ours, on purpose: the job cannot go on
        except Exception as error:
            feed.save()
            self.restarts += 1
            print(hide(f"engine broke, starting it again: {type(error).__name__}: {error}"), file=sys.stderr, flush=True)
            self._drop_engine()

    def _drop_engine(self) -> None:
        engine, self.engine = self.engine, None
        gc.unfreeze()
        try:
            if engine is not None:
                engine.close()
        except Exception as error:  # it is broken already; the new one matters
            print(hide(f"the broken engine did not close: {error}"), file=sys.stderr, flush=True)

    def ensure_engine(self) -> Engine:
        """The engine; started when the first row needs it, so that a finished job starts none."""
        if self.engine is None:
            begun = time.monotonic()
            self._count_start()
            found = check_weights(find_model(self.job.model, self.store), self.job.digest)
            sampling = self.job.task.file.sampling.model_dump()
            bound = self.job.io_format.bound(self.job.task, sampling["max_tokens"])
            with watchdog(self.job.stall_seconds + _START_S):
                self.engine = open_engine(self.job.model, found.path, bound, sampling, self.job.top_logprobs)
            gc.collect()
            gc.freeze()  # or each full collection visits the million objects of torch and vLLM: 35 us of an encoder's 148 us a row
            self.start_s += time.monotonic() - begun
        return self.engine

    def _count_start(self) -> None:
        """Write down that an engine is about to start; EngineError when too many did and none finished a row."""
        path = self.job.starts_path(self.run)
        starts = read_record(self.store, Starts, path).starts if self.store.exists(path) else 0
        signal = last_fatal_signal(log_folder()) if starts else ""
        if starts >= (MOST_ILLEGAL if signal == "SIGILL" else MOST_STARTS):
            what = f"the engine died {starts} times before it finished a row" + (f", by {signal} (see signal(7))" if signal else "")
            fix = "see the workers' output (HEADTAIL_WORKER_LOGS=1) and headtail doctor: memory, versions, GPU"
            if signal == "SIGILL":
                fix = "it uses an instruction that this CPU does not have or may not use: install a release that was built for it"
            raise EngineError(what, where=self.job.path, fix=fix)
        write_json(self.store, path, {"starts": starts + 1})
        self._proven = False

    def completions(self, requests: Iterator[Request], shards: Sequence[Shard]) -> Iterator[tuple[Completion, float]]:
        """Completions, each with the engine time since the one before. A process whose engine stalls is ended, as by a crash.

        `shards` are those that the rows belong to: they are flushed meanwhile.
        """
        engine, last = self.ensure_engine(), time.monotonic()
        self.begun = self.begun or last
        limit = self.job.stall_seconds if not self.job.model.traits.endpoint else 0.0  # an endpoint has timeouts of its own
        with watchdog(limit) as alive, flush_thread(shards, self.job.flush_seconds, self.flush, lambda: self.settled, self.begun) as check:
            for completion in engine.generate(requests):
                now = time.monotonic()
                alive(now)
                check()
                if now - self._news_at >= self._tell_s:
                    self.report_progress()
                yield completion, now - last
                last = now

    def report_progress(self) -> None:
        """Tell the meter what is new, and hear whether the job is to stop. Waits for nothing: the answer is heard the next time."""
        self._news_at = time.monotonic()
        if self.meter is None:
            return
        import ray

        if self._reply is not None and ray.wait([self._reply], timeout=0)[0]:
            try:
                self.stopped = self.stopped or ray.get(self._reply)
            except ray.exceptions.RayError as error:  # it comes back elsewhere; until then the bar stands still
                print(f"the meter did not answer: {error}", file=sys.stderr, flush=True)
            self._reply = None
        reply = self.meter.add.remote(self._done, self._before, **self._news)
        self._reply = reply if self._reply is None else self._reply
        self._done, self._before, self._news = {}, {}, defaultdict(float)

    def take(self, shard: Shard, row: int, completion: Completion, seconds: float) -> bool:
        """Settle a row, or leave it open when its error is transient and it has tries left. True when it is settled."""
        news, again = self._news, "again_" if shard.failed_before(row) else ""
        news[f"{again}asked"] += 1
        news["tokens_in"] += completion.tokens_in
        news["tokens_out"] += tokens_out(completion) if completion.samples else completion.tokens_out
        if completion.error:
            news[f"{again}errors"] += 1
            if completion.transient:
                shard.tries[row] += 1
                if shard.tries[row] < self.job.attempts:
                    self._note(completion.error)
                    return False
        parsed = classify(self.job.task, completion, self.job.io_format)
        shard.take(row, parsed, completion, seconds)
        self.settled += 1
        news[f"{again}settled"] += 1
        if parsed.state == State.ANSWERED:
            self._first.end()
            self._tell_s = _TELL_S
        else:
            self.stopped = self.stopped or self._first.problem((shard.number, row))
            news[f"{again}unanswered"] += 1
            self._note(f"{parsed.state}: {parsed.reason}")
        if shard.unsaved >= self.job.flush_rows or flush_late(
            shard.unsaved, self.settled, time.monotonic() - self.begun, self.job.flush_seconds
        ):
            self.flush(shard)
        return True

    def hand(self, shard: Shard, row: int) -> None:
        """A row goes to the engine for the first time in this run."""
        self._first.hand((shard.number, row))

    def _note(self, reason: str) -> None:
        if reason in self.reasons or len(self.reasons) < _REASONS:
            self.reasons[reason] += 1

    def flush(self, shard: Shard, broken: bool = False) -> None:
        if shard.flush(broken):
            self._done[shard.number] = shard.done
            if not self._proven:
                self._proven = True
                write_json(self.store, self.job.starts_path(self.run), {"starts": 0})


class _ChainFeed:
    """Healthy shards fed to the engine in one stream: the next is read, and the one before published, while this one runs."""

    def __init__(self, worker: Worker, asks: Sequence[Ask], alone: list[Ask]) -> None:
        self.worker, self.asks, self.alone = worker, list(asks), alone
        self.shards: list[Shard] = []
        self._handed: list[int] = []  # rows of each open shard that are with the engine
        self._ended: set[int] = set()  # shards that are published, or about to be
        self._behind = ThreadPoolExecutor(1)
        self._publishing: list[Future[ShardReceipt]] = []

    def run(self) -> Iterator[ShardReceipt]:
        with self._behind:
            self._pass(self._fresh())
            wait = _PASS_BACKOFF_S
            while any(shard.todo for shard in self.shards) and not self.worker.stopped:  # transient errors, with tries left
                self.save(broken=False)
                time.sleep(min(wait, _LONGEST_BACKOFF_S))
                wait *= 2
                self._pass(self._retries())
            for publishing in self._publishing:
                yield publishing.result()

    def _pass(self, requests: Iterator[Request]) -> None:
        first = next(requests, None)
        if first is not None:  # without a row to ask, no engine is started
            for completion, seconds in self.worker.completions(_prepend(first, requests), self.shards):
                place, row = divmod(completion.id, _ROWS)
                shard = self.shards[place]
                shard.add_seconds(seconds)
                self._handed[place] -= 1
                self.worker.take(shard, row, completion, seconds)
                if not self._handed[place] and shard.finished:
                    self._end(place)
        if self.worker.stopped:
            self.save(broken=False)

    def _end(self, place: int) -> None:
        """Publish a shard that has every row, while the engine works on."""
        if place not in self._ended:
            self._ended.add(place)
            self.worker.flush(self.shards[place])
            self._publishing.append(self._behind.submit(self.shards[place].publish))
            for publishing in self._publishing:
                if publishing.done():
                    publishing.result()  # an error ends the job here rather than at the end of the chain

    def _fresh(self) -> Iterator[Request]:
        with ThreadPoolExecutor(1) as ahead:  # the next shard is read while this one runs
            nexts: Future[Shard] | None = ahead.submit(self.worker.open, self.asks[0]) if self.asks else None
            for at, ask in enumerate(self.asks):
                assert nexts is not None
                shard = nexts.result()
                if self.worker.stopped:
                    return
                nexts = ahead.submit(self.worker.open, self.asks[at + 1]) if at + 1 < len(self.asks) else None
                if shard.suspicious:
                    self.alone.append(ask)
                    continue
                yield from self._hand(shard)

    def _hand(self, shard: Shard) -> Iterator[Request]:
        self.shards.append(shard)
        self._handed.append(0)
        place = len(self.shards) - 1
        if shard.askable:
            self.worker.ensure_engine()  # before the shard is begun: an engine that is killed at its start says nothing about rows
        if shard.todo:
            shard.begin()
        if shard.finished:
            self._end(place)  # nothing is to be asked: resumed, taken over, or no row could be rendered
            return
        messages, sample = shard.messages, shard.representative
        for row in list(shard.todo):
            if self.worker.stopped:
                return
            self._handed[place] += 1
            self.worker.hand(shard, row)
            yield Request(place * _ROWS + row, messages[row], again=shard.failed_before(row), sample=sample)

    def _retries(self) -> Iterator[Request]:
        for place, shard in enumerate(self.shards):
            for row in list(shard.todo):
                self._handed[place] += 1
                yield _again(place * _ROWS + row, shard, row)

    def save(self, broken: bool = True) -> None:
        for place, shard in enumerate(self.shards):
            if place not in self._ended:
                self.worker.flush(shard, broken=broken)


class _WindowFeed:
    """One shard that broke the engine, a window of rows at a time, each made safe before the next."""

    def __init__(self, worker: Worker, shard: Shard) -> None:
        self.worker, self.shard = worker, shard

    def run(self) -> Iterator[ShardReceipt]:
        shard, worker = self.shard, self.worker
        if shard.askable:
            worker.ensure_engine()
        shard.begin()
        while shard.todo and not worker.stopped:
            group = shard.todo[: shard.window] if shard.window else list(shard.todo)
            wait = _PASS_BACKOFF_S
            while group and not worker.stopped:
                left = []
                for completion, seconds in worker.completions((_again(row, shard, row) for row in group), [shard]):
                    shard.add_seconds(seconds)
                    if not worker.take(shard, completion.id, completion, seconds):
                        left.append(completion.id)
                worker.flush(shard)
                group = left
                if group:
                    time.sleep(min(wait, _LONGEST_BACKOFF_S))
                    wait *= 2
        if not shard.todo:
            yield shard.publish()

    def save(self) -> None:
        self.worker.flush(self.shard, broken=True)


_ROWS = 1 << 32  # request id = place of the shard in its chain * _ROWS + row


def _again(number: int, shard: Shard, row: int) -> Request:
    """A row that failed, or whose shard broke an engine: it is no sample of the job's rows."""
    return Request(number, shard.messages[row], again=True, sample=False)


def _prepend(first: Request, rest: Iterator[Request]) -> Iterator[Request]:
    yield first
    yield from rest
