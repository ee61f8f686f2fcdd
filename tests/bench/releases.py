"""How often a canary that is no worse is taken back, and how many queries it takes to catch one that is: by simulation.

    python -m tests.bench.releases           # make simulate-releases: build/bench/releases.json

In: traffic of two releases whose rates of bad outcomes are set. Out: shares of watches that ended in a false return, shares of regressions
that were caught within the promised number of queries. `twins` plays a power law of queries whose outcomes differ from query to query but
not between the releases: counted once a query the test keeps its promise, counted by request it does not.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from headtail.core.sequential import Array, Margins, Watch, paired_differences, pairs_to_catch, watch_differences

RATES = (0.01, 0.05, 0.2, 0.5)
REGRESSION = 0.02
BLOCK = 19  # requests of the champion for one of a canary with 5 % of the queries
MONTH = 300_000  # distinct queries that a canary meets in a month: one in nine seconds
WINDOWS = 720  # hours of a month
WINDOW = 2000  # queries; cut anywhere the result is the same, small arrays stay in the processor's cache


def differences(rng: np.random.Generator, new: Array | float, old: Array | float, pairs: int) -> Array:
    """Differences of one outcome of the canary and the mean of BLOCK of the champion; rates may differ from pair to pair."""
    return np.asarray((rng.random(pairs) < new) - rng.binomial(BLOCK, old, pairs) / BLOCK, np.float64)


def false_returns(
    watches: int, pairs: int, rate: float, more: float, margins: Margins, rng: np.random.Generator, daily: bool = False
) -> int:
    """How many of `watches` call a canary worse that has `more` bad outcomes, which is within the tolerance. `daily`: the rate moves."""
    hours = np.arange(pairs) * WINDOWS // pairs
    usual = rate * (1 + 0.9 * np.sin(2 * math.pi * hours / 24)) if daily else rate
    found = 0
    for _ in range(watches):
        watch = Watch()
        for window in np.array_split(differences(rng, usual + more, usual, pairs), max(1, pairs // WINDOW)):
            watch = watch_differences(watch, window, margins)
        found += watch.is_worse
    return found


def catches(watches: int, rate: float, margins: Margins, rng: np.random.Generator) -> tuple[int, int]:
    """(queries promised, watches of `watches` in which the regression was caught within them)."""
    promised = pairs_to_catch(rate, REGRESSION, margins, BLOCK)
    assert promised is not None
    found = (differences(rng, rate + REGRESSION, rate, promised) for _ in range(watches))
    return promised, sum(watch_differences(Watch(), drawn, margins).is_worse for drawn in found)


def twins(
    watches: int, requests: int, margins: Margins, rng: np.random.Generator, once: bool, share: float = 0.05, keys: int = 5000
) -> int:
    """How many watches call one of two equal releases worse. A query's outcome is its own; queries are split at random and stay there."""
    weights = np.arange(1, keys + 1, dtype=np.float64) ** -1.05
    weights /= weights.sum()
    found = 0
    for _ in range(watches):
        bad, canary = rng.random(keys) < 0.2, rng.random(keys) < share
        drawn = rng.choice(keys, size=requests, p=weights)
        if once:
            drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
        watch = Watch()
        for window in np.array_split(drawn, 50):
            outcomes, mine = bad[window].astype(np.float64), canary[window]
            watch = watch_differences(watch, paired_differences(outcomes[mine], outcomes[~mine]), margins)
        found += watch.is_worse
    return found


def at_most(found: int, watches: int) -> float:
    """Upper 95 % limit of a chance of which `found` cases were seen in `watches` (Clopper and Pearson 1934, one-sided)."""
    return 1.0 if found >= watches else float(stats.beta.ppf(0.95, found + 1, watches - found))


def at_least(found: int, watches: int) -> float:
    """Lower 95 % limit, likewise."""
    return 1 - at_most(watches - found, watches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--watches", type=int, default=1000, help="watches for each figure")
    parser.add_argument("--out", type=Path, default=Path("build/bench/releases.json"))
    args = parser.parse_args()
    watches, margins, rng, began = args.watches, Margins(), np.random.default_rng(7), time.monotonic()
    cells = (("equal", 0.0, False), ("at the tolerance", margins.tolerance, False), ("equal, rate moves daily", 0.0, True))
    result: dict[str, Any] = {"watches": watches, "pairs_in_a_month": MONTH, "margins": margins.model_dump()}
    result |= {"false_returns": {}, "caught": {}}

    def keep() -> None:
        result["seconds"] = round(time.monotonic() - began, 1)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    for rate in RATES:
        for name, more, daily in cells:
            found = false_returns(watches, MONTH, rate / (2 if daily else 1), more, margins, rng, daily)
            limit = at_most(found, watches)
            result["false_returns"][f"{rate:g}, {name}"] = {"found": found, "at_most": limit}
            print(f"rate {rate:g}, {name}: {found} false returns in {watches} months, one kind of outcome: at most {limit:.4f}", flush=True)
        promised, caught = catches(watches, rate, margins, rng)
        limit = at_least(caught, watches)
        result["caught"][f"{rate:g}"] = {"queries": promised, "caught": caught, "at_least": limit}
        print(
            f"{REGRESSION:.0%} more than {rate:g}: {caught} of {watches} caught within {promised:,} queries: at least {limit:.4f}",
            flush=True,
        )
        keep()
    found, months = sum(one["found"] for one in result["false_returns"].values()), watches * len(result["false_returns"])
    result["all_false_returns"] = {"found": found, "months": months, "at_most": at_most(found, months)}
    print(f"all: {found} false returns in {months:,} months: at most {at_most(found, months):.5f} (promised {margins.worse_level})")
    few = watches // 4
    for name, once in (("twins_once", True), ("twins_by_request", False)):
        found = twins(few, 60_000, margins, rng, once)
        result[name] = {"found": found, "watches": few, "at_most": at_most(found, few)}
        print(f"equal releases, power law, {name}: {found} of {few} called worse")
    keep()


if __name__ == "__main__":
    main()
