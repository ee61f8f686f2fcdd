"""Delete a query and all that was made from it, and say what could not be reached.

    tombstone (no cache answers it any more) -> jobs, tables, documents, decisions, overrides -> a snapshot without it becomes current
      -> snapshots that hold it are removed -> a receipt, which holds the key of the query and not its text

In: a store, a query. Out: DeletionReceipt. Killed anywhere, the same command goes on: each step finds what is left to do.
Knows nothing of servers: they take the tombstone as they take overrides.
"""

from __future__ import annotations

import json
from collections import Counter

from pydantic import Field

from headtail.adapters import append_log
from headtail.adapters.progress import say
from headtail.adapters.storage import Storage, read_json, read_table
from headtail.batch.erase import erase_input, recount_shards
from headtail.batch.job_state import driver_state
from headtail.cache.collect import files_by_snapshot, remove_snapshot
from headtail.cache.erase import publish_without, snapshot_holds
from headtail.cache.manifest import utc_now
from headtail.core.config import Config
from headtail.core.errors import InputError
from headtail.core.keys import query_key
from headtail.core.paths import StoreId, StoreIdOrEmpty, StorePath
from headtail.core.receipt import FileRef
from headtail.core.record import Moment
from headtail.releases import canary
from headtail.releases import release as releases
from headtail.releases.overrides import erase_overrides, load_overrides, plain_query, tombstone_query
from headtail.releases.scrub import DeletedQuery, current_reference, files_to_scrub, find_tables, rewrite_table, scrub_documents
from headtail.review.decision import current_moment, person_of_options
from headtail.review.log import LOGS, erase_decisions

FOLDER = "deletions"


class DeletionReceipt(Config):
    """What a deletion did, and what it could not do."""

    number: int = Field(ge=1, description="1 for the first")
    query_key: str = Field(pattern=r"^[0-9a-f]{32}$", description="hex; the hash under which the query was kept, not its text")
    who: str = Field(description="who asked for it")
    why: str = Field(description="why, in words")
    at: Moment = Field(description="UTC, ISO 8601")
    rows: dict[str, int] = Field(description="rows that were removed, by stage")
    documents: int = Field(ge=0, description="JSON files that were rewritten")
    removed: tuple[StorePath, ...] = Field((), description="folders of runs whose pages showed it; the stage makes them anew")
    decisions: int = Field(ge=0, description="decisions of the review queue and answers to drawn queries that were emptied")
    overrides: int = Field(ge=0, description="entries of overrides that were emptied")
    release: StoreIdOrEmpty = Field("", description="the release without it that became current; empty: the current one did not hold it")
    snapshots: tuple[StoreId, ...] = Field((), description="removed, since they held it: their releases cannot be rolled back to")
    unreached: tuple[str, ...] = Field((), description="what may still hold it or was made from it, and what to do")


def delete_query(store: Storage, query: str, *, who: str, why: str) -> DeletionReceipt:
    """Delete `query` (in any spelling of its normal form) from the store. InputError while a job runs."""
    person, because = person_of_options(who, why, '--who "Ada" --why "asked for by its author"')
    gone = DeletedQuery(query_key(text := plain_query(query)), text)
    files = files_to_scrub(store)
    jobs = sorted({path.rpartition("/work/")[0] for path in files if path.startswith("precompute/") and "/work/" in path})
    driven = sorted({path.rpartition("/work/")[0] for path in files if "/work/drivers/" in path})
    if running := [job for job in driven if driver_state(store, job)[0] == "running"]:
        fix = "wait until it ends, or stop it; then run the same command again"
        raise InputError("a job runs: it may write the query again", where=store.uri(running[0]), fix=fix)
    if gone.key not in load_overrides(store, "").deleted:
        tombstone_query(store, gone.key, who=person, why=because)
        files = files_to_scrub(store)  # a server's log leaves the query out from now on, but may have written a file until now
    say("delete       no cache answers it any more; servers follow within a minute")
    events = _word_events(store, files, gone)
    rows, changed = _scrub_tables(store, files, jobs, gone)
    documents, removed = scrub_documents(store, files_to_scrub(store), gone, changed)
    logs = {"/".join(path.split("/")[:2]) for path in files if path.startswith(LOGS)}
    decisions = sum(erase_decisions(store, log, {gone.key}) for log in logs)
    overrides = erase_overrides(store, [gone.key])
    release, snapshots = _replace_snapshots(store, gone, person, events)
    fields = {
        "query_key": gone.key.hex(),
        "who": person,
        "why": because,
        "at": current_moment(),
        "rows": dict(rows),
        "documents": documents,
        "removed": tuple(sorted(set(removed))),
        "decisions": decisions,
        "overrides": overrides,
        "release": release,
        "snapshots": tuple(snapshots),
        "unreached": tuple(_unreached(store, files, changed, snapshots)),
    }
    number = append_log.append_entry(store, FOLDER, lambda number: _bytes(DeletionReceipt.model_validate({**fields, "number": number})))
    store.remove(_plan_path(gone))
    return DeletionReceipt.model_validate({**fields, "number": number})


class DeletionPlan(Config):
    """What a deletion would take."""

    query_key: str = Field(description="hex")
    rows: dict[str, int] = Field(description="rows of tables, by stage")
    snapshots: tuple[str, ...] = Field(description="snapshots that hold it")


def plan_deletion(store: Storage, query: str) -> DeletionPlan:
    """What `delete_query` would take. Nothing is changed."""
    gone = DeletedQuery(query_key(text := plain_query(query)), text)
    rows: Counter[str] = Counter()
    for path, count in find_tables(store, files_to_scrub(store), gone).items():
        rows[path.split("/")[0]] += count
    return DeletionPlan(query_key=gone.key.hex(), rows=dict(rows), snapshots=tuple(_holding(store, gone)))


def _bytes(receipt: DeletionReceipt) -> bytes:
    return (receipt.model_dump_json(indent=2) + "\n").encode()


def _plan_path(gone: DeletedQuery) -> str:
    return f"{FOLDER}/plan-{gone.key.hex()}.json"


def _scrub_tables(store: Storage, files: list[str], jobs: list[str], gone: DeletedQuery) -> tuple[Counter[str], dict[str, FileRef]]:
    """Rows removed by stage, and what lies now at each path that was changed. The plan is written first: a call after a kill knows it."""
    found = find_tables(store, files, gone)
    before = read_json(store, _plan_path(gone))["rows"] if store.exists(_plan_path(gone)) else {}
    plan = {**before, **found}
    store.replace(_plan_path(gone), (json.dumps({"rows": plan}) + "\n").encode())
    inputs = sum(erase_input(store, job, {gone.key}) for job in jobs)
    for path in found:
        rewrite_table(store, path, gone)
    changed = {path: current_reference(store, path) for path in plan if store.exists(path)}
    for job in jobs:
        recount_shards(store, job, changed)
    rows = Counter({"inputs of jobs": inputs} if inputs else {})
    for path, count in plan.items():
        rows[path.split("/")[0]] += count
    return rows, changed


def _word_events(store: Storage, files: list[str], gone: DeletedQuery) -> Counter[str]:
    """Events of the query by word, in the log's table that has most of them: what the words beside a snapshot count less."""
    most = 0
    for path in files:
        if path.startswith("ingest/") and path.endswith("/queries.parquet"):
            table = read_table(store, path, ["query_key", "count"])
            for key, count in zip(table["query_key"].to_pylist(), table["count"].to_pylist(), strict=True):
                most = max(most, count) if key == gone.key else most
    return Counter({word: most * times for word, times in Counter(gone.text.split()).items()})


def _replace_snapshots(store: Storage, gone: DeletedQuery, who: str, events: Counter[str]) -> tuple[str, list[str]]:
    """The release without the query that is current now ("" when nothing changed), and the snapshots that were removed."""
    holding = _holding(store, gone)
    record = canary.read_canary(store)
    if record is not None and canary.is_running(store, record) and releases.load_release(store, record.canary).snapshot in holding:
        canary.stop_canary(store, who=who, why="its snapshot held a query that was deleted")
    current, made = releases.current_id(store), ""
    if current and (held := releases.load_release(store, current)).snapshot in holding:
        clean = publish_without(store, held.snapshot, {gone.key}, events)
        made = releases.derive_release(store, current, snapshot=clean.id, note=held.note).id
        releases.promote(store, made)  # not promote_release: labelled rows may be gone with the query, and it must go all the same
    for one in holding:
        remove_snapshot(store, one)
    return made, holding


def _holding(store: Storage, gone: DeletedQuery) -> list[str]:
    """Snapshots that hold the query, and what a killed publish or collection left of one."""
    return [one for one in files_by_snapshot(store) if snapshot_holds(store, one, {gone.key})]


def _unreached(store: Storage, files: list[str], changed: dict[str, FileRef], snapshots: list[str]) -> list[str]:
    """What this command does not change."""
    touched = {"/".join(path.split("/")[:2]) for path in changed}
    receipts = {path.removesuffix("/receipt.json"): read_json(store, path) for path in files if _is_run(path) and store.exists(path)}
    students = sorted(folder for folder, one in receipts.items() if folder.startswith("distill/") and touched & set(one["inputs"].values()))
    logs = sorted({str(one["settings"].get("log", "")) for folder, one in receipts.items() if folder.startswith("ingest/")} - {""})
    found = [f"your own log ({', '.join(logs) or 'not known'}): remove it there, or the next ingest reads it again"]
    found.append("words that people wrote (why of overrides, canaries, reviews; comments of feedback) about other queries: not searched")
    waiting = "shadow mode's answers that a server has not written yet, logs of a server that was killed or is of an earlier version"
    found.append(f"{waiting}: run this command again once log_rotate_s is over")
    found.append("MLflow: reports and tables that runs logged; delete those runs there, and mlartifacts/ of this store")
    if students:
        found.append(f"weights of students that may have learnt from it: {', '.join(students)}; train anew from the tables as they are now")
    if snapshots:
        found.append("copies of snapshots that servers and clients fetched (cache_dir): they go when a server takes the new release")
    if half := store.litter(utc_now()):
        found.append(f"{len(half)} files that a program writes now, or left half written: headtail gc removes them a day later")
    found.append("backups of the store, terminals and logs of other programs")
    return found


def _is_run(path: str) -> bool:
    return path.startswith(("ingest/", "distill/")) and path.endswith("/receipt.json")
