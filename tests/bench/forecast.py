"""Whether the planner's bands hold on days that it never saw.

    python -m tests.bench.forecast [--seeds 10] [--bing FOLDER] [--out build/bench/forecast.json]

In: example data of several seeds and kinds of drift, made here; when given, the Bing Coronavirus query set by country and by state. Out: a
table and build/bench/forecast.json. A cell is (log, day of the forecast, horizon, head size); it holds when the share of the next
`horizon` days' events that the head covers lies in the 90 % band. Planner and constants see no day after the forecast's.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from headtail.core.keys import normalise, query_key
from headtail.examples import example_data
from headtail.stages.ingest.history import history_rules, merge_history, shard_history
from headtail.stages.ingest.tally import PART, sum_days
from headtail.stages.plan.forecast import forecasts
from headtail.stages.plan.history import History, read_history

from .machine import machine

OUT = Path("build/bench/forecast.json")
HORIZONS = (1, 2, 3, 7, 14)
SIZES = (100, 1_000, 10_000)
UNIVERSE = 20_000
SEEDS, DAYS, EVENTS_PER_DAY = 5, 64, 6000
SCORED_EVERY = 1
GROWTH = {"drift 1 %, traffic grows 5 % a day": 1.05}
KINDS: dict[str, tuple[dict[str, float], dict[str, float], Callable[[int], bool]]] = {
    # what changes of example data from the default; what changes further, and on which days
    "drift 1 %, traffic grows 5 % a day": ({"drift": 0.01}, {}, lambda day: False),
    "no drift": ({}, {}, lambda day: False),
    "drift 1 % a day": ({"drift": 0.01}, {}, lambda day: False),
    "drift 3 % a day": ({"drift": 0.03}, {}, lambda day: False),
    "drift 10 % a day": ({"drift": 0.1}, {}, lambda day: False),
    "drift 1 %, from day 32 on 5 %": ({"drift": 0.01}, {"drift": 0.05}, lambda day: day >= 32),
    "weekends with three times the new queries": ({"drift": 0.01}, {"unseen_share": 0.18}, lambda day: day % 7 >= 5),
}


class Log(NamedTuple):
    """A log's family, its name and its history."""

    family: str
    name: str
    history: History


def history_of(counts: Mapping[tuple[str, int], int]) -> History:
    """From events by query and day, the way ingest does it."""
    keys = {query: query_key(query) for query, _ in counts}
    columns = [[keys[query] for query, _ in counts], [query for query, _ in counts], [day for _, day in counts], list(counts.values())]
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, PART, strict=True)], schema=PART)
    rules = history_rules(Counter(table["day"].to_pylist()))
    return read_history(merge_history([shard_history(sum_days(table), rules)]), redacted=False)


def example_counts(kind: str, seed: int, days: int, events: int) -> dict[tuple[str, int], int]:
    """Events by query and day of example data; a meaning and its spelling stand for the text."""
    base, further, when = KINDS[kind]
    config = example_data.Config(seed=seed, days=days, events=events, universe=UNIVERSE).model_copy(update=base)
    draws = example_data._Draws(config)
    counts: dict[tuple[str, int], int] = {}
    first = (config.start - datetime.date(1970, 1, 1)).days
    for day in range(days):
        draws.config = config.model_copy(update=further if when(day) else {})
        draws.start_day(day)
        found, each = np.unique(draws.take(round(events / days * GROWTH.get(kind, 1.0) ** (day - days / 2))), return_counts=True)
        counts |= {(str(name), first + day): int(n) for name, n in zip(found.tolist(), each.tolist(), strict=True)}
    return counts


def bing_logs(folder: Path) -> Iterator[Log]:
    """The world by country and by state, and the places with the most rows; popularity (1 to 100 per day and place) as a count."""
    for family, file, place in (("Bing by country", "QueriesByCountry*.tsv", "Country"), ("Bing by state", "QueriesByState*.tsv", "State")):
        world: Counter[tuple[str, int]] = Counter()
        places: dict[str, Counter[tuple[str, int]]] = defaultdict(Counter)
        for path in sorted(folder.glob(file)):
            with path.open(encoding="utf-8", newline="") as lines:
                for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
                    day = (datetime.date.fromisoformat(row["Date"]) - datetime.date(1970, 1, 1)).days
                    name = (normalise(row["Query"]), day)
                    world[name] += int(row["PopularityScore"])
                    places[row[place]][name] += int(row["PopularityScore"])
        yield Log(family, "all places", history_of(world))
        for largest in sorted(places, key=lambda one: -len(places[one]))[:3]:
            yield Log(family, largest, history_of(places[largest]))


def cells(log: Log, sizes: Sequence[int] = SIZES, ranking: str = "count") -> Iterator[dict[str, Any]]:
    """Every forecast that could be made and scored within the log: those with a band hold or do not."""
    history = log.history
    for horizon in HORIZONS:
        for origin in range(history.last - horizon + 1):
            known = history.curve(origin, ranking)
            most = int(known.queries[-1])
            heads = np.array([size for size in sizes if size < most] + [most])
            came, total = known.arrivals(heads, horizon)
            if total <= 0:
                continue
            for forecast, events in zip(forecasts(history, horizon, heads, origin, ranking), came.tolist(), strict=True):
                share = events / total
                row = {"family": log.family, "log": log.name, "origin": str(history.days[origin]), "horizon": horizon}
                row |= {"rows": forecast.rows if forecast.rows != most else "all seen", "value": forecast.value, "came": share}
                row |= {"stationary": forecast.stationary, "low": forecast.low, "high": forecast.high, "independent": forecast.independent}
                yield row | {"holds": None if forecast.low is None or forecast.high is None else forecast.low <= share <= forecast.high}


def share(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Cells with a band, the share that holds, the median width of a band and the mean distance of the estimates."""
    banded = [row for row in rows if row["holds"] is not None]
    if not banded:
        return {"cells": 0, "without_band": len(rows)}
    return {
        "cells": len(banded),
        "without_band": len(rows) - len(banded),
        "in_band": round(float(np.mean([row["holds"] for row in banded])), 4),
        "width": round(float(np.median([row["high"] - row["low"] for row in banded])), 4),
        "error": round(float(np.mean([abs(row["value"] - row["came"]) for row in banded])), 4),
        "good_turing_over": round(float(np.mean([row["stationary"] - row["came"] for row in banded])), 4),
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Shares of all cells, by family, by horizon, by head size, and by log; `forecast_in_band` is of all."""
    found: dict[str, Any] = {"forecast_in_band": share(rows).get("in_band"), "all": share(rows)}
    for name, keys in {
        "family": ("family",),
        "horizon": ("family", "horizon"),
        "rows": ("family", "rows"),
        "log": ("family", "log"),
    }.items():
        groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for row in rows:
            groups[" / ".join(str(row[key]) for key in keys)].append(row)
        found[f"by_{name}"] = {group: share(members) for group, members in groups.items()}
    found["least_family"] = min((one["in_band"] for one in found["by_family"].values() if one["cells"]), default=None)
    return found


def example_cells(seeds: int, days: int, events_per_day: int) -> list[dict[str, Any]]:
    """The cells of all kinds of example data; a line for each kind as it is done."""
    rows = []
    for kind in KINDS:
        for seed in range(seeds):
            history = history_of(example_counts(kind, seed, days, days * events_per_day))
            rows += list(cells(Log(kind, f"seed {seed}", history)))
        print(json.dumps({kind: share([row for row in rows if row["family"] == kind])}), flush=True)
    return rows


def forecast_numbers() -> dict[str, float | None]:
    """For tests.bench.numbers: the share of all cells that hold, and that of the worst kind of example data."""
    found = summary(example_cells(SEEDS, DAYS, EVENTS_PER_DAY))
    return {"forecast_in_band": found["forecast_in_band"], "forecast_in_band_least": found["least_family"]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.forecast", description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS, help="logs of each kind of example data")
    parser.add_argument("--days", type=int, default=DAYS)
    parser.add_argument("--events-per-day", type=int, default=EVENTS_PER_DAY)
    parser.add_argument("--bing", type=Path, help="folder with QueriesByCountry*.tsv and QueriesByState*.tsv")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    rows = example_cells(asked.seeds, asked.days, asked.events_per_day)
    for log in bing_logs(asked.bing) if asked.bing else ():
        rows += list(cells(log))
        print(json.dumps({f"{log.family}, {log.name}": share([row for row in rows if (row["family"], row["log"]) == log[:2]])}), flush=True)
    found = {**summary(rows), "settings": {name: str(value) for name, value in vars(asked).items()}, **machine()}
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"forecast_in_band": found["forecast_in_band"], "least_family": found["least_family"]}))


if __name__ == "__main__":
    main()
