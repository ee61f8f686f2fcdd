"""Plan: where the head ends, who answers what, and how much of the traffic that is.

In: an ingest receipt (queries by falling count, holdout traffic, human labels). Out: tables head (the teacher answers it ahead of
time), teacher_sample (others that the teacher answers too, to train on), student_rows (for the batch student), human_labels with
their strata; the coverage curve as JSON and figure.
Labelled queries are marked `eval_only` and never in the teacher's sample. Knows nothing of models or prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from headtail.adapters import charts
from headtail.adapters.progress import progress_bar, say
from headtail.adapters.storage import Storage, open_storage, stream_table
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.core.config import Config as BaseConfig
from headtail.core.config import StageConfig
from headtail.core.errors import InputError, LedgerError
from headtail.core.receipt import LATEST, FileRef, Receipt, StageResult
from headtail.core.redact import PLACEHOLDER
from headtail.core.rows import PLANNED, SIDE_INPUT, Stratum, uniform_draw, with_side_inputs
from headtail.core.task import Task, load_task
from headtail.stages.base import Stage, run_once
from headtail.stages.ingest.result import Result as IngestResult

STAGE = "plan"
VERSION = 2
POINTS = 200
STRATA = (Stratum.HEAD, Stratum.TORSO, Stratum.TAIL)
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Head(BaseConfig):
    """Limits of the head; the one that gives the smallest head rules."""

    coverage: float | None = Field(0.5, gt=0, le=1, description="share of events that the head covers; null for no such limit")
    rows: int | None = Field(None, ge=1, description="queries the teacher may answer ahead of time; null for no such limit")
    min_count: int = Field(2, ge=1, description="events from which a query may be in the head")


class Config(StageConfig):
    """What to plan."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped one: its side inputs and strata")
    log: str = Field("latest", description="ingest receipt: latest, a fingerprint or its folder")
    head: Head = Field(Head(), description="where the head ends")
    teacher_sample_rows: int = Field(
        2000, ge=0, description="queries outside the head that the teacher also answers, half torso, half tail"
    )
    max_student_rows: int | None = Field(
        None, ge=1, description="maximum of queries that the batch student answers, most frequent first; null for all"
    )
    seed: int = Field(0, ge=0, description="seed of the teacher's sample")


class Coverage(NamedTuple):
    """Cumulative events by rank: `seen[r]` up to the cut, `holdout[r]` of holdout traffic, of the r + 1 most frequent queries."""

    seen: Ints
    holdout: Ints
    total: int  # events up to the cut, also of queries that no cache may answer
    holdout_total: int  # events of holdout traffic, unseen queries included

    def shares(self, rows: int) -> tuple[float, float]:
        """Share of events covered by the first `rows` queries: before the cut, and of the holdout (0 without holdout traffic)."""
        if not rows or not len(self.seen):
            return 0.0, 0.0
        return float(self.seen[rows - 1] / self.total), float(self.holdout[rows - 1] / max(1, self.holdout_total))


def head_end(counts: Ints, limits: Head, may: Mask) -> tuple[int, str]:
    """How many of the queries, by falling count, the head ends after, and the name of the limit that said so. `may`: be in it at all."""
    ends = {"min_count": int(np.searchsorted(-counts, -limits.min_count, side="right"))}
    if limits.rows is not None:
        ends["rows"] = min(len(counts), int(np.searchsorted(np.cumsum(may), limits.rows)) + 1)
    if limits.coverage is not None:
        total = np.cumsum(np.where(may, counts, 0))
        wanted = limits.coverage * float(counts.sum())
        ends["coverage"] = min(len(counts), int(np.searchsorted(total, wanted * (1 - 1e-12), side="left")) + 1)
    limit = min(ends, key=lambda name: ends[name])
    return ends[limit], limit


def strata(counts: Ints, head: int, torso_min_count: int, may: Mask) -> npt.NDArray[np.int8]:
    """0 head, 1 torso, 2 tail per query; of the first `head` queries those that `may` be head are."""
    found = np.where(counts >= torso_min_count, 1, 2).astype(np.int8)
    found[:head][may[:head]] = 0
    return found


def draw_teacher_sample(chance: npt.NDArray[np.float64], stratum: npt.NDArray[np.int8], eval_only: Mask, rows: int) -> Mask:
    """Half torso, half tail by lowest draw, human labels left out; where one has too few, the other gives more."""
    free = [np.flatnonzero((stratum == code) & ~eval_only) for code in (1, 2)]
    torso = min(len(free[0]), max(rows // 2, rows - len(free[1])))
    chosen = np.zeros(len(stratum), bool)
    for found, wanted in zip(free, (torso, rows - torso), strict=True):
        order = np.lexsort((found, chance[found])) if wanted < len(found) else np.arange(len(found))
        chosen[found[order[:wanted]]] = True
    return chosen


def zipf_exponent(counts: Ints) -> float:
    """Slope of log count over log rank, least squares over ranks 10 to n/10 taken evenly on the log scale; for information.

    Evenly, or the flat tail would weigh as much as it is long. A straight line is a rough description of real logs
    (Clauset, Shalizi and Newman 2009). All ranks are used when there are fewer than 200; 0.0 for fewer than 3.
    """
    if len(counts) < 3:
        return 0.0
    low, high = (10, len(counts) // 10) if len(counts) >= 200 else (1, len(counts))
    ranks = np.unique(np.geomspace(low, high, POINTS).round().astype(np.int64))
    slope, _ = np.polyfit(np.log(ranks), np.log(counts[ranks - 1]), 1)
    return float(-slope)


def coverage_curve(counts: Ints, covered: Coverage, head: int, limit: str) -> dict[str, Any]:
    """The coverage curve as JSON: about 200 ranks even on a log scale, with 1, the head's end and the last."""
    n = len(counts)
    ranks = np.unique(np.concatenate([np.geomspace(1, n, POINTS).round().astype(np.int64), [max(1, head), n]]))
    share, holdout = covered.shares(head)
    points = []
    for rank in ranks.tolist():
        seen, after = covered.shares(rank)
        points.append(
            {"rank": rank, "count": int(counts[rank - 1]), "share": seen, "share_holdout": after if covered.holdout_total else None}
        )
    return {
        "queries": n,
        "events": covered.total,
        "holdout_events": covered.holdout_total,
        "head": {
            "rows": head,
            "limit": limit,
            "last_count": int(counts[head - 1]) if head else 0,
            "share": share,
            "share_holdout": holdout if covered.holdout_total else None,
        },
        "points": points,
    }


def coverage_figure(curve: dict[str, Any]) -> Any:
    """The curve: queries by rank across (log), share of events up; where the head ends, and what it covers of holdout traffic."""
    ranks = [point["rank"] for point in curve["points"]]
    head = curve["head"]
    drawn, axes = charts.blank(7.2, 3.8)
    lines: list[tuple[str, str, str, Any, float]] = [("share", "up to the cut", charts.COLOURS["teacher"], "-", 2.2)]
    if curve["holdout_events"]:
        lines.append(("share_holdout", "holdout traffic", charts.COLOURS["batch_student"], (0, (5, 2)), 2.0))
    end = max(1, head["rows"])
    axes.axvspan(ranks[0], end, color=charts.COLOURS["teacher"], alpha=0.07, linewidth=0)
    axes.axvline(end, color=charts.MUTED, linewidth=1.0, linestyle=(0, (2, 2)))
    for name, label, tint, dash, width in lines:
        shares = [point[name] for point in curve["points"]]
        axes.plot(ranks, shares, color=tint, linewidth=width, linestyle=dash, solid_capstyle="round", clip_on=False)
        axes.plot(end, head[name], "o", color=tint, markersize=6, markeredgecolor=charts.PAPER, markeredgewidth=1.0, clip_on=False)
        below = -11 if name == "share_holdout" and shares[-1] > 0.95 else 0  # clear of the label above, which ends at 100 %
        axes.annotate(
            f"{label} {shares[-1]:.0%}",
            (ranks[-1], shares[-1]),
            (7, below),
            textcoords="offset points",
            color=tint,
            fontsize=9,
            va="center",
        )
    axes.annotate("head ends", (end, 0), (4, 5), textcoords="offset points", color=charts.MUTED, fontsize=8.5)
    holdout = f", {head['share_holdout']:.1%} of holdout events" if curve["holdout_events"] else ""
    axes.set_title(
        f"head: {head['rows']:,} of {curve['queries']:,} queries, {head['share']:.1%} of events{holdout}", loc="left", fontsize=10.5
    )
    charts.log_across(axes, "most frequent queries", "share of events covered")
    charts.percent_up(axes)
    axes.set_xlim(1, max(2, curve["queries"]))
    return drawn


class Result(StageResult):
    """Where the head ends, and why."""

    head_limit: str = Field(description="the limit that ended the head: rows, min_count or coverage")
    head_last_count: int = Field(ge=0, description="events of the head's last query")


def run(config: Config) -> Receipt[Result]:
    """Plan once. InputError when the log was ingested without the task's side inputs, or no query is frequent enough."""
    task, store = load_task(config.task, config.allow_task_code), open_storage(config.root)
    log = load_receipt(store, "ingest", LATEST if config.log == "ingest" else config.log, IngestResult)
    _check_side_inputs(log, task)
    matters = {"side_inputs": list(task.side_inputs), "torso_min_count": task.file.strata.torso_min_count, "redacted": task.file.redacted}
    return run_once(
        STAGE,
        Result,
        config,
        lambda stage: _work(stage, config, log, task),
        inputs={"log": log},
        version=VERSION,
        replaces={"task": matters, "log": log.path},
        about=task.name,
    )


def _check_side_inputs(log: Receipt[IngestResult], task: Task) -> None:
    ingested = log.result.side_inputs
    if task.side_inputs != ingested:
        raise InputError(
            f"the log was ingested for another task than {task.name}",
            where=log.path,
            value=f"side inputs {', '.join(ingested) or 'none'}, the task has {', '.join(task.side_inputs) or 'none'}",
            fix=f"run ingest with task={task.name}, or name its receipt in `log`",
        )


def _work(stage: Stage, config: Config, log: Receipt, task: Task) -> Result:
    table = output_table(stage.store, log, "queries", ["query_key", "count"])
    keys, counts = table["query_key"], table["count"].to_numpy()
    if np.any(np.diff(counts) > 0):
        raise LedgerError("queries are not by falling count", where=log.output("queries").path, fix="run ingest again")
    may = _cacheable(stage.store, log, task, len(counts))
    end, limit = head_end(counts, config.head, may)
    stratum = strata(counts, end, task.file.strata.torso_min_count, may)
    if not np.any(stratum == 0):
        raise InputError(
            "the head is empty: no query is frequent enough",
            where="head.min_count",
            value=f"{config.head.min_count}; the most frequent query has {counts[0] if len(counts) else 0} events",
            fix="set head.min_count lower (1 takes every query), or ingest a longer log",
        )
    labels = output_table(stage.store, log, "human_labels")
    eval_only = np.asarray(pc.is_in(keys, labels["query_key"].combine_chunks()))
    teacher_sample = draw_teacher_sample(uniform_draw(keys, "teach", config.seed), stratum, eval_only, config.teacher_sample_rows)
    student_rows = np.flatnonzero((stratum > 0) & ~teacher_sample & may)
    keep = np.zeros(len(counts), bool)
    keep[student_rows[: config.max_student_rows]] = True
    covered = count_coverage(output_table(stage.store, log, "holdout", ["query_key", "count"]), keys, counts, may)
    curve = coverage_curve(counts, covered, end, limit)
    curve["head"]["rows"] = int((stratum == 0).sum())
    stage.rows["redacted"] = int((~may & ~teacher_sample).sum())
    plan = Plan(log.output("queries"), stratum, eval_only, task.side_inputs)
    with progress_bar("plan", 3 * len(counts), "queries") as progress:
        for name, mask in {"head": stratum == 0, "teacher_sample": teacher_sample, "student_rows": keep}.items():
            stage.table(name, plan.rows(stage.store, mask, progress.advance), plan.schema)
    labelled = plan.labels(stage.store, labels, keys)
    stage.table("human_labels", labelled)
    stage.json("coverage", curve)
    stage.figure("coverage", coverage_figure(curve))
    _tell(stage, config, plan, curve, labelled, zipf_exponent(counts))
    return Result(head_limit=limit, head_last_count=curve["head"]["last_count"])


def _cacheable(store: Storage, log: Receipt, task: Task, queries: int) -> Mask:
    """Which queries one cached answer may serve: all but redacted ones, unless the task says that they share an answer."""
    if task.file.redacted == "cached":
        return np.ones(queries, bool)
    texts = (batch.column("query") for batch in stream_table(store, log.output("queries"), ["query"]))
    found: Mask = np.concatenate([np.zeros(0, bool), *(np.asarray(pc.match_substring_regex(text, PLACEHOLDER)) for text in texts)])
    if len(found) != queries:
        raise LedgerError("the texts read are not the queries of the log", where=log.path, value=f"{len(found):,} of {queries:,}")
    return np.logical_not(found)


class Plan(NamedTuple):
    """Every query's place, by rank, over the table at `queries`."""

    queries: FileRef
    stratum: npt.NDArray[np.int8]
    eval_only: Mask
    side_inputs: tuple[str, ...]

    @property
    def schema(self) -> pa.Schema:
        return with_side_inputs(PLANNED, self.side_inputs)

    def rows(self, store: Storage, mask: Mask, advance: Callable[[int], None]) -> Iterator[pa.RecordBatch]:
        """The wanted queries as PLANNED rows, read as a stream and no further than the last one."""
        names = pa.array([str(name) for name in STRATA])
        at, end = 0, int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0
        for batch in stream_table(store, self.queries):
            if at >= end:
                break
            place = slice(at, at + batch.num_rows)
            columns = {
                **{name: batch.column(name) for name in batch.schema.names},
                "rank": pa.array(np.arange(at + 1, at + 1 + batch.num_rows)),
                "stratum": names.take(pa.array(self.stratum[place])),
                "eval_only": pa.array(self.eval_only[place]),
            }
            made = pa.RecordBatch.from_arrays([columns[name] for name in self.schema.names], schema=self.schema)
            at += batch.num_rows
            advance(batch.num_rows)
            yield made.filter(pa.array(mask[place]))
        advance(len(self.stratum) - at)

    def labels(self, store: Storage, labels: pa.Table, keys: pa.ChunkedArray) -> pa.Table:
        """Human labels with their strata, and the side inputs of the queries that were seen."""
        places = pc.index_in(labels["query_key"], keys.take(pa.array(np.flatnonzero(self.eval_only))))
        ranks = pa.array(np.flatnonzero(self.eval_only)).take(places)
        names = pa.array([str(name) for name in STRATA]).take(pa.array(self.stratum).take(ranks))
        labels = labels.set_column(labels.schema.get_field_index("stratum"), "stratum", pc.fill_null(names, str(Stratum.UNSEEN)))
        seen = pa.Table.from_batches(self.rows(store, self.eval_only, lambda _: None), self.schema)
        for name in self.side_inputs:
            labels = labels.append_column(pa.field(name, SIDE_INPUT), seen[name].combine_chunks().take(places))
        return labels


def count_coverage(holdout: pa.Table, keys: pa.ChunkedArray, counts: Ints, may: Mask) -> Coverage:
    """Events by rank that a cache may answer, of the log and of holdout traffic (query_key, count)."""
    after = np.zeros(len(counts), np.int64)
    places = pc.index_in(keys, holdout["query_key"].combine_chunks())
    found = np.flatnonzero(np.asarray(places.is_valid()))
    after[found] = holdout["count"].to_numpy()[np.asarray(places.drop_null())]
    seen, after = np.where(may, counts, 0), np.where(may, after, 0)
    return Coverage(np.cumsum(seen), np.cumsum(after), int(counts.sum()), int(pc.sum(holdout["count"]).as_py() or 0))


def _tell(stage: Stage, config: Config, plan: Plan, curve: dict[str, Any], labels: pa.Table, exponent: float) -> None:
    """Rows, figures and notes for the receipt, one line for the person watching."""
    rows, head, n = stage.rows, curve["head"], len(plan.stratum)
    torso, tail = (int((plan.stratum == code).sum()) for code in (1, 2))
    rows |= {"head": head["rows"], "torso": torso, "tail": tail, "teacher_sample": stage.outputs["teacher_sample"].rows or 0}
    rows |= {"student_rows": stage.outputs["student_rows"].rows or 0, "human_labels": len(labels), "eval_only": int(plan.eval_only.sum())}
    rows |= {f"human_labels.{name}": pc.sum(pc.equal(labels["stratum"], str(name))).as_py() or 0 for name in Stratum}
    outside = torso + tail - rows["teacher_sample"] - rows["redacted"]
    rows["left_out"] = outside - rows["student_rows"]
    if rows["head"] + outside + rows["teacher_sample"] + rows["redacted"] != n or rows["student_rows"] != min(
        outside, config.max_student_rows or outside
    ):
        raise LedgerError(
            "head, teacher_sample and student_rows are not the queries of the log", where=STAGE, value=f"{n:,} queries, {rows}"
        )
    stage.metrics |= {
        "head_rows": float(head["rows"]),
        "head_coverage": head["share"],
        "head_coverage_holdout": head["share_holdout"] or 0.0,
        "seen_coverage_holdout": curve["points"][-1]["share_holdout"] or 0.0,
        "zipf_exponent": exponent,
    }
    if not curve["holdout_events"]:
        stage.note("there is no holdout traffic: how long the head stays valid is not known")
    if rows["teacher_sample"] < config.teacher_sample_rows:
        stage.note(
            f"only {rows['teacher_sample']:,} of {config.teacher_sample_rows:,} rows in the teacher's sample: there is no other query"
        )
    if rows["redacted"]:
        stage.note(f"{rows['redacted']:,} redacted queries are in no table: each one is many questions (docs/task.md, `redacted`)")
    if rows["left_out"]:
        stage.note(f"{rows['left_out']:,} queries are in no table: max_student_rows is {config.max_student_rows:,}")
    if labels.num_rows and not any(rows[f"human_labels.{name}"] for name in (Stratum.TORSO, Stratum.TAIL, Stratum.UNSEEN)):
        stage.note("all human labels are in the head: they say nothing about the quality outside it")
    holdout = f" ({head['share_holdout']:.1%} of holdout ones)" if curve["holdout_events"] else ""
    say(
        f"{STAGE:<12} head {head['rows']:,} of {n:,} queries covers {head['share']:.1%} of events{holdout}, by {head['limit']}; "
        f"teacher sample {rows['teacher_sample']:,}, student rows {rows['student_rows']:,}, human labels {rows['human_labels']:,}"
    )
