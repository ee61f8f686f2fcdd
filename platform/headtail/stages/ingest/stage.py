"""Ingest: a query log of any size to counted queries, holdout traffic and human labels.

In: files (CSV, TSV, JSON Lines, Parquet) with a column of queries and, if there are any, counts, times, side inputs, human labels.
Out: tables queries, holdout, history, human_labels, human_labels_train, set_aside. Every row is used, or set aside with its reason.
Knows nothing of heads, tails or models.
"""

from __future__ import annotations

import dataclasses
import datetime
import errno
import itertools
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from headtail.adapters import cluster
from headtail.adapters.progress import progress_bar, say
from headtail.core import redact
from headtail.core.config import Config as BaseConfig
from headtail.core.config import StageConfig, execution
from headtail.core.errors import InputError, LedgerError, StorageError
from headtail.core.label_design import NamedDesign
from headtail.core.receipt import Receipt
from headtail.core.rows import HOLDOUT, QUERY, SET_ASIDE, check_side_inputs, with_side_inputs
from headtail.core.task import Task, load_task
from headtail.stages.base import Stage, run_once
from headtail.stages.ingest import logfile
from headtail.stages.ingest.counting import LocalCounter, RayCounter
from headtail.stages.ingest.days import cut_day, day_span
from headtail.stages.ingest.dialect import QUOTES_HELP
from headtail.stages.ingest.files import LogFile, SkippedFile
from headtail.stages.ingest.history import history_rules, merge_history
from headtail.stages.ingest.human_labels import ResolvedLabels, fill_counts, resolve_labels
from headtail.stages.ingest.intake import LABEL_CELL, LABELS_FILE, Intake, IntakeRules, Totals
from headtail.stages.ingest.logfile import ColumnSelection, LogSplit
from headtail.stages.ingest.merges import rule_coverage
from headtail.stages.ingest.notes import CURES, aside_notes, redaction_notes, rule_notes
from headtail.stages.ingest.result import FileSetAside, LogTotals, Result, RuleCoverage
from headtail.stages.ingest.sources import Files, check_column_roles
from headtail.stages.ingest.tally import HoldoutCut, keep_shard, merge_runs, total

STAGE = "ingest"
VERSION = 8
SHARD_ROWS = 1 << 20  # rows of the log per shard of keys
MAX_SHARDS = 128
SPREAD_ROWS = 20_000_000  # rows from which Ray tasks win back what they cost, where there are more cores than this process can use
BUSY_CORES = 3  # this process reads, counts and finishes on about two
TEXT_ROW_BYTES = 40  # a guess, to choose shards by
_EPOCH = datetime.date(1970, 1, 1).toordinal()
THIN = 0.001  # share of events below which held-out traffic is suspect: a wrong clock makes a last day of one event


class LogColumns(BaseConfig):
    """Names of the log's columns. Side inputs are found under the names that the task gives them."""

    query: str = Field("query", min_length=1, description="column of queries")
    count: str = Field("", description="column of counts or weights, whole numbers from 1; empty: every row is one event")
    time: str = Field("", description="column of dates or times; empty: the log has none")
    labels: str = Field("", description="column of people's answers, most cells empty; empty: the log has none")
    separator: str = Field("|", min_length=1, description="between the items of a side input in text files")


class Config(StageConfig):
    """What to ingest and how."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped one: its side inputs and answer schema")
    log: str = Field("", description="file, folder or glob, local or s3://: CSV, TSV, JSON Lines (packed too), Parquet")
    columns: LogColumns = Field(LogColumns(), description="names of the log's columns")
    quotes: Literal["auto", "doubled", "backslash", "escaped", "none"] = Field("auto", description=QUOTES_HELP)
    labels: str = Field("", description="file, folder or glob with columns query, answer and, if wanted, split (train or test)")
    labels_train_share: float = Field(
        0.0, ge=0, le=1, description="share of human labels, by hash, that may train a model; a split column overrides it"
    )
    labels_design: NamedDesign = Field("unknown", description="how labels were drawn that name no design themselves; see docs/labels.md")
    holdout_days: int = Field(1, ge=0, description="days at the end of the log kept as holdout traffic; needs columns.time")
    holdout_share: float = Field(0.1, ge=0, lt=1, description="share of events held out at random when the log has no times")
    max_query_chars: int = Field(200, ge=1, le=10_000, description="characters of a normalised query; longer ones are set aside")
    redact: bool = Field(True, description="replace e-mail addresses, phone and card numbers by <email>, <phone>, <card>")
    seed: int = Field(0, ge=0, description="seed of the draws for holdout_share and labels_train_share")
    shards: int = execution(0, "shards of keys, each finished in memory; 0 chooses by size", ge=0, le=MAX_SHARDS)
    workers: int = execution(0, "parts of the log read at once by Ray tasks; 1 stays in this process, 0 chooses by size", ge=0)


def run(config: Config, task: Task | None = None) -> Receipt[Result]:
    """Ingest once. InputError when a file or column is missing, unreadable or without use. `task`: `config.task`, loaded already."""
    task = task or load_task(config.task, config.allow_task_code)
    log, labels = find_log(config, task), find_labels(config)
    matters: dict[str, Any] = {"side_inputs": list(task.side_inputs), "redact_rules": redact.VERSION if config.redact else 0}
    if labels or config.columns.labels:
        matters |= {"schema": task.schema, "score": task.file.score.model_dump(mode="json")}
    return run_once(
        STAGE,
        Result,
        config,
        lambda stage: _work(stage, config, task, log, labels),
        inputs={"log": log.digest, **({"labels": labels.digest} if labels else {})},
        version=VERSION,
        replaces={"task": matters, "log": log.title, "labels": labels.title if labels else ""},
        about=task.name,
    )


def find_log(config: Config, task: Task) -> Files:
    """The log's files, their columns checked. InputError when one cannot be used."""
    names = config.columns.model_dump(exclude={"separator"})
    check_side_inputs(task.side_inputs, task.name)
    named = {f"columns.{role}": name for role, name in names.items() if name}
    check_column_roles([*named.items(), *(("a side input of the task", name) for name in task.side_inputs)])
    return Files(config.log, "log", named, task.side_inputs, config.quotes)


def find_labels(config: Config) -> Files | None:
    """The files of human labels, their columns checked; None when none is named."""
    return (
        Files(config.labels, "labels", {"query": "query", "answer": "answer"}, ["split", "design", "inclusion"]) if config.labels else None
    )


def _work(stage: Stage, config: Config, task: Task, log: Files, labels: Files | None) -> Result:
    began = time.monotonic()
    rules = _rules(config, task)
    parts = logfile.split_log(log.system, log.files)
    with _disk(stage.scratch):
        counter = _count_log(config, rules, log, parts, stage.scratch / "all")
        if counter.totals.days:
            span = day_span(counter.totals.days, datetime.datetime.now(datetime.UTC).date().toordinal() - _EPOCH)
            if span.first > min(counter.totals.days) or min(span.last, span.today) < max(counter.totals.days):
                rules = dataclasses.replace(rules, span=span)  # which rows these are was not kept: the log is read again
                counter = _count_log(config, rules, log, parts, stage.scratch / "believed")
        totals = counter.totals
        cut = _cut(totals, config)
        shards = [keep_shard(stage.scratch / "runs", i, shard) for i, shard in enumerate(counter.shards(cut, history_rules(totals.days)))]
        queries, holdout = [shard.queries for shard in shards], [shard.holdout for shard in shards]
        found, labels_aside = (
            _labels_file(labels, config, len(parts), stage.scratch) if labels else (LABEL_CELL.empty_table(), SET_ASIDE.empty_table())
        )
        cells = pa.concat_tables([LABEL_CELL.empty_table(), *counter.labels, found])
        settled = resolve_labels(cells, task, config.labels_train_share, config.seed, config.redact, config.labels_design)
        aside = [pa.concat_tables([settled.set_aside, labels_aside])]
        stage.table("history", merge_history([shard.history for shard in shards]))
        _write(stage, rules, queries, holdout, settled, itertools.chain(counter.set_aside(), aside))
    if labels or config.columns.labels:
        _check_labels(stage, settled, aside[0], config)
    _count_rows(stage, totals, queries, holdout, aside[0], settled)
    stage.metrics["events_per_s"] = round(totals.rows / (time.monotonic() - began), 1)
    coverage = rule_coverage([shard.merges for shard in shards], totals.used_events)
    _tell(stage, config, task, log, labels, cut, totals, coverage)
    return _result(stage, task, log, labels, cut, totals, coverage)


def _count_log(config: Config, rules: IntakeRules, log: Files, parts: Sequence[LogSplit], folder: Path) -> LocalCounter | RayCounter:
    counter = _counter(config, rules, log, parts, folder)
    with progress_bar("ingest", _rows_known(log.files), "events") as progress:
        counter.count(parts, progress.advance)
    _check_used(counter, config, _rows_known(log.files))
    return counter


def _rules(config: Config, task: Task) -> IntakeRules:
    columns = config.columns
    return IntakeRules(
        query=columns.query,
        count=columns.count,
        time=columns.time,
        labels=columns.labels,
        side_inputs=task.side_inputs,
        separator=columns.separator,
        max_chars=config.max_query_chars,
        redact=config.redact,
    )


def _rows_known(files: Sequence[LogFile]) -> int | None:
    return sum(file.rows or 0 for file in files) if all(file.rows is not None for file in files) else None


def _counter(config: Config, rules: IntakeRules, log: Files, parts: Sequence[LogSplit], folder: Path) -> LocalCounter | RayCounter:
    """This process for a small log or a log of one part, else Ray tasks."""
    rows = sum(file.rows if file.rows is not None else file.bytes // TEXT_ROW_BYTES for file in log.files)
    shards = config.shards or min(MAX_SHARDS, 1 + rows // SHARD_ROWS)
    wanted = ColumnSelection(rules.columns, rules.side_inputs, rules.separator)
    spread = rows >= SPREAD_ROWS and (cluster.joins_cluster() or (os.cpu_count() or 1) > BUSY_CORES)
    if len(parts) > 1 and (config.workers > 1 or (config.workers == 0 and spread)):
        return RayCounter(log.system, rules, wanted, shards, config.workers)
    return LocalCounter(log.system, rules, wanted, shards, folder / "counted")


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise StorageError(
            "no space left for intermediate files", where=str(folder), fix="free space, or set TMPDIR to a larger disk"
        ) from error


def _check_used(counter: LocalCounter | RayCounter, config: Config, known: int | None) -> None:
    totals = counter.totals
    if known is not None and known != totals.rows:
        raise LedgerError("the log's files hold other rows than were read", where=config.log, value=f"{known:,} and {totals.rows:,}")
    if totals.used_rows + sum(totals.set_aside.values()) != totals.rows:
        raise LedgerError("rows read are not rows used plus rows set aside", value=f"{totals}")
    if not totals.rows:
        raise InputError("the log has columns but no rows", where=config.log, fix="check the job that writes it")
    if not totals.used_rows:
        reasons = ", ".join(f"{reason}: {n:,}" for reason, n in totals.set_aside.most_common())
        most = totals.set_aside.most_common(1)[0][0]
        row = next(row for table in counter.set_aside() for row in table.to_pylist() if row["reason"] == most)
        raise InputError(
            "no row of the log can be used",
            where=f"{config.log}, row {row['row']:,} of {row['file']} for one",
            value=f"{reasons}; that row: {row['text'] or 'empty'}",
            fix=CURES.get(most, "check columns.query and the file's encoding (UTF-8)"),
        )


def _cut(totals: Totals, config: Config) -> HoldoutCut:
    """Where holdout traffic begins."""
    if not config.columns.time:
        return HoldoutCut(None, config.holdout_share, config.seed)
    if not config.holdout_days or not totals.days:
        return HoldoutCut(None)
    first, last, day = min(totals.days), max(totals.days), cut_day(totals.days, config.holdout_days)
    if day <= first:
        raise InputError(
            f"the log covers {last - first + 1} days; no day is left when the last {config.holdout_days} are held out",
            where=config.log,
            value=f"{_date(first)} to {_date(last)}, {totals.days[last]:,} rows on the last day; a few rows alone are not held out",
            fix="set holdout_days lower (0 holds nothing out), or leave columns.time empty to hold out a random holdout_share",
        )
    return HoldoutCut(day)


def _date(day: int) -> str:
    return datetime.date.fromordinal(_EPOCH + day).isoformat()


def _labels_file(labels: Files, config: Config, first_split: int, folder: Path) -> tuple[pa.Table, pa.Table]:
    """Label cells of the file of labels, and its rows that have no usable query, set aside under label_ reasons."""
    rules = dataclasses.replace(LABELS_FILE, max_chars=config.max_query_chars, redact=config.redact)
    intake = Intake(rules, folder / "human_labels", 1)
    for part in logfile.split_log(labels.system, labels.files):
        for sheet in logfile.read_split(labels.system, part, ColumnSelection(rules.columns)):
            intake.take(sheet, part.file.name, first_split + part.place)
    intake.close()
    aside = intake.aside.shard(0)
    reasons = pc.binary_join_element_wise("label", aside["reason"], "_")
    return pa.concat_tables([LABEL_CELL.empty_table(), *intake.labels]), aside.set_column(2, "reason", reasons)


def _write(
    stage: Stage, rules: IntakeRules, queries: list[pa.Table], holdout: list[pa.Table], settled: ResolvedLabels, aside: Iterator[pa.Table]
) -> None:
    stage.table("queries", merge_runs(queries), with_side_inputs(QUERY, rules.side_inputs))
    stage.table("holdout", merge_runs(holdout), HOLDOUT)
    stage.table("human_labels", fill_counts(settled.labels, queries))
    stage.table("human_labels_train", fill_counts(settled.train, queries))
    stage.table("set_aside", (piece for piece in aside if piece.num_rows), SET_ASIDE)


def _check_labels(stage: Stage, settled: ResolvedLabels, aside: pa.Table, config: Config) -> None:
    if settled.labels.num_rows + settled.train.num_rows == 0:
        first = f"{aside['reason'][0]}: {aside['text'][0]}" if aside.num_rows else "every cell of the column is empty"
        fix = "an answer is JSON valid under the task's schema, or a bare label when the task is scored by label"
        raise InputError(
            "no human label can be used", where=config.labels or f"{config.log}, column {config.columns.labels}", value=first, fix=fix
        )
    if not settled.labels.num_rows:
        stage.note("all human labels went to human_labels_train: no label is left to evaluate with")
    if settled.conflicts:
        stage.note(f"{settled.conflicts:,} queries had more than one human label; the most frequent was kept, of several the first")
    if settled.astray:
        stage.note(
            f"{settled.astray:,} people's answers have a span that is not in their query: a new spelling, or the answer to another query?"
        )
    if settled.overlaps:
        stage.note(f"{settled.overlaps:,} queries were marked train and test alike; they are kept for test only")


def _count_rows(
    stage: Stage, totals: Totals, queries: list[pa.Table], holdout: list[pa.Table], labels_aside: pa.Table, settled: ResolvedLabels
) -> None:
    """The ledger: what was read is what was written, or LedgerError."""
    log_aside, label_reasons = totals.set_aside, Counter(labels_aside["reason"].to_pylist())
    rows, outputs = stage.rows, stage.outputs
    rows["events"] = totals.used_events + log_aside.total()  # a row set aside is one event: its count may be what is wrong
    rows |= {"used_events": total(queries), "holdout_events": total(holdout), "log_rows": totals.rows}
    rows |= {name: outputs[output].rows or 0 for name, output in (("queries", "queries"), ("holdout_queries", "holdout"))}
    rows |= {name: outputs[name].rows or 0 for name in ("human_labels", "human_labels_train")}
    rows["set_aside"] = log_aside.total()
    rows |= {f"set_aside.{reason}": n for reason, n in sorted(log_aside.items())}
    if settled.labels.num_rows or settled.train.num_rows or label_reasons:
        rows |= {"label_conflicts": settled.conflicts, "label_overlaps": settled.overlaps, "labels_set_aside": label_reasons.total()}
        rows |= {f"labels_set_aside.{reason.removeprefix('label_')}": n for reason, n in sorted(label_reasons.items())}
    checks = {
        "events": (rows["events"], rows["used_events"] + rows["holdout_events"] + rows["set_aside"]),
        "queries": (sum(map(len, queries)), rows["queries"]),
        "holdout_queries": (sum(map(len, holdout)), rows["holdout_queries"]),
        "set_aside": (log_aside.total() + label_reasons.total(), outputs["set_aside"].rows),
    }
    for name, (wanted, found) in checks.items():
        if wanted != found:
            raise LedgerError(f"{name} do not add up", where=STAGE, value=f"{wanted:,} in, {found:,} out")
    unseen = [table.filter(pc.invert(table["seen"])) for table in holdout]
    stage.metrics |= {
        "unseen_share_holdout_events": total(unseen) / max(1, rows["holdout_events"]),
        "unseen_share_holdout_queries": sum(map(len, unseen)) / max(1, rows["holdout_queries"]),
        **{f"redacted_{name}": float(totals.redacted[name]) for name in ("email", "phone", "card")},
    }


def _tell(
    stage: Stage,
    config: Config,
    task: Task,
    log: Files,
    labels: Files | None,
    cut: HoldoutCut,
    totals: Totals,
    rules: tuple[RuleCoverage, ...],
) -> None:
    """Notes for the receipt, one line for the person watching."""
    rows, metrics = stage.rows, stage.metrics
    stage.rows["files_set_aside"] = len(_skipped(log, labels))
    for note in aside_notes(totals.set_aside, _skipped(log, labels)):
        stage.note(note)
        say(f"{'':<12} {note}")
    for note in [*redaction_notes(totals.redacted, totals.used_events), *rule_notes(rules)]:
        stage.note(note)
    if cut.day is not None:
        if rows["holdout_events"] < THIN * totals.used_events:
            stage.note(f"holdout traffic, from {_date(cut.day)}, has only {rows['holdout_events']:,} events: is the log's last day whole?")
    elif config.columns.time:
        stage.note("nothing is held out as holdout traffic (holdout_days is 0)")
    else:
        stage.note(
            f"the log has no times: {config.holdout_share:.0%} of events, drawn at random, stand for holdout traffic; drift does not show"
        )
    for name in task.side_inputs:
        if all(name not in file.columns and name not in file.partitions for file in log.files):
            stage.note(f"the log has no column {name}: prompts go without this side input")
    aside = f", {rows['set_aside']:,} set aside" if rows["set_aside"] else ""
    holdout = (
        f", {rows['holdout_events']:,} held out ({metrics['unseen_share_holdout_events']:.1%} of them unseen)"
        if rows["holdout_events"]
        else ""
    )
    labelled = (
        f", labels {rows['human_labels']:,} + {rows['human_labels_train']:,} to train"
        if rows["human_labels"] or rows["human_labels_train"]
        else ""
    )
    say(
        f"{STAGE:<12} {rows['events']:,} events -> {rows['queries']:,} queries{holdout}{labelled}{aside}, "
        f"{metrics['events_per_s']:,.0f} rows/s"
    )


def _result(
    stage: Stage, task: Task, log: Files, labels: Files | None, cut: HoldoutCut, totals: Totals, rules: tuple[RuleCoverage, ...]
) -> Result:
    return Result(
        totals=LogTotals(
            events=stage.rows["events"],
            queries=stage.rows["queries"],
            holdout_events=stage.rows["holdout_events"],
            human_labels=stage.rows["human_labels"],
            unseen_share_holdout_events=stage.metrics["unseen_share_holdout_events"],
        ),
        log=log.read(),
        labels=labels.read() if labels else (),
        files_set_aside=tuple(FileSetAside(name=file.name, reason=file.reason) for file in _skipped(log, labels)),
        side_inputs=task.side_inputs,
        rules=rules,
        first_day=_date(min(totals.days)) if totals.days else None,
        last_day=_date(max(totals.days)) if totals.days else None,
        holdout_from=_date(cut.day) if cut.day is not None else None,
    )


def _skipped(log: Files, labels: Files | None) -> list[SkippedFile]:
    return [*log.skipped, *(labels.skipped if labels else ())]
