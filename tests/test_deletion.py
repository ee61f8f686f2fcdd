"""A deleted query is in no file of the store that the command says it reaches, and what is left works as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from conftest import keep
from headtail.adapters import append_log
from headtail.adapters.storage import Storage, open_storage, read_table, write_json, write_once, write_table
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.batch.job import read_receipt
from headtail.batch.ledger import audit, check_sums
from headtail.batch.prepare import InputManifest, read_shard
from headtail.cache import snapshot
from headtail.cache.collect import files_by_snapshot, remove_snapshot
from headtail.cache.erase import publish_without
from headtail.cache.manifest import manifest_path
from headtail.cache.words import load_words
from headtail.core.errors import InputError, StorageError
from headtail.core.keys import query_key
from headtail.core.rows import QUERY, TRAINING_SET, with_side_inputs
from headtail.core.task import Task
from headtail.releases import canary, deletion, lookup, overrides, release, scrub
from headtail.releases.deletion import FOLDER, DeletionReceipt, delete_query
from headtail.review import decisions
from headtail.review.decision import Decision
from headtail.review.log import LABELLING, DecisionLog
from null_jobs import MakeJob, planned, run_here
from test_publish_guardrails import answered, published, spans

pytestmark = pytest.mark.usefixtures("not_drawn")

GONE, KEPT = "ada lovelace london", "pizza"
KEY = query_key(GONE)
UNTOUCHED = ("LATEST", "CURRENT", ".db", ".db-shm", ".db-wal")


def texts_in(store: Storage, text: str) -> list[str]:
    """Files of the store, whatever their form, that hold `text` or its key."""
    found = []
    for one in store.files(""):
        if one.path.endswith(UNTOUCHED) or one.path.startswith("mlartifacts/"):
            continue
        data = store.read(one.path)
        if one.path.endswith(".parquet"):
            data = repr(pq.read_table(pa.BufferReader(data)).to_pylist()).encode()
        elif one.path.endswith(".arrow"):
            data = b""  # runs of Arrow streams: looked at by read_shard below
        if text.encode() in data:
            found.append(one.path)
    return sorted(found)


@pytest.fixture
def filled(store: Storage, root: str, segmentation: Task) -> Storage:
    """A store in which the query is wherever a query can be."""
    counts = {GONE: 40, KEPT: 50, "london": 30, "denver": 5}
    rows = [{"query_key": query_key(q), "query": q, "count": n, "businesses": None} for q, n in counts.items()]
    log = keep(
        store, "ingest", "c0ffee00", {"queries": pa.Table.from_pylist(rows, schema=with_side_inputs(QUERY, ("businesses",)))},
        settings={"log": "/logs/day.csv"},
    )  # fmt: skip
    aside = pa.table({"file": ["f"], "row": [1], "reason": ["bad_row"], "text": [f"x,{GONE.title()},,"]})
    write_table(store, "ingest/c0ffee00/set_aside.parquet", aside)
    raw = pa.table({"query": [" Ada  Lovelace LONDON", KEPT, None], "time": [1, 2, 3]})
    keep(store, "example-data", "aa55aa55", {"log/day-00": raw})
    training = {
        "query_key": KEY,
        "query": GONE,
        "answer": spans(GONE),
        "weight": 1.0,
        "stratum": "head",
        "origin": "teacher",
        "answer_key": bytes(16),
    }
    curated = keep(store, "curate", "bb66bb66", {"training_set": pa.Table.from_pylist([training], schema=TRAINING_SET)})
    keep(store, "distill", "cc77cc77", {}, inputs={"training_set": curated.path})
    pairs = ((GONE, spans("ada lovelace", "london")), (KEPT, spans(KEPT)))
    first = answered(store, segmentation, "a" * 16, "teacher", {"log": log.path}, *pairs)
    published(root, "query_segmentation", first)
    more = (("denver", spans("denver")), ("london", spans("london")))
    second = answered(store, segmentation, "b" * 16, "teacher", {"log": log.path}, *pairs, *more)
    published(root, "query_segmentation", second)
    overrides.set_override(store, GONE, spans(GONE), who="ada", why="mine")
    moment = "2026-01-01T00:00:00.000+00:00"
    held = [Decision(query_key(q), q, "correct", spans(q), spans("x"), bytes(16), "ada", moment, f"of {q}") for q in (KEPT, GONE, "london")]
    DecisionLog(store, "query_segmentation").record(held, "page")
    DecisionLog(store, "query_segmentation", LABELLING).record(held[:2], "page")
    write_table(store, "requests/2026-01-01/a.parquet", pa.table({"query": [GONE, KEPT], "source": ["teacher", "teacher"]}))
    write_json(
        store, "evaluate/dd88dd88/report.json", {"rows": [{"query": GONE, "given": spans(GONE)}, {"query": KEPT}], "examples": [GONE, KEPT]}
    )
    keep(store, "report", "ee99ee99", {})
    store.replace("report/ee99ee99/report.html", f"<td>{GONE}</td>".encode())
    return store


def test_it_is_nowhere_and_all_else_is_as_it_was(filled: Storage, segmentation: Task) -> None:
    before = release.current_id(filled)
    assert len(texts_in(filled, GONE)) > 12
    receipt = delete_query(filled, " Ada lovelace  London", who="ada", why="her wish")
    assert texts_in(filled, GONE) == texts_in(filled, GONE.title()) == []
    assert not [path for path in texts_in(filled, KEY.hex()) if not path.startswith(("overrides/", "deletions/"))]
    assert receipt.rows == {"curate": 1, "example-data": 1, "ingest": 2, "precompute": 2, "requests": 1}
    assert (receipt.decisions, receipt.overrides, len(receipt.snapshots), receipt.removed) == (2, 1, 2, ("report/ee99ee99",))
    assert release.current_id(filled) == receipt.release != before
    assert lookup.look_up(filled, KEPT)["answer"] == json.loads(spans(KEPT))
    assert not lookup.look_up(filled, GONE)["cached"]
    with pytest.raises(StorageError, match="not in the store"):
        release.rollback(filled)
    for stage, name in (
        ("ingest", "queries"),
        ("curate", "training_set"),
        ("precompute", "answers/shard-00000"),
        ("example-data", "log/day-00"),
    ):
        table = output_table(filled, load_receipt(filled, stage), name)  # its digest is the one that the receipt names
        assert KEY not in (table["query_key"].to_pylist() if "query_key" in table.column_names else [])
    standing = {row["query"]: row["why"] for row in decisions(filled, "query_segmentation").to_pylist()}
    assert standing == {KEPT: f"of {KEPT}", "london": "of london", "": ""}
    labelled = [one.decision.query for one in DecisionLog(filled, "query_segmentation", LABELLING).all()]
    assert labelled == [KEPT, ""]
    assert read_table(filled, "requests/2026-01-01/a.parquet")["query"].to_pylist() == [KEPT]
    assert json.loads(filled.read("evaluate/dd88dd88/report.json")) == {"rows": [{"query": KEPT}], "examples": [KEPT]}
    assert not filled.exists("report/ee99ee99/receipt.json")


def test_the_receipt_says_what_it_could_not_reach_and_holds_no_text(filled: Storage) -> None:
    delete_query(filled, GONE, who="ada", why="her wish")
    (receipt,) = append_log.read_entry_records(filled, DeletionReceipt, FOLDER)
    assert receipt.query_key == KEY.hex()
    told = " ".join(receipt.unreached)
    for words in ("/logs/day.csv", "MLflow", "distill/cc77cc77", "backups", "cache_dir", "comments of feedback", "shadow mode"):
        assert words in told
    assert "lovelace" not in receipt.model_dump_json()


def test_a_file_that_a_server_wrote_until_the_tombstone_is_reached(filled: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its collector looks for tombstones after each file: what it wrote before this one is the deletion's to find."""

    def late(*args: Any, **said: Any) -> Any:
        write_table(filled, "requests/2026-01-02/b.parquet", pa.table({"query": [GONE, KEPT]}))
        return overrides.tombstone_query(*args, **said)

    monkeypatch.setattr("headtail.releases.deletion.tombstone_query", late)
    assert delete_query(filled, GONE, who="ada", why="").rows["requests"] == 2
    assert read_table(filled, "requests/2026-01-02/b.parquet")["query"].to_pylist() == [KEPT]


def test_words_of_the_log_count_less(filled: Storage) -> None:
    before = load_words(filled, release.current_release(filled).snapshot)
    assert (before["lovelace"], before["london"]) == (40, 70)
    delete_query(filled, GONE, who="ada", why="")
    now = load_words(filled, release.current_release(filled).snapshot)
    assert "lovelace" not in now
    assert now["london"] == 30


def test_a_dry_run_changes_nothing_and_a_query_that_is_nowhere_is_deleted_too(filled: Storage) -> None:
    before = {one.path: filled.read(one.path) for one in filled.files("")}
    plan = deletion.plan_deletion(filled, GONE)
    assert (plan.rows["ingest"], len(plan.snapshots)) == (2, 2)
    assert {one.path: filled.read(one.path) for one in filled.files("")} == before
    receipt = delete_query(filled, "never typed", who="ada", why="")
    assert (receipt.rows, receipt.snapshots, receipt.release) == ({}, (), "")
    assert query_key("never typed") in overrides.load_overrides(filled, "").deleted


@pytest.mark.parametrize(
    "step", ["find_tables", "rewrite_table", "scrub_documents", "erase_decisions", "publish_without", "remove_snapshot"]
)
def test_killed_anywhere_the_same_command_goes_on(filled: Storage, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    real, calls = getattr(deletion, step), 0

    def killed(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 or step not in ("rewrite_table", "remove_snapshot"):  # of those: after the first of several
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(deletion, step, killed)
        with pytest.raises(KeyboardInterrupt):
            delete_query(filled, GONE, who="ada", why="")
    assert not lookup.look_up(filled, GONE)["cached"], "the tombstone comes first"
    delete_query(filled, GONE, who="ada", why="")
    assert texts_in(filled, GONE) == []
    assert len(overrides.load_overrides(filled, "").deleted) == 1
    for stage, name in (("ingest", "queries"), ("precompute", "answers/shard-00000")):
        output_table(filled, load_receipt(filled, stage), name)


def test_the_next_publish_keeps_it_out_even_when_the_log_brings_it_back(filled: Storage, root: str, segmentation: Task) -> None:
    delete_query(filled, GONE, who="ada", why="")
    again = answered(filled, segmentation, "e" * 16, "teacher", {}, (GONE, spans(GONE)), (KEPT, spans(KEPT)))
    assert published(root, "query_segmentation", again).rows["left_out.deleted"] == 1


def test_a_canary_that_holds_it_ends(filled: Storage) -> None:
    moves = release.move_history(filled)
    canary.start_canary(filled, moves[0].release, 0.05, who="ada")
    delete_query(filled, GONE, who="ada", why="")
    held = canary.read_canary(filled)
    assert held is not None
    assert (held.state, held.why) == ("stopped", "its snapshot held a query that was deleted")


def test_a_job_s_own_files_add_up_without_it(make_local_job: MakeJob) -> None:
    """A finished precompute job, whose input had the query twice: its sorted input, its shards' receipts and its answers agree again."""
    job = make_local_job(planned([f"query {i}" for i in range(60)]), planned(["query 7"]), shards=3)
    run_here(job)
    store, key = open_storage(job.root), query_key("query 7")
    removed = delete_query(store, "query 7", who="ada", why="").rows
    assert (removed["inputs of jobs"], removed["plan"]) == (2, 2)
    manifest = InputManifest.model_validate_json(store.read(job.manifest_path()))
    shards = [read_receipt(job, store, number, 0) for number in range(3)]
    assert manifest.rows == sum(shard.rows for shard in shards) == 59
    check_sums(shards, manifest, job.path)
    audit(shards, manifest, store, job.path)
    assert all(key not in read_shard(store, manifest, number)["query_key"].to_pylist() for number in range(3))
    assert len(store.files(f"{job.path}/work/parts")) == len(manifest.parts)
    again, _ = run_here(job, "run1")  # failed rows are asked again, as ever
    assert again.rows == 59


@pytest.mark.parametrize("killed", ["before its manifest", "after its table"])
def test_what_a_killed_publish_left_of_a_snapshot_goes_too(killed: str, filled: Storage) -> None:
    """A publish writes files first and the manifest last; a collection takes the manifest first. What lies between serves nobody."""
    old = next(one for one in files_by_snapshot(filled) if one != release.current_release(filled).snapshot)
    filled.remove(manifest_path(old))
    if killed == "after its table":
        filled.remove(f"snapshots/{old}/answers.parquet")  # only the LMDB file, which nobody can search in a store
    other = _without_the_query(filled)
    receipt = delete_query(filled, GONE, who="ada", why="her wish")
    assert old in receipt.snapshots
    assert not filled.files(f"snapshots/{old}")
    assert texts_in(filled, GONE) == []
    assert filled.exists(f"snapshots/{other}/answers.parquet")  # unfinished, and nothing of the query in it


def _without_the_query(store: Storage) -> str:
    """An unfinished snapshot that does not hold it."""
    made = publish_without(store, release.current_release(store).snapshot, {KEY}, {})
    store.remove(manifest_path(made.id))
    return made.id


def test_a_publish_whose_files_a_deletion_takes_ends_with_an_error(filled: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    current = release.current_release(filled).snapshot

    def meanwhile(store: Storage, path: str, data: bytes) -> bytes:
        if path.endswith("manifest.json"):
            remove_snapshot(store, path.split("/")[1])
        return write_once(store, path, data)

    monkeypatch.setattr(snapshot, "write_once", meanwhile)
    with pytest.raises(StorageError, match="a deletion took this snapshot away"):
        publish_without(filled, current, {query_key(KEPT)}, {})
    assert all(filled.exists(manifest_path(one)) for one in files_by_snapshot(filled))  # nothing half there is left


def test_while_a_job_runs_it_is_refused(filled: Storage) -> None:
    from headtail.batch.lease import hold_lease

    with hold_lease(filled, "precompute/running0"), pytest.raises(InputError, match="a job runs"):
        delete_query(filled, GONE, who="ada", why="")
    assert not list(append_log.read_entry_records(filled, DeletionReceipt, FOLDER))


def test_fields_of_other_meaning_are_left_alone() -> None:
    gone = scrub.DeletedQuery(query_key("teacher"), "teacher")
    plain = {"source": "teacher", "rows": [{"label": "teacher", "text": "teacher"}, {"query": "Teacher"}], "query": "other"}
    assert scrub._scrubbed(plain, gone, {}) == {"source": "teacher", "rows": [{"label": "teacher", "text": "teacher"}], "query": "other"}


def test_the_command(filled: Storage, capsys: pytest.CaptureFixture[str]) -> None:
    from headtail.cli import main

    main(["delete", GONE, "--dry-run", "--root", filled.root])
    assert "2 snapshots" in capsys.readouterr().out
    main(["delete", GONE, "--who", "ada", "--why", "her wish", "--root", filled.root])
    shown = capsys.readouterr().out
    assert "not reached  your own log" in shown
    assert "lovelace" not in shown
    main(["delete", GONE, "--json", "--root", filled.root])
    assert DeletionReceipt.model_validate_json(capsys.readouterr().out).rows == {}


def test_on_s3(s3_root: str, tmp_path: Path, segmentation: Task) -> None:
    store = open_storage(s3_root)
    rows = answered(store, segmentation, "a" * 16, "teacher", {}, (GONE, spans(GONE)), (KEPT, spans(KEPT)))
    published(s3_root, "query_segmentation", rows)
    receipt = delete_query(store, GONE, who="ada", why="")
    assert (receipt.rows, len(receipt.snapshots)) == ({"precompute": 1}, 1)
    assert texts_in(store, GONE) == []
    assert lookup.look_up(store, KEPT, into=tmp_path)["cached"]
