"""Requests through a server as a discrete-event simulation: fronts, dynamic tier, students, escalation, fallback.

In: arrivals, a design, service times, a seed. Out: for each request the way it took, why, how long it took and waited; for each kind of
process how busy it was. The rules are those of `serve`: `answerer` (limits, time limit), `link` (the least busy student of a front's own
view), `realtime` (what waits together is one batch), `dynamic`, `escalation`. Pure, and the same for the same seed. When more
processes work than there are cores, fronts share the cores first, then students. A part that has rested is slower.
Knows nothing of queries but their numbers.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from headtail.core.intervals import Array
from headtail.stages.simulate.design import ServiceTimes, ServingDesign

WAYS = ("cache", "dynamic", "realtime", "escalated", "fallback")
CACHE, DYNAMIC, REALTIME, ESCALATED, FALLBACK = range(len(WAYS))
WHY = ("", "off", "overloaded", "timeout", "unsure")  # REASONS of serve.answerer
_NONE, _OFF, _OVERLOADED, _TIMEOUT, _UNSURE = range(len(WHY))
_NEW, _REPLY = range(2)  # what a front process does with a request
_INFINITE = math.inf


class Arrivals(NamedTuple):
    """Requests in the order in which they come. `at`: seconds, ascending; `query`: number of the query; `cached`: whether it is a hit."""

    at: Array
    query: npt.NDArray[np.int64]
    cached: npt.NDArray[np.bool_]


class FlowOutcome(NamedTuple):
    """What became of each request (arrays in the order of the arrivals; seconds), and of each kind of process."""

    way: npt.NDArray[np.int8]  # place in WAYS
    why: npt.NDArray[np.int8]  # place in WHY
    seconds: Array
    front_wait: Array
    student_wait: Array
    bigger_wait: Array
    busy: dict[str, float]  # front, student, escalation: share of the time that one of them works
    longest: dict[str, int]  # most requests that waited before one of them
    batch_rows: float  # mean rows of a student's batch; 0 without students
    span_s: float  # from the first arrival to the last answer


def simulate_flow(arrivals: Arrivals, design: ServingDesign, times: ServiceTimes, seed: int, cores: float = 0) -> FlowOutcome:
    """Every arrival to its answer. `cores`: that the fronts and students share; 0: each process has one of its own."""
    return _Flow(arrivals, design, times, seed, cores).run()


class _Workers:
    """Jobs that work at the same speed. A job is counted in seconds of a core of its own."""

    def __init__(self) -> None:
        self.worked, self.speed = 0.0, 1.0
        self.jobs: list[tuple[float, int, Callable[[], None]]] = []

    def share(self, cores: float) -> float:
        """Share these cores evenly, none more than one; the cores that are left."""
        many = len(self.jobs)
        self.speed = min(1.0, cores / many) if many else 1.0
        return cores - many * self.speed

    def next_end(self, now: float) -> float:
        """When the first job is done."""
        return now + (self.jobs[0][0] - self.worked) / self.speed if self.jobs and self.speed > 0 else _INFINITE


class _Clock:
    """Work and events in order. Fronts take the cores first: Ray starts students at niceness 15, a weight of 1 to 28."""

    def __init__(self, cores: float) -> None:
        self.now = 0.0
        self._cores, self._count = cores or _INFINITE, 0
        self.fronts, self.students = _Workers(), _Workers()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def work(self, workers: _Workers, seconds: float, then: Callable[[], None]) -> None:
        """A process works on something from now on."""
        self._count += 1
        heapq.heappush(workers.jobs, (workers.worked + seconds, self._count, then))

    def wait(self, seconds: float, then: Callable[[], None]) -> None:
        """Something happens later, without any work of ours."""
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, self._count, then))

    def step(self, arrival: float) -> bool:
        """Go to the next thing that happens, and let it; False when an arrival comes before it, or nothing is left."""
        fronts, students = self.fronts, self.students
        students.share(fronts.share(self._cores))
        ends = fronts.next_end(self.now), students.next_end(self.now), self._events[0][0] if self._events else _INFINITE
        first = min(*ends, arrival)
        if first == _INFINITE:
            return False
        for workers in (fronts, students):
            workers.worked += (first - self.now) * workers.speed
        self.now = first
        if first not in ends:
            return False
        heapq.heappop((fronts.jobs, students.jobs, self._events)[ends.index(first)])[2]()
        return True


class _Process:
    """A front process: one thing at a time, first come, first served."""

    def __init__(self) -> None:
        self.queue: deque[tuple[int, int, float]] = deque()  # request, what to do, since when
        self.working, self.last = False, -_INFINITE  # last: when it ended its work
        self.in_flight = self.escalations = self.longest = 0
        self.pending: list[int] = []  # by student: what this front waits for
        self.answers: OrderedDict[int, float] = OrderedDict()  # dynamic tier: query -> until when


class _Engine:
    """A student's engine: a batch at a time, or rows in slots."""

    def __init__(self) -> None:
        self.queue: deque[tuple[int, float]] = deque()
        self.rows = self.longest = 0
        self.last = -_INFINITE  # when it ended its work


class _Flow:
    def __init__(self, arrivals: Arrivals, design: ServingDesign, times: ServiceTimes, seed: int, cores: float) -> None:
        n = len(arrivals.at)
        rng = np.random.default_rng(seed)
        self._arrivals, self._design, self._row_share, self._clock = arrivals, design, times.row_share, _Clock(cores)
        self._draws = {name: rng.choice(times.seconds(name), size=n).tolist() for name in ("wire", "front", "miss", "student", "escalated")}
        self._times = times
        self._front_of = rng.integers(design.fronts, size=n).tolist()
        self._unsure = (rng.random(int(arrivals.query.max()) + 1 if n else 0) < design.escalation.unsure_share).tolist()
        self._query, self._cached = arrivals.query.tolist(), arrivals.cached.tolist()
        self._fronts = [_Process() for _ in range(design.fronts)]
        self._engines = [_Engine() for _ in range(design.students)]
        for front in self._fronts:
            front.pending = [0] * design.students
        if design.dynamic_shared:
            for front in self._fronts[1:]:
                front.answers = self._fronts[0].answers
        self._end, self._state = [0.0] * n, [""] * n
        self._way, self._why = np.zeros(n, np.int8), np.zeros(n, np.int8)
        self._student_of = [-1] * n
        self._front_wait, self._student_wait, self._bigger_wait = [0.0] * n, [0.0] * n, [0.0] * n
        self._worked = {"front": 0.0, "student": 0.0, "escalation": 0.0}
        self._batches = self._rows = 0
        self._bigger: deque[tuple[int, float]] = deque()
        self._bigger_rows = self._bigger_longest = 0
        self._minute, self._escalations = -1, 0

    def run(self) -> FlowOutcome:
        at = self._arrivals.at.tolist()
        for request, when in enumerate(at):
            while self._clock.step(when):
                pass
            self._put(self._front_of[request], request, _NEW)
        while self._clock.step(_INFINITE):
            pass
        return self._outcome(at)

    def _outcome(self, at: list[float]) -> FlowOutcome:
        seconds = np.asarray(self._end) - np.asarray(at) + np.asarray(self._draws["wire"])
        span = max(self._end, default=0.0) - (at[0] if at else 0.0)
        many = {"front": len(self._fronts), "student": len(self._engines), "escalation": self._design.escalation.slots}
        busy = {name: work / (many[name] * span) if many[name] and span else 0.0 for name, work in self._worked.items()}
        longest = {
            "front": max(front.longest for front in self._fronts),
            "student": max((engine.longest for engine in self._engines), default=0),
            "escalation": self._bigger_longest,
        }
        return FlowOutcome(
            self._way, self._why, seconds, np.asarray(self._front_wait), np.asarray(self._student_wait), np.asarray(self._bigger_wait),
            busy, longest, self._rows / self._batches if self._batches else 0.0, span,
        )  # fmt: skip

    # ---- a front process

    def _put(self, place: int, request: int, what: int) -> None:
        front = self._fronts[place]
        front.queue.append((request, what, self._clock.now))
        if not front.working:
            self._next(place)
        front.longest = max(front.longest, len(front.queue))

    def _next(self, place: int) -> None:
        front = self._fronts[place]
        if not front.queue:
            front.working, front.last = False, self._clock.now
            return
        request, what, since = front.queue.popleft()
        rest = 0.0 if front.working else self._clock.now - front.last
        front.working = True
        self._front_wait[request] += self._clock.now - since
        seconds = self._draws["front" if what == _NEW else "miss"][request] * self._times.pace("front", rest)
        self._worked["front"] += seconds
        self._clock.work(self._clock.fronts, seconds, lambda: self._handled(place, request, what))

    def _handled(self, place: int, request: int, what: int) -> None:
        if what == _REPLY:
            self._reply(place, request)
        elif self._cached[request]:
            self._finish(request, CACHE)
        else:
            self._miss(place, request)
        self._next(place)

    def _finish(self, request: int, way: int, why: int = _NONE) -> None:
        self._end[request], self._way[request], self._why[request], self._state[request] = self._clock.now, way, why, "done"

    def _leave(self, place: int, request: int, way: int, why: int = _NONE) -> None:
        """A miss ends."""
        self._fronts[place].in_flight -= 1
        self._finish(request, way, why)

    def _miss(self, place: int, request: int) -> None:
        front, design = self._fronts[place], self._design
        if front.in_flight >= design.max_misses:
            self._finish(request, FALLBACK, _OVERLOADED)
        elif front.answers.get(self._query[request], -1.0) > self._clock.now:
            front.answers.move_to_end(self._query[request])
            self._finish(request, DYNAMIC)
        elif not self._engines:
            self._finish(request, FALLBACK, _OFF)
        else:
            front.in_flight += 1
            student = min(range(len(self._engines)), key=front.pending.__getitem__)
            front.pending[student] += 1
            self._student_of[request], self._state[request] = student, "waits"
            self._clock.wait(design.realtime_timeout_ms / 1000, lambda: self._late(place, request))
            self._engines[student].queue.append((request, self._clock.now))
            self._feed(student)

    def _late(self, place: int, request: int) -> None:
        """The time limit of a miss. Its row leaves the engine's queue, or its answer comes for nobody."""
        if self._state[request] == "waits":
            self._fronts[place].pending[self._student_of[request]] -= 1
            self._leave(place, request, FALLBACK, _TIMEOUT)

    # ---- a student's engine

    def _feed(self, place: int) -> None:
        engine, slots = self._engines[place], self._design.slots
        while engine.queue and engine.rows < (slots or 1):
            taken = [engine.queue.popleft() for _ in range(1 if slots else len(engine.queue))]
            rows = [(request, since) for request, since in taken if self._state[request] == "waits"]
            if not rows:
                continue
            for request, since in rows:
                self._student_wait[request] = self._clock.now - since
            pace = self._times.pace("student", 0.0 if engine.rows else self._clock.now - engine.last)
            engine.rows += len(rows)
            beside = engine.rows - 1  # rows that are worked on together
            seconds = pace * self._draws["student"][rows[0][0]] * (1 + beside * self._row_share)
            self._worked["student"] += seconds / (slots or 1)
            self._batches, self._rows = self._batches + 1, self._rows + len(rows)
            done = [request for request, _ in rows]
            self._clock.work(self._clock.students, seconds, lambda done=done: self._answered(place, done))  # type: ignore[misc]
        engine.longest = max(engine.longest, len(engine.queue))

    def _answered(self, place: int, rows: list[int]) -> None:
        engine = self._engines[place]
        engine.rows, engine.last = engine.rows - len(rows), self._clock.now
        for request in rows:
            if self._state[request] == "waits":
                self._state[request] = "answered"
                self._put(self._front_of[request], request, _REPLY)
        self._feed(place)

    def _reply(self, place: int, request: int) -> None:
        """A front process has a student's answer."""
        self._fronts[place].pending[self._student_of[request]] -= 1
        if self._unsure[self._query[request]] and self._design.escalation.slots:
            self._escalate(place, request)
        else:
            self._keep(place, request)
            self._leave(place, request, REALTIME)

    def _keep(self, place: int, request: int) -> None:
        """The dynamic tier takes note of an answer."""
        answers, design = self._fronts[place].answers, self._design
        if design.dynamic_ttl_s:
            answers[self._query[request]] = self._clock.now + design.dynamic_ttl_s
            answers.move_to_end(self._query[request])
            if len(answers) > design.dynamic_answers:
                answers.popitem(last=False)

    # ---- the bigger model: it works elsewhere

    def _escalate(self, place: int, request: int) -> None:
        rules, front = self._design.escalation, self._fronts[place]
        if (minute := int(self._clock.now // 60)) != self._minute:
            self._minute, self._escalations = minute, 0
        if front.escalations >= rules.max_waiting or (rules.per_minute and self._escalations >= rules.per_minute):
            self._leave(place, request, REALTIME, _UNSURE)
            return
        self._escalations += 1
        front.escalations += 1
        self._state[request] = "escalated"
        self._clock.wait(rules.timeout_ms / 1000, lambda: self._unsure_late(place, request))
        self._bigger.append((request, self._clock.now))
        self._ask_bigger()

    def _ask_bigger(self) -> None:
        while self._bigger and self._bigger_rows < self._design.escalation.slots:
            request, since = self._bigger.popleft()
            if self._state[request] != "escalated":
                continue
            self._bigger_rows += 1
            self._bigger_wait[request] = self._clock.now - since
            seconds = self._draws["escalated"][request]
            self._worked["escalation"] += seconds
            self._clock.wait(seconds, lambda request=request: self._bigger_answered(request))  # type: ignore[misc]
        self._bigger_longest = max(self._bigger_longest, len(self._bigger))

    def _bigger_answered(self, request: int) -> None:
        self._bigger_rows -= 1
        place = self._front_of[request]
        if self._state[request] == "escalated":
            self._fronts[place].escalations -= 1
            self._keep(place, request)
            self._leave(place, request, ESCALATED)
        self._ask_bigger()

    def _unsure_late(self, place: int, request: int) -> None:
        if self._state[request] == "escalated":
            self._fronts[place].escalations -= 1
            self._leave(place, request, REALTIME, _UNSURE)
