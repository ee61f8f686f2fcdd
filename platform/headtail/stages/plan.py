"""Plan: where the head ends, who answers what, and how much of the traffic that is.

In: an ingest receipt (queries by falling count, later traffic, gold). Out: tables head (teacher, ahead of time), teach (a sample
of the others the teacher answers too, to train on), rest (student), gold with its strata; the coverage curve as JSON and figure.
Gold queries are marked `withheld` and never sampled for teaching. Knows nothing of models or prompts.
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
from headtail.adapters.progress import bar, say
from headtail.adapters.storage import Storage, open_storage, stream_table
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.core.config import Config as BaseConfig
from headtail.core.config import StageConfig
from headtail.core.errors import InputError, LedgerError
from headtail.core.receipt import LATEST, FileRef, Receipt
from headtail.core.redact import PLACEHOLDER
from headtail.core.rows import PLANNED, SIDE_INPUT, Stratum, draw, with_side_inputs
from headtail.core.task import Task, load_task
from headtail.stages.base import Station, run_once

STAGE = "plan"
VERSION = 2
POINTS = 200
STRATA = (Stratum.HEAD, Stratum.TORSO, Stratum.TAIL)
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Head(BaseConfig):
    """Limits of the head; the one that gives the smallest head rules."""

    coverage: float | None = Field(0.5, gt=0, le=1, description="share of events that the head is to cover; null for no such limit")
    rows: int | None = Field(None, ge=1, description="queries the teacher may answer ahead of time; null for no such limit")
    min_count: int = Field(2, ge=1, description="events a query needs to be worth answering ahead of time")


class Config(StageConfig):
    """What to plan."""

    task: str = Field("query_segmentation", description="task folder or name of a shipped one: its side inputs and strata")
    log: str = Field("latest", description="ingest receipt: latest, a fingerprint or its folder")
    head: Head = Field(Head(), description="where the head ends")
    teach_rows: int = Field(2000, ge=0, description="queries outside the head that the teacher also answers, half torso, half tail")
    rest_rows: int | None = Field(None, ge=1, description="most queries the batch student answers, most frequent first; null for all")
    seed: int = Field(0, ge=0, description="of the teaching sample")


class Coverage(NamedTuple):
    """Cumulative events by rank: `seen[r]` up to the cut, `later[r]` of later traffic, of the r + 1 most frequent queries."""

    seen: Ints
    later: Ints
    total: int  # events up to the cut, also of queries that no cache may answer
    later_total: int  # events of later traffic, unseen queries included

    def shares(self, rows: int) -> tuple[float, float]:
        """Share of events covered by the first `rows` queries: before the cut, and later (0 without later traffic)."""
        if not rows or not len(self.seen):
            return 0.0, 0.0
        return float(self.seen[rows - 1] / self.total), float(self.later[rows - 1] / max(1, self.later_total))


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


def teach_sample(chance: npt.NDArray[np.float64], stratum: npt.NDArray[np.int8], withheld: Mask, rows: int) -> Mask:
    """Half torso, half tail by lowest draw, gold left out; where one has too few, the other gives more."""
    free = [np.flatnonzero((stratum == code) & ~withheld) for code in (1, 2)]
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


def curve(counts: Ints, covered: Coverage, head: int, limit: str) -> dict[str, Any]:
    """The coverage curve as JSON: about 200 ranks even on a log scale, with 1, the head's end and the last."""
    n = len(counts)
    ranks = np.unique(np.concatenate([np.geomspace(1, n, POINTS).round().astype(np.int64), [max(1, head), n]]))
    share, later = covered.shares(head)
    points = []
    for rank in ranks.tolist():
        seen, after = covered.shares(rank)
        points.append({"rank": rank, "count": int(counts[rank - 1]), "share": seen, "share_later": after if covered.later_total else None})
    return {
        "queries": n,
        "events": covered.total,
        "later_events": covered.later_total,
        "head": {
            "rows": head,
            "limit": limit,
            "last_count": int(counts[head - 1]) if head else 0,
            "share": share,
            "share_later": later if covered.later_total else None,
        },
        "points": points,
    }


def figure(found: dict[str, Any]) -> Any:
    """The curve: queries by rank across (log), share of events up; where the head ends, and what it covers of later traffic."""
    ranks = [point["rank"] for point in found["points"]]
    head = found["head"]
    drawn, axes = charts.blank(7.2, 3.8)
    lines: list[tuple[str, str, str, Any, float]] = [("share", "up to the cut", charts.COLOURS["teacher"], "-", 2.2)]
    if found["later_events"]:
        lines.append(("share_later", "later traffic", charts.COLOURS["student"], (0, (5, 2)), 2.0))
    end = max(1, head["rows"])
    axes.axvspan(ranks[0], end, color=charts.COLOURS["teacher"], alpha=0.07, linewidth=0)
    axes.axvline(end, color=charts.MUTED, linewidth=1.0, linestyle=(0, (2, 2)))
    for name, label, tint, dash, width in lines:
        shares = [point[name] for point in found["points"]]
        axes.plot(ranks, shares, color=tint, linewidth=width, linestyle=dash, solid_capstyle="round", clip_on=False)
        axes.plot(end, head[name], "o", color=tint, markersize=6, markeredgecolor=charts.PAPER, markeredgewidth=1.0, clip_on=False)
        below = -11 if name == "share_later" and shares[-1] > 0.95 else 0  # clear of the label above, which ends at 100 %
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
    later = f", {head['share_later']:.1%} of later events" if found["later_events"] else ""
    axes.set_title(
        f"head: {head['rows']:,} of {found['queries']:,} queries, {head['share']:.1%} of events{later}", loc="left", fontsize=10.5
    )
    charts.log_across(axes, "most frequent queries", "share of events covered")
    charts.percent_up(axes)
    axes.set_xlim(1, max(2, found["queries"]))
    return drawn


def run(config: Config) -> Receipt:
    """Plan once. InputError when the log was ingested without the task's side inputs, or no query is frequent enough."""
    task, store = load_task(config.task, config.allow_task_code), open_storage(config.root)
    log = load_receipt(store, "ingest", LATEST if config.log == "ingest" else config.log)
    _check_side_inputs(log, task)
    matters = {"side_inputs": list(task.side_inputs), "torso_min_count": task.file.strata.torso_min_count, "redacted": task.file.redacted}
    return run_once(
        STAGE,
        config,
        lambda station: _work(station, config, log, task),
        inputs={"log": log},
        version=VERSION,
        replaces={"task": matters, "log": log.path},
    )


def _check_side_inputs(log: Receipt, task: Task) -> None:
    ingested = log.settings["config"]["task"]["side_inputs"]
    if list(task.side_inputs) != ingested:
        raise InputError(
            f"the log was ingested for another task than {task.name}",
            where=log.path,
            value=f"side inputs {ingested or 'none'}, the task has {list(task.side_inputs) or 'none'}",
            fix=f"run ingest with task={task.name}, or name its receipt in `log`",
        )


def _work(station: Station, config: Config, log: Receipt, task: Task) -> None:
    table = output_table(station.store, log, "queries", ["query_key", "count"])
    keys, counts = table["query_key"], table["count"].to_numpy()
    if np.any(np.diff(counts) > 0):
        raise LedgerError("queries are not by falling count", where=log.output("queries").path, fix="run ingest again")
    may = _cacheable(station.store, log, task, len(counts))
    end, limit = head_end(counts, config.head, may)
    stratum = strata(counts, end, task.file.strata.torso_min_count, may)
    if not np.any(stratum == 0):
        raise InputError(
            "the head is empty: no query is frequent enough",
            where="head.min_count",
            value=f"{config.head.min_count}; the most frequent query has {counts[0] if len(counts) else 0} events",
            fix="set head.min_count lower (1 takes every query), or ingest a longer log",
        )
    gold = output_table(station.store, log, "gold")
    withheld = np.asarray(pc.is_in(keys, gold["query_key"].combine_chunks()))
    teach = teach_sample(draw(keys, "teach", config.seed), stratum, withheld, config.teach_rows)
    rest = np.flatnonzero((stratum > 0) & ~teach & may)
    keep = np.zeros(len(counts), bool)
    keep[rest[: config.rest_rows]] = True
    covered = coverage(output_table(station.store, log, "later", ["query_key", "count"]), keys, counts, may)
    found = curve(counts, covered, end, limit)
    found["head"]["rows"] = int((stratum == 0).sum())
    station.rows["redacted"] = int((~may & ~teach).sum())
    plan = Plan(log.output("queries"), stratum, withheld, task.side_inputs)
    with bar("plan", 3 * len(counts), "queries") as progress:
        for name, mask in {"head": stratum == 0, "teach": teach, "rest": keep}.items():
            station.table(name, plan.rows(station.store, mask, progress.advance), plan.schema)
    golden = plan.gold(station.store, gold, keys)
    station.table("gold", golden)
    station.json("coverage", found)
    station.figure("coverage", figure(found))
    _tell(station, config, plan, found, golden, zipf_exponent(counts))


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
    withheld: Mask
    side_inputs: tuple[str, ...]

    @property
    def schema(self) -> pa.Schema:
        return with_side_inputs(PLANNED, self.side_inputs)

    def rows(self, store: Storage, wanted: Mask, advance: Callable[[int], None]) -> Iterator[pa.RecordBatch]:
        """The wanted queries as PLANNED rows, read as a stream and no further than the last one."""
        names = pa.array([str(name) for name in STRATA])
        at, end = 0, int(np.flatnonzero(wanted)[-1]) + 1 if wanted.any() else 0
        for batch in stream_table(store, self.queries):
            if at >= end:
                break
            place = slice(at, at + batch.num_rows)
            columns = {
                **{name: batch.column(name) for name in batch.schema.names},
                "rank": pa.array(np.arange(at + 1, at + 1 + batch.num_rows)),
                "stratum": names.take(pa.array(self.stratum[place])),
                "withheld": pa.array(self.withheld[place]),
            }
            made = pa.RecordBatch.from_arrays([columns[name] for name in self.schema.names], schema=self.schema)
            at += batch.num_rows
            advance(batch.num_rows)
            yield made.filter(pa.array(wanted[place]))
        advance(len(self.stratum) - at)

    def gold(self, store: Storage, gold: pa.Table, keys: pa.ChunkedArray) -> pa.Table:
        """Gold with its strata, and the side inputs of the queries that were seen."""
        places = pc.index_in(gold["query_key"], keys.take(pa.array(np.flatnonzero(self.withheld))))
        ranks = pa.array(np.flatnonzero(self.withheld)).take(places)
        names = pa.array([str(name) for name in STRATA]).take(pa.array(self.stratum).take(ranks))
        gold = gold.set_column(gold.schema.get_field_index("stratum"), "stratum", pc.fill_null(names, str(Stratum.UNSEEN)))
        seen = pa.Table.from_batches(self.rows(store, self.withheld, lambda _: None), self.schema)
        for name in self.side_inputs:
            gold = gold.append_column(pa.field(name, SIDE_INPUT), seen[name].combine_chunks().take(places))
        return gold


def coverage(later: pa.Table, keys: pa.ChunkedArray, counts: Ints, may: Mask) -> Coverage:
    """Events by rank that a cache may answer, of the log and of later traffic (query_key, count)."""
    after = np.zeros(len(counts), np.int64)
    places = pc.index_in(keys, later["query_key"].combine_chunks())
    found = np.flatnonzero(np.asarray(places.is_valid()))
    after[found] = later["count"].to_numpy()[np.asarray(places.drop_null())]
    seen, after = np.where(may, counts, 0), np.where(may, after, 0)
    return Coverage(np.cumsum(seen), np.cumsum(after), int(counts.sum()), int(pc.sum(later["count"]).as_py() or 0))


def _tell(station: Station, config: Config, plan: Plan, found: dict[str, Any], gold: pa.Table, exponent: float) -> None:
    """Rows, figures and notes for the receipt, one line for the person watching."""
    rows, head, n = station.rows, found["head"], len(plan.stratum)
    torso, tail = (int((plan.stratum == code).sum()) for code in (1, 2))
    rows |= {"head": head["rows"], "torso": torso, "tail": tail, "teach": station.outputs["teach"].rows or 0}
    rows |= {"rest": station.outputs["rest"].rows or 0, "gold": len(gold), "withheld": int(plan.withheld.sum())}
    rows |= {f"gold.{name}": pc.sum(pc.equal(gold["stratum"], str(name))).as_py() or 0 for name in Stratum}
    outside = torso + tail - rows["teach"] - rows["redacted"]
    rows["left_out"] = outside - rows["rest"]
    if rows["head"] + outside + rows["teach"] + rows["redacted"] != n or rows["rest"] != min(outside, config.rest_rows or outside):
        raise LedgerError("head, teach and rest are not the queries of the log", where=STAGE, value=f"{n:,} queries, {rows}")
    station.metrics |= {
        "head_rows": float(head["rows"]),
        "head_coverage": head["share"],
        "head_coverage_later": head["share_later"] or 0.0,
        "seen_coverage_later": found["points"][-1]["share_later"] or 0.0,
        "zipf_exponent": exponent,
    }
    station.facts |= {"head_limit": head["limit"], "head_last_count": head["last_count"]}
    if not found["later_events"]:
        station.note("no later traffic was held out: how long the head stays right is not known")
    if rows["teach"] < config.teach_rows:
        station.note(
            f"only {rows['teach']:,} of {config.teach_rows:,} teaching rows: there are no more queries outside the head and the gold"
        )
    if rows["redacted"]:
        station.note(f"{rows['redacted']:,} redacted queries are in no table: each stands for many questions (docs/task.md, `redacted`)")
    if rows["left_out"]:
        station.note(f"{rows['left_out']:,} queries are in no table: rest_rows is {config.rest_rows:,}")
    if gold.num_rows and not any(rows[f"gold.{name}"] for name in (Stratum.TORSO, Stratum.TAIL, Stratum.UNSEEN)):
        station.note("all gold is in the head: it says nothing of the quality on the rest")
    later = f" ({head['share_later']:.1%} of later ones)" if found["later_events"] else ""
    say(
        f"{STAGE:<12} head {head['rows']:,} of {n:,} queries covers {head['share']:.1%} of events{later}, by {head['limit']}; "
        f"teach {rows['teach']:,}, rest {rows['rest']:,}, gold {rows['gold']:,}"
    )
