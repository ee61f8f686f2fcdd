"""When a job stops before its end: too many errors, or its money or time is spent. Pure.

In: what workers have reported so far. Out: nothing, or why to stop. Finished rows are kept in both cases, and the next run
continues from there. Knows nothing of workers or clusters.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from headtail.core.intervals import clopper_pearson

UNPRICED = (
    "what the endpoint bills is not known: set model.usd_per_million_tokens_in and model.usd_per_million_tokens_out, or "
    "model.usd_per_hour for an endpoint of your own"
)
_SURE = 0.999  # confidence that the share of errors is above its limit before a job is stopped for it


@dataclass(frozen=True)
class Limits:
    """Bounds of one job. 0 in `usd` and `seconds` means no bound; prices are USD per worker hour and per million tokens."""

    failed_share: float = 1.0
    unanswered_share: float = 1.0
    usd: float = 0.0
    seconds: float = 0.0
    workers: int = 1
    usd_per_hour: float = 0.0
    usd_per_million_tokens_in: float = 0.0
    usd_per_million_tokens_out: float = 0.0
    priced: bool = True  # false: what an endpoint bills is not known, so no sum of money is

    def cost(self, progress: Mapping[str, float], wall: float) -> float:
        """USD: workers for `wall` seconds of this run, engine time of earlier runs (`before`), tokens of both."""
        seconds = wall * self.workers + progress.get("before", 0.0)
        return self.price(seconds, progress.get("tokens_in", 0.0), progress.get("tokens_out", 0.0))

    def price(self, seconds: float, tokens_in: float, tokens_out: float) -> float:
        """USD for `seconds` of a worker, and for tokens where a provider bills by them."""
        tokens = tokens_in * self.usd_per_million_tokens_in + tokens_out * self.usd_per_million_tokens_out
        return seconds / 3600 * self.usd_per_hour + tokens / 1e6

    def problem(self, progress: Mapping[str, float], wall: float) -> str:
        """Why the job should stop, or nothing.

        `progress`: rows `asked`, of them `errors`; rows `settled`, of them `unanswered`; tokens. The same with `again_` before the
        name: rows that failed in an earlier run, and say nothing about others. `kept`: rows that were finished before this run, of
        them `kept_failed` and `kept_unanswered`. `wall`: seconds of this run.
        """
        for limit, name, bad, total in (
            (self.failed_share, "max_failed_share", "errors", "asked"),
            (self.unanswered_share, "max_unanswered_share", "unanswered", "settled"),
        ):
            text = "requests ended in an error" if bad == "errors" else "rows ended without an answer (truncated, invalid, refused, failed)"
            if _surely_above(limit, some := progress.get(bad, 0.0), of := progress.get(total, 0.0)):
                return f"{some:,.0f} of {of:,.0f} {text}, more than {name}={limit:g}"
            kept = "kept_failed" if bad == "errors" else "kept_unanswered"
            some += progress.get(f"again_{bad}", 0.0) + progress.get(kept, 0.0)
            of += progress.get(f"again_{total}", 0.0) + progress.get("kept", 0.0)
            if _surely_above(limit, some, of):
                return f"{some:,.0f} of {of:,.0f} {text}, rows of earlier runs included, more than {name}={limit:g}"
        if self.seconds and wall >= self.seconds:
            return f"{math.ceil(wall):,} s have passed, budget_seconds={self.seconds:g} is spent"
        if self.usd and (usd := self.cost(progress, wall)) >= self.usd:
            return f"USD {usd:.4f} are spent, budget_usd={self.usd:g}"
        return ""


class FirstRows:
    """Whether the first rows that a job hands to its engine all ended without an answer. It counts rows in the order in which they are
    handed over, not in which they end: refusals end sooner than answers.

    `count`: rows after which the share of rows without an answer is above `limit` for certain; 0: never.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.count = 0 if limit >= 1 else math.floor(math.log(1 - _SURE) / math.log(limit)) + 1 if limit > 0 else 1
        self._first: set[Hashable] = set()
        self._open: set[Hashable] = set()

    def end(self) -> None:
        """Stop counting: a row has an answer, or the rows to be asked differ from the others."""
        self.count = 0

    def hand(self, row: Hashable) -> None:
        """A row goes to the engine."""
        if len(self._first) < self.count:
            self._first.add(row)
            self._open.add(row)

    def problem(self, row: Hashable) -> str:
        """Why the job should stop now that `row` has ended without an answer, or nothing."""
        self._open.discard(row)
        if not self.count or self._open or len(self._first) < self.count:
            return ""
        text = f"the first {self.count:,} rows all ended without an answer (truncated, invalid, refused, failed)"
        return f"{text}, more than max_unanswered_share={self.limit:g}"


def _surely_above(limit: float, some: float, total: float) -> bool:
    return bool(total) and some / total > limit and clopper_pearson(some, total, 2 * _SURE - 1)[0] > limit
