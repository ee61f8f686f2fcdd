"""The choice of a head: which queries come first, where the head ends, and what is expected of it.

In: LogQueries, the log's History, costs, limits. Out: a HeadChoice. Pure: it reads and writes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from headtail.core.count_classes import count_class
from headtail.core.errors import ConfigError, InputError
from headtail.core.intervals import Array
from headtail.stages.plan.config import Config
from headtail.stages.plan.forecast import Forecast, forecasts
from headtail.stages.plan.history import Cells, History, worth_of_queries
from headtail.stages.plan.money import Costs, CostStep, affordable, break_even, steps
from headtail.stages.plan.outlook import Outlook, better_order, expected_events, head_sizes, make_outlook
from headtail.stages.plan.queries import LogQueries
from headtail.stages.plan.selection import Ints, Mask, head_end


class HeadChoice(NamedTuple):
    """A head and its outlook. `order`: all queries in the order in which a head takes them; `end`: how many of them it looks at."""

    order: Ints
    ranking: str
    gain: float | None  # share of later events that the order by value covered more, in the log; None where that is not known
    end: int
    limit: str
    head: Mask
    outlook: Outlook
    dated: bool  # the log has days: without them nothing is known of drift, of days to come and of ages
    steps: list[CostStep]
    even: int | None  # queries at which the teacher breaks even

    @property
    def events(self) -> float | None:
        """Events of the horizon; None in a log without days."""
        return self.outlook.events if self.dated else None


def undated_history(queries: LogQueries) -> History:
    """A history of one nameless day, for a log without times: Good-Turing alone can be had from it."""
    classes = count_class(queries.counts) * 2 + queries.may
    known, group = np.unique(classes, return_inverse=True)
    rows = np.asarray(np.bincount(group, minlength=len(known)), np.float64)
    events = np.asarray(np.bincount(group, queries.counts, len(known)), np.float64)
    none = np.zeros(len(known), np.int64)
    cells = Cells(0, known // 2, none, known % 2 == 1, rows, events, np.zeros((len(known), 0)), np.zeros(0))
    return History((), (cells,))


class LabelMask(NamedTuple):
    """The queries with human labels, which the teacher is asked too: those of the log, and how many others."""

    mask: Mask
    unseen: int


def choose(
    config: Config, queries: LogQueries, history: History, origin: int, costs: Costs, labelled: LabelMask, dated: bool
) -> HeadChoice:
    """The head of `queries`, which are those up to the day at place `origin`.

    InputError when no query can be head, with the limit that says so; ConfigError for a budget without a price, or spent before the head.
    """
    by_count, limits, may = np.arange(len(queries.counts)), config.head, queries.may
    plain, _ = head_end(queries.counts, limits, may)
    ranking, gain = ("count", None) if not dated else better_order(history, origin, config.horizon_days, max(1, int(may[:plain].sum())))
    ranking = limits.order if limits.order != "auto" and dated else ranking
    usd = teacher_usd(config, queries, costs)
    order = by_count if ranking == "count" else _by_value(history, origin, queries, usd)
    counts, may = queries.counts[order], may[order]
    allowed = may & (counts >= limits.min_count)
    curve = curve_of(config, history, origin, ranking, int(allowed.sum()))
    spent = None if usd is None else np.cumsum(np.where(allowed, usd[order], 0.0))
    at = np.searchsorted(np.cumsum(allowed), [one.rows for one in curve]).clip(max=max(0, len(counts) - 1))
    events = expected_events(history, origin, config.horizon_days) if dated else None
    bought = steps(curve, costs, events, None if spent is None else spent[at])
    even = break_even(bought, costs, events)
    caps = {} if even is None or not limits.break_even else {"break_even": even}
    if config.budget_usd is not None:
        caps["budget"] = _budget_rows(config, usd, order[allowed], labelled)
    end, limit = head_end(counts, limits, may, caps)
    head = np.zeros(len(counts), bool)
    head[order[:end][allowed[:end]]] = True
    if not head.any():
        raise _no_head(config, limit, queries)
    outlook = make_outlook(history, origin, config.horizon_days, int(head.sum()), ranking, config.replan_loss)
    return HeadChoice(order, ranking, gain, end, limit, head, outlook, dated, bought, even)


def curve_of(config: Config, history: History, origin: int, ranking: str, most: int) -> list[Forecast]:
    """Forecasts for heads of 1 to `most` queries."""
    return forecasts(history, config.horizon_days, head_sizes(max(1, most), 1), origin, ranking)


def teacher_usd(config: Config, queries: LogQueries, costs: Costs) -> Array | None:
    """What the teacher costs for each query, in USD; None without its price."""
    if costs.teacher is None:
        return None
    further = 0.0 if queries.chars is None else config.prices.teacher_usd_per_million_chars / 1e6 * queries.chars
    return np.asarray(np.full(len(queries.counts), costs.teacher) + further)


def _by_value(history: History, origin: int, queries: LogQueries, usd: Array | None) -> Ints:
    """Queries by falling worth, per USD where they differ in price; equal ones by falling count, then key."""
    days = np.array([(day - history.epoch).days for day in history.days])
    idle = origin - (np.searchsorted(days, queries.last_days, side="right") - 1)
    worth = worth_of_queries(history, origin, queries.counts, np.maximum(idle, 0))
    return np.argsort(-(worth if usd is None or not usd.all() else worth / usd), kind="stable")


def bill(usd: Array, mask: Mask, unseen: int) -> float:
    """USD of the teacher's answers to these queries, each once, and to `unseen` ones that the log lacks, at the mean price."""
    return float(usd[mask].sum() + unseen * usd.mean()) if len(usd) else 0.0


def _budget_rows(config: Config, usd: Array | None, order: Ints, labelled: LabelMask) -> int:
    """Head queries that the budget buys, after the teacher's sample and the human labels: a labelled one is paid for already."""
    if usd is None:
        raise ConfigError(
            "a budget needs the teacher's price",
            where="budget_usd",
            value=config.budget_usd,
            fix="set prices.teacher.usd_per_million, or prices.teacher.receipt to a precompute receipt with a price",
        )
    assert config.budget_usd is not None
    sample = min(config.teacher_sample_rows, int((~labelled.mask).sum()))
    others = bill(usd, labelled.mask, labelled.unseen + sample)
    if others >= config.budget_usd:
        raise ConfigError(
            "the budget is spent before the head: the teacher's sample and the human labels cost more",
            where="budget_usd",
            value=f"{config.budget_usd:,.2f}; they cost {others:,.2f}",
            fix="raise it, or lower teacher_sample_rows",
        )
    return affordable(np.where(labelled.mask, 0.0, usd)[order], config.budget_usd - others)


def _no_head(config: Config, limit: str, queries: LogQueries) -> InputError:
    counts = queries.counts
    if limit == "break_even":
        return InputError(
            "no head pays: not even the most frequent queries save what the teacher costs within horizon_days",
            where="prices",
            value=f"teacher {config.prices.teacher}, realtime student {config.prices.realtime_student}",
            fix="let the realtime student answer; or set horizon_days or prices.hit_value_usd_per_million higher, or head.break_even=false",
        )
    return InputError(
        "the head is empty: no query is frequent enough",
        where="head.min_count",
        value=f"{config.head.min_count}; the most frequent query has {counts[0] if len(counts) else 0} events",
        fix="set head.min_count lower (1 takes every query), or ingest a longer log",
    )
