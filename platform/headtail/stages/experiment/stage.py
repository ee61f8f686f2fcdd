"""Experiment: what a treatment does to an outcome, from the logs of a running A/B, and whether it holds for all traffic.

    log, assignments, outcomes -> sums by unit -> sample ratio -> effects on changed requests, by stratum -> effect at full coverage

In mode `power`, before the start, the smallest effect that can be shown. A failed check, a refusal and "undecided" are results too.
Knows nothing of servers or of how a release is made.

    columns.py  cells of files     rows.py  logs -> sums   lookup.py  strata, changed answers   units.py  arrays
    effect.py  the statistics      analysis.py  verdict    power.py  before the start           figure.py, words.py  for people
"""

from __future__ import annotations

import pyarrow as pa

from headtail.adapters.progress import say
from headtail.adapters.storage import Storage, open_storage
from headtail.adapters.storage.day_files import REQUESTS
from headtail.adapters.storage.receipts import load_receipt
from headtail.core.errors import ConfigError, InputError
from headtail.core.query import clean_text
from headtail.core.receipt import Receipt
from headtail.core.rows import STRATA, Stratum
from headtail.core.task import Task, load_task
from headtail.releases.release import Release, load_release
from headtail.stages.base import Stage, run_once
from headtail.stages.experiment.analysis import analyse_experiment
from headtail.stages.experiment.config import Config
from headtail.stages.experiment.figure import effect_figure
from headtail.stages.experiment.lookup import query_changes, strata_of
from headtail.stages.experiment.power import detectable_effects
from headtail.stages.experiment.result import EffectEstimate, Result
from headtail.stages.experiment.rows import GroupedRows, assigned_units, open_tables, sum_rows
from headtail.stages.experiment.units import QueryFacts, unit_arrays
from headtail.stages.experiment.words import experiment_words

VERSION = 2
Arms = tuple[Release, Release] | None
_COUNTS = ("requests", "units_control", "units_treatment")
EFFECTS = pa.schema(
    [(name, pa.string() if name == "stratum" else pa.int64() if name in _COUNTS else pa.float64()) for name in EffectEstimate.model_fields]
)


def run(config: Config) -> Receipt[Result]:
    """Analyse once for each state of the logs."""
    if config.mode == "analysis" and (not config.control or not config.treatment or config.control == config.treatment):
        value = f"control={config.control}, treatment={config.treatment}"
        raise ConfigError("the two arms are not named", where="control, treatment", value=value, fix="set both, to different values")
    task, store = load_task(config.task, config.allow_task_code), open_storage(config.root)
    tables = open_tables(store, config)
    planned = load_receipt(store, "plan", config.plan) if config.plan else None
    arms = (load_release(store, config.control), load_release(store, config.treatment)) if config.trigger == "snapshots" else None
    inputs: dict[str, Receipt | str] = {**tables.digests, **({"plan": planned} if planned else {})}

    def work(stage: Stage) -> Result:
        grouped = sum_rows(store, tables, config)
        facts = _facts(store, grouped, config, task, planned, arms)
        return _analyse(stage, grouped, facts, config)

    replaces = {"task": task.name, "plan": planned.path if planned else "", **dict.fromkeys(("log", "assignments", "outcomes"), "")}
    receipt = run_once("experiment", Result, config, work, inputs=inputs, task=task, version=VERSION, replaces=replaces)
    for line in experiment_words(receipt.result, config):
        say(f"{'experiment':<12} {line}")
    return receipt


def _facts(store: Storage, grouped: GroupedRows, config: Config, task: Task, planned: Receipt | None, arms: Arms) -> QueryFacts:
    """Strata and changed answers of the log's queries, where they are to be looked up."""
    if planned is None and arms is None:
        return QueryFacts(())
    queries = grouped.table["query"].unique().to_pylist()
    clean = queries if config.log == REQUESTS else [clean_text(query) for query in queries]
    strata = None if planned is None else strata_of(store, planned, clean, task.file.strata.torso_min_count)
    if strata is not None and set(strata.tolist()) == {STRATA.index(str(Stratum.UNSEEN))}:
        fix = "name the plan of these queries' own log, check columns.query, or leave plan out"
        raise InputError("the plan knows no query of the log", where="plan", value=f"{config.plan}, {len(queries):,} queries", fix=fix)
    return QueryFacts(queries, strata, None if arms is None else query_changes(store, *arms, clean))


def _analyse(stage: Stage, grouped: GroupedRows, facts: QueryFacts, config: Config) -> Result:
    stage.rows = grouped.counts
    if not grouped.counts["used"]:
        where, value = "log, control and treatment", ", ".join(f"{name} {n:,}" for name, n in grouped.counts.items())
        raise InputError(
            "no row of the log can be used", where=where, value=value, fix="check the names of columns and arms, start and end"
        )
    assigned = assigned_units(grouped, config)
    units = unit_arrays(grouped.table, config.treatment, STRATA, facts, assigned.mixed)
    if config.mode == "power":
        result = detectable_effects(units, config)
        stage.table("power", pa.Table.from_pylist([one.model_dump() for one in result.power]))
    else:
        result = analyse_experiment(units, assigned, config)
        _record(stage, result, config)
    for line in experiment_words(result, config):
        stage.note(line)
    return result


def _record(stage: Stage, result: Result, config: Config) -> None:
    """Tables, the picture, MLflow's figures."""
    full = result.full.estimate if result.full else None
    rows = [*result.effects, *([full] if full else [])]
    if result.ratio is not None:
        stage.metrics |= {"ratio_p": result.ratio.p, "ratio_changed_p": result.ratio.changed_p}
    if not rows:
        return
    stage.table("effects", pa.Table.from_pylist([row.model_dump() for row in rows], schema=EFFECTS))
    stage.figure("effects", effect_figure(result, config.columns.outcome, config.confidence))
    for row in rows:
        if row.value is not None and row.always_low is not None and row.always_high is not None:
            ends = {"": row.value, "_low": row.always_low, "_high": row.always_high}
            stage.metrics |= {f"effect/{row.stratum.replace(' ', '_')}{end}": value for end, value in ends.items()}
