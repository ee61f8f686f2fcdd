"""The rows of an experiment: log, assignments and outcomes become sums by unit, arm, query and time.

In: a store's request log, or files that the user names. Out: GroupedRows, and a count of each row that was left out. Knows nothing of
effects. A log of one file is held in memory; the request log is read file by file.
"""

from __future__ import annotations

import datetime
import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headtail.adapters.storage import Storage, read_table
from headtail.adapters.storage.day_files import REQUESTS, day_of, list_day_files
from headtail.adapters.storage.user_tables import read_user_table
from headtail.core.errors import InputError
from headtail.core.keys import fingerprint
from headtail.core.rows import REQUEST_LOG, conform
from headtail.stages.experiment.columns import KINDS, needed_columns, typed_columns
from headtail.stages.experiment.config import Config

Taken = npt.NDArray[np.bool_]

GROUP = ["unit", "arm", "query", "stratum", "changed", "before"]
_SUMS = [("outcome", "sum"), ("outcome", "count"), ("covariate", "sum"), ("covariate", "count")]
_MOST_SHOWN = 10
_TWICE = ": an outcome would count twice"
# Why a row was left out.
REASONS = {
    "no_time": "it has no time, and start or end is set",
    "no_unit": "it has no unit",
    "other_arm": "it is of neither arm",
    "no_outcome": "it has no outcome",
    "after": "it is after `end`",
}


class ExperimentTables(NamedTuple):
    """What is read: files of the request log, or one table; and what decides the result, by name."""

    files: list[str]
    log: pa.Table | None
    assignments: pa.Table | None
    outcomes: pa.Table | None
    digests: dict[str, str]


class GroupedRows(NamedTuple):
    """Sums by GROUP: columns outcome_sum, outcome_count, covariate_sum, covariate_count; assigned units and arms where they are known."""

    table: pa.Table
    assignments: pa.Table | None
    counts: dict[str, int]


class AssignedUnits(NamedTuple):
    """Units that were assigned, whether or not they made a request."""

    control: int
    treatment: int
    mixed: pa.Array  # units that met both arms: in neither count


def open_tables(store: Storage, config: Config) -> ExperimentTables:
    """Find the log and read the user's files. InputError when one is not there."""
    digests, tables = {}, {}
    for name in ("log", "assignments", "outcomes"):
        path = getattr(config, name)
        if path and path != REQUESTS:
            tables[name], data = read_user_table(path, name, [getattr(config.columns, of) for of in KINDS if KINDS[of] == pa.string()])
            digests[name] = hashlib.sha256(data).hexdigest()
    files: dict[str, int] = {}
    if config.log == REQUESTS:
        files = {path: size for path, size in list_day_files(store, REQUESTS).items() if not config.end or day_of(path) < config.end}
        if not files:
            fix = "start the server with request_log=true, or name a file in `log`"
            raise InputError("the store has no request log", where=store.uri(REQUESTS), fix=fix)
        digests["log"] = fingerprint(files, REQUESTS)
    return ExperimentTables(sorted(files), tables.get("log"), tables.get("assignments"), tables.get("outcomes"), digests)


def sum_rows(store: Storage, tables: ExperimentTables, config: Config) -> GroupedRows:
    """Every row once, into its group or among the counts of what was left out. InputError when the log has no row of an arm."""
    assignments = _assignments(tables.assignments, config)
    counts: Counter[str] = Counter({"in": 0, "used": 0, "before": 0, **dict.fromkeys(REASONS, 0)})
    taken = np.zeros(0 if tables.outcomes is None else tables.outcomes.num_rows, bool)
    arms: set[str] = set()
    groups = []
    for part in _log(store, tables):
        rows = _log_columns(part, tables.outcomes, taken, config)
        rows = rows if assignments is None else _with_arms(rows, assignments)
        kept = _narrow(rows, config, counts, arms)
        _check_known(kept, config)
        groups.append(kept.group_by(GROUP).aggregate(_SUMS))
    if config.mode == "analysis":
        _check_arms(arms if assignments is None else {*assignments["arm"].drop_null().to_pylist()}, config)
    whole = pa.concat_tables(groups)
    sums = [(name, "sum") for name in ("outcome_sum", "outcome_count", "covariate_sum", "covariate_count")]
    whole = whole.group_by(GROUP).aggregate(sums).rename_columns([*GROUP, *(name for name, _ in sums)])
    order = [(name, "ascending") for name in ("unit", "query", "stratum", "changed")]  # sums in one order: the same rows, the same figures
    return GroupedRows(whole.sort_by(order), assignments, dict(counts))


def _log(store: Storage, tables: ExperimentTables) -> Iterator[pa.Table]:
    if tables.log is not None:
        yield tables.log
    for path in tables.files:
        yield conform(read_table(store, path), REQUEST_LOG, path)


def _check_arms(arms: set[str], config: Config) -> None:
    for name in ("control", "treatment"):
        if getattr(config, name) not in arms:
            there = sorted(arms)
            shown = ", ".join(there[:_MOST_SHOWN]) + (f" and {len(there) - _MOST_SHOWN:,} more" if len(there) > _MOST_SHOWN else "")
            fix = f"name one of: {shown}" if there else "no row has an arm: check columns.arm and columns.unit, start and end"
            raise InputError("no row has this arm", where=name, value=getattr(config, name), fix=fix)


def _check_known(rows: pa.Table, config: Config) -> None:
    """Of a request that counts, the stratum and whether the answer changed are not guessed."""
    for name in [name for name in needed_columns(config) if name in ("stratum", "changed")]:
        if n := rows.filter(pc.and_(pc.is_null(rows[name]), pc.invert(rows["before"]))).num_rows:
            fix = "fill the column in, or leave such rows out of the log"
            where = f"log, columns.{name}={getattr(config.columns, name)}"
            raise InputError("requests have no value in this column", where=where, value=f"{n:,} rows", fix=fix)


def _assignments(table: pa.Table | None, config: Config) -> pa.Table | None:
    """Unit and arm, each pair once; a unit in both arms stays twice."""
    if table is None:
        return None
    rows = typed_columns(table, ["unit", "arm"], config, "assignments")
    _check_full(rows["unit"], config.columns.unit, "assignments")
    return rows.group_by(["unit", "arm"]).aggregate([])


def _log_columns(part: pa.Table, outcomes: pa.Table | None, taken: Taken, config: Config) -> pa.Table:
    """The columns of the log, and those that it lacks of `outcomes`."""
    names = needed_columns(config)
    if outcomes is None:
        return typed_columns(part, names, config, "log")
    column = config.columns.outcome
    if column in part.column_names and column in outcomes.column_names:
        raise InputError("the outcome is in the log and in outcomes", where="columns.outcome", value=column, fix="rename one of the two")
    other = [name for name in names if getattr(config.columns, name) not in part.column_names and name != "key"]
    rows = typed_columns(part, [name for name in names if name not in other], config, "log")
    right = typed_columns(outcomes, ["key", *other], config, "log and outcomes")
    return _with_outcomes(rows, right, taken, config)


def _with_outcomes(rows: pa.Table, outcomes: pa.Table, taken: Taken, config: Config) -> pa.Table:
    """The log's rows with the columns of their outcome row. A key is in one row of each, else an outcome would count twice.

    `taken`: the rows of outcomes that earlier rows of the log had. A row without a key has no outcome.
    """
    key = config.columns.key
    _check_full(outcomes["key"], key, "outcomes")
    _check_once(
        outcomes["key"], "a key has more than one row of outcomes", f"outcomes, column {key}", "one row per key, the outcome summed"
    )
    fix = "one row per key, or another column in columns.key"
    _check_once(rows["key"].drop_null(), "a key is in more than one row of the log", f"log, column {key}", fix)
    at = pc.index_in(rows["key"], value_set=outcomes["key"].combine_chunks())
    places = at.drop_null().to_numpy()
    if taken[places].any():
        again = outcomes["key"][int(places[taken[places]][0])].as_py()
        raise InputError(f"a key is in more than one row of the log{_TWICE}", where=f"log, column {key}", value=again, fix=fix)
    taken[places] = True
    for name in outcomes.column_names[1:]:
        column = outcomes[name].take(at)
        if name == "outcome" and config.missing is not None:
            column = pc.if_else(pc.and_(pc.is_null(at), pc.is_valid(rows["key"])), config.missing, column)
        rows = rows.append_column(name, column)
    return rows


def _check_once(keys: pa.ChunkedArray, what: str, where: str, fix: str) -> None:
    if len(pc.unique(keys)) < len(keys):
        counts = keys.value_counts()
        again = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise InputError(f"{what}{_TWICE}", where=where, value=again, fix=fix)


def _check_full(column: pa.ChunkedArray, name: str, where: str) -> None:
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py() + 1
        raise InputError("a row has no value in this column", where=f"{where}, column {name}, row {row:,}", fix="leave such rows out")


def _with_arms(rows: pa.Table, assignments: pa.Table) -> pa.Table:
    """The log's rows with the arm of their unit; of a unit in both arms with neither, since which one it met is not known."""
    once = assignments.group_by("unit").aggregate([("arm", "count"), ("arm", "min")])
    once = once.filter(pc.equal(once["arm_count"], 1))
    return rows.append_column("arm", once["arm_min"].take(pc.index_in(rows["unit"], value_set=once["unit"].combine_chunks())))


def _narrow(rows: pa.Table, config: Config, counts: Counter[str], arms: set[str]) -> pa.Table:
    """The columns of GROUP and the sums, of the rows that count; `arms` takes those of the rows from the start on."""
    n, timed = rows.num_rows, bool(config.start or config.end)

    def column(name: str) -> pa.ChunkedArray | pa.Array:
        return rows[name] if name in rows.column_names else pa.nulls(n, KINDS[name])

    day, outcome, powered = column("time"), column("outcome"), config.mode == "power"
    nothing = pa.repeat(False, n)
    before = pc.fill_null(pc.less(day, _day(config.start)), False) if config.start else nothing
    after = pc.fill_null(pc.greater_equal(day, _day(config.end)), False) if config.end else nothing
    arm = pa.nulls(n, pa.string()) if powered else column("arm")
    in_arm = pc.or_(before, pc.fill_null(pc.is_in(arm, value_set=pa.array([config.control, config.treatment])), False))
    made = {name: column(name) for name in ("unit", "stratum", "changed", "outcome", "covariate")}
    table = pa.table({**made, "arm": arm, "query": pc.fill_null(column("query"), ""), "before": before})
    wrong = {
        "no_time": pc.is_null(day) if timed else nothing,
        "after": after,
        "no_unit": pc.is_null(table["unit"]),
        "other_arm": nothing if powered else pc.invert(in_arm),
        "no_outcome": pc.is_null(outcome),
    }
    arms |= set(arm.filter(pc.invert(pc.or_(before, pc.or_(after, wrong["no_time"])))).unique().drop_null().to_pylist())
    return _set_aside(table, wrong, counts)


def _set_aside(rows: pa.Table, wrong: dict[str, pa.Array], counts: Counter[str]) -> pa.Table:
    counts["in"] += rows.num_rows
    keep = pa.repeat(True, rows.num_rows)
    for reason, mask in wrong.items():
        counts[reason] += pc.sum(pc.and_(keep, mask)).as_py() or 0
        keep = pc.and_(keep, pc.invert(mask))
    rows = rows.filter(keep)
    earlier = pc.sum(rows["before"]).as_py() or 0
    counts["before"] += earlier
    counts["used"] += rows.num_rows - earlier
    return rows


def _day(text: str) -> pa.Scalar:
    return pa.scalar(datetime.date.fromisoformat(text), pa.date32())


def assigned_units(grouped: GroupedRows, config: Config) -> AssignedUnits:
    """Units by arm, from the table of assignments, else from the rows."""
    table = grouped.assignments if grouped.assignments is not None else grouped.table.filter(pc.invert(grouped.table["before"]))
    table = table.filter(pc.is_in(table["arm"], value_set=pa.array([config.control, config.treatment])))
    units = table.group_by(["unit"]).aggregate([("arm", "min"), ("arm", "max")])
    alike = pc.equal(units["arm_min"], units["arm_max"])
    arms = units.filter(alike)["arm_min"]
    control, treatment = (pc.sum(pc.equal(arms, arm)).as_py() or 0 for arm in (config.control, config.treatment))
    return AssignedUnits(control, treatment, units.filter(pc.invert(alike))["unit"].combine_chunks())
