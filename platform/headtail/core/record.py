"""Records: JSON objects that headtail wrote into a store and reads again, even if the file was damaged meanwhile.

In: bytes, or plain values, and the place they come from. Out: an object of plain values, or a validated model. Every fault (not
UTF-8, not JSON, no object, nested too deeply, a field missing or wrong) is one error that names the file and what to do.
Knows nothing of stores: `storage.read_json` and `storage.read_record` use it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date, datetime
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator

from headtail.core.config import Config, build_config
from headtail.core.errors import ConfigError, HeadtailError, StorageError

T = TypeVar("T", bound=Config)


def _moment(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time needs its time zone, such as +00:00")
    return text


_DAY = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")


def _day(text: str) -> str:
    if text and not _DAY.fullmatch(text):
        raise ValueError("this is no day, as 2031-01-31")
    try:
        return text and str(date.fromisoformat(text))
    except ValueError as error:
        raise ValueError(f"this is no day, as 2031-01-31: {error}") from None


Moment = Annotated[str, AfterValidator(_moment)]
Day = Annotated[str, AfterValidator(_day)]  # of the calendar, or empty

DEEPEST = 200  # levels of lists and objects; an answer schema, the deepest that headtail writes, has some 20. Python fails near 1,000
FIX = "restore this file from a copy of the store; if it is a receipt.json, remove it instead: its stage then runs again"


def parse_object(data: bytes | str, where: str, error: type[HeadtailError] = StorageError, fix: str = FIX) -> dict[str, Any]:
    """The JSON object in `data`. `error` names `where` when it is not JSON, no object, too deep or holds half a surrogate pair."""
    try:
        plain = json.loads(data)
    except RecursionError:
        raise error(f"nested deeper than {DEEPEST} levels", where=where, fix=fix) from None
    except ValueError as problem:  # not UTF-8, not JSON, a number of more digits than Python takes
        raise error(f"not JSON: {problem}", where=where, fix=fix) from None
    if not isinstance(plain, dict):
        raise error("not a JSON object", where=where, value=_short(plain), fix=fix)
    level: list[Any] = [plain]
    for _ in range(DEEPEST):
        level = [inner for value in level for inner in _inside(value)]
        if any(isinstance(value, str) and not _writable(value) for value in level):
            raise error("a text holds half a surrogate pair", where=where, fix=fix)
    if level:
        raise error(f"nested deeper than {DEEPEST} levels", where=where, fix=fix)
    return plain


def validate_record(kind: type[T], plain: Mapping[str, Any], where: str) -> T:
    """`plain` as a `kind`. StorageError names each field that is missing or wrong."""
    try:
        return build_config(kind, plain, where)
    except ConfigError as problem:
        name = kind.__name__.partition("[")[0]  # Receipt[Result] is a Receipt
        raise StorageError(f"not a record of kind {name}: {problem.what}", where=where, fix=FIX) from None


def parse_record(kind: type[T], data: bytes | str, where: str, layout: int | None = None) -> T:
    """The `kind` whose JSON `data` is. Errors as `parse_object` and `validate_record`; StorageError when its `format` is not `layout`."""
    plain = parse_object(data, where)
    if layout is not None and plain.get("format", 1) != layout:
        raise StorageError(
            "this store was written by another version of headtail",
            where=where,
            value=f"format {plain.get('format', 1)}; this version reads {layout}",
            fix="run the stages again in a new store, or use the version of headtail that wrote this one",
        )
    return validate_record(kind, plain, where)


def _inside(value: Any) -> list[Any]:
    return [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []


def _writable(text: str) -> bool:
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _short(plain: Any) -> str:
    return f"a list of {len(plain)}" if isinstance(plain, list) else json.dumps(plain)[:100]
