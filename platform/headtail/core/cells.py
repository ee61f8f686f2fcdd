"""What cells of a user's table mean: counts, times, lists. Whole columns at a time.

In: an Arrow array as a file had it (text as bytes, numbers, dates, lists). Out: an array of one type, null where the cell
is not valid; the caller decides about such rows. Knows nothing of files or queries.
"""

from __future__ import annotations

import datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

MAX_COUNT = 10**12  # per row: ten million such rows still sum within 64 bits
TIMES = "dates (2024-01-31, 20240131), ISO 8601 times, or seconds, milliseconds, microseconds or nanoseconds since 1970"

_EXACT = 2.0**53  # whole numbers below it are exact as float
_COUNT = r"^\s*\+?0*(?P<n>[0-9]{1,13})(?:\.0*)?\s*$"
_ISO = (
    r"^\s*(?P<day>[0-9]{4}-[0-9]{2}-[0-9]{2})(?:[Tt ](?P<h>[01][0-9]|2[0-3]):?(?P<m>[0-5][0-9])"
    r"(?::?(?P<s>[0-5][0-9]|60)(?:[.,][0-9]+)?)?\s*(?P<zone>[Zz]|UTC|[+-](?:0[0-9]|1[0-4])(?::?[0-5][0-9])?)?)?\s*$"
)  # zones reach from -12:00 to +14:00
_EPOCH = r"^\s*(?P<n>[0-9]{5,19})(?:\.[0-9]*)?\s*$"
_FIRST = int(datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC).timestamp())
_LAST = int(datetime.datetime(2200, 1, 1, tzinfo=datetime.UTC).timestamp())
_DAY = 86_400
_TICKS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_LIMITS = (10**11, 10**14, 10**17)  # numbers from here on are ms, us, ns: 10**11 s is the year 5138


def flat(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One array, dictionaries and extension types undone."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    array = pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array.dictionary_decode() if isinstance(array, pa.DictionaryArray) else array


def text(array: pa.Array) -> pa.Array | None:
    """Cells as bytes, for a column of text or plain values; None for a column of anything else."""
    kind = array.type
    if pa.types.is_binary(kind):
        return array
    if pa.types.is_null(kind):
        return pa.nulls(len(array), pa.binary())
    if pa.types.is_large_binary(kind) or pa.types.is_large_string(kind) or pa.types.is_string(kind) or pa.types.is_fixed_size_binary(kind):
        return array.cast(pa.binary())
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return array.cast(pa.binary())
    if pa.types.is_nested(kind):
        return None
    if pa.types.is_floating(kind):
        return _float_text(array).cast(pa.binary())
    return array.cast(pa.string()).cast(pa.binary())


def _float_text(array: pa.Array) -> pa.Array:
    """Numbers as text: whole ones that are exact without exponent or point, others with the fewest digits; null where not finite."""
    number = array.cast(pa.float64())
    whole = pc.and_(pc.equal(pc.floor(number), number), pc.less(pc.abs(number), _EXACT))
    digits = pc.if_else(whole, number, None).cast(pa.int64()).cast(pa.string())
    return pc.if_else(pc.is_finite(number), pc.coalesce(digits, array.cast(pa.string())), None)


def dictionary_cells(column: pa.ChunkedArray) -> pa.DictionaryArray | None:
    """A column of text or plain values as places in its distinct values, these as bytes; None for a column of anything else."""
    array = column.combine_chunks()
    if not pa.types.is_dictionary(array.type) or isinstance(array, pa.ChunkedArray):
        found = text(flat(column))
        return found if found is None else found.dictionary_encode()
    values = text(array.dictionary)
    return values if values is None else pa.DictionaryArray.from_arrays(array.indices, values)


def counts(array: pa.Array) -> pa.Array:
    """Whole numbers from 1 to MAX_COUNT as int64, else null. `3`, `3.0` and `+3` are 3; `0`, `2.5`, `1,000` are null."""
    kind = array.type
    if pa.types.is_integer(kind):
        numbers = array.cast(pa.int64(), safe=False)
    elif pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        number = array.cast(pa.float64())
        whole = pc.and_(pc.is_finite(number), pc.equal(pc.floor(number), number))
        numbers = pc.if_else(pc.and_(whole, pc.less_equal(number, MAX_COUNT)), number, None).cast(pa.int64())
    else:
        numbers = _number(array, _COUNT)
    return pc.if_else(pc.and_(pc.greater_equal(numbers, 1), pc.less_equal(numbers, MAX_COUNT)), numbers, None)


def times(array: pa.Array) -> pa.Array:
    """Seconds since 1970 (UTC) as int64, null where a cell is no time between 1970 and 2200. See TIMES."""
    kind = array.type
    if pa.types.is_timestamp(kind):
        ticks = np.asarray(pc.fill_null(array.cast(pa.int64()), -1))  # before 1970: null below
        seconds = pa.array(ticks // _TICKS[kind.unit])
    elif pa.types.is_date(kind):
        seconds = pc.multiply(array.cast(pa.date32()).cast(pa.int32()).cast(pa.int64()), _DAY)
    elif pa.types.is_integer(kind):
        seconds = _epoch(array.cast(pa.int64(), safe=False))
    elif pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        number = array.cast(pa.float64())
        fine = pc.and_(pc.is_finite(number), pc.less(pc.abs(number), 9e18))
        seconds = _epoch(pc.floor(pc.if_else(fine, number, None)).cast(pa.int64()))
    elif (cells := text(array)) is not None:  # of nearby rows many are the same
        coded = cells.dictionary_encode()
        seconds = pc.coalesce(_iso(coded.dictionary), _epoch(_number(coded.dictionary, _EPOCH))).take(coded.indices)
    else:
        return pa.nulls(len(array), pa.int64())
    return pc.if_else(pc.and_(pc.greater_equal(seconds, _FIRST), pc.less(seconds, _LAST)), seconds, None)


def second_parts(array: pa.Array) -> npt.NDArray[np.float64]:
    """What `times` cuts off: the parts of a second of each cell, from 0 to below 1; 0 where a cell has none."""
    kind = array.type
    if pa.types.is_timestamp(kind):
        ticks = _TICKS[kind.unit]
        return np.asarray(np.asarray(pc.fill_null(array.cast(pa.int64()), 0)) % ticks / ticks)
    if (texts := plain_texts(array)) is not None:
        digits = pc.struct_field(pc.extract_regex(texts, r"[.,](?P<f>[0-9]+)"), "f")
        numbers = pc.if_else(
            pc.match_substring_regex(texts, r"^\s*([0-9]{12,18}|[0-8][0-9]{18})\s*$"), pc.utf8_trim_whitespace(texts), None
        )
        parts = pc.fill_null(pc.binary_join_element_wise("0", digits, ".").cast(pa.float64()), 0.0)
        return np.asarray(np.asarray(parts) + second_parts(numbers.cast(pa.int64())))
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return np.zeros(len(array))
    number = np.nan_to_num(np.asarray(pc.fill_null(array, 0)))
    whole = np.floor(number).astype(np.int64)
    units = np.array(list(_TICKS.values()))[np.searchsorted(_LIMITS, whole, side="right")]
    return np.asarray(np.where(units == 1, number - whole, whole % units / units))


def plain_texts(array: pa.Array) -> pa.Array | None:
    """Cells as text, for a column of text; None for a column of anything else."""
    kind = array.type
    return array.cast(pa.string()) if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind) else None


def item_type(kind: pa.DataType) -> pa.DataType:
    """The type of a list's items; that of the cells themselves where they are no lists."""
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_list_view(kind)
    return kind.value_type if listed else kind


def lists(array: pa.Array, separator: str) -> pa.Array:
    """Lists of text: blanks around items and empty items gone, null for a list of nothing; text is cut at `separator`.

    Raises pa.ArrowInvalid when an item is not UTF-8.
    """
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_list_view(kind):
        if pa.types.is_fixed_size_list(kind) or pa.types.is_list_view(kind):
            array = array.cast(pa.list_(kind.value_type))
        items, parents = pc.list_flatten(array), pc.list_parent_indices(array)
        items = _float_text(items) if pa.types.is_floating(items.type) else items
    else:
        cells = text(array)
        if cells is None:
            raise pa.ArrowInvalid("side inputs must be text or lists of text")
        cut = pc.split_pattern(cells.cast(pa.string()), separator)
        items, parents = pc.list_flatten(cut), pc.list_parent_indices(cut)
    items = pc.utf8_trim_whitespace(items.cast(pa.string()))
    kept = pc.fill_null(pc.greater(pc.utf8_length(items), 0), False)
    items, owners = items.filter(kept), np.asarray(parents.filter(kept))
    sizes = np.bincount(owners, minlength=len(array)) if len(owners) else np.zeros(len(array), np.int64)
    offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, items, mask=pa.array(sizes == 0))


def _number(array: pa.Array, pattern: str) -> pa.Array:
    """The group `n` of `pattern` in cells of text, as int64."""
    cells = text(array)
    if cells is None:
        return pa.nulls(len(array), pa.int64())
    digits = pc.struct_field(pc.extract_regex(cells, pattern), "n").cast(pa.string())
    small = pc.if_else(pc.or_(pc.less(pc.utf8_length(digits), 19), pc.less(digits, "92")), digits, None)  # within 64 bits
    return small.cast(pa.int64())


def _epoch(number: pa.Array) -> pa.Array:
    """Numbers as times, by size: 8 digits 19000101..21991231 are dates; then s, ms, us, ns since 1970."""
    looks = pc.and_(pc.greater_equal(number, 19_000_101), pc.less_equal(number, 21_991_231))
    day = _day(pc.if_else(looks, number, None).cast(pa.string()), "%Y%m%d")
    found = pc.if_else(looks, day, number)
    for limit in _LIMITS:
        found = pc.if_else(pc.greater_equal(number, limit), pc.divide(number, limit // 10**8), found)
    return found


def _iso(cells: pa.Array) -> pa.Array:
    parts = pc.extract_regex(cells, _ISO)
    day = _day(pc.struct_field(parts, "day").cast(pa.string()), "%Y-%m-%d")
    if not pc.any(pc.not_equal(pc.fill_null(pc.binary_length(pc.struct_field(parts, "h")), 0), 0)).as_py():
        return day  # dates only
    clock = [_int(pc.struct_field(parts, name)) for name in ("h", "m", "s")]
    seconds = pc.add(pc.add(pc.multiply(clock[0], 3600), pc.multiply(clock[1], 60)), clock[2])
    return pc.subtract(pc.add(day, seconds), _offset(pc.struct_field(parts, "zone").cast(pa.string())))


def _day(text: pa.Array, form: str) -> pa.Array:
    """Seconds since 1970 at the start of a day; null when there is no such day (strptime alone turns 30 February into 1 March)."""
    found = pc.strptime(text, format=form, unit="s", error_is_null=True)
    exists = pc.equal(pc.day(found), pc.utf8_slice_codeunits(text, -2).cast(pa.int64()))
    return pc.if_else(exists, found.cast(pa.int64()), None)


def _offset(zone: pa.Array) -> pa.Array:
    """Seconds east of UTC; no zone is taken as UTC."""
    digits = pc.replace_substring_regex(zone, "[^0-9]", "")
    hours, minutes = _int(pc.utf8_slice_codeunits(digits, 0, 2)), _int(pc.utf8_slice_codeunits(digits, 2, 4))
    seconds = pc.add(pc.multiply(hours, 3600), pc.multiply(minutes, 60))
    return pc.if_else(pc.fill_null(pc.starts_with(zone, "-"), False), pc.negate(seconds), seconds)


def _int(digits: pa.Array) -> pa.Array:
    """Digits as int64, 0 where there are none."""
    digits = digits.cast(pa.string())
    return pc.fill_null(pc.if_else(pc.greater(pc.utf8_length(digits), 0), digits, None).cast(pa.int64()), 0)
