"""The tier of the realtime student: its text, parsed and checked against the task's schema here, in the front.

In: a miss. Out: the student's reply, with its confidence calibrated where the release knows how; Unsure when the release's threshold does
not cover it. The calibration of a release holds for its own student alone: another one's confidence goes out as it is. Knows
nothing of the link or of bigger models.
"""

from __future__ import annotations

from headtail.core.rows import Source
from headtail.stages.serve.answerer import ANY_RELEASE, AskStudent, Miss, Reply, Tier, Unsure, model_reply, read_answer


class StudentTier(Tier):
    """The student. `threshold`: least confidence, as answers show it, over the release's own threshold; None: the release's holds."""

    def __init__(self, ask: AskStudent, threshold: float | None = None) -> None:
        self._ask, self._threshold = ask, threshold

    async def answer(self, miss: Miss, reason: str) -> Reply | None:
        """See Tier."""
        realtime, release = await self._ask(miss), miss.served.release
        answer, raw = read_answer(miss, realtime), realtime.confidence
        known = release.calibration if realtime.stands_for == release.student else None
        shown = known.map.apply(raw) if known is not None and known.map is not None and raw is not None else raw
        note = "" if realtime.stands_for in (release.student, ANY_RELEASE) else "previous_student"
        reply = model_reply(miss, realtime, answer, Source.REALTIME_STUDENT, shown, note)
        if self._threshold is not None:
            sure = shown is not None and shown >= self._threshold
        else:
            sure = known is None or known.threshold is None or known.is_sure(raw)
        if not sure:
            raise Unsure(reply)
        return reply
