"""Rows in, rows out: no row lost, doubled, mixed or paid twice, whatever breaks. In process, with the null engine."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pyarrow as pa
import pytest

from headtail.adapters.storage import Storage, open_storage, read_json, read_table, write_table
from headtail.batch import remove_work_files
from headtail.batch.driver import chain_count, find_open_shards
from headtail.batch.job import Journal
from headtail.batch.ledger import audit, check_sums, close_ledger
from headtail.batch.parsed_answer import classify
from headtail.batch.prepare import INPUT, input_rows, prepare_input, read_shard, shard_count
from headtail.batch.shard import CRASHES_ALONE, WINDOWS, Shard
from headtail.batch.shard_requests import ShardRequests, check_rows, shard_requests
from headtail.batch.worker import MOST_STARTS, Ask, Worker
from headtail.core import keys, rows
from headtail.core.errors import EngineError, InputError, LedgerError, StorageError
from headtail.core.rows import State, shards_of
from headtail.core.task import Task
from headtail.engines import Completion, ModelConfig
from null_jobs import MakeJob, interrupted, planned, rows_of, run_here


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headtail.batch.worker._PASS_BACKOFF_S", 0.01)


# --- prepare


def test_shards_are_ranges_of_keys() -> None:
    table = planned([f"q{i}" for i in range(500)])
    for some in (table, table.slice(37, 100)):
        expected = [int.from_bytes(key[:4], "big") * 7 >> 32 for key in some["query_key"].to_pylist()]
        assert shards_of(some["query_key"], 7).tolist() == expected


@pytest.mark.parametrize("shards", [1, 3, 16])
def test_every_input_row_is_in_one_shard(make_job: MakeJob, shards: int) -> None:
    first, second = planned([f"a{i}" for i in range(101)]), planned([f"b{i}" for i in range(53)])
    job = make_job(first, second, shards=shards)
    manifest, store = prepare_input(job), open_storage(job.root)
    assert manifest.rows == 154
    seen = [query for shard in range(shards) for query in read_shard(store, manifest, shard).to_pydict().get("query", [])]
    assert sorted(seen) == sorted([*first["query"].to_pylist(), *second["query"].to_pylist()])


def test_a_resumed_job_keeps_its_shards(make_job: MakeJob) -> None:
    table = planned([f"a{i}" for i in range(101)])
    assert prepare_input(make_job(table, shards=3)) == prepare_input(make_job(table, shards=9))


def test_shard_count_bounds() -> None:
    assert shard_count(1, 1) == 1
    assert shard_count(2000, 1) == 4
    assert shard_count(2000, 8) == 8
    assert shard_count(50_000_000, 64) == 2500


def test_a_table_of_labels_is_withheld_and_a_missing_side_input_is_null(segmentation: Task) -> None:
    labels = pa.table({"query_key": [keys.query_key("a")], "query": ["a"], "answer": ["{}"], "count": [3], "stratum": ["tail"]})
    made = input_rows(labels, ("businesses",), "plan:human_labels").to_pylist()
    assert made == [{"query_key": keys.query_key("a"), "query": "a", "count": 3, "stratum": "tail", "eval_only": True, "businesses": None}]
    with pytest.raises(InputError, match="query_key"):
        input_rows(labels.drop_columns(["query_key"]), (), "plan:human_labels")


def test_no_rows_is_an_error_that_says_where(make_local_job: MakeJob) -> None:
    with pytest.raises(InputError, match="no rows to answer"):
        prepare_input(make_local_job(planned([])))


# --- all rows, each in one state


@pytest.mark.parametrize("rows, shards, flush", [(1, 1, 1), (97, 4, 10), (1000, 7, 33)])
def test_rows_in_are_rows_out(make_job: MakeJob, rows: int, shards: int, flush: int) -> None:
    job = make_job(planned([f"query {i}" for i in range(rows)]), shards=shards, flush_rows=flush)
    ledger, _ = run_here(job)
    assert (ledger.rows, ledger.states[State.ANSWERED], ledger.duplicates, ledger.computed) == (rows, rows, 0, rows)
    table = rows_of(job, ledger)
    assert table.schema.equals(job.schema)
    assert len(set(table["query_key"].to_pylist())) == rows


def test_each_row_has_its_own_answer_also_when_prompts_are_alike(make_local_job: MakeJob) -> None:
    """The null engine echoes the prompt's end: an answer given to another row would show."""
    job = make_local_job(planned([f"pizza {i}" for i in range(50)]), planned([f"pizza {i}" for i in range(25, 75)]), shards=3)
    table = rows_of(job, run_here(job)[0])
    for row in table.to_pylist():
        assert json.loads(row["answer"])["segments"][0]["text"].endswith(row["query"])


def test_duplicates_are_answered_once_and_labelled_queries_stay_withheld(make_local_job: MakeJob) -> None:
    same = planned(["a", "b", "c"], businesses=[None, None, None])
    labels = planned(["b", "d"], businesses=[None, None], eval_only=[True, True])
    job = make_local_job(same, labels)
    ledger, _ = run_here(job)
    assert (ledger.rows, ledger.duplicates) == (4, 1)
    assert {row["query"]: row["eval_only"] for row in rows_of(job, ledger).to_pylist()} == {"a": False, "b": True, "c": False, "d": True}


def test_the_same_query_with_other_side_inputs_is_another_row(make_local_job: MakeJob) -> None:
    job = make_local_job(planned(["a"], businesses=[["x"]]), planned(["a"], businesses=[["y"]]))
    assert run_here(job)[0].rows == 2


def test_every_kind_of_bad_row_ends_in_its_state(make_local_job: MakeJob) -> None:
    words = ["!fail", "!length", "!refuse", "!text", "!invalid", "!flaky", "fine"]
    job = make_local_job(planned(words), shards=1)
    ledger, _ = run_here(job)
    states = {row["query"]: row["state"] for row in rows_of(job, ledger).to_pylist()}
    assert states == {
        "!fail": "failed",
        "!length": "truncated",
        "!refuse": "refused",
        "!text": "invalid",
        "!invalid": "invalid",
        "!flaky": "answered",
        "fine": "answered",
    }
    for row in rows_of(job, ledger).to_pylist():
        assert (row["state"] == "answered") == (row["answer"] is not None) == (row["reason"] == "")
    assert ledger.reasons == {"told to fail": 1}


def test_a_prompt_template_that_raises_fails_its_row_alone(make_local_job: MakeJob, segmentation: Task) -> None:
    picky = dataclasses.replace(
        segmentation, template="{% block user %}{{ query }}{% if query == 'bad' %}{{ 1 // 0 }}{% endif %}{% endblock %}"
    )
    job = make_local_job(planned(["good", "bad", "better"]), task=picky)
    ledger, _ = run_here(job)
    assert (ledger.states[State.ANSWERED], ledger.states[State.FAILED]) == (2, 1)
    assert "ZeroDivisionError" in next(iter(ledger.reasons))


# --- resume


def test_a_second_run_starts_no_engine_and_changes_no_row(make_job: MakeJob) -> None:
    job = make_job(planned([f"q{i}" for i in range(100)]), shards=4)
    first, _ = run_here(job)
    second, worker = run_here(job, "run1")
    assert worker.engine is None
    assert (second.computed, second.rows) == (0, 100)
    assert [shard.answers for shard in second.shards] == [shard.answers for shard in first.shards]


def test_killed_anywhere_a_rerun_repeats_at_most_a_flush_per_open_shard(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """DESIGN 1, in process: many kills at random places; rows are counted where they are processed, not where they are written."""
    job = make_job(planned([f"q{i}" for i in range(300)]), shards=3, flush_rows=10)
    rng, processed, kills = random.Random(5), 0, 0
    while True:
        answered = interrupted(job, rng.randint(1, 60), f"run{kills}", monkeypatch)
        processed += answered
        if find_open_shards(job, open_storage(job.root), prepare_input(job))[1] == []:
            break
        kills += 1
    ledger, _ = run_here(job, "last")
    assert (ledger.rows, ledger.states[State.ANSWERED], ledger.computed) == (300, 300, 0)
    assert kills >= 5
    assert processed - 300 <= kills * job.flush_rows


def test_failed_rows_are_asked_again_on_a_rerun_and_finished_ones_are_not(make_job: MakeJob) -> None:
    """DESIGN 3."""
    job = make_job(planned(["!fail", *(f"q{i}" for i in range(40))]), shards=2)
    first, _ = run_here(job)
    assert first.states[State.FAILED] == 1
    healed = dataclasses.replace(job, model=ModelConfig(engine="null", model="null"))
    second, _ = run_here(dataclasses.replace(healed, digest="null"), "run1")
    assert (second.states[State.FAILED], second.states[State.ANSWERED]) == (0, 41)
    assert second.computed == 1
    kept = {shard.shard: shard.answers for shard in first.shards if not shard.failed}
    assert all(kept.get(shard.shard, shard.answers) == shard.answers for shard in second.shards)


def test_failed_rows_are_asked_again_after_the_work_was_swept(make_job: MakeJob) -> None:
    """A job killed between the removal of its work files and its receipt: what was published is where the next edition starts."""
    job = make_job(planned(["!fail", *(f"q{i}" for i in range(40))]), shards=2)
    run_here(job)
    store = open_storage(job.root)
    remove_work_files(store, job)
    remove_work_files(store, job)
    assert not store.exists(job.journal_path(0))
    second, _ = run_here(dataclasses.replace(job, model=ModelConfig(engine="null", model="null")), "run1")
    assert (second.states[State.ANSWERED], second.computed) == (41, 1)


def test_a_removal_that_is_cut_short_has_no_row_asked_again(make_job: MakeJob) -> None:
    """Journals go first: one that outlived its segments would name rows that are gone."""
    job = make_job(planned(["!fail", *(f"q{i}" for i in range(40))]), shards=2)
    first, _ = run_here(job)
    store = open_storage(job.root)

    class Cut:
        """The store's file system until the folder itself is to go."""

        def __getattr__(self, name: str) -> object:
            return getattr(store.filesystem, name)

        def delete_dir(self, path: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        remove_work_files(cast(Storage, SimpleNamespace(full=store.full, filesystem=Cut())), job)
    left = [store.exists(job.journal_path(shard)) for shard in (0, 1)]
    assert left == [False, False]
    second, _ = run_here(dataclasses.replace(job, model=ModelConfig(engine="null", model="null")), "run1")
    assert (second.states[State.ANSWERED], second.computed) == (41, 1)
    assert second.seconds >= first.seconds  # what the first edition took was paid for


@pytest.mark.parametrize("late, tries", [(1, 2), (9, 3)])
def test_a_driver_that_writes_while_another_removes_breaks_neither(make_job: MakeJob, late: int, tries: int) -> None:
    """Two drivers of one job: a file appears in a folder that is being removed. What is left is the other driver's to remove."""
    job = make_job(planned([f"q{i}" for i in range(40)]), shards=2)
    run_here(job)
    store, removals = open_storage(job.root), []

    class Late:
        """The store's file system, in whose folders files appear while they are removed."""

        fault = OSError(errno.ENOTEMPTY, "Cannot delete directory entry")

        def __getattr__(self, name: str) -> object:
            return getattr(store.filesystem, name)

        def delete_dir(self, path: str) -> None:
            removals.append(path)
            if len(removals) <= late:
                raise self.fault
            store.filesystem.delete_dir(path)

    class Refused(Late):
        fault = OSError(errno.EACCES, "Permission denied")

    with pytest.raises(StorageError, match="Permission denied"):
        remove_work_files(cast(Storage, SimpleNamespace(full=store.full, uri=store.uri, filesystem=Refused())), job)
    removals.clear()
    remove_work_files(cast(Storage, SimpleNamespace(full=store.full, filesystem=Late())), job)
    assert len(removals) == tries
    second, _ = run_here(job, "run1")
    assert (second.states[State.ANSWERED], second.computed) == (40, 0)


def test_transient_errors_stop_at_the_limit(make_local_job: MakeJob) -> None:
    job = make_local_job(planned(["!flaky one", "fine"]), attempts=2)
    ledger, _ = run_here(job)
    assert ledger.states[State.FAILED] == 1


@pytest.mark.parametrize("swept", [False, True])
def test_a_row_that_ends_the_same_way_is_asked_in_so_many_runs_and_no_more(make_job: MakeJob, swept: bool) -> None:
    """Five runs: one asks all, one more the failed rows; then no engine starts. One that may pass is asked in each."""
    job = make_job(planned(["!fail", "!flaky", *(f"q{i}" for i in range(40))]), shards=2, attempts=1, max_runs_per_row=2)
    computed, engines, runs = [], [], []
    for number in range(5):
        ledger, worker = run_here(job, f"run{number}")
        computed.append(ledger.computed)
        engines.append(worker.engine is not None)
        runs.append({row["query"]: row["runs"] for row in rows_of(job, ledger).to_pylist()})
        if swept:
            remove_work_files(open_storage(job.root), job)
    assert computed == [42, 2, 1, 1, 1]
    assert [(one["!fail"], one["!flaky"], one["q1"]) for one in runs] == [(1, 0, 0), (2, 0, 0), (2, 0, 0), (2, 0, 0), (2, 0, 0)]
    assert (ledger.states[State.FAILED], ledger.given_up) == (2, 1)
    more = dataclasses.replace(job, max_runs_per_row=3)
    assert run_here(more, "run5")[0].computed == 2
    only = make_job(planned(["!fail", *(f"q{i}" for i in range(40))]), path="precompute/y", max_runs_per_row=1, reuse=False)
    run_here(only)
    assert find_open_shards(only, open_storage(job.root), prepare_input(only))[1] == [], "a third driver finds nothing to do"


def test_the_runs_of_a_row_are_counted_over_jobs(make_job: MakeJob) -> None:
    """Five jobs over one plan, as a changed setting or ask_again makes them: what an earlier one asked in vain is taken over."""
    asked = []
    for number in range(5):
        table = planned(["!fail", "!refuse", *(f"q{i}" for i in range(20))])
        job = make_job(table, path=f"precompute/{number}", shards=1, max_runs_per_row=2, retry=("failed", "refused"))
        ledger, _ = run_here(job, f"run{number}")
        asked.append((ledger.computed, ledger.reused))
    assert asked == [(22, 0), (2, 20), (0, 22), (0, 22), (0, 22)]


def test_a_damaged_segment_is_made_again_and_said(make_local_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make_local_job(planned([f"q{i}" for i in range(100)]), shards=1, flush_rows=10)
    interrupted(job, 55, "run0", monkeypatch)
    store = open_storage(job.root)
    journal = Journal.model_validate(read_json(store, job.journal_path(0)))
    assert len(journal.segments) == 5
    Path(store.full(journal.segments[1].path)).write_bytes(b"not parquet")
    ledger, _ = run_here(job, "run1")
    assert (ledger.rows, ledger.computed, ledger.shards[0].damaged) == (100, 60, 10)


def test_what_changes_an_answer_changes_every_key(make_local_job: MakeJob, segmentation: Task, intent: Task) -> None:
    """DESIGN 2. The folder is named by the stage's fingerprint; the rows' own keys differ too."""
    base = make_local_job(planned(["a"]))
    others = {
        "weights": dataclasses.replace(base, digest="other"),
        "precision": dataclasses.replace(base, model=base.model.model_copy(update={"dtype": "float32"})),
        "quantization": dataclasses.replace(base, model=base.model.model_copy(update={"quantization": "fp8"})),
        "engine": dataclasses.replace(base, model=base.model.model_copy(update={"engine": "vllm"})),
        "endpoint": dataclasses.replace(base, model=base.model.model_copy(update={"base_url": "http://x/v1"})),
        "schema": dataclasses.replace(base, task=dataclasses.replace(segmentation, schema={**segmentation.schema, "minProperties": 1})),
        "task": dataclasses.replace(base, task=intent),
    }
    marks = {name: job.settings for name, job in others.items()}
    assert base.settings not in marks.values()
    assert len(set(marks.values())) == len(marks)
    same = base.model.model_copy(update={"max_num_seqs": 3, "cpus": 2.0, "usd_per_hour": 9.0})
    assert dataclasses.replace(base, model=same).settings == base.settings
    prompt = dataclasses.replace(segmentation, template=segmentation.template.replace("Split", "Cut"))
    made = [keys.answer_key(task.messages("a"), base.settings) for task in (segmentation, prompt)]
    assert made[0] != made[1]


# --- rows and engines that break


@pytest.mark.slow
def test_a_row_that_breaks_the_engine_ends_as_failed_and_the_others_are_answered(make_local_job: MakeJob) -> None:
    """DESIGN 5: found by asking fewer and fewer rows at a time, at the cost of some restarts."""
    job = make_local_job(planned([*(f"q{i}" for i in range(90)), "!raise", *(f"r{i}" for i in range(90))]), shards=2, flush_rows=1000)
    ledger, worker = run_here(job)
    assert (ledger.states[State.ANSWERED], ledger.states[State.FAILED]) == (180, 1)
    assert worker.restarts == len(WINDOWS) + CRASHES_ALONE - 1
    assert "the engine died or hung on this row" in next(iter(ledger.reasons))


@pytest.mark.slow
def test_two_rows_that_break_the_engine(make_local_job: MakeJob) -> None:
    job = make_local_job(planned(["!raise 1", *(f"q{i}" for i in range(20)), "!raise 2"]), shards=1)
    ledger, _ = run_here(job)
    assert (ledger.states[State.ANSWERED], ledger.states[State.FAILED]) == (20, 2)


@pytest.mark.slow
def test_an_engine_that_breaks_on_everything_ends_the_job(make_local_job: MakeJob) -> None:
    job = make_local_job(planned([f"!raise {i}" for i in range(30)]), shards=1)
    with pytest.raises(EngineError, match=r"the engine died \d+ times|killed the engine"):
        run_here(job)


def test_an_engine_that_dies_at_every_start_ends_the_job(make_local_job: MakeJob) -> None:
    """Each worker stands for one that Ray brought back after its process died before any row was finished."""
    job = make_local_job(planned(["a", "b"]), shards=1)
    manifest = prepare_input(job)
    for _ in range(MOST_STARTS):
        Worker(job, manifest, "run0").ensure_engine()
    with pytest.raises(EngineError, match="before it finished a row"):
        Worker(job, manifest, "run0").work([Ask(0, 0)])
    assert run_here(job, "run1")[0].rows == 2


# --- publishing and the ledger


def test_a_publish_retried_after_its_commit_changes_nothing(make_job: MakeJob) -> None:
    job = make_job(planned([f"q{i}" for i in range(30)]), shards=1)
    store, manifest = open_storage(job.root), prepare_input(job)
    first, late = (Shard(job, store, manifest, 0, 0, run) for run in ("one", "two"))
    made = []
    for shard in (first, late):  # two workers that do not know of one another
        shard.begin()
        for row in list(shard.todo):
            text = json.dumps({"segments": [{"text": str(id(shard)), "label": "topic"}]})
            completion = Completion(row, text, "stop")
            shard.take(row, classify(job.task, completion), completion)
        made.append(shard.publish())
    assert made[0] == made[1]
    assert close_ledger(job, store, manifest, [], [made[0]], []).rows == 30
    assert Worker(job, manifest, "three").work([Ask(0, 0)]) == [made[0]]


def test_check_rows_names_what_is_wrong(make_local_job: MakeJob) -> None:
    job = make_local_job(planned(["a", "b"]), shards=1)
    ledger, _ = run_here(job)
    table = rows_of(job, ledger)
    asked = shard_requests(read_shard(open_storage(job.root), prepare_input(job), 0), job.task, job.settings)
    check_rows(table, asked, "here")
    with pytest.raises(LedgerError, match=r"1 missing \('[ab]' "):
        check_rows(table.slice(0, 1), asked, "here")
    with pytest.raises(LedgerError, match="1 twice"):
        check_rows(pa.concat_tables([table, table.slice(0, 1)]), asked, "here")
    with pytest.raises(LedgerError, match="1 not asked for"):
        check_rows(table, ShardRequests(asked.table.slice(0, 1), asked.messages[:1], asked.pairs[:1]), "here")
    with pytest.raises(LedgerError, match="out of order"):
        check_rows(table.take([1, 0]), asked, "here")
    odd = table.set_column(table.column_names.index("state"), "state", pa.array(["answered", "lost"]))
    with pytest.raises(LedgerError, match="unknown state lost"):
        check_rows(odd, asked, "here")


def test_sums_that_do_not_agree_name_the_shard(make_local_job: MakeJob) -> None:
    job = make_local_job(planned([f"q{i}" for i in range(100)]), shards=4)
    ledger, _ = run_here(job)
    manifest = prepare_input(job)
    check_sums(ledger.shards, manifest, "here")
    with pytest.raises(LedgerError, match="shard 2 is missing"):
        check_sums([shard for shard in ledger.shards if shard.shard != 2], manifest, "here")
    short = ledger.shards[1].model_copy(update={"states": {"answered": 1}})
    with pytest.raises(LedgerError, match="shard 1: "):
        check_sums([ledger.shards[0], short, *ledger.shards[2:]], manifest, "here")
    with pytest.raises(LedgerError, match="shard 3 is there 2 times"):
        check_sums([*ledger.shards, ledger.shards[3]], manifest, "here")


def test_a_published_file_that_was_cut_is_found(make_local_job: MakeJob) -> None:
    job = make_local_job(planned([f"q{i}" for i in range(20)]), shards=1)
    ledger, _ = run_here(job)
    path = Path(open_storage(job.root).full(ledger.shards[0].answers.path))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(LedgerError, match=r"has \d+ bytes, not"):
        run_here(job)


def test_the_audit_reads_what_is_published_and_names_rows(make_job: MakeJob) -> None:
    """The anti-join looks at the store, not at what workers said."""
    job = make_job(planned([f"q{i}" for i in range(20)]), shards=1)
    ledger, _ = run_here(job)
    store, manifest, receipt = open_storage(job.root), prepare_input(job), ledger.shards[0]
    whole = read_table(store, receipt.answers.path)
    other = whole.set_column(0, "query_key", pa.array([*whole["query_key"].to_pylist()[:-1], keys.query_key("stranger")], rows.KEY))
    damaged = {
        r"1 missing \('q\d+'\); 1 not asked for": other,
        "has 19 rows, not 20": whole.slice(1),
    }
    for said, table in damaged.items():
        ref = write_table(store, receipt.answers.path, table)
        with pytest.raises(LedgerError, match=said):
            audit([receipt.model_copy(update={"answers": ref})], manifest, store, "here")


def test_input_columns_survive(make_local_job: MakeJob) -> None:
    table = planned(["a", "b"], stratum=["torso", "tail"], eval_only=[True, False])
    job = make_local_job(table)
    found = {row["query"]: row for row in rows_of(job, run_here(job)[0]).to_pylist()}
    for row in table.to_pylist():
        for name in (*INPUT.names, "businesses"):
            assert found[row["query"]][name] == row[name]


@pytest.mark.parametrize("shards, workers, tasks", [(1, 1, 1), (4, 1, 1), (5, 2, 2), (16, 1, 4), (2500, 16, 157)])
def test_chains(shards: int, workers: int, tasks: int) -> None:
    assert chain_count(shards, workers) == tasks


@pytest.mark.parametrize("rows", [1, 2, 3, 97, 401])
def test_reordered_and_recut_input_is_the_same_rows_in_the_same_shards(make_local_job: MakeJob, rows: int) -> None:
    """DESIGN 4: what a shard holds depends on its keys alone, and no count is rounded off."""
    table = planned([f"q{i}" for i in range(rows)])
    shuffled = table.take(random.Random(rows).sample(range(rows), rows))
    cut = sorted({0, rows // 3, rows // 2, rows})
    pieces = [shuffled.slice(a, b - a) for a, b in itertools.pairwise(cut)]
    tables, made = [], []
    for path, parts in (("precompute/one", [table]), ("precompute/two", pieces)):
        job = make_local_job(*parts, path=path, shards=5, reuse=False)
        made.append(run_here(job)[0])
        tables.append(rows_of(job, made[-1]).drop_columns(["seconds"]))
    assert tables[0].num_rows == rows
    assert tables[0].equals(tables[1])
    assert [shard.rows for shard in made[0].shards] == [shard.rows for shard in made[1].shards]


@pytest.mark.slow
def test_machines_that_are_taken_away_again_and_again_blame_no_row(make_local_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run dies after a few rows, without a fault of any row: all are answered in the end, however narrow the steps became."""
    job = make_local_job(planned([f"q{i}" for i in range(40)]), shards=1, flush_rows=1000)
    rng, runs = random.Random(3), 0
    while find_open_shards(job, open_storage(job.root), prepare_input(job))[1]:
        interrupted(job, rng.randint(0, 4), f"run{runs}", monkeypatch)
        runs += 1
        assert runs < 200
    ledger, _ = run_here(job, "last")
    assert runs > 10
    assert ledger.states == {**dict.fromkeys(map(str, State), 0), "answered": 40}
