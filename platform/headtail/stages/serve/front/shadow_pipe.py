"""The near end of shadow mode: a sample of the answers that were given, into a pipe that never makes a request wait.

In: answers. Out: a line (see `line_pipe`) for each that is drawn; one that finds the pipe full, or is too long, is dropped and counted. The
pipe is the whole queue: 64 KiB. `shadow_asker` reads the far end.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence

from headtail.stages.serve.answerer import Reply
from headtail.stages.serve.front.counters import Counters
from headtail.stages.serve.front.hot import Hit
from headtail.stages.serve.line_pipe import write_line
from headtail.stages.serve.shadow import ShadowConfig, ShadowSample


class ShadowPipe:
    """Draws each answer with the share of its kind: a random sample of requests, so that frequent queries count as often as people ask."""

    def __init__(self, pipe: int, config: ShadowConfig, counters: Counters, draw: Callable[[], float] = random.random) -> None:
        self._pipe, self._config, self._counters, self._draw = pipe, config, counters, draw
        os.set_blocking(pipe, False)

    def offer_hit(self, request_id: str, hit: Hit) -> None:
        """An answer of the snapshot, or of a person."""
        if self._draw() < self._config.share_hits:
            found, answer = hit.found, hit.found.answer.decode()
            self._send(
                ShadowSample(_now(), request_id, hit.clean, hit.served.release.id, found.source, True, False, answer, found.confidence, {})
            )

    def offer_reply(self, reply: Reply, side_inputs: Mapping[str, Sequence[str]]) -> None:
        """Another answer. `side_inputs`: that came with the query."""
        if self._draw() < (self._config.share_hits if reply.cached else self._config.share_misses):
            answer = json.dumps(reply.answer, ensure_ascii=False)
            self._send(
                ShadowSample(
                    _now(), reply.request_id, reply.normalised, reply.release, reply.source, reply.cached, reply.degraded, answer,
                    reply.confidence, side_inputs,
                )
            )  # fmt: skip

    def _send(self, sample: ShadowSample) -> None:
        if not write_line(self._pipe, tuple(sample)):
            self._counters.add("shadow_dropped")


def _now() -> int:
    return int(time.time() * 1_000_000)
