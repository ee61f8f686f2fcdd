"""Plan: where the head ends, who answers what, how much of the traffic to come that is, and what it costs.

In: an ingest receipt (queries by falling count, holdout traffic, history, human labels). Out: tables head (the teacher answers it ahead
of time), teacher_sample (others that the teacher answers too, to train on), student_rows (for the batch student), human_labels with
their strata; forecast, coverage curve and money as JSON and on one page.
LabelMask queries are marked `eval_only` and never in the teacher's sample. Knows nothing of models or prompts.
"""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headtail.adapters.progress import progress_bar, say
from headtail.adapters.storage import open_storage
from headtail.adapters.storage.receipts import load_receipt, output_table
from headtail.core.errors import InputError, LedgerError
from headtail.core.receipt import LATEST, Receipt
from headtail.core.rows import Stratum, uniform_draw
from headtail.core.strata import stratum_places
from headtail.core.task import Task, load_task
from headtail.stages.base import Stage, run_once
from headtail.stages.ingest.result import Result as IngestResult
from headtail.stages.plan import picture
from headtail.stages.plan.choice import HeadChoice, LabelMask, bill, choose, teacher_usd, undated_history
from headtail.stages.plan.config import Config
from headtail.stages.plan.coverage import count_coverage, coverage_curve
from headtail.stages.plan.history import History, read_history
from headtail.stages.plan.money import Costs
from headtail.stages.plan.outlook import band_words
from headtail.stages.plan.prices import resolve_costs
from headtail.stages.plan.queries import LogQueries, all_days, read_queries
from headtail.stages.plan.result import HeadForecast, PlanFigures, Result
from headtail.stages.plan.selection import Mask, draw_teacher_sample, zipf_exponent
from headtail.stages.plan.tables import Plan
from headtail.stages.plan.words import conclude, outlook_facts

STAGE = "plan"
VERSION = 6
_OTHERS = {"teacher_sample": "teacher sample", "student_rows": "student rows", "human_labels": "human labels"}


def run(config: Config, task: Task | None = None) -> Receipt[Result]:
    """Plan once. InputError when the log was ingested without the task's side inputs, or no query is frequent enough.

    `task`: what `config.task` names, where it is loaded already.
    """
    task, store = task or load_task(config.task, config.allow_task_code), open_storage(config.root)
    log = load_receipt(store, "ingest", LATEST if config.log == "ingest" else config.log, IngestResult)
    _check_log(log, task)
    costs = resolve_costs(store, config.prices, task.name)
    matters = {"side_inputs": list(task.side_inputs), "torso_min_count": task.file.strata.torso_min_count, "redacted": task.file.redacted}
    prices = {"usd": list(costs), "training": config.prices.training_usd, "chars": config.prices.teacher_usd_per_million_chars}
    receipt = run_once(
        STAGE,
        Result,
        config,
        lambda stage: _work(stage, config, log, task, costs),
        inputs={"log": log},
        version=VERSION,
        replaces={"task": matters, "log": log.path, "prices": prices},
        about=task.name,
    )
    for line in receipt.result.headline:
        say(f"{'':<12} {line}")
    return receipt


def _check_log(log: Receipt[IngestResult], task: Task) -> None:
    ingested = log.result.side_inputs
    if task.side_inputs != ingested:
        raise InputError(
            f"the log was ingested for another task than {task.name}",
            where=log.path,
            value=f"side inputs {', '.join(ingested) or 'none'}, the task has {', '.join(task.side_inputs) or 'none'}",
            fix=f"run ingest with task={task.name}, or name its receipt in `log`",
        )
    if "history" not in log.outputs:
        raise InputError("this log was ingested by an older version: it has no history of its days", where=log.path, fix="run ingest again")


def _work(stage: Stage, config: Config, log: Receipt[IngestResult], task: Task, costs: Costs) -> Result:
    labels = output_table(stage.store, log, "human_labels")
    with_chars = config.prices.teacher_usd_per_million_chars > 0
    queries = read_queries(stage.store, log.output("queries"), task, with_chars)
    table = output_table(stage.store, log, "history")
    dated = table.num_rows > 0
    history = read_history(table, task.file.redacted == "cached", config.head.min_count) if dated else undated_history(queries)
    known = _labelled(queries, labels)
    choice = choose(config, queries, history, _origin(history, log.result.holdout_from), costs, known, dated)
    holdout = output_table(stage.store, log, "holdout", ["query_key", "count"])
    covered = count_coverage(holdout, queries.keys, queries.counts, queries.may, choice.order)
    curve = coverage_curve(queries.counts[choice.order], covered, choice.end, choice.limit)
    curve["head"]["rows"] = int(choice.head.sum())
    if choice.outlook.checked is not None and curve["holdout_events"]:  # what came, of these very queries and not of such cells
        choice = choice._replace(outlook=choice.outlook._replace(checked=(choice.outlook.checked[0], curve["head"]["share_holdout"])))
    if config.rebuild:
        queries = _rebuild(stage, log, task, with_chars)
        if not dated:
            history = undated_history(queries)
        known = _labelled(queries, labels)
        choice = choose(config, queries, history, max(0, history.last), costs, known, dated)
    labelled, asked = _write_tables(stage, config, task, queries, choice, labels, known.mask)
    usd = teacher_usd(config, queries, costs)
    teacher = int(asked.sum()) + known.unseen, None if usd is None else bill(usd, asked, known.unseen)
    decision = conclude(config, costs, choice, curve, len(queries.counts), teacher)
    stage.json("coverage", curve)
    stage.json("outlook", outlook_facts(choice, costs, decision))
    stage.figure("coverage", picture.coverage_figure(curve, choice.outlook))
    stage.figure("plan", picture.plan_page(curve, choice, costs, decision))
    figures = PlanFigures(
        head_rows=stage.rows["head"],
        human_labels=stage.rows["human_labels"],
        head_coverage=curve["head"]["share"],
        head_coverage_holdout=curve["head"]["share_holdout"] or 0.0,
        seen_coverage_holdout=curve["points"][-1]["share_holdout"] or 0.0,
        zipf_exponent=zipf_exponent(queries.counts),
    )
    _tell(stage, config, choice, curve, labelled, figures)
    last = queries.counts[choice.head].min()
    return Result(
        head_limit=choice.limit,
        head_last_count=int(last),
        head_order=choice.ranking,
        rebuilt=config.rebuild,
        figures=figures,
        forecasts=tuple(
            HeadForecast(horizon_days=one.horizon, value=one.value, low=one.low, high=one.high, independent=one.independent)
            for one in choice.outlook.head
        ),
        replan_days=choice.outlook.replan.days,
        pays=decision.pays,
        decision=decision.lines,
        headline=decision.headline,
    )


def _labelled(queries: LogQueries, labels: pa.Table) -> LabelMask:
    mask = np.asarray(pc.is_in(queries.keys, labels["query_key"].combine_chunks()))
    return LabelMask(mask, len(labels) - int(mask.sum()))


def _origin(history: History, holdout_from: str | None) -> int:
    """Place of the last day before holdout traffic; of the last day without any."""
    if holdout_from is None:
        return max(0, history.last)
    return max(0, history.place(datetime.date.fromisoformat(holdout_from) - datetime.timedelta(1)))


def _rebuild(stage: Stage, log: Receipt[IngestResult], task: Task, with_chars: bool) -> LogQueries:
    """The queries of all days, as output `queries`."""
    days = [
        pa.scalar(None if day is None else datetime.date.fromisoformat(day), pa.date32())
        for day in (log.result.holdout_from, log.result.last_day)
    ]
    both = all_days(output_table(stage.store, log, "queries"), output_table(stage.store, log, "holdout"), task.side_inputs, *days)
    ref = stage.table("queries", both)
    stage.note("the head was chosen again on all days: holdout traffic is in it and cannot measure it")
    return read_queries(stage.store, ref, task, with_chars)


def _write_tables(
    stage: Stage, config: Config, task: Task, queries: LogQueries, choice: HeadChoice, labels: pa.Table, eval_only: Mask
) -> tuple[pa.Table, Mask]:
    """Tables head, teacher_sample, student_rows and human_labels, and their rows; labels with strata; what the teacher is asked."""
    keys, counts, may = queries.keys, queries.counts, queries.may
    stratum = stratum_places(counts, choice.head, task.file.strata.torso_min_count)
    teacher_sample = draw_teacher_sample(uniform_draw(keys, "teach", config.seed), stratum, eval_only | ~may, config.teacher_sample_rows)
    student_rows = np.flatnonzero((stratum > 0) & ~teacher_sample & may)
    keep = np.zeros(len(counts), bool)
    keep[student_rows[: config.max_student_rows]] = True
    plan = Plan(queries.ref, stratum, eval_only, task.side_inputs)
    with progress_bar("plan", 3 * len(counts), "queries") as progress:
        for name, mask in {"head": stratum == 0, "teacher_sample": teacher_sample, "student_rows": keep}.items():
            stage.table(name, plan.rows(stage.store, mask, progress.advance), plan.schema)
    labelled = plan.labels(stage.store, labels, keys)
    stage.table("human_labels", labelled)
    stage.rows["redacted"] = int((~may).sum())
    _count_rows(stage, config, plan, labelled)
    return labelled, (stratum == 0) | teacher_sample | eval_only


def _count_rows(stage: Stage, config: Config, plan: Plan, labels: pa.Table) -> None:
    """The ledger: every query of the log is in one table, or left out and counted; LedgerError otherwise."""
    rows, n = stage.rows, len(plan.stratum)
    head, torso, tail = (int((plan.stratum == code).sum()) for code in (0, 1, 2))
    rows |= {"head": head, "torso": torso, "tail": tail, "teacher_sample": stage.outputs["teacher_sample"].rows or 0}
    rows |= {"student_rows": stage.outputs["student_rows"].rows or 0, "human_labels": len(labels), "eval_only": int(plan.eval_only.sum())}
    rows |= {f"human_labels.{name}": pc.sum(pc.equal(labels["stratum"], str(name))).as_py() or 0 for name in Stratum}
    outside = torso + tail - rows["teacher_sample"] - rows["redacted"]
    rows["left_out"] = outside - rows["student_rows"]
    whole = rows["head"] + outside + rows["teacher_sample"] + rows["redacted"] == n == head + torso + tail
    if not whole or stage.outputs["head"].rows != head or rows["student_rows"] != min(outside, config.max_student_rows or outside):
        raise LedgerError(
            "head, teacher_sample and student_rows are not the queries of the log", where=STAGE, value=f"{n:,} queries, {rows}"
        )


def _tell(stage: Stage, config: Config, choice: HeadChoice, curve: dict[str, Any], labels: pa.Table, figures: PlanFigures) -> None:
    """Figures and notes for the receipt, one line for the person watching."""
    rows, head, expected = stage.rows, curve["head"], choice.outlook.head[-1]
    stage.metrics |= {
        **figures.model_dump(exclude={"human_labels"}),
        "head_coverage_forecast": expected.value,
        "forecast_horizon_days": float(expected.horizon),
        "unseen_share_forecast": 1 - choice.outlook.all_seen.value,
    }
    if expected.low is not None and expected.high is not None:
        stage.metrics |= {"head_coverage_forecast_low": expected.low, "head_coverage_forecast_high": expected.high}
    if not curve["holdout_events"]:
        stage.note("there is no holdout traffic: the forecast was not checked on days that it had not seen")
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
    band = band_words(expected.low, expected.high)
    holdout = f"; {head['share_holdout']:.1%} of holdout events" if curve["holdout_events"] else ""
    days = f" of the next {expected.horizon} days' events" if choice.dated else " of events"
    others = ", ".join(f"{words} {rows[name]:,}" for name, words in _OTHERS.items())
    say(
        f"{STAGE:<12} head {rows['head']:,} of {len(choice.head):,} queries, by {choice.limit}: {expected.value:.1%}{days} expected "
        f"({band}){holdout}; {others}"
    )
