"""What is never paid twice, and when a job stops: answers of earlier jobs, limits, engines that hang. In process, null engine."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from headtail.adapters.storage import open_storage
from headtail.batch import Job, driver, generate, worker
from headtail.batch.driver import _raise_limit, find_open_shards
from headtail.batch.limits import FirstRows, Limits
from headtail.batch.parsed_answer import ParsedAnswer
from headtail.batch.prepare import InputManifest, prepare_input
from headtail.batch.shard import _tops
from headtail.batch.worker import Ask, Worker
from headtail.core import keys
from headtail.core.errors import LimitReached
from headtail.core.rows import KEY, TOP, State, shards_of
from headtail.core.task import Task
from headtail.engines import Completion, ModelConfig, Request, Top
from headtail.engines.null import NullEngine
from headtail.stages.precompute.dry_run.compare import Comparison, scope
from null_jobs import MakeJob, interrupted, planned, rows_of, run_here
from test_engines_openai import Server, chat
from timescale import SCALE, limit

# --- answers of earlier jobs


def test_shards_in_order_are_keys_in_order(make_local_job: MakeJob) -> None:
    job = make_local_job(planned([f"q{i}" for i in range(500)]), shards=7)
    ledger, _ = run_here(job)
    pairs = [(row["query_key"], row["answer_key"]) for row in rows_of(job, ledger).select(["query_key", "answer_key"]).to_pylist()]
    assert pairs == sorted(pairs)


@pytest.mark.parametrize("shards, others", [(1, 1), (7, 3), (3, 7), (64, 1000), (1000, 64)])
def test_overlapping_shards_cover_a_shard_and_no_more(shards: int, others: int) -> None:
    some = pa.array([keys.query_key(str(i)) for i in range(3000)], KEY)
    own, theirs = shards_of(some, shards), shards_of(some, others)
    for shard in range(0, shards, max(1, shards // 20)):
        mine = set(theirs[own == shard].tolist())
        found = keys.overlapping_shards(shard, shards, others)
        assert mine <= set(found)
        assert 0 <= found.start < found.stop <= others
        assert len(found) <= others // shards + 2


def test_a_larger_log_asks_only_what_is_new_and_carries_its_own_columns(make_job: MakeJob) -> None:
    """An answer is paid for once, whatever job asks and however it is cut; what belongs to the asker is the asker's."""
    first = make_job(planned([f"q{i}" for i in range(300)]), path="precompute/one", shards=3)
    run_here(first)
    more = planned([*(f"q{i}" for i in range(99, 399))], stratum=["torso"] * 300, eval_only=[True] * 300)
    second = make_job(more, path="precompute/two", shards=5, source="student")
    ledger, _ = run_here(second)
    assert (ledger.rows, ledger.reused, ledger.computed) == (300, 201, 99)
    table = rows_of(second, ledger)
    assert set(table["stratum"].to_pylist()) == {"torso"}
    assert set(table["source"].to_pylist()) == {"student"}
    assert all(table["eval_only"].to_pylist())
    wanted_counts = dict(zip(more["query"].to_pylist(), more["count"].to_pylist(), strict=True))
    assert dict(zip(table["query"].to_pylist(), table["count"].to_pylist(), strict=True)) == wanted_counts
    for row in table.to_pylist():
        assert json.loads(row["answer"])["segments"][0]["text"].endswith(row["query"])
    none = dataclasses.replace(second, path="precompute/three", reuse=False)
    assert run_here(none)[0].computed == 300


def test_a_job_that_was_cut_short_leaves_its_flushed_rows_to_others(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_job(planned([f"q{i}" for i in range(100)]), path="precompute/one", shards=1, flush_rows=20)
    interrupted(first, 75, "run0", monkeypatch)
    ledger, _ = run_here(make_job(planned([f"q{i}" for i in range(110)]), path="precompute/two", shards=2))
    assert (ledger.reused, ledger.computed) == (60, 50)


def test_a_prompt_edit_asks_only_the_rows_it_touches(make_local_job: MakeJob, segmentation: Task) -> None:
    table = planned([f"q{i}" for i in range(90)])  # every third has businesses
    run_here(make_local_job(table, path="precompute/one", shards=2))
    edited = dataclasses.replace(segmentation, template=segmentation.template.replace("Businesses viewed", "People then viewed"))
    ledger, _ = run_here(make_local_job(table, path="precompute/two", shards=2, task=edited))
    assert (ledger.reused, ledger.computed) == (60, 30)
    longer = dataclasses.replace(segmentation, schema={**segmentation.schema, "minProperties": 1})
    ledger, _ = run_here(make_local_job(table, path="precompute/three", shards=2, task=longer))
    assert (ledger.reused, ledger.computed) == (0, 90)


class Telling(NullEngine):
    """Says of each token which are likeliest: made up, as many as asked for."""

    def __init__(self, schema: Any, model: str, samples: int, top: int) -> None:
        super().__init__(schema, model, samples)
        self.top = top

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for made in super().generate(requests):
            ids = np.arange(3 * self.top, dtype=np.int32).reshape(3, -1)
            yield replace(made, top=Top(np.arange(3, dtype=np.int32), ids, -ids.astype(np.float16)) if self.top else None)


@pytest.fixture
def telling(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(config: ModelConfig, path: str, bound: Any, sampling: dict[str, Any], top: int) -> Telling:
        return Telling(bound, path, int(sampling.get("n", 1)), top)

    monkeypatch.setattr(worker, "open_engine", opened)


def test_likeliest_tokens_are_asked_for_once(make_local_job: MakeJob, telling: None) -> None:
    """An answer stored without them, or with fewer, does not serve a job that asks for them; one with them serves any."""
    table = planned(["a", "b", "c", "!length", "!invalid"])
    run_here(make_local_job(table, path="precompute/none", shards=1))
    job = make_local_job(table, path="precompute/two", shards=2, top_logprobs=2)
    manifest, store = prepare_input(job), open_storage(job.root)
    told = Comparison(scope(job, manifest, 0)).of(find_open_shards(job, store, manifest)[1])
    assert dict(told.rows) == {("reused", ()): 2, ("retried", ("without top_logprobs",)): 3}
    ledger, _ = run_here(job)
    assert (ledger.reused, ledger.computed) == (2, 3), "rows that are no answers have none to ask for"
    for row in rows_of(job, ledger).to_pylist():
        likeliest = (row["token_ids"], row["top_ids"], row["top_logprobs"])
        wanted = ([0, 1, 2], [0, 1, 2, 3, 4, 5], [0, -1, -2, -3, -4, -5]) if row["state"] == "answered" else (None, None, None)
        assert likeliest == wanted
    for path, top, computed in (("three", 3, 3), ("one", 1, 0), ("again", 3, 0)):
        ledger, _ = run_here(make_local_job(table, path=f"precompute/{path}", shards=1, top_logprobs=top))
        assert (path, ledger.computed) == (path, computed)
    last = make_local_job(table, path="precompute/last", shards=1)
    ledger, _ = run_here(last)
    assert (ledger.reused, ledger.computed) == (5, 0)
    assert not set(TOP.names) & set(rows_of(last, ledger).column_names)


def test_tokens_are_those_of_the_answer_that_was_taken() -> None:
    """Of several samples the first has its tokens kept; where another won the vote they are not the answer's."""
    top = Top(np.zeros(1, np.int32), np.zeros((1, 2), np.int32), np.zeros((1, 2), np.float16))
    made = Completion(0, "x", "stop", top=top)
    won = ParsedAnswer(State.ANSWERED, "1", 0.5, "", None, 1.0, ({"answer": "1"}, {"answer": "1"}))
    lost = won._replace(samples=({"answer": "2"}, {"answer": "1"}, {"answer": "1"}))
    none = ParsedAnswer(State.INVALID, None, None, "no", "x")
    found = _tops([won, lost, none, won._replace(samples=None)], [made] * 4)
    assert [found[name][0] is None for name in TOP.names] == [False] * 3
    assert [values is None for values in found["token_ids"]] == [False, True, True, False]


def test_states_to_retry_are_asked_again_and_an_answer_wins_over_a_newer_failure(make_local_job: MakeJob) -> None:
    table = planned(["a", "b", "!length", "!invalid", "!fail"])
    run_here(make_local_job(table, path="precompute/one", shards=1))
    ledger, _ = run_here(make_local_job(table, path="precompute/two", shards=1))
    assert (ledger.reused, ledger.computed) == (4, 1)  # the failed row alone
    again = (State.FAILED, State.INVALID)
    ledger, _ = run_here(make_local_job(table, path="precompute/three", shards=1, retry=again))
    assert (ledger.reused, ledger.computed) == (3, 2)
    sober = make_local_job(table, path="precompute/four", shards=1, retry=again, model=ModelConfig(engine="null", model="null"))
    assert run_here(sober)[0].states[State.ANSWERED] == 4  # the same engine without faults answers what it may ask
    ledger, _ = run_here(make_local_job(table, path="precompute/five", shards=1))
    assert ledger.states[State.ANSWERED] == 4
    assert ledger.computed == 0


def test_a_job_whose_rows_were_all_answered_before_starts_no_cluster(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(make_job(planned([f"q{i}" for i in range(90)]), path="precompute/one", shards=2))
    spread: list[int] = []

    def workers(job: Job, manifest: InputManifest, asks: list[Ask], done: int) -> list[dict[str, object]]:
        spread.extend(ask.shard for ask in asks)
        worker = Worker(job, manifest, "run1")
        return [{"worker": "w", "engine": {}, "start_s": 0.0, "restarts": 0, "receipts": [one.model_dump() for one in worker.work(asks)]}]

    monkeypatch.setattr("headtail.batch.driver._spread", workers)
    ledger = generate(make_job(planned([f"q{i}" for i in range(9, 81)]), path="precompute/two", shards=3))
    assert (ledger.reused, ledger.computed, spread) == (72, 0, [])
    ledger = generate(make_job(planned([f"q{i}" for i in range(100)]), path="precompute/three", shards=3))
    assert (ledger.reused, ledger.computed) == (90, 10)
    assert spread, "new rows are for workers"


# --- limits and engines that hang


def test_limits() -> None:
    limits = Limits(failed_share=0.05, usd=1.0, seconds=60, workers=2, usd_per_hour=3.6, usd_per_million_tokens_out=10.0)
    assert limits.problem({}, 0) == ""
    assert limits.problem({"asked": 10, "errors": 3}, 1) == ""  # far too few to be sure
    assert limits.problem({"asked": 10_000, "errors": 520}, 1) == ""  # above, but it may be chance
    assert "600 of 10,000" in limits.problem({"asked": 10_000, "errors": 600}, 1)
    assert "budget_seconds=60" in limits.problem({}, 60)
    assert limits.cost({"before": 100, "tokens_out": 50_000}, 50) == pytest.approx(0.2 + 0.5)
    assert "budget_usd=1" in limits.problem({"tokens_out": 90_000}, 50)
    assert Limits().problem({"asked": 9, "errors": 9}, 1e9) == ""
    half = Limits(unanswered_share=0.5)
    assert "40 of 40 rows ended without an answer" in half.problem({"asked": 40, "settled": 40, "unanswered": 40}, 1)
    assert half.problem({"settled": 3, "unanswered": 2}, 1) == half.problem({"settled": 1000, "unanswered": 490}, 1) == ""


def test_rows_that_failed_before_count_among_all_rows_of_the_job() -> None:
    limits = Limits(failed_share=0.05, unanswered_share=0.5)
    again = {"again_asked": 20, "again_errors": 20, "again_settled": 20, "again_unanswered": 20}
    assert limits.problem({**again, "kept": 980, "kept_failed": 0, "kept_unanswered": 5}, 1) == ""
    assert "20 of 100 requests ended in an error, rows of earlier runs included" in limits.problem({**again, "kept": 80}, 1)
    assert "620 of 1,000 rows ended without an answer" in limits.problem({**again, "kept": 980, "kept_unanswered": 600}, 1)
    assert "8 of 8 requests ended in an error, more" in limits.problem({"asked": 8, "errors": 8, "kept": 10**6}, 1), "new rows speak"


@pytest.mark.parametrize("shards", [1, 4])
def test_a_second_run_over_failed_rows_counts_the_rows_of_the_first(
    make_local_job: MakeJob, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    """20 of 400 rows failed: asked again they are all that this run asks, and all of them fail, which is still one row in twenty."""
    limits = Limits(failed_share=0.06)
    job = make_local_job(planned([*(f"!fail {i}" for i in range(20)), *(f"q{i}" for i in range(380))]), shards=shards, limits=limits)
    first, one = run_here(job)
    assert first.states[State.FAILED] == 20
    assert {name: one._news[name] for name in ("asked", "errors", "again_asked")} == {"asked": 400, "errors": 20, "again_asked": 0}
    judged: list[str] = []

    def meter(*_: object, judge: Callable[..., str], **__: object) -> None:
        news = dict(again._news)
        for amounts in again._before.values():
            news |= {name: news.get(name, 0) + amount for name, amount in amounts.items()}
        judged.append(judge(news, 1.0))
        raise LimitReached("judged")

    store, manifest = open_storage(job.root), prepare_input(job)
    done, asks = find_open_shards(job, store, manifest)
    again = Worker(job, manifest, "run1")
    again.work(asks)
    assert (again._news["again_errors"], again._news["errors"]) == (20, 0)
    monkeypatch.setattr("headtail.adapters.meter.job_meter", meter)
    monkeypatch.setattr("headtail.batch.driver.start_cluster", lambda: None)
    monkeypatch.setattr("headtail.batch.driver._check_room", lambda job: None)
    with pytest.raises(LimitReached, match="judged"):
        driver._spread(job, manifest, asks, done)
    assert judged == [""]


def test_first_rows_count_in_the_order_in_which_they_were_handed_over() -> None:
    first = FirstRows(0.5)
    assert (first.count, FirstRows(1.0).count, FirstRows(0.0).count, FirstRows(0.2).count) == (10, 0, 1, 5)
    assert [Limits(unanswered_share=0.5).problem({"settled": n, "unanswered": n}, 1) != "" for n in (9, 10)] == [False, True]
    for row in range(32):
        first.hand(row)
    assert [first.problem(row) for row in range(31, 9, -1)] == [""] * 22, "the rows that came back soonest say nothing of the others"
    assert [first.problem(row) != "" for row in range(10)] == [False] * 9 + [True]
    first.end()
    assert first.problem(0) == ""


def test_a_worker_stops_by_itself_when_its_first_rows_have_no_answer(make_local_job: MakeJob) -> None:
    """32 in flight: what is paid beyond the first 10 rows is what was in flight, also when the job is run again."""
    server = Server()
    server.reply = lambda text, nth: (200, chat("{", "length"), {})
    model = ModelConfig(engine="openai", model="m", base_url=server.url, request_timeout_s=limit(20), concurrency=32)
    table, digest = planned([f"q{i}" for i in range(250)]), f"endpoint:{server.url}:m@"
    job = make_local_job(table, model=model, digest=digest, shards=1, limits=Limits(unanswered_share=0.5))
    for run in (1, 2):
        worker = Worker(job, prepare_input(job), f"run{run}")
        assert worker.work([Ask(0, 0)]) == []
        worker._drop_engine()
        assert worker.stopped.startswith("the first 10 rows all ended without an answer")
        assert run * 10 <= len(server.asked) <= run * (10 + 2 * 32)
    server.http.shutdown()
    server.http.server_close()


@pytest.mark.parametrize("kind, reports", [("!length", 40), ("fine", 1)])
def test_a_worker_reports_often_until_a_row_has_an_answer(
    make_local_job: MakeJob, monkeypatch: pytest.MonkeyPatch, kind: str, reports: int
) -> None:
    """One of several workers: the driver hears at once that no row has an answer, and not after a second."""
    monkeypatch.setattr(worker, "_FIRST_TELL_S", 0.0)
    monkeypatch.setattr(worker, "_TELL_S", 1e9)
    job = make_local_job(planned([f"{kind} {i}" for i in range(40)]), workers=2, shards=1)
    one, told = Worker(job, prepare_input(job), "run0"), list[float]()
    report = one.report_progress

    def told_progress() -> None:
        told.append(one._news["settled"])
        report()

    monkeypatch.setattr(one, "report_progress", told_progress)
    one.work([Ask(0, 0)])
    assert len(told) == reports + 1, "and once at the end"


def test_a_worker_leaves_to_the_driver_what_it_cannot_judge(make_local_job: MakeJob) -> None:
    """A row among its first has an answer; it is one of several; rows of the job were answered before; its rows failed before."""
    half, bad = Limits(unanswered_share=0.5), [f"!length {i}" for i in range(60)]
    stopped = run_here(make_local_job(planned([f"fine {i}" for i in range(30)]), path="precompute/fine"))[1].stopped
    for path, queries, fields in (
        ("mixed", [*bad[:5], "good", *bad[5:]], {}),
        ("several", bad, {"workers": 2}),
        ("taken over", ["fine 1", *bad], {}),
        ("again", [f"!fail {i}" for i in range(60)], {"retry": ("failed",)}),
    ):
        if path == "again":
            run_here(make_local_job(planned(queries), path="precompute/before", shards=1))
        ledger, worker = run_here(make_local_job(planned(queries), path=f"precompute/{path}", shards=1, limits=half, **fields))
        stopped += worker.stopped
        assert ledger.rows == len(queries)
    assert stopped == ""


@pytest.mark.slow
def test_a_job_that_stops_names_the_reasons(make_job: MakeJob) -> None:
    """What workers say of rows that were truncated, are asked again, or failed goes into the one error."""
    job = make_job(planned([*(f"!length {i}" for i in range(60)), *(f"!fail {i}" for i in range(5)), "!flaky", "fine"]), shards=1)
    worker = Worker(job, prepare_input(job), "run0")
    worker.work([Ask(0, 0)])
    counted = {name: worker._news[name] for name in ("asked", "errors", "settled", "unanswered")}
    assert counted == {"asked": 69, "errors": 7, "settled": 67, "unanswered": 65}
    assert "max_unanswered_share" in Limits(unanswered_share=0.5).problem(counted, 1)
    reports: list[dict[str, Any]] = [{"reasons": worker.reasons}, {"reasons": {"HTTP 503: overloaded (5 tries)": 9000}}]
    with pytest.raises(LimitReached) as error:
        _raise_limit(job, "7 of 69 requests ended in an error", 0, 1, reports)
    text = str(error.value)
    assert (
        "rows in flight at the stop included: 9,000 x HTTP 503: overloaded (5 tries); 60 x truncated: stopped at the length limit" in text
    )
    assert "5 x failed: told to fail" in text


@pytest.mark.slow
@pytest.mark.parametrize("status", [500, 503])
def test_an_endpoint_that_is_down_stops_the_job_with_its_status(
    make_local_job: MakeJob, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr("headtail.engines.openai.BACKOFF_S", 0.001)
    monkeypatch.setattr("headtail.batch.worker._PASS_BACKOFF_S", 0.001)
    server = Server()
    server.reply = lambda text, nth: (status, {"error": {"message": "down for today"}}, {})
    model = ModelConfig(engine="openai", model="m", base_url=server.url, request_timeout_s=limit(5))
    job = make_local_job(planned([f"q{i}" for i in range(12)]), model=model, digest=f"endpoint:{server.url}:m@", shards=1, attempts=2)
    worker = Worker(job, prepare_input(job), "run0")
    worker.work([Ask(0, 0)])
    worker._drop_engine()
    server.http.shutdown()
    server.http.server_close()
    reason = Limits(failed_share=0.05).problem(worker._news, 1)
    with pytest.raises(
        LimitReached,
        match=rf"requests ended in an error, more than max_failed_share=0.05; .* included: \d+ x .*HTTP {status}: .*down for",
    ):
        _raise_limit(job, reason, 0, 1, [{"reasons": worker.reasons}])


def test_a_worker_that_is_told_to_stop_keeps_what_is_done_and_the_next_goes_on(make_local_job: MakeJob) -> None:
    job = make_local_job(planned([f"q{i}" for i in range(200)]), shards=2, flush_rows=1000)
    store, manifest = open_storage(job.root), prepare_input(job)
    worker = Worker(job, manifest, "run0")
    take, taken = worker.take, 0

    def counted(*args: object) -> bool:
        nonlocal taken
        taken += 1
        worker.stopped = "enough" if taken == 130 else worker.stopped
        return take(*args)  # type: ignore[arg-type]

    worker.take = counted  # type: ignore[method-assign,assignment]
    made = worker.work([Ask(0, 0), Ask(1, 0)])
    assert len(made) == 1
    assert taken == 130
    done, asks = find_open_shards(job, store, manifest)
    assert (done, len(asks)) == (made, 1)
    ledger, _ = run_here(job, "run1")
    assert ledger.computed == 70
    assert ledger.rows == 200


HANGS = """
import sys, time; scale = float(sys.argv[1])
from headtail.batch.watch import watchdog
with watchdog(1.5 * scale) as alive:
    for _ in range(20):
        time.sleep(0.1 * scale)
        alive(time.monotonic())
    print("alive", flush=True)
with watchdog(0.2 * scale):
    pass
time.sleep(0.4 * scale)
print("let go", flush=True)
with watchdog(0.5 * scale):
    time.sleep(60 * scale)
print("never", flush=True)
"""


@pytest.mark.slow
def test_a_process_that_hangs_ends_itself_and_shows_where() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS, str(SCALE)], capture_output=True, text=True, timeout=limit(30))
    assert done.stdout.split("\n")[:2] == ["alive", "let go"]
    assert "never" not in done.stdout
    assert done.returncode != 0
    assert "Timeout" in done.stderr
    assert "line 14" in done.stderr
