"""The tier of the bigger model: it is asked where the student is unsure or failed on the query, within a budget.

In: a miss, and why the student has no answer that may go out. Out: the bigger model's reply, or None: then the student's own answer goes
out as `unsure`, or the fallback. What happened to each escalation is counted. The model runs in a process of its own and is connected as
students are. Knows nothing of engines or of the budget's file.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from pydantic import Field, model_validator

from headtail.core.config import Config, execution
from headtail.core.rows import Source
from headtail.core.secrets import hide
from headtail.engines import ModelConfig
from headtail.stages.serve.answerer import Miss, MissFailed, RealtimeReply, Reply, Tier, guard_reply, model_reply, read_answer
from headtail.stages.serve.budget import EscalationBudget
from headtail.stages.serve.front.counters import Counters

log = logging.getLogger("headtail.serve")
# Failures that the query may have caused. Failures of the student's process are left out: they would send every miss to the bigger model.
CAUSES = ("unsure", "invalid", "truncated", "withheld")
_NOT_SENT = ("unavailable", "outdated", "overloaded")  # never reached the model, so it cost nothing


class EscalationModel(ModelConfig):
    """The engine of the bigger model. `model` empty: none."""

    model: str = Field("", description="the bigger model, in a process here or behind an endpoint; empty: nothing is escalated")


class EscalationConfig(Config):
    """A bigger model for the misses of which the student is unsure, and what it may cost."""

    model: EscalationModel = Field(EscalationModel(), description="the bigger model and its engine")
    timeout_ms: int = Field(
        5000, ge=1, le=600_000, description="milliseconds that an unsure answer waits for the bigger model, after the student's"
    )
    threshold: float | None = Field(
        None,
        ge=0,
        le=1,
        description="confidence, as answers show it, below which the student is unsure; null: the release's threshold holds",
    )
    per_minute: int = execution(60, "escalations per minute, over all front processes of this node; 0: no limit", ge=0)
    usd_per_hour: float = execution(0.0, "USD per hour that escalations may cost on this node; 0: no limit", ge=0)
    usd_per_day: float = execution(0.0, "USD per day (UTC) that escalations may cost on this node; 0: no limit", ge=0)
    max_waiting: int = execution(
        16, "escalations of one front process that may wait at once; the next one keeps the student's answer", ge=1
    )
    replicas: int = execution(1, "engines of the bigger model", ge=1)

    @property
    def enabled(self) -> bool:
        """Whether there is a bigger model."""
        return bool(self.model.model)

    @model_validator(mode="after")
    def _priced(self) -> EscalationConfig:
        prices = (self.model.usd_per_hour, self.model.usd_per_million_tokens_in, self.model.usd_per_million_tokens_out)
        if (self.usd_per_hour or self.usd_per_day) and not any(prices):
            raise ValueError(
                "a budget in USD needs a price: set model.usd_per_million_tokens_in and model.usd_per_million_tokens_out, or "
                "model.usd_per_hour for a machine of your own; or set per_minute alone"
            )
        return self

    def price(self, tokens_in: int, tokens_out: int, seconds: float) -> float:
        """USD of one answer: its tokens, and the machine's time."""
        model = self.model
        tokens = tokens_in * model.usd_per_million_tokens_in + tokens_out * model.usd_per_million_tokens_out
        return tokens / 1e6 + seconds / 3600 * model.usd_per_hour


class AskBigger(Protocol):
    """How the bigger model is asked; it may take `seconds`. MissFailed when it cannot answer."""

    async def __call__(self, miss: Miss, seconds: float) -> RealtimeReply: ...


class EscalationTier(Tier):
    """The bigger model, with a time limit of its own."""

    own_limit = True

    def __init__(self, ask: AskBigger, config: EscalationConfig, budget: EscalationBudget, counters: Counters | None = None) -> None:
        self._ask, self._config, self._budget, self._counters = ask, config, budget, counters
        self.waiting = 0

    async def answer(self, miss: Miss, reason: str) -> Reply | None:
        """See Tier."""
        if reason not in CAUSES:
            return None
        outcome = await self._escalate(miss)
        if isinstance(outcome, str):
            self._count(outcome)
            return None
        self._count("answered")
        return outcome

    async def _escalate(self, miss: Miss) -> Reply | str:
        """The bigger model's reply, or one of ESCALATION_RESULTS."""
        if self.waiting >= self._config.max_waiting:
            return "overloaded"
        reservation = self._budget.reserve()
        if reservation is None:
            return "budget"
        self.waiting += 1
        usd = reservation.usd  # counted as paid: an endpoint bills for a call that was cancelled too
        try:
            realtime = await self._ask_in_time(miss)
            usd = self._config.price(realtime.tokens_in, realtime.tokens_out, realtime.seconds)
            reply = model_reply(miss, realtime, read_answer(miss, realtime), Source.ESCALATED, realtime.confidence)
            return guard_reply(miss, reply) or reply
        except MissFailed as failure:
            usd = 0.0 if failure.reason in _NOT_SENT else usd
            return failure.reason
        except TimeoutError:
            return "timeout"
        except asyncio.CancelledError:
            self._count("left")
            raise
        except Exception as error:
            log.warning("an escalation failed: %s: %s", type(error).__name__, hide(str(error))[:300])
            return "error"
        finally:
            self.waiting -= 1
            self._budget.charge(reservation, usd)
            if self._counters is not None:
                self._counters.add("escalation_nanousd", round(usd * 1e9))

    async def _ask_in_time(self, miss: Miss) -> RealtimeReply:
        seconds = self._config.timeout_ms / 1000
        async with asyncio.timeout(seconds):
            return await self._ask(miss, seconds)

    def _count(self, result: str) -> None:
        if self._counters is not None:
            self._counters.add(f"escalation/{result}")
