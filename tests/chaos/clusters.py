"""What is done to a job on a real Ray cluster: its processes are killed at random times, many in the life of one job.

In: a Bench, how many kills are left and an Aim (who, how often). Out: nothing; the bench's log and findings hold it. After
the kill of an actor, an engine core or one node among several the job goes on by itself; after that of the driver, the
only raylet or the GCS it is started again at once, while what is left of the old cluster may still be at work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .bench import ANSWERED, FAILED, Bench
from .kinds import MOMENTS
from .spec import DONE, SLOWER
from .tree import Driver
from .verify import STATES

_LONGEST_S = 120.0 * SLOWER  # without a row or an end after a kill: the job hangs
_POLL_S = 0.05


@dataclass(frozen=True)
class Aim:
    """Whom to kill, in turn, and after how many further rows at most (evenly from 0); `most` kills in one job."""

    role: str  # one, or several with a comma between
    rows: int = 300
    most: int = 25
    nodes: int = 0
    workers: int = 1
    restarts: bool = False  # the kill ends the driver: it is started again
    delay_us: int = 2000  # of the null engine, per row: an orphaned worker lives some seconds and should not get far


AIMS = {
    "actor": Aim("actor", workers=2),
    "node": Aim("node", nodes=2, most=6),
    "driver": Aim("driver", rows=150, most=6, restarts=True, delay_us=10_000),
    "raylet": Aim("raylet", rows=150, most=4, restarts=True, delay_us=10_000),
    "mixed": Aim("actor,driver", rows=100, most=2, restarts=True, delay_us=5000),
    "gcs": Aim("gcs", rows=150, most=3, restarts=True, delay_us=10_000),
}
VLLM_AIMS = {
    "actor": Aim("actor", rows=120, most=5),
    "core": Aim("core", rows=120, most=5, restarts=True),  # killed while it starts it ends the run, as an engine that cannot start does
    "driver": Aim("driver", rows=120, most=4, restarts=True),
}


def cluster(bench: Bench, left: int, aim: Aim) -> None:
    """Kills at random times: after some rows, or while a cluster or an engine starts."""
    kills = bench.rng.randint(min(left, -(-2 * aim.most // 3)), min(left, aim.most))
    if bench.lab.engine == "vllm":
        _real(bench, rows=int(aim.rows * kills * 0.6) + 60)
    else:
        rows = int(aim.rows * kills * 0.7) + 300
        bench.make(bench.rows(rows), flush_rows=50, shards=max(2, rows // 800), delay_us=aim.delay_us)
    bench.fields |= {"workers": aim.workers}
    _live(bench, aim, kills)


def writer(bench: Bench, left: int) -> None:
    """SIGKILL at commits, in whichever process of the cluster makes them; each number of the plan once."""
    kills = min(left, bench.rng.randint(4, 12))
    bench.make({**bench.rows(800), f"!fail {bench.name}": FAILED}, flush_rows=25, shards=4, delay_us=1000)
    numbers = bench.rng.sample(range(1, 120), kills)
    _live(bench, Aim("nobody"), 0, {number: bench.rng.choice(MOMENTS) for number in numbers})


def poison(bench: Bench, left: int) -> None:
    """A row that kills its actor each time; Ray brings it back each time. Crashes are counted afterwards, from the log."""
    bench.make({**bench.rows(300), f"!exit {bench.name}": FAILED}, flush_rows=25, shards=2)
    _live(bench, Aim("nobody"), 0)
    for pid in bench.log.workers():
        own = [event for event in bench.log.events if event.pid == pid]
        if own[-1].kind == "a":  # it was asked a row and never said anything again
            bench.note_kill(pid, "a row killed its actor", at=own[-1].time)


def _real(bench: Bench, rows: int) -> None:
    """The reference teacher under vLLM, decoding few rows together so that a job of some hundred rows takes some seconds."""
    from .stage_data import sentences

    own: dict[str, Any] = {
        "model": "example:teacher",
        "engine": "vllm",
        "cpus": 1,
        "max_num_seqs": 4,
        "kv_cache_gib": 0.25,
        "max_model_len": 512,
    }
    if bench.name.startswith("core"):
        own["engine_process"] = True
    bench.echo = False
    bench.make({query: STATES - {"failed"} for query in sentences(min(rows, 700))}, flush_rows=50, shards=2, model=own)
    bench.fields |= {"flush_seconds": 1.0}
    assert ANSWERED < STATES


def _live(bench: Bench, aim: Aim, kills: int, at: dict[int, str] | None = None) -> None:
    """Driver after driver until one ends well. `at`: commits to die at, counted over all of them."""
    plan, most = bench.plan(at), kills + len(at or {}) + 3
    drivers: list[Driver] = []
    try:
        while len(drivers) < most:
            before = bench.log.count("k")
            driver = Driver(bench.folder / f"driver-{len(drivers) + 1}", bench.fields, plan, bench.lab.environment, aim.nodes)
            drivers.append(driver)
            kills -= _hunt(bench, driver, aim, kills)
            if (code := driver.process.wait()) == DONE:
                return
            if bench.log.count("k") == before or not (aim.restarts or at):
                bench.fault(f"driver {len(drivers)} ended with {code} and was not killed: ...{driver.said[-600:]}")
        bench.fault(f"{most} drivers did not finish the job: ...{drivers[-1].said[-600:]}")
    finally:
        for driver in drivers:
            bench.lab.left_behind += driver.end()


def _hunt(bench: Bench, driver: Driver, aim: Aim, left: int) -> int:
    """Kill until the driver ends; how many were killed. A driver that hangs is told and ended."""
    killed, rng = 0, bench.rng
    due = _due(bench, aim)
    while driver.alive:
        time.sleep(_POLL_S)
        events = bench.log.read()
        if time.time() - max(events[-1].time if events else 0, driver.started) > _LONGEST_S:
            bench.fault(f"no row, no kill and no end within {_LONGEST_S:g} s: the job hangs")
            driver.stop()
        if killed >= left or not due():
            continue
        roles = aim.role.split(",")
        role = roles[(killed - left) % len(roles)]  # the last kill of a job is of the last role
        if victims := driver.find(role, bench.log.workers()):
            victim = rng.choice(victims)
            bench.note_kill(victim.pid, role)
            driver.kill(victim, whole=aim.nodes > 0 and rng.random() < 0.5)
            killed += 1
            due = _due(bench, aim)
    return killed


def _due(bench: Bench, aim: Aim) -> Callable[[], bool]:
    """When the next kill is: after some more rows, or at some time whatever is going on."""
    if bench.rng.random() < 0.2:
        then = time.monotonic() + bench.rng.uniform(0, 6)
        return lambda: time.monotonic() > then
    rows = bench.log.count("d") + bench.rng.randint(0, aim.rows)
    return lambda: bench.log.count("d") > rows
