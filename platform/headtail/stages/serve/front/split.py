"""While a canary runs: which release answers a query, and the outcome of the answer, for the comparison.

In: the canary's record, its release, opened; outcomes of answers. Out: the release for each query, the same one every time; counts of
both releases in the shared counters. A query counts once, whichever process answers it first. Knows nothing of HTTP or of tests.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from headtail.core.keys import query_key
from headtail.releases.canary import CanaryRecord, SeenQueries, assign
from headtail.releases.overrides import Overrides
from headtail.stages.serve.answerer import OpenRelease
from headtail.stages.serve.front.counters import Counters


@dataclass(frozen=True)
class CanarySplit:
    """A canary that runs. Replaced as a whole, like the release itself."""

    record: CanaryRecord
    canary: OpenRelease
    seen: SeenQueries
    counters: Counters

    def choose(self, clean: str, champion: OpenRelease) -> OpenRelease:
        """The release that answers a clean query; always `champion` when CURRENT has moved since the canary began."""
        chosen = assign(self.record, query_key(clean), champion.release.id)
        return self.canary if chosen == self.canary.release.id else champion

    def count(self, clean: str, release: str, seconds: float, degraded: bool, failed: bool = False) -> None:
        """Count an answer of `release`, unless its query was counted before."""
        arm = "canary" if release == self.record.canary else "champion" if release == self.record.champion else ""
        if not arm or not self.seen.add(query_key(clean)):
            return
        self.counters.add(f"arm/{arm}/queries")
        outcomes = {"errors": failed, "degraded": degraded, "slow": 1000 * seconds > self.record.policy.slow_ms}
        for kind, bad in outcomes.items():
            if bad:
                self.counters.add(f"arm/{arm}/{kind}")

    def with_overrides(self, overrides: Overrides) -> CanarySplit:
        """The same split, with people's newer overrides."""
        return dataclasses.replace(self, canary=dataclasses.replace(self.canary, overrides=overrides))
