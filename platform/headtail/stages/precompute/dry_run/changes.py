"""What changed in a task and its model since an earlier job, in words. Pure.

In: a CatalogEntry and a job. Out: names of the parts of the answer key that differ, and for each what it was and
what it is now. Knows nothing of rows: whether a changed prompt touches a row is for `compare` to say.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import Field

from headtail.batch.catalog import CatalogEntry
from headtail.batch.job import Job
from headtail.core.config import Config

# Parts of `answer_settings` by the names people know; another is named as it is there.
_WORDS = {
    "model.digest": "model",
    "model.revision": "model revision",
    "model.dtype": "precision",
    "model.quantization": "quantization",
    "model.max_model_len": "length limit",
    "model.base_url": "endpoint",
    "model.engine": "engine",
}
_SHOWN = 120  # characters of a value
_LINES = 12  # lines of a changed prompt
_PLACES = 5  # of a changed schema


class Change(Config):
    """One part of the key that is another now."""

    part: str = Field(description="schema, prompt, model, precision, ...")
    was: str = Field(description="in the earlier job")
    now: str = Field(description="in this one")


def key_changes(entry: CatalogEntry, job: Job) -> tuple[str, ...]:
    """The parts of the key, besides messages, that differ between an earlier job and this one."""
    return tuple(_settings(entry, job))


def changes(entry: CatalogEntry, job: Job) -> tuple[Change, ...]:
    """All that differs between an earlier job and this one, with its values."""
    differences = []
    if entry.template != job.task.template and job.io_format.prompt == "full":  # a query alone is asked without the template
        was, now = _lines(entry.template, job.task.template)
        differences.append(Change(part="prompt", was=was, now=now))
    was, now = _side(entry.side_inputs, entry.shown), _side(job.task.side_inputs, job.side_inputs)
    if was != now:
        differences.append(Change(part="side inputs", was=was, now=now))
    for part, values in _settings(entry, job).items():
        pair = values
        if part == "schema":
            places = list(_places(*pair, ""))[:_PLACES]
            pair = (_at(places, 1), _at(places, 2))
        elif part == "model" and entry.model != job.name:
            pair = (entry.model, job.name)
        differences.append(Change(part=part, was=_short(pair[0]), now=_short(pair[1])))
    return tuple(differences)


def _side(names: Sequence[str], with_inputs: bool) -> str:
    return ", ".join(names) if with_inputs or not names else "left out"


def _at(places: Sequence[tuple[str, Any, Any]], side: int) -> str:
    return ", ".join(f"{place[0]}: {_short(place[side])}" for place in places)


def _settings(entry: CatalogEntry, job: Job) -> dict[str, tuple[Any, Any]]:
    """What `CatalogEntry.parts` and the job's own differ in. What follows from another difference is left out."""
    was, now = _flat(entry.parts), _flat(job.parts)
    differences = {
        _WORDS.get(name, name.replace(".", " ")): (was.get(name), now.get(name))
        for name in {**was, **now}
        if was.get(name) != now.get(name)
    }
    if "engine" in differences:
        differences.pop("grammar", None)  # how the engine gets the schema
    if "endpoint" in differences and entry.model == job.name and "model revision" not in differences:
        differences.pop("model", None)  # an endpoint's model is called by its address
    if "model" in differences:
        differences.pop("model revision", None)
    return differences


def _flat(parts: Mapping[str, Any]) -> dict[str, Any]:
    """`parts` with the groups `model` and `sampling` taken apart."""
    flat: dict[str, Any] = {}
    for name, value in parts.items():
        flat |= {f"{name}.{field}": item for field, item in value.items()} if name in ("model", "sampling") else {name: value}
    return flat


def _places(was: Any, now: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    """Where two schemas differ, with the differing parts."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for name in {**was, **now}:
            if was.get(name) != now.get(name):
                yield from _places(was.get(name), now.get(name), f"{place}.{name}".lstrip("."))
    else:
        yield place, was, now


def _lines(was: str, now: str) -> tuple[str, str]:
    """The lines of two prompts that are in one of them only."""
    found = list(difflib.ndiff(was.splitlines(), now.splitlines()))
    sides = ([line[2:].strip() for line in found if line.startswith(mark)] for mark in ("- ", "+ "))
    first, second = ("\n".join(lines[:_LINES]) for lines in sides)
    return first, second


def _short(value: Any) -> str:
    shown = str("none" if value is None else value)
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + "…"
