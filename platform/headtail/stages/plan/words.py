"""What was decided, in sentences, and the outlook as JSON.

In: a HeadChoice, costs, the coverage curve. Out: a Conclusion (sentences, the most important first) and a dictionary for a JSON file. Pure.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from headtail.stages.plan.choice import HeadChoice
from headtail.stages.plan.config import Config
from headtail.stages.plan.forecast import Forecast
from headtail.stages.plan.money import Costs, does_pay, stop_words, student_break_even, usd_words
from headtail.stages.plan.outlook import band_words, concentration, days_needed


class Conclusion(NamedTuple):
    """Whether it pays (None: not known), and all that was decided, in sentences; `headline`: those to act on at once."""

    pays: bool | None
    lines: tuple[str, ...]
    headline: tuple[str, ...]


def conclude(
    config: Config, costs: Costs, choice: HeadChoice, curve: dict[str, Any], queries: int, teacher: tuple[int, float | None]
) -> Conclusion:
    """The sentences of a plan. `teacher`: queries that it is asked, head, sample and labels together, and their USD (None: not known)."""
    outlook = choice.outlook
    pays, why = does_pay(*concentration(outlook.curve), choice.even, outlook.curve)
    band = _band(choice)
    stop = stop_words(choice.limit, int(choice.head.sum()), choice.steps, costs, choice.events)
    cost = _teacher_words(config, *teacher)
    lines = [*_expected(choice), *band, *_checked(config, choice, curve), why, stop, cost]
    lines += _training(config, costs, queries)
    lines += _unseen(choice)
    lines += _ages(config, choice)
    lines += _order(choice)
    if not config.rebuild and curve["holdout_events"]:
        lines.append("before the release that people use, choose the head again on all days: rebuild=true")
    return Conclusion(pays, tuple(lines), (*band, *([why] if pays is False else []), stop, cost))


def _expected(choice: HeadChoice) -> list[str]:
    expected, rows = choice.outlook.head[-1], int(choice.head.sum())
    what = f"a head of {rows:,} queries is expected to cover {expected.value:.1%} of the events"
    if not choice.dated:
        return [f"{what} of other traffic of this kind"]
    lines = [f"{what} of the next {_days(expected.horizon)} ({band_words(expected.low, expected.high)})"]
    if expected.season:
        lines.append("the same weekday's misses foretell later ones: the forecast has a weekly season")
    return lines


def _band(choice: HeadChoice) -> list[str]:
    """Why there is no band; nothing where there is one."""
    expected = choice.outlook.head[-1]
    if not choice.dated:
        return ["no band: the log has no days, so drift and ageing are not known either"]
    if expected.has_band:
        return []
    shorter = [one for one in choice.outlook.head if one.has_band]
    known = f"; {_short(shorter[-1])}" if shorter else ""
    return [f"no band: one for {_days(expected.horizon)} needs {days_needed(expected.horizon)} days of log before the head is built{known}"]


def _checked(config: Config, choice: HeadChoice, curve: dict[str, Any]) -> list[str]:
    came = curve["head"]["share_holdout"]
    if came is None:
        return []
    if config.rebuild:
        return [f"a head chosen before the held-out days covered {came:.1%} of them; then it was chosen again on all days"]
    if choice.outlook.checked is None:
        return [f"of held-out events it covered {came:.1%}"]
    forecast, share = choice.outlook.checked
    band = band_words(forecast.low, forecast.high)
    if forecast.low is not None and forecast.high is not None:
        band += ": inside" if forecast.low <= share <= forecast.high else ": OUTSIDE the band"
    return [f"of the {_days(forecast.horizon)} held out it covered {came:.1%}; foretold were {forecast.value:.1%} ({band})"]


def _teacher_words(config: Config, asked: int, usd: float | None) -> str:
    what = f"the teacher is asked {asked:,} queries: head, sample and human labels"
    if usd is None:
        return f"{what}; what they cost is not known: set prices.teacher.usd_per_million, or prices.teacher.receipt"
    budget = "" if config.budget_usd is None else f" of a budget of {usd_words(config.budget_usd)}"
    return f"{what}; they cost {usd_words(usd)}{budget}"


def _training(config: Config, costs: Costs, queries: int) -> list[str]:
    even = student_break_even(costs, config.prices.training_usd)
    if even is None:
        return []
    verdict = "it pays" if queries > even else "it does not pay"
    return [f"training a batch student is cheaper than asking the teacher from {even:,} queries on; the log has {queries:,}: {verdict}"]


def _unseen(choice: HeadChoice) -> list[str]:
    seen = choice.outlook.all_seen
    low, high = (None, None) if seen.low is None or seen.high is None else (1 - seen.high, 1 - seen.low)
    lines = [f"{1 - seen.value:.1%} of events will be of queries never seen before ({band_words(low, high)}): no cache answers them"]
    if choice.dated and choice.outlook.new_queries is not None:
        lines.append(f"about {choice.outlook.new_queries:,.0f} new distinct queries are expected, if traffic stays as it is (no interval)")
    return lines


def _ages(config: Config, choice: HeadChoice) -> list[str]:
    replan = choice.outlook.replan
    if not choice.dated or replan.oldest < 2:
        return ["how a head ages is not known: that needs three days of log"]
    loss = f"{config.replan_loss:.1%} of events"
    if replan.days is None:
        return [f"plan anew: not yet due at {replan.oldest} days, the greatest age in the log; a head lost less than {loss} by then"]
    ranged = replan.soonest is not None and (replan.latest is not None or replan.oldest > replan.days)
    until = str(replan.latest) if replan.latest is not None else f"more than {replan.oldest}"
    spread = f" ({replan.soonest} to {until})" if ranged and (replan.soonest, replan.latest) != (replan.days, replan.days) else ""
    return [f"plan anew after {_days(max(1, replan.days))}{spread}: an older head loses more than {loss}"]


def _order(choice: HeadChoice) -> list[str]:
    if choice.ranking == "value":
        gain = "" if choice.gain is None else f", which covered {choice.gain:.1%} more of the log's later days than the order by count"
        return [f"queries are taken by the events expected of them{gain}"]
    return []


def _days(count: int) -> str:
    return "day" if count == 1 else f"{count} days"


def _short(one: Forecast) -> str:
    return f"for the next {_days(one.horizon)} it is {one.value:.1%} ({band_words(one.low, one.high)})"


def outlook_facts(choice: HeadChoice, costs: Costs, decision: Conclusion) -> dict[str, Any]:
    """All figures of the outlook; infinite and unknown ones are null."""
    outlook = choice.outlook

    def plain(rows: Any) -> list[dict[str, Any]]:
        return [{name: _finite(value) for name, value in row._asdict().items()} for row in rows]

    return {
        "horizon_days": outlook.horizon,
        "order": choice.ranking,
        "order_gain": choice.gain,
        "curve": plain(outlook.curve),
        "head": plain(outlook.head),
        "checked": None if outlook.checked is None else {**outlook.checked[0]._asdict(), "came": outlook.checked[1]},
        "unseen_share": 1 - outlook.all_seen.value,
        "new_queries": outlook.new_queries if choice.dated else None,
        "events": choice.events,
        "ages": plain(outlook.ages),
        "replan": outlook.replan._asdict(),
        "usd_per_answer": costs._asdict(),
        "steps": plain(choice.steps),
        "break_even_rows": choice.even,
        "pays": decision.pays,
        "decision": list(decision.lines),
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
