"""How full an engine was, and how much of its prompts it found in its cache: a few sums per engine step.

In: after each step how many rows it moved on, the time since the step before and whether rows were still waiting to be
asked; prompt tokens of each finished row. Out: `figures`. Occupancy says whether long answers leave the engine idle at
the end of a batch: with a source that never stops, a row that finishes is replaced in the next step. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Load:
    """Sums since the engine started. `slots`: rows it can decode together."""

    slots: int
    steps: int = 0
    time_s: float = 0.0
    row_s: float = 0.0  # rows x seconds
    fed_s: float = 0.0  # the same two while the source still had rows
    fed_row_s: float = 0.0
    core_s: float = 0.0  # in the engine's core, or waiting for it
    rows: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def step(self, rows: int, seconds: float, core_seconds: float, fed: bool) -> None:
        """A step moved `rows` on; it ended `seconds` after the one before, of which the core took `core_seconds`."""
        self.steps += 1
        self.time_s += seconds
        self.row_s += rows * seconds
        self.core_s += core_seconds
        if fed:
            self.fed_s += seconds
            self.fed_row_s += rows * seconds

    def row(self, prompt_tokens: int, cached_tokens: int) -> None:
        """A row finished."""
        self.rows += 1
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens

    def figures(self) -> dict[str, float | int]:
        """Shares 0..1. `core_share`: of the time, in the engine's core; the rest is ours and the caller's."""
        return {
            "steps": self.steps,
            "engine_rows": self.rows,
            "occupancy": _share(self.row_s, self.slots * self.time_s),
            "occupancy_fed": _share(self.fed_row_s, self.slots * self.fed_s),
            "core_share": _share(self.core_s, self.time_s),
            "prefix_hit_rate": _share(self.cached_tokens, self.prompt_tokens),
        }


def _share(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole else 0.0
