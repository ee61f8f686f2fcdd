"""Prometheus text over the counters of all front processes.

In: for each task a Reading of its shared counters. Out: metrics in the exposition format, the same whichever process is asked. The label
`task` is on all that is counted of a task; what is the processes' own (starts, keys, limits, traces) has none. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from headtail.core.buckets import BUCKETS, cumulate_buckets
from headtail.core.rows import Source
from headtail.stages.serve.answerer import REASONS
from headtail.stages.serve.errors import CODES
from headtail.stages.serve.front.counters import ARM_KINDS, CLIENT_STATES, ESCALATION_RESULTS, FEEDBACK_KINDS, PATHS, Reading, number_id

# name of the metric: name of the counter, what it says
_COUNTERS = {
    "headtail_callers_left": ("callers_left", "requests whose caller left before its answer"),
    "headtail_student_frames": ("student_frames", "frames of misses sent to students"),
    "headtail_student_misses": ("student_misses", "misses sent to students"),
    "headtail_refresh_failures": ("refresh_failures", "looks at CURRENT that failed"),
    "headtail_dynamic_misses": ("dynamic_misses", "misses for which no earlier answer of the student was there"),
    "headtail_dynamic_spoiled": ("dynamic_spoiled", "stored answers that were damaged or do not fit the schema, and were not given"),
    "headtail_redis_failures": ("redis_failures", "calls of Redis that failed or came too late"),
    "headtail_redis_skipped": ("redis_skipped", "calls of Redis that were not made, since it was away"),
    "headtail_shadow_asked": ("shadow_asked", "answers that the shadow model was asked for too"),
    "headtail_shadow_dropped": (
        "shadow_dropped",
        "sampled answers that it was not asked for: the pipe was full, the budget spent, the model away",
    ),
    "headtail_log_lines": ("log_lines", "lines handed to the request log"),
    "headtail_log_dropped": ("log_dropped", "lines of the request log that were dropped: the pipe was full, or the store away"),
    "headtail_feedback_lines": ("feedback_lines", "calls of /v1/feedback that were taken"),
    "headtail_feedback_dropped": ("feedback_dropped", "feedback that was lost: the log's pipe was full, or the store away"),
    "headtail_student_tokens_in": ("tokens_in", "prompt tokens of misses that students answered"),
    "headtail_student_tokens_out": ("tokens_out", "tokens of students' answers"),
    "headtail_escalation_tokens_in": ("escalation_tokens_in", "prompt tokens of misses that the bigger model answered"),
    "headtail_escalation_tokens_out": ("escalation_tokens_out", "tokens of the bigger model's answers"),
}
# The same of the processes, whatever tasks they serve.
_PROCESS_COUNTERS = {
    "headtail_unlimited": ("unlimited", "requests let in without a limit, since the Redis of the limits was away"),
    "headtail_admin_calls": ("admin_calls", "calls below /admin/ that were let in and change something"),
    "headtail_failed_logins": ("failed_logins", "calls of /metrics and below /admin/ without a right key"),
    "headtail_limited_logins": ("limited_logins", "calls that were refused since their address had failed too often"),
    "headtail_key_file_failures": ("key_file_failures", "changed files of API keys that could not be used"),
    "headtail_trace_spans": ("trace_spans", "spans of traces that were sent"),
    "headtail_trace_dropped": ("trace_dropped", "spans that were lost: too many waited, or the endpoint did not take them"),
    "headtail_process_starts": (
        "starts",
        "starts of front processes, the log's collector and, with API keys, the pages; more than there are: some were restarted",
    ),
}
_GAUGES = {
    "headtail_realtime_in_flight": ("in_flight", "requests waiting for a student"),
    "headtail_students_connected": ("students", "connections to students, over all front processes"),
    "headtail_bigger_models_connected": ("bigger_models", "connections to the bigger model, over all front processes"),
}


class _Server:
    """A collector, in prometheus_client's sense, over all tasks of a server."""

    def __init__(self, readings: Mapping[str, Reading]) -> None:
        self._readings = readings

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for task, reading in self._readings.items():
            for family in _Task(reading).collect():
                labelled = [sample._replace(labels={**sample.labels, "task": task}) for sample in family.samples]
                whole = families.setdefault(family.name, family)
                whole.samples = [*(whole.samples if whole is not family else ()), *labelled]
        yield from families.values()
        for name, (counter, text) in _PROCESS_COUNTERS.items():
            yield CounterMetricFamily(name, text, self._sum(counter))
        yield CounterMetricFamily(
            "headtail_front_cpu_seconds", "processor time of the front processes", self._sum("cpu_microseconds") / 1e6
        )

    def _sum(self, counter: str) -> float:
        return sum(reading.sums[counter] for reading in self._readings.values())


class _Task:
    """The same over one task, without its name."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def collect(self) -> Iterator[Metric]:
        sums, rows = self._reading
        requests = CounterMetricFamily("headtail_requests", "answered requests", labels=["path", "source"])
        for path in PATHS:
            for source in Source:
                if count := sums[f"requests/{path}/{source}"]:
                    requests.add_metric([path, str(source)], count)
        yield requests
        yield self._seconds()
        degraded = CounterMetricFamily("headtail_degraded", "requests that got the fallback", labels=["reason"])
        refused = CounterMetricFamily("headtail_refused", "requests that were refused", labels=["code", "status"])
        for reason in REASONS:
            if count := sums[f"degraded/{reason}"]:
                degraded.add_metric([reason], count)
        for code, kind in CODES.items():
            if count := sums[f"refused/{code}"]:
                refused.add_metric([code, str(kind.status)], count)
        compared = CounterMetricFamily(
            "headtail_canary", "distinct queries while a canary ran, by release and outcome", labels=["arm", "outcome"]
        )
        for arm in ("champion", "canary"):
            for outcome in ARM_KINDS:
                compared.add_metric([arm, outcome], sums[f"arm/{arm}/{outcome}"])
        yield compared
        feedback = CounterMetricFamily("headtail_feedback", "what callers said of answers", labels=["kind"])
        for said in FEEDBACK_KINDS:
            feedback.add_metric([said], sums[f"feedback/{said}"])
        yield feedback
        escalations = CounterMetricFamily(
            "headtail_escalations", "unsure or failed misses, by what the bigger model made of them", labels=["result"]
        )
        for result in ESCALATION_RESULTS:
            escalations.add_metric([result], sums[f"escalation/{result}"])
        yield escalations
        yield CounterMetricFamily("headtail_escalation_usd", "USD that escalations cost", sums["escalation_nanousd"] / 1e9)
        yield from _shadow(sums)
        yield from _clients(sums)
        yield degraded
        yield refused
        for name, (counter, text) in _COUNTERS.items():
            yield CounterMetricFamily(name, text, sums[counter])
        for name, (gauge, text) in _GAUGES.items():
            yield GaugeMetricFamily(name, text, sums[gauge])
        fronts = [row for row in rows if row["release"]]
        yield GaugeMetricFamily("headtail_fronts", "front processes that serve a release", len(fronts))
        queues = (row["student_queue"] for row in fronts)
        yield GaugeMetricFamily("headtail_student_queue", "misses that all students work on, as they report", max(queues, default=0))
        yield from _release(fronts)

    def _seconds(self) -> HistogramMetricFamily:
        sums = self._reading.sums
        seconds = HistogramMetricFamily("headtail_request_seconds", "time to answer", labels=["path"])
        for path in PATHS:
            counts = [sums[f"seconds/{path}/{i}"] for i in range(len(BUCKETS) + 1)]
            seconds.add_metric([path], cumulate_buckets(counts), sums[f"seconds/{path}/sum"])
        return seconds


def _clients(sums: dict[str, float]) -> Iterator[Metric]:
    hits = CounterMetricFamily(
        "headtail_client_hits", "hits that clients answered by themselves, as they report", labels=["release", "source"]
    )
    for state in CLIENT_STATES:
        for source in Source:
            if count := sums[f"client/{state}/{source}"]:
                hits.add_metric([state, str(source)], count)
    yield hits
    counts = [sums[f"client_seconds/{i}"] for i in range(len(BUCKETS) + 1)]
    seconds = HistogramMetricFamily("headtail_client_hit_seconds", "time of such a hit in the client's process")
    seconds.add_metric([], cumulate_buckets(counts), sums["client_microseconds"] / 1e6)
    yield seconds


def _shadow(sums: dict[str, float]) -> Iterator[Metric]:
    compared = CounterMetricFamily(
        "headtail_shadow_compared", "answers that were compared with the shadow model's", labels=["source", "outcome"]
    )
    for source in Source:
        if count := sums[f"shadow/{source}/compared"]:
            agreed = sums[f"shadow/{source}/agreed"]
            compared.add_metric([str(source), "agree"], agreed)
            compared.add_metric([str(source), "differ"], count - agreed)
    yield compared
    yield CounterMetricFamily("headtail_shadow_usd", "USD that the shadow model's answers cost", sums["shadow_microusd"] / 1e6)


def _release(fronts: list[dict[str, float]]) -> Iterator[Metric]:
    info = GaugeMetricFamily("headtail_release_info", "front processes that serve this release", labels=["release", "snapshot"])
    held: dict[tuple[str, str], int] = {}
    for row in fronts:
        key = number_id(row["release"]), number_id(row["snapshot"])
        held[key] = held.get(key, 0) + 1
    for key, count in held.items():
        info.add_metric(list(key), count)
    yield info
    if fronts:
        published, swapped = (min(row[name] for row in fronts) for name in ("published_at", "swapped_at"))
        yield GaugeMetricFamily(
            "headtail_snapshot_published_timestamp_seconds", "when the snapshot was published; its age is time() - this", published
        )
        yield GaugeMetricFamily("headtail_release_served_timestamp_seconds", "since when the release is served", swapped)
        yield GaugeMetricFamily("headtail_snapshot_rows", "answers in the snapshot", max(row["snapshot_rows"] for row in fronts))


def prometheus_text(readings: Mapping[str, Reading]) -> bytes:
    """The body of /metrics. `readings`: by name of the task."""
    registry = CollectorRegistry()
    registry.register(_Server(readings))
    return generate_latest(registry)
