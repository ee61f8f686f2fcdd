"""What a store holds and what happens in it: jobs that are not finished, models and their gates, the current release, latest runs.

In: a root. Out: plain values, or a table for people. Reads pointers, receipts, journals and leases. Training runs alone are found by
listing their folders, since no pointer leads to one that did not end.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from itertools import islice
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from headtail.adapters.progress import format_time_left
from headtail.adapters.storage import Storage, open_existing, read_record
from headtail.adapters.storage.receipts import load_receipt
from headtail.adapters.tracking import tracking_uri
from headtail.batch.catalog import CatalogEntry, catalog_entries
from headtail.batch.job_state import JobState, driver_state, job_state
from headtail.cache import read_manifest
from headtail.core.config import TrackingConfig
from headtail.core.rows import State
from headtail.core.secrets import hide
from headtail.releases import release
from headtail.releases.canary import canary_verdict, is_running, read_canary
from headtail.releases.release import Release
from headtail.stages.distill.checkpoints import Marker
from headtail.stages.distill.resume import MARKER
from headtail.stages.gate import latest_verdict

STAGES = (
    "example-data",
    "ingest",
    "plan",
    "precompute",
    "evaluate",
    "judge",
    "curate",
    "feedback",
    "shadow",
    "experiment",
    "distill",
    "gate",
    "publish",
    "replay",
    "simulate",
    "report",
)
NEWEST = 50  # jobs of the store whose state is looked at
SHOWN = 10  # unfinished ones that the table shows
_ID_WIDTH, _WITH_ID = 27, ("model, newest job", "job", "latest run")  # precompute/<16 hex digits> on one line
_PROBE = "/probe/"  # in the path of a dry run's probe


def status(root: str) -> dict[str, Any]:
    """Root, tracking, release, answer sources, unfinished jobs and trainings, latest receipts. InputError when there is no such store."""
    store = open_existing(root)
    current = release.current_release(store) if store.exists(release.CURRENT) else None
    newest = list(islice(catalog_entries(store), NEWEST))
    states = {entry.path: job_state(store, entry.path) for entry in newest}
    return {
        "root": store.root,
        "tracking": hide(tracking_uri(TrackingConfig(), root)),
        "release": current.model_dump(mode="json") if current else None,
        "canary": _canary(store),
        "sources": list(_sources(store, newest, states, current)),
        "jobs": [_job(entry, states[entry.path]) for entry in newest if states[entry.path].phase != "done"],
        "trainings": list(_trainings(store)),
        "stages": dict(_stages(store)),
    }


def _canary(store: Storage) -> dict[str, Any] | None:
    """The canary that runs; None when none does."""
    record = read_canary(store)
    if record is None or not is_running(store, record):
        return None
    return {"release": record.canary, "share": record.share, "verdict": canary_verdict(record).word}


def _stages(store: Storage) -> Iterator[tuple[str, dict[str, Any]]]:
    for stage in STAGES:
        if store.exists(f"{stage}/LATEST"):
            found = load_receipt(store, stage)
            kept = ("path", "started", "seconds", "rows", "run_id")
            yield stage, {name: getattr(found, name) for name in kept}


def _sources(store: Storage, newest: list[CatalogEntry], states: dict[str, JobState], current: Release | None) -> Iterator[dict[str, Any]]:
    """Teacher, batch student and realtime student of each task: the newest job of each, its gate, and its part in the release."""
    lineage = read_manifest(store, current.snapshot).lineage if current else ()
    seen = set()
    for entry in newest:
        if (entry.task, entry.source) in seen or _PROBE in entry.path:
            continue
        seen.add((entry.task, entry.source))
        verdict = latest_verdict(store, entry.task, entry.source)
        state = states[entry.path]
        rows = load_receipt(store, "precompute", entry.path).rows if state.phase == "done" else {}
        uses = ["cache"] if entry.path in lineage else []
        uses += ["misses"] if current is not None and current.student and current.student == entry.model else []
        yield {
            "task": entry.task,
            "source": entry.source,
            "model": entry.model,
            "answers": entry.path,
            "state": state.phase,
            "rows": {name: rows[name] for name in ("in", *map(str, State)) if name in rows},
            "gate": None if verdict is None else {"passed": verdict.passed, "candidate": verdict.candidate, "missing": verdict.missing()},
            "in_release": uses,
        }


def _job(entry: CatalogEntry, state: JobState) -> dict[str, Any]:
    return {
        "path": state.path,
        "task": entry.task,
        "source": entry.source,
        "model": entry.model,
        "state": state.phase,
        "rows_done": state.rows_done,
        "rows": state.rows,
        "driver": state.driver,
        "silent_s": None if state.silent_s is None else round(state.silent_s, 1),
        "began": entry.began,
        "probe": _PROBE in state.path,
    }


def _trainings(store: Storage) -> Iterator[dict[str, Any]]:
    """Trainings without a receipt, found by listing. `step`: of the last whole checkpoint."""
    written: dict[str, datetime.datetime] = {}
    ended, begun = set(), set()
    for file in store.files("distill"):
        path = "/".join(file.path.split("/")[:2])
        written[path] = max(file.modified, written.get(path, file.modified))
        ended |= {path} if file.path == f"{path}/receipt.json" else set()
        begun |= {path} if file.path.startswith(f"{path}/work/") else set()
    now = datetime.datetime.now(datetime.UTC)
    for path in sorted(begun - ended):
        marker = f"{path}/{MARKER}"
        found = read_record(store, Marker, marker) if store.exists(marker) else None
        step, steps = (found.state.step, found.steps) if found else (0, 0)
        phase, driver, _ = driver_state(store, path)
        silent_s = round(max(0.0, (now - written[path]).total_seconds()), 1)
        yield {"path": path, "state": phase, "step": step, "steps": steps or None, "driver": driver, "silent_s": silent_s}


def status_table(facts: dict[str, Any]) -> Group:
    """`status` for people."""
    parts: list[Any] = [_title(facts), ""]
    if facts["sources"]:
        parts += [_sources_table(facts["sources"]), ""]
    if facts["jobs"] or facts["trainings"]:
        parts += [_jobs_table(facts["jobs"], facts["trainings"])]
        if len(facts["jobs"]) > SHOWN:
            parts.append(f"{len(facts['jobs']) - SHOWN} older unfinished jobs are not shown; --json has them")
    else:
        parts.append("No job is unfinished.")
    return Group(*parts, "", _stages_table(facts["stages"]))


def _title(found: dict[str, Any]) -> str:
    current = found["release"]
    what = f"release {current['id']} (snapshot {current['snapshot']}, task {current['task']})" if current else "no release yet"
    if (trial := found["canary"]) is not None:
        what += f"; canary {trial['release']} answers {trial['share']:.3g} of the queries: {trial['verdict']}"
    return f"{found['root']}  {what}\ntracking: {found['tracking']}"


def _table(*heads: str, title: str) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        made.add_column(head, overflow="fold", min_width=_ID_WIDTH if head in _WITH_ID else None)
    return made


def _sources_table(sources: list[dict[str, Any]]) -> Table:
    table = _table("answer source", "model, newest job", "gate", "release", title="Teacher and students")
    for one in sources:
        rows = f"{one['rows'].get('answered', 0):,} of {one['rows'].get('in', 0):,} answered" if one["state"] == "done" else one["state"]
        gate = one["gate"]
        verdict = "" if gate is None else "passed" if gate["passed"] else f"REJECTED: {'; '.join(gate['missing'])}"
        name, model = f"{one['source']}\n{one['task']}", f"{one['model']}\n{one['answers']}\n{rows}"
        table.add_row(name, model, verdict, ", ".join(one["in_release"]))
    return table


def _jobs_table(jobs: list[dict[str, Any]], trainings: list[dict[str, Any]]) -> Table:
    table = _table("job", "state", "last sign of life", title="Jobs that are not finished")
    for one in jobs[:SHOWN]:
        share = f" ({one['rows_done'] / one['rows']:.0%})" if one["rows"] else ""
        done = "rows are not counted yet" if one["rows"] is None else f"{one['rows_done']:,} of {one['rows']:,} rows{share}"
        what = f"{one['path']}\n{'probe of ' if one['probe'] else ''}{one['source']}, {one['model']}"
        table.add_row(what, f"{one['state']}\n{done}", _sign_of_life(one))
    for one in trainings:
        of = f" of {one['steps']:,}" if one["steps"] else ""
        table.add_row(f"{one['path']}\ntraining", f"{one['state']}\ncheckpoint of step {one['step']:,}{of}", _sign_of_life(one))
    return table


def _sign_of_life(one: dict[str, Any]) -> str:
    seconds = one["silent_s"]
    return "\n".join(filter(None, ["none" if seconds is None else f"{format_time_left(seconds)} ago", one["driver"]]))


def _stages_table(stages: dict[str, Any]) -> Table:
    table = _table("stage", "latest run", "rows", title="Latest finished runs")
    for stage, item in stages.items():
        rows = ", ".join(f"{key} {value:,}" for key, value in list(item["rows"].items())[:4])
        table.add_row(stage, f"{item['path']}\n{item['started'][:16].replace('T', ' ')} UTC", rows)
    return table
