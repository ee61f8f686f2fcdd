"""Columns of an experiment's tables as what they mean: names, numbers, days. Each under its own name, whatever the table calls it.

In: a table as a file had it. Out: the columns that are needed, null where a cell is empty. A cell that is neither empty nor what its column
means is an error that names the row, counted from 1. Knows nothing of how rows are counted or joined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from headtail.core import cells
from headtail.core.errors import ConfigError, InputError
from headtail.stages.experiment.config import Config

_MOST = 1e60  # the fourth power of an outcome must be a number
_DAY_S = 86_400
KINDS = {
    **dict.fromkeys(("unit", "arm", "key", "query", "stratum"), pa.string()),
    **dict.fromkeys(("outcome", "covariate"), pa.float64()),
    "changed": pa.bool_(),
    "time": pa.date32(),
}


def needed_columns(config: Config) -> list[str]:
    """The columns that decide the result."""
    used = {
        "arm": config.mode == "analysis" and not config.assignments,
        "key": bool(config.outcomes),
        "time": bool(config.start or config.end),
        "query": bool(config.plan) or config.trigger == "snapshots",
        "stratum": bool(config.columns.stratum),
        "changed": config.trigger == "column",
        "covariate": bool(config.columns.covariate),
    }
    return [name for name in KINDS if used.get(name, True)]


def typed_columns(table: pa.Table, names: Sequence[str], config: Config, where: str) -> pa.Table:
    """These columns of a table. ConfigError when one is not there, InputError when a cell is not what its column means."""
    return pa.table({name: _typed(table, name, getattr(config.columns, name), where) for name in names})


def _typed(table: pa.Table, name: str, column: str, where: str) -> pa.ChunkedArray:
    if column not in table.column_names:
        fix = f"set columns.{name} to one of: {', '.join(table.column_names)}"
        raise ConfigError("this column is not there", where=f"{where}, columns.{name}", value=column, fix=fix)
    kind, row, parts = KINDS[name], 0, []
    read: Callable[[pa.Array], tuple[pa.Array, int | None]] = {
        pa.date32(): _days,
        pa.float64(): _numbers,
        pa.string(): _texts,
    }.get(kind, lambda array: _cast(array, kind))
    for chunk in table[column].chunks:
        plain = _blank_to_null(cells.flat(chunk))
        part, bad = read(plain)
        if bad is not None:
            what = {pa.date32(): "time", pa.float64(): "number", pa.bool_(): "true or false"}.get(kind, "text")
            fix = f"a time is one of: {cells.TIMES}" if kind == pa.date32() else "correct the row, or leave the cell empty"
            at = f"{where}, columns.{name}={column}, row {row + bad + 1:,}"
            raise InputError(f"a cell of this column is not a {what}", where=at, value=plain[bad].as_py(), fix=fix)
        parts.append(part)
        row += len(chunk)
    return pa.chunked_array(parts, kind)


def _blank_to_null(array: pa.Array) -> pa.Array:
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        return pc.if_else(pc.equal(pc.utf8_trim_whitespace(array), ""), None, array)
    return pc.if_else(pc.is_nan(array), None, array) if pa.types.is_floating(array.type) else array


def _texts(array: pa.Array) -> tuple[pa.Array, int | None]:
    if pa.types.is_floating(array.type):
        whole, bad = _cast(array, pa.int64())
        array = array if bad is not None else whole  # user 7, where a missing user made the column floating
    return _cast(array, pa.string())


def _numbers(array: pa.Array) -> tuple[pa.Array, int | None]:
    found, bad = _cast(array.cast(pa.int8()) if pa.types.is_boolean(array.type) else array, pa.float64())
    if bad is not None:
        return found, bad
    found = pc.if_else(pc.is_nan(found), None, found)
    return found, _first(pc.greater_equal(pc.abs(found), _MOST))


def _days(array: pa.Array) -> tuple[pa.Array, int | None]:
    """Days in UTC; a time without a zone is taken as UTC."""
    seconds = cells.times(array)
    days = pc.floor(pc.divide(seconds.cast(pa.float64()), _DAY_S)).cast(pa.int32()).cast(pa.date32())
    return days, _first(pc.and_(pc.is_valid(array), pc.is_null(seconds)))


def _first(mask: pa.Array) -> int | None:
    place = pc.index(mask, True).as_py()
    return None if place < 0 else int(place)


def _cast(array: pa.Array, kind: pa.DataType) -> tuple[pa.Array, int | None]:
    """The array as `kind`, or the place of the first cell that is none."""
    try:
        return array.cast(kind), None
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        low, high = 0, len(array)
        while high - low > 1:
            middle = (low + high) // 2
            try:
                array.slice(low, middle - low).cast(kind)
                low = middle
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                high = middle
        return array, low
