"""POST /v1/client/hits: hits that a client answered from its own copy of the snapshot, for /metrics. Counts alone; no query.

In: counts by source and latency of one release. Out: the same in the shared counters. Who has a key may send any counts: they say what
clients say, and nothing else is made of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from headtail.core.buckets import BUCKETS
from headtail.core.rows import Source
from headtail.stages.serve.answerer import Answerer
from headtail.stages.serve.errors import validation_error
from headtail.stages.serve.front.app import FrontRequest, FrontResponse, Route, json_response
from headtail.stages.serve.front.counters import Counters

_Count = Annotated[int, Field(ge=0, le=1_000_000_000)]


class ClientHits(BaseModel):
    """Local hits of one client since its last report."""

    model_config = ConfigDict(extra="forbid")
    release: str = Field(description="id of the release whose snapshot answered", pattern=r"^[0-9a-f]{1,64}$")
    hits: dict[Source, _Count] = Field(description="hits by source")
    seconds: list[_Count] = Field(
        description="hits by latency, as in headtail_request_seconds, not cumulated",
        min_length=len(BUCKETS) + 1,
        max_length=len(BUCKETS) + 1,
    )
    sum_s: float = Field(ge=0, le=1e9, description="sum of their seconds", allow_inf_nan=False)


class ClientHitRoutes:
    """The route."""

    def __init__(self, answerer: Answerer, counters: Counters) -> None:
        self._answerer, self._counters = answerer, counters

    @property
    def routes(self) -> Mapping[str, Route]:
        return {"/v1/client/hits": Route(("POST",), self._take, "answer")}

    async def _take(self, request: FrontRequest) -> FrontResponse:
        try:
            sent = ClientHits.model_validate_json(request.body)
        except ValidationError as error:
            raise validation_error(error) from None
        state = "current" if sent.release == self._answerer.served.release.id else "other"
        for source, count in sent.hits.items():
            self._counters.add(f"client/{state}/{source}", count)
        for at, count in enumerate(sent.seconds):
            self._counters.add(f"client_seconds/{at}", count)
        self._counters.add("client_microseconds", round(1e6 * sent.sum_s))
        return json_response({"request_id": request.request_id}, 202)
