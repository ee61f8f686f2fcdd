"""Shadow mode: a sample of the answers that were given is asked again of another model, such as the teacher, off the way of requests.

In: the settings. Out: what a front hands over (ShadowSample), what an answer of the model costs. The front writes a sample into a pipe and
goes on; `shadow_asker`, a process of its own, asks. Knows nothing of pipes or engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import Field

from headtail.core.config import Config
from headtail.core.errors import ConfigError
from headtail.engines import ModelConfig


class ShadowModel(ModelConfig):
    """The model that is asked. `model` empty: none is."""

    model: str = Field("", description="empty: shadow mode is off; else the model that is asked, such as the teacher's")


class ShadowConfig(Config):
    """Which answers are asked again, of which model, and what it may cost."""

    model: ShadowModel = Field(ShadowModel(), description="the model and its engine; it needs a price")
    share_hits: float = Field(0.0, ge=0, le=1, description="share of the answers of the snapshot that are asked again")
    share_misses: float = Field(0.01, ge=0, le=1, description="share of the other answers that are asked again, fallbacks included")
    usd_per_day: float = Field(
        1.0, ge=0, description="USD that it may cost on a day (UTC); what the store holds of the day at the start counts"
    )

    @property
    def is_on(self) -> bool:
        """Whether anything is asked."""
        return bool(self.model.model) and (self.share_hits > 0 or self.share_misses > 0)

    def price(self, tokens_in: float, tokens_out: float, seconds: float = 0.0) -> float:
        """USD of so many tokens, and seconds of the model's machine."""
        tokens = tokens_in * self.model.usd_per_million_tokens_in + tokens_out * self.model.usd_per_million_tokens_out
        return tokens / 1e6 + seconds / 3600 * self.model.usd_per_hour


class ShadowSample(NamedTuple):
    """An answer that was given. `time`: microseconds since 1970; `answer`: JSON as it was sent; `query`: clean."""

    time: int
    request_id: str
    query: str
    release: str
    source: str
    cached: bool
    degraded: bool
    answer: str
    confidence: float | None
    side_inputs: Mapping[str, Sequence[str]]


def check_shadow(config: ShadowConfig) -> None:
    """ConfigError when the budget cannot be kept, since no price is known."""
    model = config.model
    if config.is_on and not (model.usd_per_hour or model.usd_per_million_tokens_in or model.usd_per_million_tokens_out):
        fix = "set shadow.model.usd_per_million_tokens_in and _out; for a model of your own shadow.model.usd_per_hour"
        raise ConfigError("a budget a day needs the model's price", where="shadow.model", value=model.model, fix=fix)
