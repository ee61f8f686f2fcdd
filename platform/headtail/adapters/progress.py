"""Progress for people: one line per stage, a bar with rows, rate and time left on long work.

On a terminal the bar moves; elsewhere (CI, `ray job submit`) a plain line is printed after 10 s, 30 s, 90 s, ...: six in two
hours, twelve in three weeks. `headtail status` says more at any time.
`quiet()` turns it off for tests and `--json`. Progress goes to stderr, so that stdout holds nothing but what a command was asked for.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.control import Control
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment

# Text of users reaches every table: no markup in it is heeded, and `_Visible` leaves none of their control characters to the terminal.
console = Console(stderr=True, highlight=False, markup=False, emoji=False)
answers = Console(highlight=False, markup=False, emoji=False)  # what a command was asked for: stdout, `quiet` or not
_UNSEEN = {**dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\ufffd"), 0x2028: " ", 0x2029: " "}
_UNSEEN |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C), "\ufffd")  # they turn text around
_FIRST_PLAIN_S = 10.0  # of a bar without a terminal, to its first line; each further line comes after three times as long
_WINDOW_S = 60.0
_SEEN_S = 2.0  # of progress, before a time left is shown


def printable(text: str) -> str:
    """`text` with no character that a terminal would act on, but for tabs and new lines."""
    return text.translate(_UNSEEN)


class _Visible(RenderHook):
    """All that is printed, with its text made printable; the console's own codes are not text."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [item if isinstance(item, Control) else _Printable(item) for item in renderables]


class _Printable:
    def __init__(self, inner: ConsoleRenderable) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.inner, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


for _each in (console, answers):
    _each.push_render_hook(_Visible())


class ProgressRate:
    """Units per second over the last minute, from the first progress on: starting up and what was done before do not count."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def see(self, now: float, done: int) -> None:
        """`done` units at `now`, in seconds."""
        points = self._points
        if len(points) == 1 and points[0][1] == done:
            points.clear()  # nothing has moved yet
        points.append((now, done))
        while len(points) > 2 and now - points[1][0] > _WINDOW_S:
            points.popleft()

    @property
    def rate(self) -> float:
        """Units per second; 0 before anything moved."""
        (begun, first), (now, last) = (self._points[0], self._points[-1]) if self._points else ((0.0, 0), (0.0, 0))
        return (last - first) / (now - begun) if last > first and now > begun else 0.0

    def seconds_left(self, total: int) -> float | None:
        """Seconds to `total`; None while too little was seen to say."""
        if not self.rate or self._points[-1][0] - self._points[0][0] < _SEEN_S:
            return None
        return max(0, total - self._points[-1][1]) / self.rate


class Bar:
    """A bar over `total` units. `advance(n)` adds, `update(done)` sets."""

    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done, self._pace = 0, ProgressRate()
        now = time.monotonic()
        self._pace.see(now, 0)
        self._wait, self._due = _FIRST_PLAIN_S, now + _FIRST_PLAIN_S
        self.rich: Progress | None = None
        if console.is_terminal:
            self.rich = Progress(
                SpinnerColumn(),
                TextColumn("{task.description:<28}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=console,
                transient=True,
            )
            self._task = self.rich.add_task(label, total=total, rate="", left="")

    def advance(self, n: int = 1) -> None:
        self.update(self.done + n)

    def begin(self, done: int) -> None:
        """Units that an earlier run has done: shown, but no part of this run's pace."""
        self.done, self._pace = done, ProgressRate()
        self.update(done)

    def update(self, done: int) -> None:
        """Set the units done so far."""
        now, self.done = time.monotonic(), done
        self._pace.see(now, done)
        rate = format_rate(self._pace.rate, self.unit)
        seconds = self._pace.seconds_left(self.total) if self.total else None
        if self.rich is not None:
            self.rich.update(self._task, completed=done, rate=rate, left="" if seconds is None else f"{format_time_left(seconds)} left")
        elif now >= self._due and not console.quiet:
            self._wait, self._due = 3 * self._wait, now + 2 * self._wait
            of = f"/{self.total:,}" if self.total else ""
            tail = ", ".join(filter(None, [rate, "" if seconds is None else f"{format_time_left(seconds)} left"]))
            print(f"  {self.label}: {done:,}{of} {self.unit}{', ' + tail if tail else ''}", file=sys.stderr, flush=True)


def format_rate(rate: float, unit: str) -> str:
    """A rate for people: `380 rows/s`, `0.42 rows/s`, `55 s a row`; nothing for none."""
    if not rate:
        return ""
    one = unit.removesuffix("s")
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s" if rate >= 0.2 else f"{1 / rate:,.0f} s a {one}"


def format_time_left(seconds: float) -> str:
    """A time left for people: `8 s`, `4 min`, `2.5 h`, `3.1 days`."""
    for size, name in ((86_400.0, "days"), (3_600.0, "h")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


@contextmanager
def progress_bar(label: str, total: int | None, unit: str = "rows") -> Iterator[Bar]:
    """A bar for the length of a `with` block."""
    new_bar = Bar(label, total, unit)
    if new_bar.rich is None:
        yield new_bar
        return
    with new_bar.rich:
        yield new_bar


def say(text: str) -> None:
    """One line for the person watching."""
    console.print(text, soft_wrap=True)


def quiet(on: bool = True) -> None:
    """Silence bars and lines."""
    console.quiet = on
