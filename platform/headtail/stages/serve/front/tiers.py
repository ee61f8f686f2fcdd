"""The way of a miss, as the list of its tiers: the one place where they are named.

In: the config, the link to the models, the folder that the server's processes share. Out: the tiers, in the order in which they are asked.
To add one: a file with a class that is a `Tier`, and a line here. Knows nothing of how a tier answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from headtail.stages.serve.answerer import Tier
from headtail.stages.serve.budget import EscalationBudget
from headtail.stages.serve.config import Config
from headtail.stages.serve.dynamic import DynamicTier, open_answers
from headtail.stages.serve.escalation import EscalationTier
from headtail.stages.serve.front.counters import Counters
from headtail.stages.serve.front.link import StudentLink
from headtail.stages.serve.run_folder import BUDGET
from headtail.stages.serve.student_tier import StudentTier
from headtail.stages.serve.tracing import TracedStudent


def open_tiers(config: Config, link: StudentLink | None, folder: Path, counters: Counters | None = None) -> list[Tier]:
    """Where misses go."""
    return list(_tiers(config, link, folder, counters)) if link is not None else []


def _tiers(config: Config, link: StudentLink, folder: Path, counters: Counters | None) -> Iterator[Tier]:
    bigger = config.escalation
    if config.dynamic.enabled:
        yield DynamicTier(open_answers(config.dynamic), config.dynamic.ttl_s, keeps_unsure=not bigger.enabled)
    yield StudentTier(TracedStudent(link.ask, config.traces.texts) if config.traces.endpoint else link.ask, bigger.threshold)
    if bigger.enabled:
        budget = EscalationBudget(folder / BUDGET, bigger.per_minute, bigger.usd_per_hour, bigger.usd_per_day)
        yield EscalationTier(link.ask_bigger, bigger, budget, counters)
