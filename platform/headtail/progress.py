"""Progress for people: one line per station, a bar with rows, rate and time left on long work.

On a terminal the bar moves; elsewhere (CI, `ray job submit`) a plain line is printed every few seconds.
`quiet()` turns it off for tests and `--json`. Writes to stderr only.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)
_PLAIN_EVERY_S = 10.0


class Bar:
    """A bar over `total` units. `advance(n)` adds, `update(done)` sets."""

    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self.started, self._said = 0, time.monotonic(), time.monotonic()
        self.rich: Progress | None = None
        if console.is_terminal:
            self.rich = Progress(
                SpinnerColumn(),
                TextColumn("{task.description:<28}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self.rich.add_task(label, total=total, rate="")

    def advance(self, n: int = 1) -> None:
        self.update(self.done + n)

    def update(self, done: int) -> None:
        """Set the units done so far."""
        self.done = done
        elapsed = time.monotonic() - self.started
        rate = done / elapsed if elapsed > 0 else 0.0
        if self.rich is not None:
            self.rich.update(self._task, completed=done, rate=f"{rate:,.0f} {self.unit}/s")
        elif time.monotonic() - self._said > _PLAIN_EVERY_S and not console.quiet:
            self._said = time.monotonic()
            left = f", {(self.total - done) / rate:,.0f} s left" if self.total and rate else ""
            of = f"/{self.total:,}" if self.total else ""
            print(f"  {self.label}: {done:,}{of} {self.unit}, {rate:,.0f}/s{left}", file=sys.stderr, flush=True)


@contextmanager
def bar(label: str, total: int | None, unit: str = "rows") -> Iterator[Bar]:
    """A bar for the length of a `with` block."""
    made = Bar(label, total, unit)
    if made.rich is None:
        yield made
        return
    with made.rich:
        yield made


def say(text: str) -> None:
    """One line for the person watching."""
    console.print(text, soft_wrap=True)


def quiet(on: bool = True) -> None:
    """Silence bars and lines."""
    console.quiet = on
